"""Scores: the libraries' own; their sums agree; resampled test sets as by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn_metrics

from fedpipe.data.tasks.registry import TASKS, TaskSpec
from fedpipe.data.tasks.scoring import METRICS, draws, resamples

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
    assert TaskSpec.of(TASKS["ddi"]).positive == (1, 2, 3, 4)
    gold, predicted = np.array([0, 0, 1, 2, 3, 4]), np.array([0, 1, 1, 2, 0, 1])
    # positive and right 2 (classes 1 and 2); predicted positive 4; positive 4
    assert METRICS["micro_f1"].whole(gold, predicted, [1, 2, 3, 4]) == pytest.approx(2 * 2 / 8)
    assert TaskSpec.of(TASKS["gad"]).positive == (0, 1)
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
