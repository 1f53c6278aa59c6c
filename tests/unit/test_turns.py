"""Rounds of a fine-tuning: who trains, who is slow, who is lost; a function of the seed only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpipe.commands.finetune.turns import batches, num_tuning_steps, plan_tuning_round
from fedpipe.config.finetune import FinetuneConfig, load_finetune
from fedpipe.federation.cohort import client_history

LENGTHS = [np.arange(1, size + 1) for size in (40, 10, 25, 3, 60, 17, 5, 33)]


def config(*overrides: str) -> FinetuneConfig:
    base = ["federation.num_clients=8", "federation.clients_per_round=8", "batch_size=4"]
    return load_finetune(None, [*base, *overrides])


def plan(*overrides: str, round_id: int = 0) -> Any:
    return plan_tuning_round(config(*overrides), round_id=round_id, lengths=LENGTHS)


def test_shares_are_those_of_trained_examples() -> None:
    turns = plan().turns
    assert {t.client_id: t.num_examples for t in turns} == dict(enumerate(map(len, LENGTHS)))
    total = sum(map(len, LENGTHS))
    assert all(t.weight == pytest.approx(t.num_examples / total) for t in turns)


@pytest.mark.parametrize(
    ("weighting", "shares"),
    [("uniform", [1] * 8), ("tokens", [int(x.sum()) for x in LENGTHS])],
)
def test_shares_are_tokens_or_equal_where_asked_for(weighting: str, shares: list[int]) -> None:
    turns = sorted(
        plan(f"federation.aggregation.weighting={weighting}").turns, key=lambda t: t.client_id
    )
    assert [t.weight for t in turns] == pytest.approx([s / sum(shares) for s in shares])


def test_the_lost_send_nothing_and_shares_are_of_those_who_came_back() -> None:
    found = plan("scenario.dropout_share=0.5")
    back = {turn.client_id for turn in found.turns}
    assert found.dropped and back | set(found.dropped) == set(range(8))
    assert not back & set(found.dropped)
    assert sum(turn.weight for turn in found.turns) == pytest.approx(1)
    assert [t.replica_id for t in found.turns] == [k % 2 for k in range(len(found.turns))]


def test_stragglers_end_early() -> None:
    whole = {t.client_id: t.num_steps for t in plan().turns}
    found = plan("scenario.straggler_share=0.5", "scenario.straggler_work=0.25")
    assert 0 < len(found.stragglers) < 8
    for turn in found.turns:
        slow = turn.client_id in found.stragglers
        steps = whole[turn.client_id]
        assert turn.num_steps == (max(1, int(steps * 0.25)) if slow else steps)


def test_the_scenario_is_a_function_of_the_seed_and_the_round() -> None:
    asked = ("scenario.dropout_share=0.5", "scenario.straggler_share=0.5")
    assert plan(*asked) == plan(*asked)
    fates = {(r, s): plan(*asked, f"seed={s}", round_id=r).dropped for r in (0, 1) for s in (0, 1)}
    assert len(set(fates.values())) > 1


def test_the_number_of_workers_changes_no_turn_but_its_place() -> None:
    few, many = (
        [(t.client_id, t.num_steps, t.weight) for t in plan(f"federation.num_replicas={n}").turns]
        for n in (1, 4)
    )
    assert few == many


def test_too_few_clients_for_a_robust_rule_leave_the_round_out() -> None:
    rule = ("federation.aggregation.rule=krum", "federation.aggregation.num_byzantine=2",
            "federation.aggregation.weighting=uniform", "scenario.dropout_share=0.9")  # fmt: skip
    found = plan(*rule)
    assert not found.turns
    assert len(found.dropped) > 1


@pytest.mark.parametrize(
    ("epochs", "size", "steps"), [(1, 10, 3), (2, 10, 6), (0.5, 16, 2), (0.1, 8, 1)]
)
def test_epochs_are_passes_over_the_batches(epochs: float, size: int, steps: int) -> None:
    asked = config(f"federation.num_local_epochs={epochs}")
    assert num_tuning_steps(asked, size) == steps
    assert num_tuning_steps(config("federation.num_local_epochs=0"), size) == 20


def test_a_pass_takes_every_example_once_and_passes_differ() -> None:
    found = list(batches(config(), 3, round_id=1, size=10, steps=6))
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(found[:3]), np.concatenate(found[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert first.tolist() != np.concatenate(list(batches(config(), 3, round_id=2, size=10,
                                                         steps=3))).tolist()  # fmt: skip


@pytest.mark.parametrize("byzantine", [0, 1])
def test_the_last_round_of_a_client_is_the_one_from_which_it_came_back(byzantine: int) -> None:
    """In a round that is left out for too few clients nobody trains."""
    asked = ["scenario.dropout_share=0.5", "federation.clients_per_round=3"]
    if byzantine:
        asked += ["federation.aggregation.rule=trimmed_mean",
                  "federation.aggregation.weighting=uniform",
                  "federation.aggregation.num_byzantine=1"]  # fmt: skip
    plans = [plan(*asked, round_id=round_id) for round_id in range(6)]
    assert not all(p.turns for p in plans)
    found = client_history(lambda round_id: plans[round_id].turns, before=6, num_clients=8)
    for client_id, last in enumerate(found.last_round):
        mine = [r for r, p in enumerate(plans) for t in p.turns if t.client_id == client_id]
        assert last == max(mine, default=None)
        assert found.examples_seen[client_id] == len(mine) * len(LENGTHS[client_id])
