"""``fedpipe finetune`` on the real command line: a grid, an interruption, errors in one line."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from fedpipe.report.writer import read_metrics
from tests.helpers.cli import Command, fedpipe
from tests.helpers.tuned import small_folder, small_task


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tiny model and a tiny task."""
    root = tmp_path_factory.mktemp("tiny")
    model, task = small_folder(root / "model"), small_task(root / "task")
    return [
        f"model.path={model}", f"task.data={task}", "task.name=imdb", "task.max_length=12",
        "batch_size=8", "federation.num_rounds=2",
    ]  # fmt: skip


def test_methods_are_compared_in_a_table(tmp_path: Path, tiny: list[str]) -> None:
    result = fedpipe("finetune", "--run-dir", str(tmp_path / "run"), *tiny, "seed=1",
                     "federation.num_replicas=1", "--grid", "method.name=lora,full",
                     folder=tmp_path)  # fmt: skip
    assert (result.code, result.err) == (0, ""), result.out + result.err
    table = result.out.splitlines()[-4:-1]
    assert table[0].split()[:2] == ["run", "score"]
    assert [row.split()[0] for row in table[1:]] == ["lora", "full"]
    for name, folder in (("lora", "adapter"), ("lora", "export"), ("full", "export")):
        assert any((tmp_path / "run" / name / folder).iterdir())
    assert not (tmp_path / "run/full/adapter").exists()
    assert (tmp_path / "run/report.html").is_file() and (tmp_path / "run/scores.png").is_file()
    again = fedpipe("finetune", "--run-dir", str(tmp_path / "run"), folder=tmp_path)
    assert again.code == 0 and "lora is done" in again.out
    other = fedpipe("finetune", "--run-dir", str(tmp_path / "run"), "--grid", "seed=1,2",
                    folder=tmp_path)  # fmt: skip
    assert other.code == 2 and "expected the grid of the fine-tunings that is" in other.error


def _outcome(run_dir: Path) -> tuple[list[str], dict[str, bytes]]:
    """Every record without wall times, and the last weights."""
    times = ("seconds", "sync_s", "memory_bytes")
    lines = [
        str(sorted((k, v) for k, v in record.items() if k not in times))
        for record in read_metrics(run_dir / "metrics.jsonl")
        if record["kind"] in ("round", "eval")
    ]
    last = max((run_dir / "checkpoints").glob("round_*"))
    return lines, {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


def test_runs_beside_each_other_train_what_runs_one_after_another_train(
    tmp_path: Path, tiny: list[str]
) -> None:
    arguments = (*tiny, "federation.num_replicas=1", "--grid", "method.name=lora,full")
    one_thread = {"OMP_NUM_THREADS": "1"}
    results = [
        fedpipe("finetune", "--run-dir", str(tmp_path / name), *arguments, "--parallel", parallel,
                folder=tmp_path, environment=one_thread)
        for name, parallel in (("one", "1"), ("two", "2"))
    ]  # fmt: skip
    for result in results:
        assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "1/2 cell lora started" in results[1].out and "2/2 cell full done in" in results[1].out
    for name in ("lora", "full"):
        assert _outcome(tmp_path / "two" / name) == _outcome(tmp_path / "one" / name)
        assert (tmp_path / "two/logs" / f"{name}.log").is_file()
    tables = [
        [row.split()[:2] for row in result.out.splitlines() if row.startswith(("lora ", "full "))]
        for result in results
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 2


def test_runs_at_a_time_are_those_of_a_grid(tmp_path: Path, tiny: list[str]) -> None:
    result = fedpipe("finetune", *tiny, "method.name=lora", "--parallel", "2", folder=tmp_path)
    assert result.code == 2
    assert result.error.startswith("ConfigError: --parallel: expected 1 without --grid, got 2.")


def test_a_signal_ends_it_within_a_few_local_steps_and_the_same_directory_goes_on(
    tmp_path: Path, tiny: list[str]
) -> None:
    run_dir = tmp_path / "run"
    asked = ["federation.num_rounds=3", "method.name=lora", "federation.num_local_epochs=0",
             "federation.num_local_steps=150"]  # fmt: skip
    command = Command("finetune", "--run-dir", str(run_dir), *tiny[:-1], *asked, folder=tmp_path)
    command.wait_for(lambda: "round 1/3" in command.output(), "round 1")
    command.process.send_signal(signal.SIGTERM)
    stopped = command.finish()
    assert stopped.code == 75, stopped.out + stopped.err
    assert "it saves and stops within a few local steps; a second signal" in stopped.out
    assert re.search(r"interrupted after local step \d+ of round [23];", stopped.out), stopped.out
    assert f"resume with: fedpipe finetune --run-dir {run_dir}" in stopped.out
    last = max(path.name for path in (run_dir / "checkpoints").glob("round_*"))
    assert "_step_" in last
    moved = fedpipe("finetune", "--run-dir", str(run_dir), "federation.num_replicas=4",
                    folder=tmp_path)  # fmt: skip
    assert "values of federation.num_replicas (4 instead of 2)" in moved.error
    resumed = fedpipe("finetune", "--run-dir", str(run_dir), folder=tmp_path)
    assert resumed.code == 0, resumed.out + resumed.err
    assert f"from {last}" in resumed.out
    rounds = [r["round"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "round"]
    assert rounds == list(range(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.nam=full"], "ConfigError: method.nam: unknown key in an override. Did you mean"),
        (["--preset", "hilmkill"], "ConfigError: --preset: expected one of fate-sentiment, hilm"),
        (["--grid", "method.name=lora,lorra"], "ConfigError: cell lorra: method.name: expected"),
        (["method.name=lora", "--grid", "method.name=ia3"], "ConfigError: --grid: expected keys"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = fedpipe("finetune", *arguments, folder=tmp_path)
    assert result.code == 2
    assert result.error.startswith(message)
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
