"""Fine-tuning in plain PyTorch: one model, one task, one seed; repeatable on a CPU.

The recipe of BERT (Devlin et al. 2019, appendix A.3): AdamW, no decay of biases and LayerNorms, a
linear warm-up and a linear fall to 0, all weights trained. Sequences of like length share a batch,
so that little of it is padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fedpipe.commands.evaluate.content import Settings
from fedpipe.config.evaluation import Kind, Precision
from fedpipe.config.schema import OptimizerConfig
from fedpipe.data.tasks.batches import Forward, labelled_batch, task_loss
from fedpipe.data.tasks.encoding import Encoded
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.distributed.device import autocast
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.models.tuned import read_model
from fedpipe.pipeline.optimizer import make_optimizer

_POOL = 50
"""Batches whose sequences are sorted together: long enough to pad little, short enough to mix."""
_JITTER = 0.1
"""Lengths are blurred by this share, or a small task would have the same batches in every epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How a fine-tuning went."""

    best_epoch: int
    """From 1; the last one where no dev split chooses."""
    dev_scores: tuple[float, ...]
    """After every epoch; empty without a dev split."""
    num_steps: int
    diverged_at: int | None = None
    """The first recorded step whose loss or gradients are not finite; the weights stay so."""


Note = Callable[[dict[str, Any]], None]
"""Takes a record for metrics.jsonl."""


def load_model(folder: str, spec: TaskSpec, *, device: torch.device) -> torch.nn.Module:
    """Read an encoder and put a new head on it, drawn from torch's generator.

    Args:
        folder: Hugging Face folder.
        spec: What the head predicts; its pad token is that of a model that knows none (decoders).
        device: Where it is to be.

    Returns:
        The model.

    Raises:
        CheckpointError: transformers cannot read it, or has no such head for it.
        ConfigError: Weights of the encoder are missing, or are not used.
    """
    auto: Any = AutoModelForSequenceClassification
    if spec.kind == "ner":
        auto = AutoModelForTokenClassification
    names = dict(enumerate(spec.labels)) or {0: "score"}
    try:
        model = read_model(
            auto,
            folder,
            key="--model",
            new_head=True,
            num_labels=len(names),
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    except ConfigError:
        raise
    except Exception as error:  # each model family raises classes of its own
        raise CheckpointError(
            f"--model: expected an encoder that transformers reads with a head for {spec.kind},"
            f" got {' '.join(str(error).split())[:200]} from {folder}. Use a BERT-like model."
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = spec.pad_id
    result: torch.nn.Module = model.to(device)
    return result


def forward_of(model: torch.nn.Module, spec: TaskSpec, *, precision: Precision) -> Forward:
    """Return what runs a model on sequences of a task."""
    device: torch.device = next(model.parameters()).device

    def forward(split: Encoded, sequences: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        inputs, labels = labelled_batch(split, sequences, spec=spec, device=device)
        with autocast(device, precision):
            logits: Tensor = model(**inputs).logits
        return logits.float(), labels

    return forward


def train(
    model: torch.nn.Module,
    data: Encoded,
    settings: Settings,
    *,
    kind: Kind,
    seed: int,
    forward: Forward,
    dev_score: Callable[[], float] | None,
    note: Note,
) -> Trained:
    """Fine-tune; afterwards the model has the weights of its best epoch.

    Args:
        model: From ``load_model``.
        data: The training split.
        settings: ``settings_of``.
        kind: Of the task.
        seed: Of order and dropout.
        forward: Runs the model.
        dev_score: Scores the model; None keeps the last epoch.
        note: Takes records.

    Returns:
        How it went.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    chosen = drawn(data, settings["max_train_examples"])
    lengths = data.lengths()[chosen]
    num_epochs, batch_size = int(settings["num_epochs"]), int(settings["batch_size"])
    num_steps = num_epochs * math.ceil(len(chosen) / batch_size)
    optimizer = make_optimizer(
        [p for p in model.parameters() if p.requires_grad],
        OptimizerConfig(
            lr=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            betas=(0.9, 0.999),
            eps=1e-8,
        ),
    )
    warmup = max(1, round(settings["warmup_ratio"] * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / num_steps)
    )
    every = max(1, num_steps // 50)
    step, scores, best = 0, [], (-math.inf, 0)
    diverged_at: int | None = None
    kept: dict[str, Tensor] = {}
    for epoch in range(1, num_epochs + 1):
        model.train()
        for batch in batches(lengths, batch_size=batch_size, rng=rng):
            loss = task_loss(*forward(data, chosen[batch]), kind=kind)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            limit = settings["max_grad_norm"] or math.inf
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            step += 1
            if step % every == 0 or step == num_steps:
                if diverged_at is None and not (loss.isfinite() and norm.isfinite()):
                    diverged_at = step
                note(
                    {
                        "kind": "step",
                        "epoch": epoch,
                        "step": step,
                        "num_steps": num_steps,
                        "loss": loss.item(),
                        "lr": rate,
                        "grad_norm": float(norm),
                    }
                )
        if dev_score is None:
            continue
        scores.append(dev_score())
        note({"kind": "eval", "epoch": epoch, "step": step, "score": scores[-1]})
        if scores[-1] > best[0] or not kept:  # a score that is not a number never wins
            best = (scores[-1] if math.isfinite(scores[-1]) else -math.inf, epoch)
            if epoch < num_epochs:
                kept = copy.deepcopy(model.state_dict())
    if dev_score is not None and best[1] < num_epochs:
        model.load_state_dict(kept)
    return Trained(
        best_epoch=best[1] or num_epochs,
        dev_scores=tuple(scores),
        num_steps=num_steps,
        diverged_at=diverged_at,
    )


def drawn(data: Encoded, limit: int) -> NDArray[np.int64]:
    """Choose the sequences of at most so many examples, the same ones every time; 0 means all."""
    wanted = np.arange(data.num_sequences)
    if not 0 < limit < data.num_examples:
        return wanted
    examples = np.random.default_rng(0).permutation(data.num_examples)[:limit]
    return wanted[np.isin(data.examples, examples)]


def batches(
    lengths: NDArray[np.int64], *, batch_size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Go once through all sequences in a random order, those of like length together.

    Args:
        lengths: Tokens of every sequence.
        batch_size: Sequences per batch; the last one may be smaller.
        rng: Where the order comes from.

    Yields:
        Indices of sequences.
    """
    order = rng.permutation(len(lengths))
    blurred = lengths * rng.uniform(1 - _JITTER, 1 + _JITTER, size=len(lengths))
    pool = _POOL * batch_size
    found = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(blurred[part], kind="stable")]
        found += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    for index in rng.permutation(len(found)):
        yield found[index]
