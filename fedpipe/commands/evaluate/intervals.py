"""Intervals and tests for means over seeds: 95 % intervals, p-values, and Holm's correction.

The units of a system are its independent trainings. With several seeds of pre-training, a unit is
the mean over the seeds of fine-tuning of one of them. Otherwise the units are the seeds of
fine-tuning of the one model. All units are scored on the same test examples, so that two variances
add up: the variance of the mean over units, which Student's t takes from the units, and the
variance of the test examples, which the bootstrap estimates, minus the part of it that the variance
of the units already contains.

Fewer than ``MIN_SEEDS`` units do not show how much trainings vary. Their interval covers test
examples only, holds for these trainings only, and has no p-value.

A test simulates trainings: from three seeds on the intervals of means and of differences cover 93
to 97 of 100, and Holm's correction finds a difference between equal systems in 5 tables of 100.

Source: percentile bootstrap, Efron and Tibshirani 1993; units crossed with examples, Owen 2007,
https://arxiv.org/abs/0708.0107; a t and a normal variable together, Fisher 1935 (Behrens and
Fisher); several differences, Holm 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpipe.commands.evaluate.content import EstimateFacts
from fedpipe.data.tasks.scoring import Array, Metric, draws

# U = units (independent trainings), F = fine-tunings of each, B = resampled test sets

MIN_SEEDS = 3
"""Least number of units for an interval over units: with two, Student's t is 12.7."""
LEVEL = 0.95
_NODES, _WEIGHTS = (np.stack(np.polynomial.legendre.leggauss(64)) + [[1], [0]]) / 2
"""Nodes and weights of the Gauss-Legendre quadrature from 0 to 1."""
SEEDS, EXAMPLES = "seeds and test examples", "test examples"
"""Values of ``Estimate.over``: what varies in an interval."""
METHOD = (
    f"over seeds (Student's t) and test examples (bootstrap) from {MIN_SEEDS} seeds on, else over "
    "test examples alone, and of these trainings only"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Scores of a system by unit, or a difference or mean of several samples, unit by unit."""

    scores: Array
    """(U,) scores on the test set."""
    drawn: Array
    """(U, B) scores on the resampled test sets."""

    def __sub__(self, other: Sample) -> Sample:
        """Subtract unit by unit, for units that share a seed."""
        return Sample(scores=self.scores - other.scores, drawn=self.drawn - other.drawn)

    def at(self, units: Sequence[int]) -> Sample:
        """Return the sample of some units, in this order."""
        return Sample(scores=self.scores[list(units)], drawn=self.drawn[list(units)])

    def per_unit(self, num_units: int) -> Sample:
        """Average consecutive fine-tunings, so that a pre-training is one unit.

        Args:
            num_units: Number of pre-trainings; it divides the number of fine-tunings.
        """
        shape = (num_units, -1)
        return Sample(
            scores=self.scores.reshape(shape).mean(axis=1),
            drawn=self.drawn.reshape(*shape, self.drawn.shape[1]).mean(axis=1),
        )


def sample(
    metric: Metric, scores: Sequence[float], statistics: Sequence[Array], *, num_draws: int
) -> Sample:
    """Score the resampled test sets of every unit.

    Args:
        metric: The metric of the scores.
        scores: Scores by unit.
        statistics: By unit, the statistics of the metric for every test example.
        num_draws: Number of resampled test sets. They are the same in every call with the same
            number of examples.
    """
    drawn = draws(metric, statistics, num_draws=num_draws)
    return Sample(scores=np.asarray(scores, dtype=np.float64), drawn=drawn)


def joined(samples: Sequence[Sample]) -> Sample:
    """Return one sample with the units of several samples."""
    return Sample(
        scores=np.concatenate([each.scores for each in samples]),
        drawn=np.concatenate([each.drawn for each in samples]),
    )


def mean_of(samples: Sequence[Sample]) -> Sample:
    """Average samples of several tasks or rounds, unit by unit."""
    return Sample(
        scores=np.mean([each.scores for each in samples], axis=0),
        drawn=np.mean([each.drawn for each in samples], axis=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over units, or the difference of two means, with an interval and a p-value."""

    value: float
    interval: tuple[float, float] | None
    """95 % interval, not corrected; None if too many resampled test sets have no score."""
    over: str | None
    """``SEEDS`` or ``EXAMPLES``; None without an interval."""
    n: tuple[int, ...]
    """Number of units of each system; one number if the systems are paired by seed."""
    p_value: float | None
    """Two-sided p-value of the hypothesis 0; None if the interval is not over seeds."""

    def to_dict(self) -> EstimateFacts:
        """Return the estimate as JSON."""
        return {
            "value": self.value,
            "interval": self.interval,
            "over": self.over,
            "n": list(self.n),
            "p_value": self.p_value,
        }


def estimate(first: Sample, second: Sample | None = None) -> Estimate:
    """Estimate a mean over units, or the difference of two systems' means.

    Args:
        first: One system, or its paired difference to another system.
        second: System to subtract if the two do not share seeds; on the same test examples.
    """
    groups = [first] if second is None else [first, second]
    means = [float(group.scores.mean()) for group in groups]
    centres = [group.drawn.mean(axis=0) for group in groups]
    value = means[0] - sum(means[1:])
    centre = centres[0] - sum(centres[1:])
    n = tuple(len(group.scores) for group in groups)
    known = np.isfinite(centre)
    if 2 * known.sum() <= len(centre):
        return Estimate(value=value, interval=None, over=None, n=n, p_value=None)
    if min(n) < MIN_SEEDS:
        low, high = np.percentile(centre[known], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        interval = float(low), float(high)
        return Estimate(value=value, interval=interval, over=EXAMPLES, n=n, p_value=None)
    # Of the mean over units: of units that are drawn anew, and of test examples that are.
    by_units = [float(group.scores.var(ddof=1)) / len(group.scores) for group in groups]
    by_examples = float(centre[known].var())
    # How units differ in which examples they get right is in both.
    in_both = sum(
        float(group.drawn[:, known].var(axis=1).mean() - middle[known].var()) / (size - 1)
        for group, middle, size in zip(groups, centres, n, strict=True)
    )
    rest = max(by_examples - in_both, 0.0)
    return _over_seeds(value, by_units, rest, n)


def _over_seeds(
    value: float, by_units: Sequence[float], rest: float, n: tuple[int, ...]
) -> Estimate:
    """Combine Student's t over units (Welch's for two systems) with a normal over examples."""
    from scipy import special

    seeds = sum(by_units)
    if seeds == 0:
        freedom, quantile = float("inf"), special.ndtri(0.5 + LEVEL / 2)
    else:
        shares = (own**2 / (size - 1) for own, size in zip(by_units, n, strict=True))
        freedom = seeds**2 / sum(shares)
        # Degrees of freedom grow with the share of the examples, of which there are many.
        quantile = special.stdtrit(freedom * (1 + rest / seeds), 0.5 + LEVEL / 2)
    half = float(quantile * np.sqrt(seeds + rest))
    return Estimate(
        value=value,
        interval=(value - half, value + half),
        over=SEEDS,
        n=n,
        p_value=_p_value(value, seeds=seeds, rest=rest, freedom=freedom),
    )


def _p_value(value: float, *, seeds: float, rest: float, freedom: float) -> float:
    """Return the two-sided p-value of Behrens and Fisher, which is exact in the tails too."""
    from scipy import special

    if seeds + rest == 0:
        return float(value == 0)
    if seeds == 0:
        return float(2 * special.ndtr(-abs(value) / np.sqrt(rest)))
    # Mean over the chi-squared variable behind the t; nodes are dense where its tail comes from.
    chi_squared = 2 * special.gammaincinv(freedom / 2, _NODES**4)
    tails = special.ndtr(-abs(value) / np.sqrt(seeds * freedom / chi_squared + rest))
    return float(_WEIGHTS @ (8 * _NODES**3 * tails))


def student_half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean; None for fewer than two values."""
    from scipy import special

    if len(values) < 2:
        return None
    quantile = special.stdtrit(len(values) - 1, 0.5 + LEVEL / 2)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


def holm(p_values: Sequence[float | None]) -> list[bool]:
    """Return which values of a table differ from 0 at a family-wise error rate of 5 %.

    Args:
        p_values: All p-values of the table; None is never significant and does not count.
    """
    ranked = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    found = [False] * len(p_values)
    for rank, (p, index) in enumerate(ranked):
        if p > (1 - LEVEL) / (len(ranked) - rank):
            break
        found[index] = True
    return found
