"""The FedAvg synchronizer of one stage: accumulate clients, average over replicas, keep parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedpipe.config.schema import AverageConfig
from fedpipe.distributed.comm import Comm
from fedpipe.models.split import part_of
from fedpipe.models.stage import Stage, trainable

BUCKET_ELEMENTS = 16 * 2**20
"""Elements per all-reduce, 64 MiB of float32: large enough for full bandwidth."""


class Synchronizer:
    """Averages one stage's parameters over the clients of a round.

    ``w <- sum_k (n_k / n) w_k`` over the clients k of the cohort, with n_k their trained tokens;
    float32 sums, one flat vector, per stage.
    Source: FedAvg, McMahan et al. 2017, algorithm 1, https://arxiv.org/abs/1602.05629.

    Parts that ``federation.average`` switches off are *kept*: they are not averaged, every client
    starts from the run's first values and finds its own again at its next turn, on any replica.
    """

    def __init__(self, stage: Stage, average: AverageConfig, *, comm: Comm) -> None:
        """Remember the global weights of a stage.

        Args:
            stage: With its first weights; identical on every replica.
            average: What is averaged.
            comm: Its replica group holds this stage once per replica.
        """
        self._stage_id = stage.spec.stage_id
        self._comm = comm
        parameters = trainable(stage)
        kept = {n for n in parameters if not getattr(average, part_of(n, stage.spec))}
        self._averaged = {n: p for n, p in parameters.items() if n not in kept}
        self._kept = {n: p for n, p in parameters.items() if n in kept}
        self._global = {n: p.detach().clone() for n, p in parameters.items()}
        numel = sum(p.numel() for p in self._averaged.values())
        device = next(iter(parameters.values())).device
        self._sum = torch.zeros(numel, dtype=torch.float32, device=device)

    @property
    def keeps_parts(self) -> bool:
        """Some parameters stay with their client."""
        return bool(self._kept)

    def begin_turn(self, kept: Mapping[str, Tensor] | None) -> None:
        """Set the stage to the global weights and a client's own kept parts.

        Args:
            kept: What ``kept_state`` returned at the end of the client's last turn; None at its
                first, which starts from the run's first values.
        """
        with torch.no_grad():
            for name, parameter in (self._averaged | self._kept).items():
                parameter.copy_((kept or {}).get(name, self._global[name]))

    def end_turn(self, weight: float) -> None:
        """Add the trained weights of a client to the round's sum.

        Args:
            weight: The client's share of the round's tokens.
        """
        offset = 0
        with torch.no_grad():
            for parameter in self._averaged.values():
                part = self._sum[offset : offset + parameter.numel()]
                part.add_(parameter.flatten().float(), alpha=weight)
                offset += parameter.numel()

    def kept_state(self) -> dict[str, Tensor]:
        """Parameters that stay with the client that trained last; empty if all are averaged."""
        return {n: p.detach().cpu().clone() for n, p in self._kept.items()}

    def synchronize(self) -> int:
        """Sum over the replicas; the result becomes the global weights and the stage's.

        A replica that trained nothing contributes zero.

        Returns:
            Bytes this rank sent.

        Collective: this stage and data index of every replica, with the stream drained.
        """
        sent = sum(
            self._comm.sum_over_replicas_(self._stage_id, bucket, label="fedavg")
            for bucket in self._sum.split(BUCKET_ELEMENTS)
            if bucket.numel()  # everything may be kept
        )
        offset = 0
        with torch.no_grad():
            for name, parameter in self._averaged.items():
                mean = self._sum[offset : offset + parameter.numel()].view_as(parameter)
                self._global[name].copy_(mean)
                parameter.copy_(mean)
                offset += parameter.numel()
        self._sum.zero_()
        return sent

    def global_state(self) -> dict[str, Tensor]:
        """Global weights by full name; kept parts with the run's first values."""
        return dict(self._global)

    def load_global_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the global weights; the stage takes them at the next ``begin_turn``."""
        for name, tensor in self._global.items():
            tensor.copy_(state[name])

    def partial_state(self) -> dict[str, Any]:
        """The unfinished round: what ``end_turn`` has summed so far."""
        return {"sum": self._sum.detach().cpu().clone()}

    def load_partial_state(self, state: Mapping[str, Any]) -> None:
        """Continue an unfinished round."""
        self._sum.copy_(state["sum"])
