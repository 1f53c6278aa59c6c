"""Time a training step of every method at GPT-2's size, and count what it computes.

    python docs/benchmarks/fate.py [--batch 8] [--length 200] [--steps 5] [--methods full,lora,...]

FATE-LLM 1.0 published seconds per epoch of GPT-2 on sequences of 200. Here all methods take turns
step by step in one process with all cores, on random tokens: weights and text change no time. A
step is forward, backward and Adam; the counts are of matrix products, by torch's counter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedpipe.config.finetune import MethodConfig
from fedpipe.models.peft import METHODS, attach, trainable
from fedpipe.models.tuned import base_config, build_model
from fedpipe.workflows.finetune.tuner import task_loss

PUBLISHED = {
    "full": 1693.0, "houlsby": 464.1, "pfeiffer": 445.0, "parallel": 560.875,
    "houlsby_inv": 456.0, "pfeiffer_inv": 453.8, "lora": 410.67, "ia3": 412.76, "compacter": 446.55,
}  # fmt: skip
"""Seconds per epoch: FATE-LLM 1.0, 2 clients x 2 V100, IMDB, batch 64, sequences of 200."""
LABELS = 2


class Step(NamedTuple):
    """Seconds of one step."""

    forward: float
    backward: float
    optimizer: float


def main() -> None:
    """Measure, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of initialising weights that are not there
    names = args.methods.split(",")
    shape = (args.batch, args.length)
    models = {name: _build(name) for name in names}
    optimizers = {
        name: torch.optim.Adam(trainable(model).values(), lr=1e-4, fused=True)
        for name, model in models.items()
    }
    counted: dict[str, int] = {}
    found: dict[str, list[Step]] = {name: [] for name in names}
    ids = torch.randint(1000, shape)
    labels = torch.randint(LABELS, shape[:1])
    for name in names:  # a first step, which also makes the optimizer's state
        with FlopCounterMode(display=False) as counter:
            _step(models[name], optimizers[name], ids, labels)
        counted[name] = counter.get_total_flops()
    for _ in range(args.steps):
        for name in names:
            found[name].append(_step(models[name], optimizers[name], ids, labels))
    sys.stdout.write(_table(found, counted))


def _build(name: str) -> Any:
    torch.manual_seed(0)
    config = base_config("gpt2", pad_token_id=50256)
    model = build_model(config, "classification", num_labels=LABELS)
    attach(model, MethodConfig(name=name))  # type: ignore[arg-type]
    return model.train()


def _step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Step:
    started = time.perf_counter()
    loss = task_loss(model(input_ids=ids).logits, labels, kind="classification")
    forward = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    backward = time.perf_counter()
    optimizer.step()
    return Step(forward - started, backward - forward, time.perf_counter() - backward)


def _table(found: dict[str, list[Step]], counted: dict[str, int]) -> str:
    lines = [
        "| method | forward, s | backward, s | Adam, s | step, s | of full's step, % "
        "| of full's operations, % | FATE's epoch, of full's, % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    full = statistics.median(map(sum, found["full"]))
    for name, steps in found.items():
        parts = [statistics.median(part) for part in zip(*steps, strict=True)]
        whole = sorted(map(sum, steps))
        cells = [f"{part:.2f}" for part in parts]
        cells.append(f"{statistics.median(whole):.2f} ({whole[0]:.2f} to {whole[-1]:.2f})")
        cells.append(f"{100 * statistics.median(whole) / full:.1f}")
        cells.append(f"{100 * counted[name] / counted['full']:.1f}")
        published = PUBLISHED.get(name)
        cells.append(f"{100 * published / PUBLISHED['full']:.1f}" if published else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
