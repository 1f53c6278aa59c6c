"""More stages and more replicas: CPU seconds per token, or speed on emulated devices; one table.

    python benchmarks/scaling.py [--emulate-ms 10] [--repetitions 3] [--steps 20]

More processes than cores share them, so wall time says nothing about real compute: what all
processes compute does, and they run on one core then. Each stage more has a head more, so the CPU
seconds of local steps are also put in relation to the counted FLOPs. With --emulate-ms layers sleep
(see ``fedpipe.pipeline.emulate``), and a round is timed, FedAvg included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from functools import partial

from ranks import run_ranks

from fedpipe.commands.plan.flops import stage_flops
from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.config.load import load_config
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.distributed.comm import Comm
from fedpipe.federation.cohort import plan_round
from fedpipe.models.split import stage_specs
from fedpipe.pipeline.emulate import emulate_

Grid = tuple[int, int]
"""Stages, replicas."""
CUTS = {1: "[]", 2: "[4]", 4: "[2,4,6]"}
"""Of 8 layers, by stages."""
COMPUTED: list[Grid] = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
EMULATED: list[Grid] = [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
SCALE = [
    "model.num_hidden_layers=8", "model.hidden_size=256", "model.num_attention_heads=4",
    "model.intermediate_size=1024", "data.mask_probability=0.15", "pipeline.micro_batch_size=4",
    "data.sequence_length=128", "pipeline.num_micro_batches=4", "federation.num_clients=4",
]  # fmt: skip


def main() -> None:
    """Run every grid in turns, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulate-ms", type=float, default=0.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    grids = EMULATED if args.emulate_ms else COMPUTED
    if not args.emulate_ms:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    measure = partial(_round, num_steps=args.steps, layer_s=args.emulate_ms / 1000)
    found: dict[Grid, list[list[tuple[float, float, float]]]] = {grid: [] for grid in grids}
    configs = {}
    for _ in range(args.repetitions):
        for grid in grids:
            stages, replicas = grid
            configs[grid] = load_config(None, [
                *SCALE, f"pipeline.cut={CUTS[stages]}", f"federation.num_replicas={replicas}",
                f"federation.clients_per_round={replicas}",
                f"federation.num_local_steps={args.steps}", *args.overrides,
            ])  # fmt: skip
            found[grid].append(run_ranks(configs[grid], measure))
    tokens = {grid: args.steps * _tokens(configs[grid]) for grid in grids}
    table = _emulated(found, tokens) if args.emulate_ms else _computed(found, tokens, configs)
    sys.stdout.write("\n".join(table) + "\n")


def _round(
    config: RunConfig, data: PreparedData, comm: Comm, *, num_steps: int, layer_s: float
) -> tuple[float, float, float]:
    """CPU seconds of this process in its local steps; wall seconds of these, and of FedAvg."""
    replica = PretrainingReplica(config, data, comm=comm)
    if layer_s:
        for engine in replica.stages:
            emulate_(
                engine.stage, layer_forward_s=layer_s, masked_layer_forward_s=0.3 * layer_s,
                head_forward_s=0.5 * layer_s,
            )  # fmt: skip
    blocks = [shard.num_blocks for shard in data.train]
    turn = next(
        turn
        for turn in plan_round(config, round_id=0, blocks_per_client=blocks)
        if turn.replica_id == comm.replica
    )
    for synchronizer in replica.synchronizers.values():
        synchronizer.set_weights(None)
    source = replica.training_source(turn.client_id, start=0)

    def train(steps: range) -> None:
        replica.engine.train(
            steps, source=source, lr=lambda step: 1e-5, on_step=lambda stage, result: None
        )

    train(range(2))
    comm.barrier()
    cpu, started = time.process_time(), time.monotonic()
    train(range(2, 2 + num_steps))
    cpu, trained = time.process_time() - cpu, time.monotonic()
    for synchronizer in replica.synchronizers.values():
        synchronizer.take_update(turn.client_id, weight=turn.weight, round_id=0)
        synchronizer.synchronize()
    return cpu, trained - started, time.monotonic() - trained


def _tokens(config: RunConfig) -> int:
    """Tokens of a local step of all replicas."""
    return config.blocks_per_step * config.data.sequence_length * config.federation.num_replicas


def _flops(config: RunConfig) -> float:
    """FLOPs per token of all stages and their heads."""
    length, vocab_size = config.data.sequence_length, tokenizer_info(config).vocab_size
    shape = resolve(config.model, vocab_size=vocab_size, sequence_length=length)
    total = 0.0
    for spec in stage_specs(config.pipeline, num_hidden_layers=shape.num_hidden_layers):
        cost = stage_flops(spec, config, shape)
        total += cost.forward_s + cost.backward_s + cost.head_s
    return total / (config.pipeline.micro_batch_size * length)


def _computed(
    found: dict[Grid, list[list[tuple[float, float, float]]]],
    tokens: dict[Grid, int],
    configs: dict[Grid, RunConfig],
) -> list[str]:
    lines = [
        "| stages | replicas | CPU s per 1,000 tokens | over 1 x 1 | FLOPs per token over 1 x 1 "
        "| CPU s per FLOP over 1 x 1 |",
        "|---|---|---|---|---|---|",
    ]
    costs = {
        grid: [1000 * sum(cpu for cpu, _, _ in ranks) / tokens[grid] for ranks in runs]
        for grid, runs in found.items()
    }
    base = costs[1, 1]
    for grid, values in costs.items():
        flops = _flops(configs[grid]) / _flops(configs[1, 1])
        ratios = [value / one for value, one in zip(values, base, strict=True)]
        lines.append(
            f"| {grid[0]} | {grid[1]} | {_spread(values)} | {_spread(ratios)} | {flops:.3f} "
            f"| {_spread([ratio / flops for ratio in ratios])} |"
        )
    return lines


def _emulated(
    found: dict[Grid, list[list[tuple[float, float, float]]]], tokens: dict[Grid, int]
) -> list[str]:
    lines = [
        "| stages | replicas | processes | tokens/s | a replica's speed over that of one alone "
        "| FedAvg, % of the round |",
        "|---|---|---|---|---|---|",
    ]
    rates, shares = {}, {}
    for grid, runs in found.items():
        seconds = [max(trained + averaged for _, trained, averaged in ranks) for ranks in runs]
        rates[grid] = [tokens[grid] / s for s in seconds]
        shares[grid] = [
            100 * max(averaged for _, _, averaged in ranks) / s
            for ranks, s in zip(runs, seconds, strict=True)
        ]
    for (stages, replicas), values in rates.items():
        pairs = zip(values, rates[stages, 1], strict=True)
        ratios = [value / replicas / one for value, one in pairs]
        lines.append(
            f"| {stages} | {replicas} | {stages * replicas} | {statistics.median(values):,.0f} "
            f"| {_spread(ratios)} | {statistics.median(shares[stages, replicas]):.2f} |"
        )
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
