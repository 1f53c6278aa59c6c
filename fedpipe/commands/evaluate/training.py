"""Fine-tuning in plain PyTorch: one model, one task, one seed; repeatable on a CPU.

The recipe of BERT (Devlin et al. 2019, appendix A.3): AdamW, no decay of biases and LayerNorms, a
linear warm-up and a linear fall to 0, all weights trained. Sequences of like length share a batch,
so that little of it is padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fedpipe.commands.evaluate.labelled import labelled_batch, task_loss
from fedpipe.config.schema import OptimizerConfig
from fedpipe.data.tasks.encoding import IGNORED, Encoded
from fedpipe.distributed.device import autocast
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.models.tuned import read_model
from fedpipe.pipeline.optimizer import make_optimizer

# N = sequences of a split, B = sequences of a batch, T = tokens of its longest one, C = classes

_POOL = 50
"""Batches whose sequences are sorted together: long enough to pad little, short enough to mix."""
_JITTER = 0.1
"""Lengths are blurred by this share, or a small task would have the same batches in every epoch."""
_EVAL_BATCH = 64


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


def load_model(
    folder: str, *, kind: str, labels: Sequence[str], pad_id: int, device: torch.device
) -> torch.nn.Module:
    """Read an encoder and put a new head on it, drawn from torch's generator.

    Args:
        folder: Hugging Face folder.
        kind: Of the task.
        labels: Names of the classes or tags; empty for a regression.
        pad_id: Of its tokenizer, for a model that does not know one (decoders).
        device: Where it is to be.

    Returns:
        The model.

    Raises:
        CheckpointError: transformers cannot read it, or has no such head for it.
        ConfigError: Weights of the encoder are missing, or are not used.
    """
    auto: Any = AutoModelForSequenceClassification
    if kind == "ner":
        auto = AutoModelForTokenClassification
    names = dict(enumerate(labels)) or {0: "score"}
    try:
        model = read_model(
            auto, folder, key="--model", new_head=True, num_labels=len(names), id2label=names,
            label2id={name: number for number, name in names.items()},
        )  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # each model family raises classes of its own
        raise CheckpointError(
            f"--model: expected an encoder that transformers reads with a head for {kind}, got "
            f"{' '.join(str(error).split())[:200]} from {folder}. Use a BERT-like model."
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id
    result: torch.nn.Module = model.to(device)
    return result


def train(
    model: torch.nn.Module,
    data: Encoded,
    settings: dict[str, Any],
    *,
    kind: str,
    seed: int,
    pad_id: int,
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
        pad_id: Fills short sequences up.
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
            lr=settings["learning_rate"], weight_decay=settings["weight_decay"],
            betas=(0.9, 0.999), eps=1e-8,
        ),
    )  # fmt: skip
    warmup = max(1, round(settings["warmup_ratio"] * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / num_steps)
    )
    device, every = _device(model), max(1, num_steps // 50)
    step, scores, best = 0, [], (-math.inf, 0)
    diverged_at: int | None = None
    kept: dict[str, Tensor] = {}
    for epoch in range(1, num_epochs + 1):
        model.train()
        for batch in batches(lengths, batch_size=batch_size, rng=rng):
            inputs, labels = labelled_batch(
                data, chosen[batch], kind=kind, pad_id=pad_id, device=device
            )
            loss = task_loss(_logits(model, inputs, settings), labels, kind=kind)
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
                note({"kind": "step", "epoch": epoch, "step": step, "num_steps": num_steps,
                      "loss": loss.item(), "lr": rate, "grad_norm": float(norm)})  # fmt: skip
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
        best_epoch=best[1] or num_epochs, dev_scores=tuple(scores), num_steps=num_steps,
        diverged_at=diverged_at,
    )  # fmt: skip


def predict(
    model: torch.nn.Module,
    data: Encoded,
    *,
    sequences: NDArray[np.int64],
    kind: str,
    pad_id: int,
    settings: dict[str, Any],
) -> list[NDArray[Any]]:
    """Predict sequences.

    Args:
        model: Trained.
        data: A split.
        sequences: Which of it.
        kind: Of the task.
        pad_id: Fills short sequences up.
        settings: ``settings_of``.

    Returns:
        In the order of ``sequences``: the tag of every labelled position, the class, or the number.
    """
    model.eval()
    order = np.argsort(data.lengths()[sequences], kind="stable")
    found: list[NDArray[Any]] = [np.empty(0)] * len(sequences)
    device = _device(model)
    with torch.inference_mode():
        for start in range(0, len(order), _EVAL_BATCH):
            part = order[start : start + _EVAL_BATCH]
            inputs, labels = labelled_batch(
                data, sequences[part], kind=kind, pad_id=pad_id, device=device
            )
            logits = _logits(model, inputs, settings)
            values = logits[..., 0] if kind == "regression" else logits.argmax(-1)
            rows = zip(part, values.cpu().numpy(), labels.cpu().numpy(), strict=True)
            for index, value, label in rows:
                found[index] = value[label != IGNORED] if kind == "ner" else value
    return found


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


def _logits(model: torch.nn.Module, inputs: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Return (B, C), or (B, T, C) of a NER task, in float32."""
    with autocast(inputs["input_ids"].device, settings["precision"]):
        logits: Tensor = model(**inputs).logits
    return logits.float()


def _device(model: torch.nn.Module) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
