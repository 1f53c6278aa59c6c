"""The exact average of LoRA updates: what averaging A and B apart leaves out goes to the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedpipe.distributed.comm import Comm
from fedpipe.federation.aggregation import LEDGER

if TYPE_CHECKING:
    from fedpipe.models.peft import LoraUpdate


class ProductAverage:
    """Keeps ``W + scaling B A`` at the mean of the clients' own, whatever their factors are.

    ``W <- W + scaling (sum_k p_k B_k A_k - B A)`` with the averaged factors ``B = sum_k p_k B_k``
    and ``A = sum_k p_k A_k``; p are the shares of the clients in the round.
    Source: FedEx-LoRA, Singhal et al. 2024, equation 7, https://arxiv.org/abs/2410.09432.
    """

    def __init__(self, updates: Sequence[LoraUpdate], *, comm: Comm) -> None:
        """Start with no client.

        Args:
            updates: The model's; their weights are equal on every replica.
            comm: Its replica group holds the model once per replica.
        """
        self._updates, self._comm = updates, comm
        self._sums = [torch.zeros_like(update.weight) for update in updates]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The frozen weights that the residuals have gone to, live, by full name."""
        return {update.name: update.weight.detach() for update in self._updates}

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
    def end_turn(self, *, weight: float) -> None:
        """Take a client's products into the round; ``weight`` is its share."""
        for update, total in zip(self._updates, self._sums, strict=True):
            total.add_(update.product(), alpha=weight)

    @torch.no_grad()
    def synchronize(self, *, share: float = 1.0) -> int:
        """Move the frozen weights, after the averaged factors are in the model.

        Args:
            share: What the weights of the clients sum to whose turns have ended here.

        Returns:
            Bytes this rank sent.

        Collective: every replica.
        """
        sent = 0
        for update, total in zip(self._updates, self._sums, strict=True):
            sent += self._comm.sum_over_replicas_(0, total, label=LEDGER)
            update.weight.add_(total.div_(share).sub_(update.product()))
            total.zero_()
        return sent

    def forget_round(self) -> None:
        """Leave the weights as they are, whatever the round's clients have sent."""
        for total in self._sums:
            total.zero_()

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Replace the frozen weights by those of a checkpoint."""
        with torch.no_grad():
            for update in self._updates:
                update.weight.copy_(saved[update.name])
