"""The tiny run that launchers are tested with, and what is compared of two of them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from fedpipe.report.writer import read_metrics
from tests.helpers.cli import Command, fedpipe

TINY = (
    "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "model.hidden_dropout_prob=0.1", "data.sequence_length=32",
    "pipeline.cut=[2]", "pipeline.micro_batch_size=8", "pipeline.num_micro_batches=2",
    "federation.num_clients=6", "federation.num_replicas=1", "federation.clients_per_round=2",
    "federation.num_rounds=2", "federation.num_local_steps=25", "log.to=[]",
)  # fmt: skip
"""2 stages of 1 replica, 2 rounds of 50 steps: seconds, most of them imports."""
TWO_REPLICAS = ("federation.num_replicas=2", "federation.clients_per_round=4")
ONE_PROCESS = ("pipeline.colocate=true",)
LONG = ("federation.num_rounds=4000",)
_TIMES = ("seconds", "tokens_per_s", "sync_s")


def job_id(run_dir: Path) -> str:
    """The job that was submitted last for a run."""
    return str(json.loads((run_dir / "logs" / "job.json").read_text())["job_id"])


def num_rounds(run_dir: Path) -> int:
    """Rounds that the record of a run holds."""
    path = run_dir / "metrics.jsonl"
    return sum(r["kind"] == "round" for r in read_metrics(path)) if path.is_file() else 0


def after_rounds(command: Command, run_dir: Path, number: int) -> None:
    """Wait until a run has recorded so many rounds while a command goes on."""
    command.wait_for(lambda: num_rounds(run_dir) >= number, f"round {number}")


def outcome(run_dir: Path) -> tuple[list[str], dict[str, bytes]]:
    """Every record without wall times, and the final weights."""
    lines = [
        str(sorted((k, v) for k, v in record.items() if k not in _TIMES))
        for record in read_metrics(run_dir / "metrics.jsonl")
        if record["kind"] != "system"
    ]
    last = max((run_dir / "checkpoints").glob("round_*"))
    return sorted(lines), {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


def rank_process(run_dir: Path, rank: int) -> int:
    """Find the process of a rank of a job on SLURM."""
    marks = (f"SLURM_PROCID={rank}", f"SLURM_JOB_ID={job_id(run_dir)}")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_text(errors="replace").split("\0")
            command = (entry / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if "submitit.core._submit" in command and command[0] != "srun":
            if all(mark in variables for mark in marks):
                return int(entry.name)
    raise AssertionError(f"no process is rank {rank}")


def lock_holder(run_dir: Path) -> int:
    """Find the process that works on a run: it holds the run's lock."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            for link in (entry / "fd").iterdir():
                with contextlib.suppress(OSError):  # it has just been closed
                    if os.readlink(link) == str(run_dir / ".lock"):
                        return int(entry.name)
    raise AssertionError(f"no process works on {run_dir}")


def run_locally(run_dir: Path, *arguments: str) -> Path:
    """The same run without any scheduler."""
    cache = f"data.cache_dir={run_dir.parent / 'cache'}"
    result = fedpipe(
        "pretrain", "--run-dir", str(run_dir), *TINY, *arguments, cache, folder=run_dir.parent
    )
    assert (result.code, result.err) == (0, ""), result.err
    return run_dir
