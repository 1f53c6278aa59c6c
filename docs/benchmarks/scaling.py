"""CPU seconds per token with more stages and more replicas; write one table.

    python docs/benchmarks/scaling.py [--repetitions 2] [--out runs/scaling] [key=value ...]

More processes than cores share them, so wall time says nothing; what all processes of a run compute
does. Every grid is run with few and with many local steps, and start-up cancels in the difference.
Each stage more has a head more, so CPU seconds are also put in relation to the counted FLOPs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from fedpipe.config.load import load_config
from fedpipe.config.model_shape import resolve
from fedpipe.data.masking import num_masked
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.models.split import stage_specs
from fedpipe.workflows.costs.flops import stage_flops

GRIDS = {
    (1, 1): "[]",
    (2, 1): "[4]",
    (4, 1): "[2,4,6]",
    (2, 2): "[4]",
    (2, 4): "[4]",
}
"""(stages, replicas): the cut of 8 layers."""
FEW, MANY = 4, 24
"""Local steps; the difference is what counts."""
SCALE = [
    "model.num_hidden_layers=8", "model.hidden_size=256", "model.num_attention_heads=4",
    "model.intermediate_size=1024", "data.sequence_length=128", "data.mask_probability=0.15",
    "data.valid=[]", "pipeline.micro_batch_size=4", "pipeline.num_micro_batches=4",
    "federation.num_rounds=1", "log.tensorboard=false",
]  # fmt: skip


def main() -> None:
    """Run every grid, then write table.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    _adopt_orphans()
    costs: dict[tuple[int, int], list[float]] = {grid: [] for grid in GRIDS}
    flops = {}
    for _ in range(args.repetitions):
        for (stages, replicas), cut in GRIDS.items():
            overrides = [
                *SCALE, f"pipeline.cut={cut}", f"federation.num_replicas={replicas}",
                f"federation.clients_per_round={replicas}", *args.overrides,
            ]  # fmt: skip
            few, many = (_cpu_s(args.out / "run", [*overrides, _steps(n)]) for n in (FEW, MANY))
            tokens, flops[stages, replicas] = _counts(overrides)
            costs[stages, replicas].append((many - few) / (MANY - FEW) / tokens)
    table = _table(costs, flops)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


def _adopt_orphans() -> None:
    """Become the parent of whoever outlives its own, so that its CPU time can be read."""
    pr_set_child_subreaper = 36  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def _steps(number: int) -> str:
    return f"federation.num_local_steps={number}"


def _cpu_s(run_dir: Path, overrides: list[str]) -> float:
    """User and system seconds of a run and all its processes."""
    shutil.rmtree(run_dir, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(run_dir), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with contextlib.suppress(ChildProcessError):
        while os.wait():
            pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _counts(overrides: list[str]) -> tuple[int, float]:
    """Tokens of a local step of all replicas, and FLOPs per token."""
    config = load_config(None, overrides)
    length, vocab_size = config.data.sequence_length, tokenizer_info(config).vocab_size
    shape = resolve(config.model, vocab_size=vocab_size, sequence_length=length)
    masked = num_masked(length, config.data.mask_probability)
    total = 0.0
    for spec in stage_specs(config.pipeline, num_hidden_layers=shape.num_hidden_layers):
        cost = stage_flops(spec, config, shape, num_masked=masked)
        total += cost.forward_s + cost.backward_s + cost.head_s
    tokens = config.blocks_per_step * length
    micro_batch = config.pipeline.micro_batch_size * length
    return tokens * config.federation.num_replicas, total / micro_batch


def _table(costs: dict[tuple[int, int], list[float]], flops: dict[tuple[int, int], float]) -> str:
    first = next(iter(costs))
    base = statistics.mean(costs[first])
    lines = [
        "| stages | replicas | processes | CPU s per 1,000 tokens | over 1 x 1 | FLOPs over 1 x 1 "
        "| CPU s per FLOP over 1 x 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for (stages, replicas), values in costs.items():
        mean = statistics.mean(values)
        counted = flops[stages, replicas] / flops[first]
        spread = f"{1000 * mean:.3f} ({1000 * min(values):.3f} to {1000 * max(values):.3f})"
        cells = (
            str(stages), str(replicas), str(stages * replicas), spread, f"{mean / base:.3f}",
            f"{counted:.3f}", f"{mean / base / counted:.3f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
