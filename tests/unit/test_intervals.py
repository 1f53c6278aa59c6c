"""Intervals: their coverage by simulated trainings, Holm's correction, and what few seeds say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedpipe.commands.evaluate.intervals import (
    EXAMPLES,
    SEEDS,
    Sample,
    estimate,
    holm,
    joined,
    mean_of,
    sample,
    student_half_width,
)
from fedpipe.data.tasks.scoring import METRICS, Array, resamples

ACCURACY = METRICS["accuracy"]
NUM_EXAMPLES, NUM_DRAWS, SKILL = 200, 1000, 0.8
WEIGHTS = np.concatenate(list(resamples(NUM_EXAMPLES, num_draws=NUM_DRAWS))) / NUM_EXAMPLES


def trainings(
    rng: np.random.Generator, hardness: Array, *, units: int, by_seed: float, by_fine: float = 0.0
) -> list[Sample]:
    """Simulate systems, (N, E) hardness: skill varies by pre-training and by fine-tuning."""
    size = (len(hardness), units)
    skill = SKILL + rng.normal(0, by_seed, (*size, 1, 1))
    skill = skill + rng.normal(0, by_fine, (*size, 3 if by_fine else 1, 1))
    luck = rng.normal(size=(*skill.shape[:3], hardness.shape[1]))
    right = (luck < skill + hardness[:, None, None]).mean(axis=2)  # over fine-tunings
    drawn = (right.reshape(-1, right.shape[-1]) @ WEIGHTS.T).reshape(*size, NUM_DRAWS)
    return [Sample(scores=r.mean(axis=1), drawn=d) for r, d in zip(right, drawn, strict=True)]


def truth(hardness_sd: float, *spreads: float) -> float:
    """Return the expected accuracy over all trainings and examples."""
    spread = math.sqrt(1 + hardness_sd**2 + sum(s**2 for s in spreads))
    return float(stats.norm.cdf(SKILL / spread))


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


@pytest.mark.slow
@pytest.mark.parametrize("units", [3, 5])
@pytest.mark.parametrize(("by_seed", "by_fine"), [(0.12, 0.0), (0.12, 0.2)])
def test_of_100_intervals_93_to_97_hold_the_truth(
    units: int, by_seed: float, by_fine: float
) -> None:
    rng = np.random.default_rng(11)
    hardness = rng.normal(0, 1, (1200, NUM_EXAMPLES))
    first, second = (
        trainings(rng, hardness, units=units, by_seed=by_seed, by_fine=by_fine) for _ in range(2)
    )
    expected = truth(1, by_seed, by_fine)
    scores = [estimate(one) for one in first]
    paired = [estimate(one - other) for one, other in zip(first, second, strict=True)]
    apart = [estimate(one, other) for one, other in zip(first, second, strict=True)]
    for name, found, true in (
        ("a mean", scores, expected), ("paired", paired, 0.0), ("apart", apart, 0.0)
    ):  # fmt: skip
        covered = share([e.interval[0] <= true <= e.interval[1] for e in found if e.interval])
        assert 0.93 <= covered <= 0.97, (name, covered)
    assert {(e.over, e.n) for e in apart} == {(SEEDS, (units, units))}


def test_equal_systems_differ_in_5_tables_of_100_after_holms_correction() -> None:
    num_tasks = 8
    rng = np.random.default_rng(12)
    tables, by_chance = [], []
    hardness = rng.normal(0, 1, (400 * num_tasks, NUM_EXAMPLES))
    first, second = (trainings(rng, hardness, units=3, by_seed=0.12) for _ in range(2))
    p_values = [estimate(a - b).p_value for a, b in zip(first, second, strict=True)]
    for start in range(0, len(p_values), num_tasks):
        table = p_values[start : start + num_tasks]
        tables.append(any(holm(table)))
        by_chance.append(any(p is not None and p < 0.05 for p in table))
    error = 2 * math.sqrt(0.05 * 0.95 / len(tables))
    assert share(tables) <= 0.05 + error
    assert share(by_chance) > 0.05 + error, "without the correction it is more"


def test_a_difference_that_is_there_is_found() -> None:
    rng = np.random.default_rng(13)
    hardness = rng.normal(0, 1, (200, NUM_EXAMPLES))
    weak = trainings(rng, hardness, units=5, by_seed=0.05)
    strong = trainings(rng, hardness + 0.8, units=5, by_seed=0.05)
    found = [estimate(a - b) for a, b in zip(strong, weak, strict=True)]
    assert share([e.p_value is not None and e.p_value < 0.05 for e in found]) > 0.95


@pytest.mark.parametrize("units", [1, 2])
def test_fewer_than_three_seeds_give_an_interval_over_examples_and_no_test(units: int) -> None:
    rng = np.random.default_rng(5)
    right = rng.random((units, 300)) < 0.7
    one = sample(
        ACCURACY, right.mean(axis=1).tolist(),
        [ACCURACY.statistics(np.ones(300), row, []) for row in right], num_draws=4000,
    )  # fmt: skip
    found = estimate(one)
    assert (found.over, found.n, found.p_value) == (EXAMPLES, (units,), None)
    plain = [right[:, rng.integers(300, size=300)].mean() for _ in range(4000)]
    np.testing.assert_allclose(found.interval, np.percentile(plain, [2.5, 97.5]), atol=0.006)
    assert holm([found.p_value, found.p_value]) == [False, False]


def test_without_a_share_of_the_examples_the_interval_is_students() -> None:
    scores = np.array([0.7, 0.72, 0.76, 0.71])
    still = Sample(scores=scores, drawn=np.repeat(scores[:, None], 50, axis=1))
    found, other = estimate(still - Sample(scores=0 * scores, drawn=0 * still.drawn)), scores * 0.9
    expected = stats.ttest_1samp(scores, 0)
    np.testing.assert_allclose(found.interval, expected.confidence_interval(0.95))
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-4)
    half = student_half_width(scores.tolist())
    assert half == pytest.approx((found.interval[1] - found.interval[0]) / 2)
    assert student_half_width([0.5]) is None
    apart = estimate(still, Sample(scores=other, drawn=np.repeat(other[:, None], 50, axis=1)))
    welch = stats.ttest_ind(scores, other, equal_var=False)
    np.testing.assert_allclose(apart.interval, welch.confidence_interval(0.95))
    assert apart.p_value == pytest.approx(welch.pvalue, rel=1e-4)


def test_seeds_that_agree_leave_the_variance_of_the_examples() -> None:
    rng = np.random.default_rng(7)
    drawn = np.tile(0.1 + 0.01 * rng.normal(size=20_000), (3, 1))
    found = estimate(Sample(scores=np.full(3, 0.1), drawn=drawn))
    np.testing.assert_allclose(found.interval, (0.1 - 0.0196, 0.1 + 0.0196), atol=5e-4)
    nothing = estimate(Sample(scores=np.zeros(3), drawn=np.zeros((3, 10))))
    assert (nothing.interval, nothing.p_value) == ((0.0, 0.0), 1.0)


def test_fine_tunings_are_averaged_before_pre_trainings_are_counted() -> None:
    whole = Sample(scores=np.array([1.0, 3.0, 5.0, 7.0]), drawn=np.arange(8.0).reshape(4, 2))
    by_unit = whole.per_unit(2)
    assert by_unit.scores.tolist() == [2.0, 6.0]
    assert by_unit.drawn.tolist() == [[1.0, 2.0], [5.0, 6.0]]
    again = joined([mean_of([by_unit, by_unit]), by_unit])
    assert again.scores.tolist() == [2.0, 6.0, 2.0, 6.0]


def test_too_many_scores_that_are_not_defined_give_no_interval() -> None:
    scores = np.array([0.5])
    assert estimate(Sample(scores=scores, drawn=np.array([[math.nan, math.nan, 0.5]]))).over is None
    found = estimate(Sample(scores=scores, drawn=np.array([[0.5, 0.6, math.nan]])))
    assert found.interval is not None


def test_holm_stops_at_the_first_value_that_is_not_small_enough() -> None:
    assert holm([0.04, None, 0.01, 0.03]) == [False, False, True, False]
    assert holm([0.02, 0.01, 0.04]) == [True, True, True]
    assert holm([]) == []
