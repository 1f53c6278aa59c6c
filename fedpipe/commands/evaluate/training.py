"""Fine-tune one model on one task with one seed, in plain PyTorch; repeatable on a CPU.

The recipe is that of BERT (Devlin et al. 2019, appendix A.3): AdamW without decay of biases and
LayerNorms, a linear warm-up, a linear decay to 0, and all weights trained. Sequences of similar
length share a batch, so that a batch has little padding.
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
from fedpipe.report.records import DevScoreRecord, TrainingStepRecord

_POOL = 50
"""Number of batches whose sequences are sorted together: large for little padding, small to mix."""
_JITTER = 0.1
"""Relative noise of the lengths; without it, a small task has the same batches in every epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The course of a fine-tuning."""

    best_epoch: int
    """Epoch of the final weights, from 1; the last one without a dev split."""
    dev_scores: tuple[float, ...]
    """Dev score after every epoch; empty without a dev split."""
    num_steps: int
    diverged_at: int | None = None
    """First recorded step whose loss or gradient norm is not finite; None if there is none."""


Note = Callable[[TrainingStepRecord | DevScoreRecord], None]
"""Takes a record for metrics.jsonl."""


def load_model(folder: str, spec: TaskSpec, *, device: torch.device) -> torch.nn.Module:
    """Read an encoder and add a new head, with weights from torch's random generator.

    Args:
        folder: Hugging Face folder.
        spec: The task of the head. Its pad token is used if the model has none, as decoders.
        device: Device of the model.

    Returns:
        The model.

    Raises:
        CheckpointError: transformers cannot read the folder, or has no such head for the family.
        ConfigError: Weights of the encoder are missing or unused.
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
    """Return a function that runs a model on sequences of a task."""
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
    """Fine-tune a model; afterwards it has the weights of its best epoch.

    Args:
        model: Model from ``load_model``.
        data: Training split.
        settings: Settings from ``settings_of``.
        kind: Kind of the task.
        seed: Seed of the order of batches and of dropout.
        forward: Function from ``forward_of``.
        dev_score: Returns the dev score of the model; None keeps the last epoch.
        note: Called with records for metrics.jsonl.

    Returns:
        The course of the training.
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
    """Draw the sequences of at most ``limit`` examples, always the same ones; 0 means all."""
    wanted = np.arange(data.num_sequences)
    if not 0 < limit < data.num_examples:
        return wanted
    examples = np.random.default_rng(0).permutation(data.num_examples)[:limit]
    return wanted[np.isin(data.examples, examples)]


def batches(
    lengths: NDArray[np.int64], *, batch_size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield all sequences once in random order, in batches of similar length.

    Args:
        lengths: Number of tokens of every sequence.
        batch_size: Sequences per batch; the last batch may be smaller.
        rng: Random generator of the order.

    Yields:
        Indices of the sequences of a batch.
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
