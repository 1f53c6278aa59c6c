"""Replicas side by side on emulated devices: local steps of a round, then FedAvg; write one table.

    python docs/benchmarks/replicas.py [--repetitions 3] [--steps 40] [key=value ...]

Layers sleep their device time (see ``fedpipe.pipeline.emulate``), so that more processes than cores
can be measured; messages, autograd, engines, optimizers and the average are real.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial

from ranks import run_ranks

from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.comm import Comm
from fedpipe.federation.cohort import plan_round
from fedpipe.pipeline.emulate import emulate_
from fedpipe.workflows.replica import Replica

LAYER_S = 0.010
"""Forward pass of a layer for one micro-batch; backward takes twice that."""
SCALE = [
    "model.num_hidden_layers=8", "model.hidden_size=256", "model.num_attention_heads=4",
    "model.intermediate_size=1024", "pipeline.num_micro_batches=4", "pipeline.micro_batch_size=4",
    "pipeline.cut=[4]", "federation.num_clients=4",
]  # fmt: skip


def main() -> None:
    """Run 1, 2 and 4 replicas in turns, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    shares: dict[int, list[float]] = {n: [] for n in rates}
    for _ in range(args.repetitions):
        for replicas in rates:
            overrides = [
                *SCALE, f"federation.num_replicas={replicas}",
                f"federation.clients_per_round={replicas}",
                f"federation.num_local_steps={args.steps}", *args.overrides,
            ]  # fmt: skip
            config = load_config(None, overrides)
            parts = run_ranks(config, partial(_round, num_steps=args.steps))
            seconds = max(trained + averaged for trained, averaged in parts)
            tokens = config.blocks_per_step * config.data.sequence_length * args.steps * replicas
            rates[replicas].append(tokens / seconds)
            shares[replicas].append(100 * max(averaged for _, averaged in parts) / seconds)
    lines = [
        "| replicas | processes | tokens/s | over one replica | FedAvg, % of the round |",
        "|---|---|---|---|---|",
    ]
    for replicas, values in rates.items():
        ratios = [v / one / replicas for v, one in zip(values, rates[1], strict=True)]
        gain = (
            f"{replicas} x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
        lines.append(
            f"| {replicas} | {2 * replicas} | {statistics.median(values):,.0f} | {gain} "
            f"| {statistics.median(shares[replicas]):.2f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def _round(
    config: RunConfig, data: PreparedData, comm: Comm, *, num_steps: int
) -> tuple[float, float]:
    """Seconds of the local steps and of the average."""
    replica = Replica(config, data, comm=comm)
    for engine in replica.stages:
        emulate_(
            engine.stage, layer_forward_s=LAYER_S, masked_layer_forward_s=0.3 * LAYER_S,
            head_forward_s=0.5 * LAYER_S,
        )  # fmt: skip
    blocks = [shard.num_blocks for shard in data.train]
    turn = next(
        turn
        for turn in plan_round(config, round_id=0, blocks_per_client=blocks)
        if turn.replica_id == comm.replica
    )
    for synchronizer in replica.synchronizers.values():
        synchronizer.begin_turn(None)
    source = replica.training_source(turn.client_id, start=0)

    def train(steps: range) -> None:
        replica.engine.train(
            steps, source=source, lr=lambda step: 1e-5, on_step=lambda stage, result: None
        )

    train(range(2))
    comm.barrier()
    started = time.monotonic()
    train(range(2, 2 + num_steps))
    trained = time.monotonic()
    for synchronizer in replica.synchronizers.values():
        synchronizer.end_turn(turn, round_id=0)
        synchronizer.synchronize()
    return trained - started, time.monotonic() - trained


if __name__ == "__main__":
    main()
