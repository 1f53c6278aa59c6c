"""From predictions to scores: what a metric needs of every example, and the metric of some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.commands.finetune.examples import Meaning
from fedpipe.data.tasks.encoding import IGNORED
from fedpipe.data.tasks.scoring import METRICS

StageLosses = dict[int, list[float]]
"""By stage, the loss of every local step of a turn; a whole model is stage 0."""
Scores = dict[int, dict[int, NDArray[np.float64]]]
"""By stage and client, what the task's metric needs to know of each of its examples, (E, K)."""


def statistics(
    meaning: Meaning, split: Any, sequences: NDArray[np.int64], outputs: Mapping[int, Any]
) -> NDArray[np.float64]:
    """Return what the metric needs of every example, (E, K), from predictions by sequence."""
    if meaning.kind == "causal-lm":
        return np.array([outputs[int(row)] for row in sequences], dtype=np.float64).reshape(-1, 2)
    metric = METRICS[meaning.metric]
    if meaning.kind != "ner":
        gold = [float(label) for label in split.labels[sequences]]
        predicted = [outputs[int(row)] for row in sequences]
        return metric.statistics(gold, predicted, meaning.positive)
    there: dict[int, list[str]] = {}
    found: dict[int, list[str]] = {}
    for row in sequences:
        tags = split.labels[split.starts[row] : split.starts[row + 1]]
        example = int(split.examples[row])
        there.setdefault(example, []).extend(
            meaning.labels[int(tag)] for tag in tags[tags != IGNORED]
        )
        found.setdefault(example, []).extend(meaning.labels[tag] for tag in outputs[int(row)])
    return metric.statistics(list(there.values()), list(found.values()), meaning.positive)


def from_statistics(meaning: Meaning, rows: NDArray[np.float64]) -> float:
    """Return the score of some examples; of texts the mean loss per token."""
    if meaning.kind == "causal-lm":
        return float(rows[:, 0].sum() / max(1.0, rows[:, 1].sum()))
    metric = METRICS[meaning.metric]
    if metric.from_sums is None:  # its statistics are gold and prediction
        return metric.whole(rows[:, 0], rows[:, 1], meaning.positive)
    return float(metric.from_sums(rows.sum(axis=0)[None])[0])
