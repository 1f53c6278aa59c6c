"""Tokens per second of ModernBERT and of RoBERTa of the same size: fedpipe against transformers.

    python benchmarks/encoders.py [--repetitions 5] [--steps 8] [key=value ...]

Every variant trains the same model with AdamW on the same batches, in processes of its own with one
thread each. Variants take turns, and the order rotates; ratios are within a repetition.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks, step_s
from torch import Tensor
from torch.nn import functional

from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.comm import Comm
from fedpipe.families.family import gather
from fedpipe.pipeline.optimizer import build_optimizer

# ettin-32m, and a RoBERTa whose layers have as many weights
MODELS = {
    "ModernBERT": ("model.family=modernbert", "model.size=ettin-32m"),
    "RoBERTa": (
        "model.family=roberta", "model.num_hidden_layers=10", "model.hidden_size=384",
        "model.num_attention_heads=6", "model.intermediate_size=864",
        "model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0",
    ),
}  # fmt: skip
SETTINGS = (
    "data.sequence_length=128", "pipeline.micro_batch_size=16", "pipeline.num_micro_batches=4",
    "federation.num_replicas=1", "data.partition=iid",
)  # fmt: skip
VARIANTS = (
    "transformers, logits at every position", "transformers, logits at masked positions",
    "fedpipe, one stage on one core", "fedpipe, two stages on two cores",
)  # fmt: skip
ONE_STAGE, TWO_STAGES = VARIANTS[2:]
CUT = 5


def main() -> None:
    """Run all variants in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for repetition in range(args.repetitions):
        for model, sizes in MODELS.items():
            first = repetition % len(VARIANTS)
            for variant in VARIANTS[first:] + VARIANTS[:first]:
                config = load_config(None, [*SETTINGS, *sizes, *args.overrides])
                cut = (CUT,) if variant == TWO_STAGES else ()
                config = replace(config, pipeline=replace(config.pipeline, cut=cut))
                parts = run_ranks(config, partial(_measure, variant=variant, num_steps=args.steps))
                step_s, memory = max(p[0] for p in parts), max(p[1] for p in parts)
                tokens = config.blocks_per_step * config.data.sequence_length
                found.setdefault((model, variant), []).append((tokens / step_s, memory))
    sys.stdout.write(_table(found))


def _measure(
    config: RunConfig, data: PreparedData, comm: Comm, *, variant: str, num_steps: int
) -> tuple[float, float]:
    """Return the seconds of a local step in steady state, and the peak memory in MiB."""
    torch.set_num_threads(1)
    replica = PretrainingReplica(config, data, comm=comm)
    if variant in (ONE_STAGE, TWO_STAGES):
        seconds = step_s(replica, comm, num_steps)
    else:
        seconds = _train_plainly(config, replica, variant=variant, num_steps=num_steps)
    return seconds, _peak_mib()


def _train_plainly(
    config: RunConfig,
    replica: PretrainingReplica,
    *,
    variant: str,
    num_steps: int,
) -> float:
    """Train transformers' own model with the loop that its documentation shows."""
    ends: list[float] = []
    family = replica.stages[0].stage.family
    source, count = replica.training_source(0, start=0), config.pipeline.num_micro_batches
    settings = replica.hf_config
    settings.tie_word_embeddings = replica.specs[0].decoder == "shared"
    replica.stages.clear()
    model = family.masked_lm_class()(settings).train()
    optimizer = build_optimizer(model, config.optimizer)
    masked = variant == VARIANTS[1]
    run: Callable[..., Tensor] = _masked_loss if masked else _whole_loss
    assert source is not None
    for step in range(num_steps):
        for micro_batch in range(count):
            loss = run(model, *source(step, micro_batch)) / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.monotonic())
    return (ends[-1] - ends[1]) / (num_steps - 2)


def _whole_loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    labels = torch.full_like(ids, -100).scatter(1, targets[0].long(), targets[1].long())
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def _masked_loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """The head at masked positions; ModernBERT's own ``sparse_prediction`` does the same."""
    hidden = gather(model.base_model(input_ids=ids).last_hidden_state, targets[0])
    if hasattr(model, "lm_head"):
        logits = model.lm_head(hidden)
    else:
        logits = model.decoder(model.head(hidden))
    return functional.cross_entropy(logits.flatten(0, 1), targets[1].long().flatten())


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _table(found: dict[tuple[str, str], list[tuple[float, float]]]) -> str:
    lines = [
        "| model | variant | tokens/s | speed over one stage of fedpipe | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for (model, variant), values in found.items():
        base = [speed for speed, _ in found[model, ONE_STAGE]]
        ratios = [speed / b for (speed, _), b in zip(values, base, strict=True)]
        speed, memory = (statistics.median(column) for column in zip(*values, strict=True))
        lines.append(f"| {model} | {variant} | {speed:,.0f} | {_spread(ratios)} | {memory:,.0f} |")
    return "\n".join(lines) + "\n"


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
