"""Scores of tasks, by seqeval, scikit-learn and scipy, also of resampled test sets.

A score's interval needs thousands of resampled test sets. Each metric is therefore also written as
a function of sums over examples (of hits, of entities found and missed, of products): a resampled
test set is a vector of weights, and all of them together are one matrix product. Tests hold both
forms together.

Source: the bootstrap, Efron and Tibshirani 1993; the same draws for all systems as in
Berg-Kirkpatrick et al. 2012, https://aclanthology.org/D12-1091.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.data.tasks.encoding import IGNORED, Encoded
from fedpipe.data.tasks.registry import TaskSpec

# E = examples of a test set, K = sums that a metric needs, B = resampled test sets, S = seeds

Array = NDArray[np.float64]

SEED = 20
"""Of the resampled test sets: the same for every model, so that differences are paired."""
_ROUNDING = 1e-12
"""Relative size of a variance that is none."""
_CHUNK = 100
"""Resampled test sets at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number that says how good predictions are."""

    title: str
    """For people."""
    whole: Callable[[Any, Any, Sequence[int]], float]
    """Of gold, predictions and the numbers of the positive classes."""
    statistics: Callable[[Any, Any, Sequence[int]], Array]
    """Of the same: what it needs of every example, (E, K), whatever the other examples are."""
    from_sums: Callable[[Array], Array] | None
    """Of sums (..., K); None where the score is no function of sums (ranks)."""
    lowest: float = 0.0
    """The least that there is; the most is 1."""


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Divide; nothing found of nothing is 0, as in seqeval and scikit-learn."""
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, 0.0, numerator / safe)


def _entity_score(name: str) -> Callable[[Any, Any, Sequence[int]], float]:
    def whole(gold: Any, predicted: Any, positive: Sequence[int]) -> float:
        from seqeval import metrics
        from seqeval.scheme import IOB2

        score = getattr(metrics, name)
        return float(score(gold, predicted, mode="strict", scheme=IOB2, zero_division=0))

    return whole


def _entity_counts(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    """Per sentence: entities found, entities predicted, entities there are."""
    from seqeval.scheme import IOB2, Entities

    there = Entities(gold, scheme=IOB2).entities
    found = Entities(predicted, scheme=IOB2).entities
    pairs = zip(there, found, strict=True)
    rows = [(len(set(a) & set(b)), len(set(b)), len(set(a))) for a, b in pairs]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _class_counts(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    """Per example: positive and right, predicted positive, positive."""
    there, found = np.isin(gold, positive), np.isin(predicted, positive)
    right = there & (np.asarray(gold) == np.asarray(predicted))
    return np.stack([right, found, there], axis=1).astype(np.float64)


def _second_class_counts(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    return _class_counts(gold, predicted, [1])


def _f1(sums: Array) -> Array:
    return _ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _micro_f1(gold: Any, predicted: Any, positive: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=list(positive), average="micro", zero_division=0))


def _binary_f1(gold: Any, predicted: Any, positive: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, pos_label=1, zero_division=0))


def _accuracy(gold: Any, predicted: Any, positive: Sequence[int]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, predicted))


def _hits(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    right = np.asarray(gold) == np.asarray(predicted)
    return np.stack([right, np.ones_like(right)], axis=1).astype(np.float64)


def _matthews(gold: Any, predicted: Any, positive: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predicted))


def _confusion(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    there, found = np.asarray(gold) == 1, np.asarray(predicted) == 1
    cells = [there & found, ~there & found, there & ~found, ~there & ~found]
    return np.stack(cells, axis=1).astype(np.float64)


def _matthews_of_sums(sums: Array) -> Array:
    tp, fp, fn, tn = (sums[..., index] for index in range(4))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return _ratio(tp * tn - fp * fn, np.sqrt(product))


def _correlation(name: str) -> Callable[[Any, Any, Sequence[int]], float]:
    def whole(gold: Any, predicted: Any, positive: Sequence[int]) -> float:
        from scipy import stats

        # The correlation with a constant is not defined.
        if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
            return float("nan")
        return float(getattr(stats, name)(gold, predicted).statistic)

    return whole


def _moments(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    x, y = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _pearson_of_sums(sums: Array) -> Array:
    n, x, y, xx, yy, xy = (sums[..., index] for index in range(6))
    spreads = [_spread(n, *moments) for moments in ((x, xx), (y, yy))]
    spread = np.sqrt(spreads[0] * spreads[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(spread == 0, np.nan, (n * xy - x * y) / spread))


def _spread(n: Array, total: Array, squares: Array) -> Array:
    """Return n squared times the variance; 0 for a constant, whatever rounding leaves of it."""
    spread = n * squares - total * total
    return np.where(spread > _ROUNDING * n * squares, spread, 0.0)


def _values(gold: Any, predicted: Any, positive: Sequence[int]) -> Array:
    return np.stack([np.asarray(gold), np.asarray(predicted)], axis=1).astype(np.float64)


METRICS = {
    "entity_f1": Metric(
        title="F1", whole=_entity_score("f1_score"), statistics=_entity_counts, from_sums=_f1
    ),
    "entity_precision": Metric(
        title="precision", whole=_entity_score("precision_score"), statistics=_entity_counts,
        from_sums=lambda sums: _ratio(sums[..., 0], sums[..., 1]),
    ),
    "entity_recall": Metric(
        title="recall", whole=_entity_score("recall_score"), statistics=_entity_counts,
        from_sums=lambda sums: _ratio(sums[..., 0], sums[..., 2]),
    ),
    "micro_f1": Metric(
        title="micro-F1", whole=_micro_f1, statistics=_class_counts, from_sums=_f1
    ),
    "f1": Metric(title="F1", whole=_binary_f1, statistics=_second_class_counts, from_sums=_f1),
    "accuracy": Metric(
        title="accuracy", whole=_accuracy, statistics=_hits,
        from_sums=lambda sums: _ratio(sums[..., 0], sums[..., 1]),
    ),
    "matthews": Metric(
        title="Matthews", whole=_matthews, statistics=_confusion, from_sums=_matthews_of_sums,
        lowest=-1.0,
    ),
    "pearson": Metric(
        title="Pearson", whole=_correlation("pearsonr"), statistics=_moments,
        from_sums=_pearson_of_sums, lowest=-1.0,
    ),
    "spearman": Metric(
        title="Spearman", whole=_correlation("spearmanr"), statistics=_values, from_sums=None,
        lowest=-1.0,
    ),
}  # fmt: skip
"""Every metric by its name. NER counts entities by seqeval's strict mode under IOB2."""


def by_example(
    spec: TaskSpec,
    split: Encoded,
    sequences: NDArray[np.int64],
    outputs: Mapping[int, Any],
) -> tuple[list[Any], list[Any], list[int]]:
    """Join windows of sentences again: gold and predicted labels of every example.

    Args:
        spec: What is predicted, not of texts.
        split: Holds the sequences.
        sequences: Ascending.
        outputs: From ``predict``.

    Returns:
        Gold and predictions (numbers, classes, or lists of tag names), and which examples they are.
    """
    if spec.kind != "ner":
        read = float if spec.kind == "regression" else int
        gold = [read(label) for label in split.labels[sequences]]
        predicted = [outputs[int(row)] for row in sequences]
        return gold, predicted, split.examples[sequences].tolist()
    there: dict[int, list[str]] = {}
    found: dict[int, list[str]] = {}
    for row in sequences:
        tags = split.labels[split.starts[row] : split.starts[row + 1]]
        tags = tags[tags != IGNORED]
        example, output = int(split.examples[row]), outputs[int(row)]
        assert len(tags) == len(output), "every labelled position has a prediction"
        there.setdefault(example, []).extend(spec.labels[int(tag)] for tag in tags)
        found.setdefault(example, []).extend(spec.labels[int(tag)] for tag in output)
    return list(there.values()), list(found.values()), list(there)


def statistics(
    spec: TaskSpec, split: Encoded, sequences: NDArray[np.int64], outputs: Mapping[int, Any]
) -> Array:
    """Return what the first metric needs of every example, (E, K).

    Arguments are those of ``by_example``; of texts the summed loss and the number of tokens.
    """
    if spec.kind == "causal-lm":
        return np.array([outputs[int(row)] for row in sequences], dtype=np.float64).reshape(-1, 2)
    gold, predicted, _ = by_example(spec, split, sequences, outputs)
    return METRICS[spec.metric].statistics(gold, predicted, spec.positive)


def from_statistics(spec: TaskSpec, rows: Array) -> float:
    """Return the first metric of some examples; of texts the mean loss per token."""
    if spec.kind == "causal-lm":
        return float(rows[:, 0].sum() / max(1.0, rows[:, 1].sum()))
    metric = METRICS[spec.metric]
    if metric.from_sums is None:  # its statistics are gold and prediction
        return metric.whole(rows[:, 0], rows[:, 1], spec.positive)
    return float(metric.from_sums(rows.sum(axis=0)[None])[0])


def resamples(num_examples: int, *, num_draws: int) -> Iterator[Array]:
    """Draw test sets with replacement, as weights.

    Args:
        num_examples: Of the test set.
        num_draws: Resampled test sets.

    Yields:
        How often each example was drawn, (B', E); the same ones for equal arguments.
    """
    rng = np.random.default_rng(SEED)
    even = np.full(num_examples, 1 / num_examples)
    for start in range(0, num_draws, _CHUNK):
        size = min(_CHUNK, num_draws - start)
        yield rng.multinomial(num_examples, even, size=size).astype(np.float64)


def draws(metric: Metric, statistics: Sequence[Array], *, num_draws: int) -> Array:
    """Score every resampled test set.

    Args:
        metric: What to compute.
        statistics: By system (seeds of a model, say), (E, K) each; of the same examples.
        num_draws: Resampled test sets; 0 gives an array without columns.

    Returns:
        (S, B); the columns of calls with the same number of examples belong to the same test sets.
    """
    found = [np.empty((len(statistics), 0))]
    for weights in resamples(len(statistics[0]), num_draws=num_draws):
        if metric.from_sums is not None:
            found.append(np.stack([metric.from_sums(weights @ each) for each in statistics]))
        else:
            found.append(np.stack([_rank_correlations(weights, each) for each in statistics]))
    return np.concatenate(found, axis=1)


def _rank_correlations(weights: Array, values: Array) -> Array:
    """Spearman's correlation: Pearson's of the ranks inside each resampled test set."""
    from scipy.stats import rankdata

    counts = weights.astype(np.int64)
    rows = np.stack([np.repeat(np.arange(len(values)), row) for row in counts])
    ranks = [rankdata(values[rows, column], axis=1) for column in (0, 1)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    one = np.ones(len(rows))
    zero = np.zeros(len(rows))
    sums = np.stack([one, zero, zero, (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], axis=-1)
    return _pearson_of_sums(sums)
