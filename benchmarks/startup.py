"""Where the seconds between the command and the first local step go; write one table.

python benchmarks/startup.py [--repetitions 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
from ranks import run_ranks

from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.data.corpus import prepare
from fedpipe.distributed.comm import Comm
from fedpipe.report.writer import read_metrics

IMPORTS = """
import json, os, sys, time
os.environ["DS_ACCELERATOR"] = "cpu"
seconds, before = {}, time.monotonic()
for name in ("torch", "fedpipe.models.weights", "deepspeed", "fedpipe.commands.pretrain.run",
             "fedpipe.run.export", "fedpipe.commands.pretrain.report"):
    __import__(name)
    now = time.monotonic()
    label = "transformers, BERT and RoBERTa" if name.endswith("modeling") else name.split(".")[0]
    seconds[label] = seconds.get(label, 0) + now - before
    before = now
json.dump(seconds, sys.stdout)
"""
RUN = ["data.valid=[]", "log.to=[]", "federation.num_rounds=1",
       "federation.num_local_steps=2"]  # fmt: skip


def main() -> None:
    """Measure every part in turns, then print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    config = load_config(None, RUN)
    parts: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        parts.setdefault(name, []).append(seconds)

    for _ in range(args.repetitions):
        for name, seconds in _imports().items():
            note(f"import {name}", seconds)
        with tempfile.TemporaryDirectory() as scratch:
            cache = f"data.cache_dir={scratch}/cache"
            for again in ("text read and tokenised", "text found prepared"):
                started = time.monotonic()
                prepare(load_config(None, [*RUN, cache]))
                note(again, time.monotonic() - started)
            for when, folder in (("prepared", "cache"), ("read and tokenised", "empty")):
                name = f"**first local step of `fedpipe pretrain`**, text {when}"
                note(name, _first_step_s(Path(scratch), cache=folder))
        for rank in run_ranks(config, _build):
            for name, seconds in rank.items():
                note(name, seconds)
    lines = ["| part | seconds, median (least to most) |", "|---|---|"]
    for name, values in parts.items():
        spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        lines.append(f"| {name} | {spread} |")
    sys.stdout.write("\n".join(lines) + "\n")


def _imports() -> dict[str, float]:
    """Seconds of each package, in the order in which the fork server imports them."""
    command = [sys.executable, "-c", IMPORTS]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def _first_step_s(scratch: Path, *, cache: str) -> float:
    run_dir = scratch / f"run_{cache}"
    command = [sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(run_dir), *RUN]
    cache_dir = f"data.cache_dir={scratch / cache}"
    subprocess.run([*command, cache_dir], check=True, stdout=subprocess.DEVNULL)
    records = read_metrics(run_dir / "metrics.jsonl")
    return float(next(r["seconds_to_first_step"] for r in records if "seconds_to_first_step" in r))


def _build(config: RunConfig, data: PreparedData, comm: Comm) -> dict[str, float]:
    """Seconds to build a rank's stages, those inside DeepSpeed, and its first step, on one rank."""
    inside = 0.0
    initialize = deepspeed.initialize

    def timed(**kwargs: object) -> object:
        nonlocal inside
        started = time.monotonic()
        result = initialize(**kwargs)
        inside += time.monotonic() - started
        return result

    deepspeed.initialize = timed
    comm.barrier()
    started = time.monotonic()
    replica = PretrainingReplica(config, data, comm=comm)
    built = time.monotonic()
    replica.engine.train(
        range(1),
        source=replica.training_source(0, start=0),
        lr=lambda step: 1e-5,
        on_step=lambda stage, result: None,
    )
    return {
        "in a rank: stages built and connected": built - started - inside,
        "in a rank: `deepspeed.initialize`": inside,
        "in a rank: the first local step": time.monotonic() - built,
    }


if __name__ == "__main__":
    main()
