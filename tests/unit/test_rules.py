"""Rules and server optimizers against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpipe.config.federation import AttackConfig, FederationConfig, ServerOptimizerConfig
from fedpipe.config.load import from_dict
from fedpipe.federation.rules import (
    ServerOptimizer,
    krum_select,
    median,
    squared_distances,
    trimmed_mean,
)
from fedpipe.federation.synchronizer import falsify
from fedpipe.federation.traffic import averaging_bytes

NAN, INF = math.nan, math.inf


def _close(actual: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


def test_the_median_is_the_middle_of_each_coordinate() -> None:
    odd = torch.tensor([[1.0, 9.0], [5.0, -2.0], [3.0, 4.0]])
    _close(median(odd), [3.0, 4.0])
    _close(median(torch.cat([odd, torch.tensor([[100.0, 5.0]])])), [4.0, 4.5])
    _close(median(odd[:1]), [1.0, 9.0])


def test_the_trimmed_mean_leaves_out_the_extremes_of_each_coordinate() -> None:
    updates = torch.tensor([[1.0, 90.0], [2.0, 1.0], [3.0, 2.0], [-70.0, 3.0], [6.0, -50.0]])
    _close(trimmed_mean(updates, num_byzantine=1), [2.0, 2.0])
    _close(trimmed_mean(updates, num_byzantine=2), [2.0, 2.0])
    _close(trimmed_mean(updates, num_byzantine=0), updates.mean(0))


@pytest.mark.parametrize("lie", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum"])
def test_two_liars_of_seven_cannot_move_a_robust_rule_out_of_the_honest_range(
    rule: str, lie: float
) -> None:
    honest = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    updates = torch.cat([torch.full((2, 40), lie), honest])
    if rule == "median":
        result = median(updates)
    elif rule == "trimmed_mean":
        result = trimmed_mean(updates, num_byzantine=2)
    else:
        selected = krum_select(squared_distances(updates), num_byzantine=2)
        assert not {0, 1} & set(selected)
        result = updates[selected].mean(0)
    assert (honest.amin(0) <= result).all() and (result <= honest.amax(0)).all()
    assert (
        not (honest.amin(0) <= updates.mean(0)).logical_and(updates.mean(0) <= honest.amax(0)).all()
    )


def test_distances_of_shards_add_up() -> None:
    updates = torch.tensor([[0.0, 0.0, 1.0], [3.0, 4.0, 1.0], [0.0, 0.0, 3.0]])
    expected = [[0.0, 25.0, 4.0], [25.0, 0.0, 29.0], [4.0, 29.0, 0.0]]
    _close(squared_distances(updates), expected)
    shards = squared_distances(updates[:, :1]) + squared_distances(updates[:, 1:])
    assert torch.equal(shards, squared_distances(updates))


def test_krum_selects_the_lowest_sums_over_the_nearest_others() -> None:
    # On a line, K = 6, f = 1: three nearest count and three are selected. Scores: 0 -> 1+9+25 = 35,
    # 1 -> 1+4+16 = 21, 3 -> 4+4+9 = 17, 5 -> 4+16+25 = 45, 40 -> 35^2+37^2+39^2,
    # -0.5 -> 0.25+2.25+12.25 = 14.75; and with -0.5: 0 -> 0.25+1+9 = 10.25, 1 -> 1+2.25+4 = 7.25,
    # 3 -> 4+4+9 = 17, 5 -> 4+16+25 = 45.
    updates = torch.tensor([[0.0], [1.0], [3.0], [5.0], [40.0], [-0.5]])
    assert krum_select(squared_distances(updates), num_byzantine=1) == [0, 1, 5]


def test_krum_does_not_count_a_client_itself_when_others_send_the_same() -> None:
    # K = 5, f = 1: two nearest, two selected. The twins' scores are 0 + 100, the middle's 1 + 1.
    updates = torch.tensor([[0.0], [0.0], [10.0], [11.0], [12.0]])
    assert krum_select(squared_distances(updates), num_byzantine=1) == [2, 3]


# Two rounds of delta = (aggregate - weights) from weights (1, 1), aggregates (2, 0) and (3, 3).
# lr = 0.5, betas = (0.5, 0.75), tau = 0.1; v starts at 0.01.
def _adam_by_hand() -> list[list[float]]:
    v = 0.75 * 0.01 + 0.25 * 1.0
    first = [1 + 0.5 * 0.5 / (math.sqrt(v) + 0.1), 1 - 0.5 * 0.5 / (math.sqrt(v) + 0.1)]
    second = []
    for w, m in zip(first, (0.5, -0.5), strict=True):
        delta = 3 - w
        v2 = 0.75 * v + 0.25 * delta**2
        second.append(w + 0.5 * (0.5 * m + 0.5 * delta) / (math.sqrt(v2) + 0.1))
    return [first, second]


def _yogi_by_hand() -> list[list[float]]:
    v = 0.01 + 0.25 * 1.0  # delta^2 = 1 is above v = 0.01: sign -1, v grows by (1 - b2) delta^2
    first = [1 + 0.5 * 0.5 / (math.sqrt(v) + 0.1), 1 - 0.5 * 0.5 / (math.sqrt(v) + 0.1)]
    second = []
    for w, m in zip(first, (0.5, -0.5), strict=True):
        delta = 3 - w
        v2 = v - 0.25 * delta**2 * math.copysign(1, v - delta**2)
        second.append(w + 0.5 * (0.5 * m + 0.5 * delta) / (math.sqrt(v2) + 0.1))
    return [first, second]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedavg", [[1.5, 0.5], [2.25, 1.75]]),
        # v = (1, -1), then 0.5 v + (3 - w) = (0.5 + 1.5, -0.5 + 2.5)
        ("fedavgm", [[1.5, 0.5], [2.5, 1.5]]),
        ("fedadam", _adam_by_hand()),
        ("fedyogi", _yogi_by_hand()),
    ],
)
def test_a_server_optimizer_takes_the_steps_of_its_paper(
    name: Any, expected: list[list[float]]
) -> None:
    config = ServerOptimizerConfig(name=name, lr=0.5, betas=(0.5, 0.75), tau=0.1)
    weights = torch.tensor([1.0, 1.0])
    optimizer = ServerOptimizer(config, like=weights)
    for aggregate, after in zip(([2.0, 0.0], [3.0, 3.0]), expected, strict=True):
        optimizer.step_(weights, torch.tensor(aggregate))
        _close(weights, after)


def test_yogi_shrinks_its_second_moment_where_the_change_is_small() -> None:
    config = ServerOptimizerConfig(name="fedyogi", betas=(0.0, 0.75), tau=0.5)
    weights = torch.tensor([1.0])
    optimizer = ServerOptimizer(config, like=weights)
    optimizer.step_(weights, torch.tensor([1.2]))
    _close(optimizer.moments["second"], [0.25 - 0.25 * 0.04])


def test_fedavg_with_a_step_of_one_is_the_aggregate_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(3)
    weights, aggregate = torch.randn(1001, generator=draw), torch.randn(1001, generator=draw)
    ServerOptimizer(ServerOptimizerConfig(), like=weights).step_(weights, aggregate)
    assert torch.equal(weights, aggregate)


def test_a_flipped_update_points_back() -> None:
    change = torch.tensor([1.0, -2.0])
    attack = AttackConfig(kind="sign_flip", num_attackers=1, scale=3.0)
    assert falsify(change, attack, seed=0).tolist() == [-3.0, 6.0]


def test_noise_has_the_changes_own_size_and_is_a_function_of_the_seed() -> None:
    change = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 0.01 + 5.0
    attack = AttackConfig(kind="noise", num_attackers=1, scale=2.0)
    noise = falsify(change, attack, seed=7) - change
    # The standard deviation of 20,000 draws lies within 3 % of the true one, six sigma.
    assert float(noise.std()) == pytest.approx(2.0 * float(change.std()), rel=0.03)
    assert torch.equal(falsify(change, attack, seed=7), change + noise)
    assert not torch.equal(falsify(change, attack, seed=8), change + noise)


def _federation(**values: Any) -> FederationConfig:
    base = {"num_clients": 8, "num_replicas": 4, "clients_per_round": 8}
    return from_dict({"federation": base | values}).federation


def test_nesterov_momentum_takes_the_outer_steps_of_diloco() -> None:
    """DiLoCo's outer optimizer, lr 0.7 and momentum 0.9, as PyTorch's SGD has it."""
    config = ServerOptimizerConfig(name="fedavgm", lr=0.7, nesterov=True, betas=(0.9, 0.99))
    draw = np.random.default_rng(0)
    expected, momentum = draw.standard_normal(100), np.zeros(100)
    weights = torch.tensor(expected)
    optimizer = ServerOptimizer(config, like=weights)
    for _ in range(5):
        change = draw.standard_normal(100)
        optimizer.step_(weights, torch.tensor(expected + change))
        momentum = 0.9 * momentum + change
        expected = expected + 0.7 * (0.9 * momentum + change)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("density", "factor"), [(0.01, 282), (0.02, 160), (0.03, 114)])
def test_a_sparse_average_moves_a_hundredth_of_a_float32_one_or_less(
    density: float, factor: int
) -> None:
    two = {"num_replicas": 2, "density": density}
    wide, sparse = (
        averaging_bytes(4096 * 500, federation=_federation(wire=wire, **two))
        for wire in ("fp32", "sparse")
    )
    assert int(wide / sparse) == factor
    eight = _federation(wire="sparse", num_replicas=8, density=density)
    assert averaging_bytes(4096 * 500, federation=eight) == 7 * sparse
    assert averaging_bytes(0, federation=eight) == 0


def test_an_int8_average_moves_about_a_quarter_of_a_float32_one() -> None:
    numel = 10_000_000
    sizes = [
        averaging_bytes(numel, federation=_federation(wire=w)) for w in ("fp32", "bf16", "int8")
    ]
    assert sizes[0] == 2 * 3 * numel  # 2 (R - 1) / R of four bytes each
    assert sizes[0] / sizes[1] == pytest.approx(2.0, rel=1e-3)
    assert sizes[0] / sizes[2] == pytest.approx(4 / (1 + 4 / 1024), rel=1e-3)
    assert averaging_bytes(0, federation=_federation(wire="int8")) == 0
    alone = _federation(num_replicas=1, clients_per_round=1, wire="int8")
    assert averaging_bytes(numel, federation=alone) == 0
