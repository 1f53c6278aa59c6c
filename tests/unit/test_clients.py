"""Whose an example is: every split gives each example one owner, and says how uneven it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpipe.commands.finetune.clients import (
    Labels,
    class_labels,
    deal_out,
    describe,
    no_labels,
    number_labels,
    tag_labels,
)
from fedpipe.config.finetune import TaskConfig
from fedpipe.errors import CorpusError

NAMES = ("a", "b", "c", "d")


def labels(size: int, *, seed: int = 0) -> Labels:
    rng = np.random.default_rng(seed)
    return class_labels(rng.integers(0, 4, size).astype(np.float64), NAMES)


def deal(split: str, *, clients: int = 5, size: int = 200, **asked: Any) -> Any:
    columns = asked.pop("columns", None)
    task = TaskConfig(split=split, column="site" if columns else "", **asked)  # type: ignore[arg-type]
    train, test = labels(size), labels(size // 2, seed=1)
    owned = deal_out(task, train, test, num_clients=clients, seed=3, columns=columns)
    return train, *owned


@pytest.mark.parametrize("split", ["iid", "label_sorted", "dirichlet"])
def test_every_example_has_one_owner(split: str) -> None:
    _, train, test = deal(split)
    assert sorted(np.concatenate(train)) == list(range(200))
    assert sorted(np.concatenate(test)) == list(range(100))
    assert all(len(mine) for mine in (*train, *test))


def test_iid_shards_are_equal_in_size_and_even_in_labels() -> None:
    known, train, test = deal("iid", size=4000)
    facts = describe(known, train, test)
    assert {fact.num_examples for fact in facts} == {800}
    assert min(fact.entropy_bits for fact in facts) > 1.98
    assert not any(fact.missing for fact in facts)


def test_sorted_shards_have_few_labels_each() -> None:
    known, train, test = deal("label_sorted", clients=8)
    facts = describe(known, train, test)
    assert {fact.num_examples for fact in facts} == {25}
    assert max(4 - len(fact.missing) for fact in facts) == 2
    assert max(fact.entropy_bits for fact in facts) <= 1
    held_out = [set(labels(100, seed=1).classes[mine]) for mine in test]
    assert max(map(len, held_out)) <= 3  # a client is scored on what it knows


def test_small_alpha_gives_few_labels() -> None:
    entropies = []
    for alpha in (0.05, 100.0):
        known, train, test = deal("dirichlet", size=2000, dirichlet_alpha=alpha)
        entropies.append(np.mean([f.entropy_bits for f in describe(known, train, test)]))
    assert entropies[0] < 1.2 < 1.9 < entropies[1]


def test_a_column_keeps_its_values_together() -> None:
    sites = [f"site {i % 7}" for i in range(200)]
    _, train, _ = deal("column", columns=(sites, sites[:100]))
    owners = [{sites[i] for i in mine} for mine in train]
    assert sum(map(len, owners)) == 7


def test_too_few_values_of_a_column_are_refused() -> None:
    sites = ["one", "two"] * 100
    with pytest.raises(CorpusError, match=r"^task.column: expected at least 5 values of 'site'"):
        deal("column", columns=(sites, sites[:100]))


def test_an_empty_client_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"^federation.num_clients: expected at most 4 \(the tr"):
        deal("iid", clients=9, size=4)


def test_entropy_by_hand() -> None:
    known = class_labels(np.array([0.0, 0, 1, 2]), NAMES)
    fact = describe(known, [np.arange(4)], [np.arange(2)])[0]
    assert fact.entropy_bits == pytest.approx(1.5)
    assert fact.missing == ("d",)


def test_tags_and_numbers_have_classes() -> None:
    known = tag_labels([(0, 0, 1), (0, 2), (0, 0)], ("O", "B-x", "I-x"))
    assert known.classes.tolist() == [1, 2, 0]
    assert known.counts.tolist() == [[2, 1, 0], [1, 0, 1], [2, 0, 0]]
    numbers = number_labels(np.arange(8.0), like=np.arange(8.0))
    assert np.bincount(numbers.classes).tolist() == [2, 2, 2, 2]
    assert describe(no_labels(3), [np.arange(3)], [np.arange(1)])[0].entropy_bits == 0
