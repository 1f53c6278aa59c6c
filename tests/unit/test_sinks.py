"""Sinks: every service gets the numbers of the records; what fails or is missing is said."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

import pytest

from fedpipe.cli import main
from fedpipe.report.sinks import check_sinks
from fedpipe.report.writer import MetricsWriter, read_metrics
from tests.helpers.records import make_records

STEP = {"kind": "step", "stage": 0, "tokens": 10, "loss": 1.0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: mine\nlog:\n  every: 10\n", "utf-8")
    return tmp_path / "run"


def write(run_dir: Path, sink: str, losses: list[float], *, kept: int = 0) -> None:
    """Write steps after the kept ones, as a run does that is resumed there."""
    writer = MetricsWriter(run_dir, sinks=[sink])
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    writer.truncate(sum(map(len, lines[:kept])))
    for loss in losses:
        writer.write([{**STEP, "loss": loss}])
    writer.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
@pytest.mark.parametrize(
    "command",
    [["pretrain"], ["sweep", "--grid", "seed=0,1"], ["finetune"], ["finetune", "method.name=lora"]],
    ids=["pretrain", "sweep", "grid of fine-tunings", "finetune"],
)
def test_a_library_that_is_not_installed_is_refused_before_anything_is_written(
    command: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    text = (
        f"log.to: expected the library {name} to be installed, got none. Install it with pip"
        f' install "fedpipe[{name}]", or leave {name} out of log.to.'
    )
    monkeypatch.setattr(forkserver, "ensure_running", lambda: pytest.fail("it starts processes"))
    run_dir = tmp_path / "run"
    assert main([*command, f"log.to=[tensorboard,{name}]", "--run-dir", str(run_dir)]) == 2
    assert capsys.readouterr().err.endswith(f"{text}\n")
    assert not run_dir.exists()


def test_what_is_installed_is_not_refused() -> None:
    check_sinks(["tensorboard"])
    check_sinks([])


def test_a_sink_that_fails_is_left_out_and_the_record_goes_on(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "tensorboard").write_text("a file where the folder should be", "utf-8")
    records = make_records(num_rounds=1)
    writer = MetricsWriter(run_dir, sinks=["tensorboard"])
    with caplog.at_level(logging.WARNING):
        writer.write(records[:5])
        writer.write(records[5:])
        writer.close()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith("log.to: tensorboard gets no more numbers of this run (")
    assert warning.endswith("metrics.jsonl has all of them.")
    assert len(read_metrics(run_dir / "metrics.jsonl")) == len(records)


def test_mlflow_gets_every_point_once_also_of_a_resumed_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write(run_dir, "mlflow", [1.0, 2.0, 3.0])
    write(run_dir, "mlflow", [3.0, 4.0], kept=2)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fedpipe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine"
    assert run.data.params["log.every"] == "10"
    history = client.get_metric_history(run.info.run_id, "train/loss/stage_00")
    assert {(m.step, m.value) for m in history} == {(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)}


def test_wandb_keeps_a_run_offline_and_goes_on_with_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(run_dir, "wandb", [1.0, 2.0, 3.0])
    write(run_dir, "wandb", [3.0, 4.0], kept=2)
    (number,) = json.loads((run_dir / "sinks.json").read_text("utf-8")).values()
    files = sorted((run_dir / "wandb").glob(f"offline-run-*/run-{number}.wandb"))
    assert len(files) == 2
    assert b"train/loss/stage_00" in files[0].read_bytes()


def test_trackio_gets_every_point(run_dir: Path, tmp_path: Path) -> None:
    if not find_spec("trackio"):
        pytest.skip("trackio is not installed")
    code = (  # in a process of its own: the library looks for its folder when it is imported
        "import sys; from pathlib import Path; from tests.unit.test_sinks import write\n"
        "write(Path(sys.argv[1]), 'trackio', [1.0, 2.0])\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", code, str(run_dir)], env=environment, check=True)
    with sqlite3.connect(tmp_path / "trackio/fedpipe.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(m)) for step, m in rows] == [
        (10, {"train/loss/stage_00": 1.0}),
        (20, {"train/loss/stage_00": 2.0}),
    ]
