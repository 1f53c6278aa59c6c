"""How a round's clients become one model, per stage: pure functions of tensors, no communication.

The robust rules bound what ``num_byzantine`` (f) arbitrary clients can do to the result, nan and
inf included.
"""

# K = clients of the round, N = parameters of the stage, or of a shard of it

from __future__ import annotations

import torch
from torch import Tensor

from fedpipe.config.federation import ServerOptimizerConfig


def median(updates_KN: Tensor) -> Tensor:
    """Return the coordinate-wise median; of an even K, the mean of the two in the middle.

    Source: Yin et al. 2018, definition 1, https://arxiv.org/abs/1803.01498.
    """
    ordered_KN = updates_KN.sort(dim=0).values  # nan comes last, and so counts as an extreme
    middle = (len(ordered_KN) - 1) // 2
    return (ordered_KN[middle] + ordered_KN[len(ordered_KN) // 2]) / 2


def trimmed_mean(updates_KN: Tensor, *, num_byzantine: int) -> Tensor:
    """Return the coordinate-wise mean without the f largest and the f smallest values.

    Source: Yin et al. 2018, definition 2 with beta = f / K, https://arxiv.org/abs/1803.01498.

    Args:
        updates_KN: float.
        num_byzantine: f, below K / 2.
    """
    ordered_KN = updates_KN.sort(dim=0).values
    return ordered_KN[num_byzantine : len(ordered_KN) - num_byzantine].mean(dim=0)


def squared_distances(updates_KN: Tensor) -> Tensor:
    """Return the pairwise squared distances, (K, K) float64; those of shards add up."""
    rows = [(updates_KN - row_N).square().sum(-1, dtype=torch.float64) for row_N in updates_KN]
    return torch.stack(rows)


def krum_select(distances_KK: Tensor, *, num_byzantine: int) -> list[int]:
    """Return the clients whose mean multi-Krum takes, ascending.

    A client's score is the sum of the squared distances to its K - f - 2 nearest others. The
    K - f - 2 lowest scores are selected: the most for which resilience is proven.
    Source: Krum, Blanchard et al. 2017, section 4, https://arxiv.org/abs/1703.02757; the number
    selected, El Mhamdi et al. 2018, section 3, https://arxiv.org/abs/1802.07927.

    Args:
        distances_KK: Squared, float64; symmetric, zero diagonal.
        num_byzantine: f, with K >= 2 f + 3.
    """
    num_nearest = len(distances_KK) - num_byzantine - 2
    distances_KK = distances_KK.nan_to_num(nan=torch.inf, posinf=torch.inf)
    distances_KK.fill_diagonal_(-1.0)  # itself comes first, whoever else is as near
    scores_K = distances_KK.sort(dim=1).values[:, 1 : 1 + num_nearest].sum(dim=1)
    return sorted(scores_K.sort(stable=True).indices[:num_nearest].tolist())


class ServerOptimizer:
    """Takes the aggregate of a round as a gradient: ``delta = aggregate - weights``.

    - fedavg: ``w <- w + lr delta``
    - fedavgm: ``v <- b1 v + delta``, ``w <- w + lr v``; with ``nesterov``
      ``w <- w + lr (b1 v + delta)``
    - fedadam: ``m <- b1 m + (1 - b1) delta``, ``v <- b2 v + (1 - b2) delta^2``,
      ``w <- w + lr m / (sqrt(v) + tau)``
    - fedyogi: the same with ``v <- v - (1 - b2) delta^2 sign(v - delta^2)``

    Moments start at m = 0 and v = tau^2; there is no bias correction.
    Source: fedavgm, Hsu et al. 2019, section 3, https://arxiv.org/abs/1909.06335; nesterov, DiLoCo,
    Douillard et al. 2023, algorithm 1, https://arxiv.org/abs/2311.08105; the others, Reddi et al.
    2021, algorithm 2, https://arxiv.org/abs/2003.00295.
    """

    def __init__(self, config: ServerOptimizerConfig, *, like: Tensor) -> None:
        """Start with fresh moments.

        Args:
            config: Which one.
            like: The weights (N), for shape, dtype and device.
        """
        self._config = config
        self.moments: dict[str, Tensor] = {}
        if config.name != "fedavg":
            self.moments["first"] = torch.zeros_like(like)
        if config.name in ("fedadam", "fedyogi"):
            self.moments["second"] = torch.full_like(like, config.tau**2)

    def step_(self, weights_N: Tensor, aggregate_N: Tensor) -> None:
        """Move the global weights, in place."""
        config, (beta1, beta2) = self._config, self._config.betas
        if config.name == "fedavg":
            weights_N.lerp_(aggregate_N, config.lr)  # at lr 1 the aggregate itself, bit for bit
            return
        delta_N, first_N = aggregate_N - weights_N, self.moments["first"]
        if config.name == "fedavgm":
            first_N.mul_(beta1).add_(delta_N)
            step_N = first_N.mul(beta1).add_(delta_N) if config.nesterov else first_N
            weights_N.add_(step_N, alpha=config.lr)
            return
        first_N.lerp_(delta_N, 1 - beta1)
        second_N, square_N = self.moments["second"], delta_N.square_()
        if config.name == "fedadam":
            second_N.lerp_(square_N, 1 - beta2)
        else:
            sign_N = (second_N - square_N).sign_()
            second_N.addcmul_(square_N, sign_N, value=beta2 - 1)
        weights_N.addcdiv_(first_N, second_N.sqrt().add_(config.tau), value=config.lr)
