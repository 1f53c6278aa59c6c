"""Who trains in a round, for how long and with which weight."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.federation.cohort import (
    Turn,
    client_history,
    draw_cohort,
    num_local_steps,
    plan_round,
    steps_per_round,
)
from tests.helpers.tiny import LENGTH, tiny_config

BLOCKS = [40, 7, 100, 1, 63, 12]


def _config(*, seed: int = 0, **federation: Any) -> RunConfig:
    import dataclasses

    base = {"num_clients": len(BLOCKS), "clients_per_round": 3, "num_replicas": 2, "num_rounds": 9}
    return dataclasses.replace(tiny_config(federation=base | federation), seed=seed)


def _plan(config: RunConfig, round_id: int) -> tuple[Turn, ...]:
    return plan_round(config, round_id=round_id, blocks_per_client=BLOCKS)


def _draw(seed: int, round_id: int, count: int = 4) -> tuple[int, ...]:
    return draw_cohort(seed, round_id=round_id, num_clients=10, clients_per_round=count)


def test_a_cohort_has_no_client_twice() -> None:
    for round_id in range(200):
        cohort = _draw(0, round_id)
        assert len(set(cohort)) == len(cohort) == 4
        assert set(cohort) <= set(range(10))


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    cohorts = [_draw(seed, round_id) for seed in range(4) for round_id in range(50)]
    assert cohorts == [_draw(seed, round_id) for seed in range(4) for round_id in range(50)]
    assert len(set(cohorts)) > 150, "hardly any two are the same of 5040"


def test_a_cohort_of_everyone_is_everyone() -> None:
    assert sorted(_draw(3, 5, count=10)) == list(range(10))


def test_every_client_trains_equally_often_in_the_long_run() -> None:
    counts = Counter(c for round_id in range(1000) for c in _draw(7, round_id))
    # 1000 draws with p = 0.4: a standard deviation is 15.5; five of them is chance in 10^6.
    assert all(abs(counts[c] - 400) < 78 for c in range(10))
    first = Counter(_draw(7, round_id)[0] for round_id in range(1000))
    assert all(abs(first[c] - 100) < 48 for c in range(10)), "and is hosted first equally often"


@pytest.mark.parametrize("seed", [-1, 2**63, 2**80])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert len(_draw(seed, 0)) == 4


def test_weights_are_shares_of_the_trained_tokens() -> None:
    config = _config(num_local_epochs=1.0)
    for round_id in range(50):
        turns = plan_round(config, round_id=round_id, blocks_per_client=BLOCKS)
        assert math.isclose(sum(t.weight for t in turns), 1.0, rel_tol=1e-12)
        total = sum(t.num_steps for t in turns)
        for turn in turns:
            assert turn.num_tokens == turn.num_steps * config.blocks_per_step * LENGTH
            assert turn.weight == pytest.approx(turn.num_steps / total)


def test_uniform_weights_ignore_how_much_a_client_has() -> None:
    config = _config(num_local_epochs=1.0, aggregation={"weighting": "uniform"})
    turns = plan_round(config, round_id=1, blocks_per_client=BLOCKS)
    assert len({t.num_tokens for t in turns}) > 1
    assert [t.weight for t in turns] == [1 / 3] * 3


@pytest.mark.parametrize(("replicas", "cohort"), [(1, 3), (2, 3), (2, 6), (5, 3), (3, 1)])
def test_clients_are_spread_evenly_and_in_order(replicas: int, cohort: int) -> None:
    config = _config(num_replicas=replicas, clients_per_round=cohort)
    turns = plan_round(config, round_id=2, blocks_per_client=BLOCKS)
    hosted = Counter(t.replica_id for t in turns)
    assert set(hosted) <= set(range(replicas))
    assert max(hosted.values()) == math.ceil(cohort / replicas)
    assert [t.replica_id for t in turns] == [k % replicas for k in range(cohort)]
    assert len({t.client_id for t in turns}) == cohort


def test_steps_are_the_same_for_everyone_without_epochs() -> None:
    config = _config(num_local_steps=5)
    assert {num_local_steps(config, blocks) for blocks in BLOCKS} == {5}


@pytest.mark.parametrize(
    ("epochs", "blocks", "expected"),
    [(1.0, 60, 10), (1.0, 65, 10), (1.0, 5, 1), (0.5, 60, 5), (0.01, 60, 1), (2.5, 60, 25)],
)
def test_epochs_are_whole_steps_and_one_at_least(epochs: float, blocks: int, expected: int) -> None:
    config = _config(num_local_epochs=epochs)
    assert config.blocks_per_step == 6
    assert num_local_steps(config, blocks) == expected


def test_rounding_of_floats_costs_no_step() -> None:
    """0.57 * 100 is 56.99999999999999 in floating point."""
    pipeline = {"micro_batch_size": 1, "num_micro_batches": 1}
    config = tiny_config(pipeline=pipeline, federation={"num_local_epochs": 0.57})
    assert num_local_steps(config, 100) == 57


def test_the_schedule_advances_by_the_longest_turn_there_can_be() -> None:
    config = _config(num_local_epochs=1.0)
    longest = steps_per_round(config, BLOCKS)
    assert longest == 100 // 6
    for round_id in range(20):
        turns = plan_round(config, round_id=round_id, blocks_per_client=BLOCKS)
        assert max(t.num_steps for t in turns) <= longest


@pytest.mark.parametrize("epochs", [0.0, 0.7])
def test_every_client_goes_on_where_it_stopped(epochs: float) -> None:
    config = _config(num_local_epochs=epochs, data_parallel_degree=2)
    seen = [0] * len(BLOCKS)
    plan = partial(_plan, config)
    for round_id in range(9):
        history = client_history(plan, before=round_id, num_clients=len(BLOCKS))
        assert list(history.examples_seen) == seen
        for turn in plan(round_id):
            seen[turn.client_id] += turn.num_steps * config.blocks_per_step
    assert sum(seen) > 0
