"""Time a training step of every method at GPT-2's size, and count what it computes.

    python benchmarks/fate.py [--batch 8] [--length 200] [--steps 5] [--methods full,lora@9]

FATE-LLM 1.0 published seconds per epoch of GPT-2 on sequences of 200. Here all methods take turns
step by step in one process with all cores, on random tokens: weights and text change no time. A
step is forward, backward and Adam; the counts are of matrix products, by torch's counter.
``lora@9`` is LoRA from layer 9 on, in an epoch after the first: what the layers below give is read
from disk, as part of the forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedpipe.commands.finetune.hidden_states import HiddenStateCache
from fedpipe.config.finetune import MethodConfig
from fedpipe.data.tasks.batches import task_loss
from fedpipe.data.tasks.encoding import Encoded
from fedpipe.models.lower import LowerLayers
from fedpipe.models.peft import METHODS, attach, trainable
from fedpipe.models.tuned import base_config, build_model

PUBLISHED = {
    "full": 1693.0, "houlsby": 464.1, "pfeiffer": 445.0, "parallel": 560.875,
    "houlsby_inv": 456.0, "pfeiffer_inv": 453.8, "lora": 410.67, "ia3": 412.76, "compacter": 446.55,
}  # fmt: skip
"""Seconds per epoch: FATE-LLM 1.0, 2 clients x 2 V100, IMDB, batch 64, sequences of 200."""
LABELS = 2
UPPER = ("lora@8", "lora@9")


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
    parser.add_argument("--methods", default=",".join((*METHODS, *UPPER)))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of initialising weights that are not there
    names = args.methods.split(",")
    counted: dict[str, int] = {}
    found: dict[str, list[Step]] = {name: [] for name in names}
    ids = torch.randint(1000, (args.batch, args.length))
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: _Run(name, ids, Path(folder)) for name in names}
        for name in names:  # a first step, which also makes the optimizer's state
            runs[name].lower_layers()
            with FlopCounterMode(display=False) as counter:
                runs[name].step()
            counted[name] = counter.get_total_flops()
        for _ in range(args.steps):
            for name in names:
                found[name].append(runs[name].step())
    sys.stdout.write(_table(found, counted))


class _Run:
    """A model with a method, and a batch."""

    def __init__(self, name: str, ids: Tensor, folder: Path) -> None:
        torch.manual_seed(0)
        method, _, first = name.partition("@")
        config = base_config("gpt2", pad_token_id=50256)
        self.model = build_model(config, "classification", num_labels=LABELS).train()
        attach(self.model, MethodConfig(name=method, first_layer=int(first or 0)))  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(trainable(self.model).values(), lr=1e-4, fused=True)
        self.inputs = {"input_ids": ids}
        self.labels = torch.randint(LABELS, ids.shape[:1])
        self.lower_layers: Callable[[], AbstractContextManager[None]] = nullcontext
        if first:
            lower = LowerLayers(self.model, int(first))
            cache = HiddenStateCache(lower, _split(ids), folder)
            rows = np.arange(len(ids))
            self.lower_layers = lambda: lower.given(cache.hidden(rows, self.inputs))

    def step(self) -> Step:
        started = time.perf_counter()
        with self.lower_layers():
            logits = self.model(**self.inputs).logits
        loss = task_loss(logits, self.labels, kind="classification")
        forward = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        return Step(forward - started, backward - forward, time.perf_counter() - backward)


def _split(ids: Tensor) -> Encoded:
    batch, length = ids.shape
    flat = ids.flatten().numpy().astype(np.int32)
    return Encoded(
        ids=flat, types=np.zeros(len(flat), dtype=np.int8),
        starts=np.arange(batch + 1) * length, labels=np.zeros(batch),
        examples=np.arange(batch, dtype=np.int32), num_truncated=0,
    )  # fmt: skip


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
        published = PUBLISHED.get(name.partition("@")[0])
        cells.append(f"{100 * published / PUBLISHED['full']:.1f}" if published else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
