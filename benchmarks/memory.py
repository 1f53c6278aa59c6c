"""Peak memory of every process: whole model, stages, recomputation, ZeRO-1; write one table.

    python benchmarks/memory.py [--config FILE] [key=value ...]

Every row is a run of its own: two local steps to fill the optimizer, then two that are watched.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ranks import run_ranks

from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.commands.throughput.instruments import PeakMemory
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.comm import Comm

CUT = ["pipeline.cut=[4]"]
TWO_RANKS = ["federation.data_parallel_degree=2"]
VARIANTS = {
    "whole model in one process": ["pipeline.cut=[]"],
    "two stages": CUT,
    "two stages, layers recomputed": [*CUT, "pipeline.activation_checkpointing=true"],
    "two stages, two data ranks per client": [*CUT, *TWO_RANKS],
    "the same with ZeRO-1": [*CUT, *TWO_RANKS, "deepspeed.config={zero}"],
}


def main() -> None:
    """Run every variant, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="launch/configs/throughput_cpu.yaml")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    lines = [
        "| run | processes | peak of each, MiB, by stage | weights and optimizer, MiB |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        zero = Path(scratch) / "zero1.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": 1}}), encoding="utf-8")
        for name, own in VARIANTS.items():
            overrides = [*(text.format(zero=zero) for text in own), *args.overrides]
            config = load_config(args.config, overrides)
            parts = run_ranks(config, _peak)
            peaks, held = (", ".join(f"{b / 2**20:,.0f}" for b in column) for column in
                           zip(*parts, strict=True))  # fmt: skip
            lines.append(f"| {name} | {config.world_size} | {peaks} | {held} |")
    sys.stdout.write("\n".join(lines) + "\n")


def _peak(config: RunConfig, data: PreparedData, comm: Comm) -> tuple[int, int]:
    """Bytes of this process' model at its peak, and of weights and optimizer alone."""
    replica = PretrainingReplica(config, data, comm=comm)

    def train(steps: range) -> None:
        replica.engine.train(
            steps,
            source=replica.training_source(0, start=0),
            lr=lambda step: 1e-5,
            on_step=lambda stage, result: None,
        )

    train(range(2))
    stages = [engine.stage for engine in replica.stages]
    comm.barrier()
    watch = PeakMemory(stages, [e._torch_optimizer for e in replica.stages], device=comm.device)
    train(range(2, 4))
    return watch.read(), watch._own


if __name__ == "__main__":
    main()
