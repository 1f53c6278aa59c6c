"""Scores: the libraries' own; their sums agree; intervals as by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn_metrics

from fedpipe.data.tasks.registry import TASKS
from fedpipe.metrics.scoring import METRICS, draws, interval, paired_differences, resamples
from fedpipe.workflows.evaluate.cell import positive_classes

RNG = np.random.default_rng(3)
GOLD_TAGS = [
    ["B-X", "I-X", "O", "B-X"],
    ["O", "O"],
    ["B-X", "B-X", "I-X"],
    ["B-Y", "I-Y", "O"],
    ["O", "B-X"],
]
TAGS = [
    ["B-X", "I-X", "O", "O"],
    ["O", "I-X"],  # an I without a B is no entity in strict mode
    ["B-X", "I-X", "I-X"],
    ["B-X", "I-X", "O"],  # the right place, another type
    ["O", "B-X"],
]
CLASSES = (RNG.integers(0, 2, 80), RNG.integers(0, 2, 80))
DDI = (RNG.integers(0, 5, 200), RNG.integers(0, 5, 200))
NUMBERS = (RNG.normal(size=60).round(1), RNG.normal(size=60).round(1))


def data(name: str) -> tuple[Any, Any, list[int]]:
    if name.startswith("entity"):
        return GOLD_TAGS, TAGS, []
    if name in ("pearson", "spearman"):
        return *NUMBERS, []
    return (*DDI, [1, 2, 3, 4]) if name == "micro_f1" else (*CLASSES, [0, 1])


def test_entities_are_counted_strictly_by_hand() -> None:
    gold, predicted, _ = data("entity_f1")
    # found: B-X I-X in the first, B-X in the last; predicted 4, there are 6
    assert METRICS["entity_precision"].whole(gold, predicted, []) == pytest.approx(2 / 4)
    assert METRICS["entity_recall"].whole(gold, predicted, []) == pytest.approx(2 / 6)
    expected = seqeval_f1(gold, predicted, mode="strict", scheme=IOB2)
    assert METRICS["entity_f1"].whole(gold, predicted, []) == expected == pytest.approx(0.4)


def test_ddi_counts_positive_classes_only_and_gad_all_of_them() -> None:
    assert positive_classes(TASKS["ddi"]) == [1, 2, 3, 4]
    gold, predicted = np.array([0, 0, 1, 2, 3, 4]), np.array([0, 1, 1, 2, 0, 1])
    # positive and right 2 (classes 1 and 2); predicted positive 4; positive 4
    assert METRICS["micro_f1"].whole(gold, predicted, [1, 2, 3, 4]) == pytest.approx(2 * 2 / 8)
    assert positive_classes(TASKS["gad"]) == [0, 1]
    score = METRICS["micro_f1"].whole(*CLASSES, [0, 1])
    assert score == pytest.approx(sklearn_metrics.accuracy_score(*CLASSES))


def test_glue_scores_are_the_libraries_own() -> None:
    assert METRICS["f1"].whole(*CLASSES, [0, 1]) == sklearn_metrics.f1_score(*CLASSES)
    assert METRICS["matthews"].whole(*CLASSES, []) == sklearn_metrics.matthews_corrcoef(*CLASSES)
    assert METRICS["pearson"].whole(*NUMBERS, []) == stats.pearsonr(*NUMBERS).statistic
    assert METRICS["spearman"].whole(*NUMBERS, []) == stats.spearmanr(*NUMBERS).statistic
    assert np.isnan(METRICS["pearson"].whole([1.0, 2.0], [3.0, 3.0], []))


@pytest.mark.parametrize("name", METRICS)
def test_the_sums_of_a_metric_give_the_librarys_score_on_the_whole(name: str) -> None:
    metric = METRICS[name]
    gold, predicted, positive = data(name)
    statistics = metric.statistics(gold, predicted, positive)
    assert len(statistics) == len(gold)
    whole = metric.whole(gold, predicted, positive)
    if metric.from_sums is not None:
        assert float(metric.from_sums(statistics.sum(0))) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_the_statistics_of_parts_of_a_test_set_are_those_of_the_whole(name: str) -> None:
    metric = METRICS[name]
    gold, predicted, positive = data(name)
    half = len(gold) // 2
    parts = [
        metric.statistics(gold[rows], predicted[rows], positive)
        for rows in (slice(half), slice(half, None))
    ]
    np.testing.assert_array_equal(
        np.concatenate(parts), metric.statistics(gold, predicted, positive)
    )


def test_the_correlation_with_a_constant_is_not_defined() -> None:
    constant = np.full(60, 0.1)
    metric = METRICS["pearson"]
    assert metric.from_sums is not None
    for pair in ((NUMBERS[0], constant), (constant, NUMBERS[0]), (constant, constant)):
        assert np.isnan(metric.from_sums(metric.statistics(*pair, []).sum(0)))
        assert np.isnan(metric.whole(*pair, []))


@pytest.mark.parametrize("name", METRICS)
def test_every_resampled_test_set_is_scored_as_the_library_would(name: str) -> None:
    metric = METRICS[name]
    gold, predicted, positive = data(name)
    num_draws = 150  # more than one chunk
    found = draws(metric, [metric.statistics(gold, predicted, positive)], num_draws=num_draws)
    expected = []
    for chunk in resamples(len(gold), num_draws=num_draws):
        for weights in chunk.astype(int):
            rows = np.repeat(np.arange(len(gold)), weights)
            sets = ([x[i] for i in rows] for x in (gold, predicted))
            expected.append(metric.whole(*sets, positive))
    assert found.shape == (1, num_draws)
    np.testing.assert_allclose(found[0], expected, atol=1e-9)


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    metric = METRICS["accuracy"]
    rng = np.random.default_rng(5)
    gold = np.zeros(300, dtype=int)
    predicted = (rng.random(300) < 0.3).astype(int)
    found = interval(draws(metric, [metric.statistics(gold, predicted, [])], num_draws=4000)[0])
    hits = gold == predicted
    plain = [hits[rng.integers(300, size=300)].mean() for _ in range(4000)]
    np.testing.assert_allclose(found, np.percentile(plain, [2.5, 97.5]), atol=0.006)


def test_an_interval_of_scores_that_are_not_defined_is_none() -> None:
    assert interval(np.array([np.nan, np.nan, 0.5])) is None
    assert interval(np.array([0.1, 0.2, np.nan])) is not None
    assert interval(np.empty(0)) is None


def test_paired_differences_use_the_same_test_examples() -> None:
    metric = METRICS["accuracy"]
    rng = np.random.default_rng(6)
    gold = np.zeros(400, dtype=int)
    one = (rng.random(400) < 0.4).astype(int)
    other = one.copy()
    other[np.flatnonzero(one)[:12]] = 0  # right on 12 examples more
    first, second = ([metric.statistics(gold, x, [])] for x in (other, one))
    found = interval(paired_differences(metric, first, second, num_draws=1000, same_seeds=True))
    assert found is not None
    assert 0 < found[0] < 0.03 < found[1] < 0.06
    nothing = paired_differences(metric, first, first, num_draws=1000, same_seeds=True)
    assert not nothing.any()
    alone = [interval(draws(metric, x, num_draws=1000)[0]) for x in (first, second)]
    assert alone[0] and alone[1] and alone[0][0] < alone[1][1], "unpaired intervals overlap"


def test_paired_differences_resample_seeds_as_pairs_where_they_are_the_same() -> None:
    metric = METRICS["accuracy"]
    gold = np.zeros(50, dtype=int)
    good, bad = np.zeros(50, dtype=int), np.ones(50, dtype=int)
    seeds = [metric.statistics(gold, predicted, []) for predicted in (good, bad)]
    paired = paired_differences(metric, seeds, seeds, num_draws=1000, same_seeds=True)
    assert not paired.any()
    apart = paired_differences(metric, seeds, seeds[::-1], num_draws=1000, same_seeds=False)
    assert set(apart) == {-1.0, -0.5, 0.0, 0.5, 1.0}
