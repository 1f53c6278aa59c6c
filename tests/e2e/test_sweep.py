"""``fedpipe sweep`` as a user runs it: a cell is killed, the sweep is stopped, and is completed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.helpers.cli import Command, fedpipe

TINY = (
    "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "data.sequence_length=32", "pipeline.micro_batch_size=8",
    "pipeline.num_micro_batches=2", "pipeline.colocate=true", "federation.num_clients=6",
    "federation.num_replicas=1", "federation.clients_per_round=1", "federation.num_rounds=2",
    "federation.num_local_steps=5", "validation.max_blocks_per_client=4", "log.to=[]",
)  # fmt: skip
CELLS = ["seed=0", "seed=1", "seed=2"]
KILLED = CELLS[1]


def _cell(command: Command, name: str) -> int:
    """Find the process of a cell."""
    for pid in command.descendants():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if any(word.endswith(name.encode()) for word in words):
            return pid
    raise AssertionError(f"no process of {name}")


def test_a_sweep_survives_a_killed_cell_and_a_signal_and_runs_only_what_is_not_done(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "sweep"
    arguments = (
        "sweep", "--run-dir", str(run_dir), *TINY, f"data.cache_dir={tmp_path / 'cache'}",
        "--parallel", "2", "--grid", "seed=0,1,2",
    )  # fmt: skip
    record = run_dir / "cells" / KILLED / "metrics.jsonl"

    command = Command(*arguments, folder=tmp_path)
    command.wait_for(record.is_file, "training")
    os.kill(_cell(command, KILLED), signal.SIGKILL)
    failed = command.finish()
    assert failed.code == 1, failed.out + failed.err
    assert f"cell {KILLED} failed: killed by SIGKILL. Full log: {run_dir}/logs/" in failed.out
    assert failed.error.startswith(
        f"LaunchError: sweep: expected 3 finished cells, got 2: not done are {KILLED}. Run them "
        f"again with: fedpipe sweep --run-dir {run_dir} --parallel 2"
    )
    assert "2 of 3" in (run_dir / "sweep.md").read_text("utf-8")
    command.assert_nothing_left()
    others = [run_dir / "cells" / name / "metrics.jsonl" for name in CELLS if name != KILLED]
    before = [path.stat().st_mtime_ns for path in others]

    command = Command(*arguments, folder=tmp_path)
    command.wait_for(lambda: f"cell {KILLED} started" in command.output(), "the cell")
    os.kill(command.process.pid, signal.SIGTERM)
    stopped = command.finish()
    assert (stopped.code, stopped.err) == (75, ""), stopped.out + stopped.err
    assert stopped.out.splitlines()[-1] == (
        f"interrupted after 2 of 3 cells; resume with: fedpipe sweep --run-dir {run_dir}"
        " --parallel 2"
    )
    command.assert_nothing_left()

    resumed = fedpipe("sweep", "--run-dir", str(run_dir), folder=tmp_path)
    assert (resumed.code, resumed.err) == (0, ""), resumed.out + resumed.err
    assert resumed.out.count(" started") == 1
    assert [path.stat().st_mtime_ns for path in others] == before
    content = json.loads((run_dir / "sweep.json").read_text("utf-8"))
    assert [cell["name"] for cell in content["cells"]] == CELLS
    assert [(row["done"], row["loss"]["n"]) for row in content["rows"]] == [(3, 3)]
    # 2 rounds x 5 steps x 16 sequences x 32 tokens
    assert [row["tokens"]["mean"] for row in content["rows"]] == [5120]
    assert (run_dir / "sweep.png").read_bytes().startswith(b"\x89PNG")

    nothing = fedpipe(*arguments, folder=tmp_path)
    assert (nothing.code, nothing.err) == (0, "")
    assert "nothing to do: all 3 cells" in nothing.out
    assert " started" not in nothing.out
