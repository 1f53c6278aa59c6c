"""The exact average of LoRA updates: the frozen weight takes up the error of averaging A and B."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedpipe.config.federation import FederationConfig
from fedpipe.distributed.comm import Comm
from fedpipe.federation.aggregation import LEDGER
from fedpipe.federation.synchronizer import Synchronizer, all_finite

if TYPE_CHECKING:
    from fedpipe.models.peft import LoraUpdate


class ProductSynchronizer(Synchronizer):
    """Keeps ``W + scaling B A`` at the mean of the clients' own, whatever their factors are.

    ``W <- W + scaling (sum_k p_k B_k A_k - B A)`` with the averaged factors ``B = sum_k p_k B_k``
    and ``A = sum_k p_k A_k``; p are the shares of the clients in the round. Factors, head and kept
    parts are those of every ``Synchronizer``.
    Source: FedEx-LoRA, Singhal et al. 2024, equation 7, https://arxiv.org/abs/2410.09432.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        federation: FederationConfig,
        *,
        updates: Sequence[LoraUpdate],
        seed: int,
        comm: Comm,
        kept: Collection[str] = (),
    ) -> None:
        """Start with no client.

        Args:
            parameters: See ``Synchronizer``.
            federation: With the plain mean.
            updates: The model's; their weights are equal on every replica.
            seed: Of attackers.
            comm: Its replica group holds the model once per replica.
            kept: See ``Synchronizer``.
        """
        super().__init__(parameters, federation, seed=seed, comm=comm, kept=kept)
        self._updates = updates
        self._sums = {u.name: torch.zeros_like(u.weight) for u in updates}
        """By weight, the products of the round under way so far."""

    def residual_numel(self, num_clients: int) -> int:
        """Elements that a client receives beside A and B in a round.

        ``sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)`` has rank ``(K - 1) r`` at most,
        so it travels as two factors of that rank, or as a matrix where that is smaller.

        Args:
            num_clients: K, clients of the round.
        """
        total = 0
        for update in self._updates:
            rank = (num_clients - 1) * update.factors[1].shape[1]
            total += min(update.weight.numel(), rank * sum(update.weight.shape))
        return total

    @torch.no_grad()
    def take_update(self, client_id: int, *, weight: float, round_id: int) -> None:
        """Take a client's factors and products into the round."""
        super().take_update(client_id, weight=weight, round_id=round_id)
        for update in self._updates:
            self._sums[update.name].add_(update.product(), alpha=weight)

    @torch.no_grad()
    def synchronize(
        self,
        num_clients: int | None = None,
        *,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> int:
        """Average the factors, then move the frozen weights. See ``Synchronizer.synchronize``."""
        sent = super().synchronize(num_clients, left_out=left_out, share=share)
        for update in self._updates:
            total = self._sums[update.name]
            sent += self._comm.sum_over_replicas_(0, total, label=LEDGER)
            update.weight.add_(total.div_(share).sub_(update.product()))
            total.zero_()
        return sent

    def forget_round(self) -> None:
        """Leave the weights as they are, whatever the round's clients have sent."""
        super().forget_round()
        for total in self._sums.values():
            total.zero_()

    @property
    def is_global_finite(self) -> bool:
        """Whether the global weights, the frozen ones included, hold neither nan nor inf."""
        return super().is_global_finite and all_finite(self._weights.values())

    def global_state(self) -> dict[str, Tensor]:
        """Global weights by full name, and the frozen ones that the residuals have gone to."""
        return super().global_state() | self._weights

    def load_global_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the global weights, and the frozen ones."""
        super().load_global_state(state)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[name])

    @property
    def unfinished_round(self) -> Mapping[str, Tensor]:
        """The unfinished round, live."""
        products = {f"product/{name}": total for name, total in self._sums.items()}
        return {**super().unfinished_round, **products}

    @property
    def _weights(self) -> dict[str, Tensor]:
        return {update.name: update.weight.detach() for update in self._updates}
