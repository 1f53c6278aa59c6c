"""``fedpipe evaluate`` as a user runs it: a cell is killed, all is stopped, resumed, and kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.cli import Command, fedpipe
from tests.helpers.encoders import bert, easy_ner, easy_pairs
from tests.helpers.runs import lock_holder

CELLS = ["one_ncbi-disease_seed=0", "two_ncbi-disease_seed=0"]
SLOW = ("evaluation.num_epochs=400", "evaluation.learning_rate=1e-3")


def test_an_evaluation_survives_a_killed_cell_and_a_signal_and_keeps_what_is_done(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    models = [
        bert(tmp_path / name, hidden=16, seed=seed) for seed, name in enumerate(("one", "two"))
    ]
    data = easy_ner(tmp_path / "data")
    easy_pairs(tmp_path / "data")
    shared = (
        "evaluate", "--run-dir", str(run_dir), "--data", str(data),
        *(word for model in models for word in ("--model", str(model))),
        f"data.cache_dir={tmp_path / 'cache'}", "evaluation.batch_size=16",
    )  # fmt: skip

    command = Command(*shared, "--parallel", "2", *SLOW, folder=tmp_path)
    cells = [run_dir / "cells" / name for name in CELLS]
    for cell in cells:
        record = cell / "metrics.jsonl"
        command.wait_for(lambda path=record: path.is_file() and path.stat().st_size > 0, "steps")
    os.kill(lock_holder(cells[0]), signal.SIGKILL)
    command.wait_for(lambda: "failed" in command.output(), "the failure")
    assert f"cell {CELLS[0]} failed: killed by SIGKILL. Full log: {run_dir}/logs/" in (
        command.output()
    )
    os.kill(command.process.pid, signal.SIGTERM)
    stopped = command.finish()
    assert (stopped.code, stopped.err) == (75, ""), stopped.out + stopped.err
    assert stopped.out.splitlines()[-1] == (
        f"interrupted after 0 of 2 cells; resume with: fedpipe evaluate --run-dir {run_dir}"
        " --parallel 2"
    )
    command.assert_nothing_left()

    # other settings: both cells run, from the start
    done = fedpipe(
        "evaluate", "--run-dir", str(run_dir), "evaluation.num_epochs=1", folder=tmp_path
    )
    assert (done.code, done.err) == (0, ""), done.out + done.err
    assert done.out.count(" started") == 2
    assert "task    ncbi-disease: JSON lines, train 60, dev 30, test 30" in done.out
    assert "task          metric  test n  runs" in done.out
    content = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    assert [cell["done"] for cell in content["cells"]] == [True, True]

    # a model that has changed runs again, and fails alone
    save_file({"another": torch.zeros(1)}, models[0] / "model.safetensors")
    failed = fedpipe(
        "evaluate", "--run-dir", str(run_dir), "--tasks", "ncbi-disease", folder=tmp_path
    )
    assert failed.code == 2, failed.out + failed.err
    assert failed.out.count(" started") == 1
    assert "failed: ConfigError: --model: expected all weights of the model in" in failed.out
    assert failed.error.startswith(f"ConfigError: cell {CELLS[0]}: --model: expected all")
