"""The weights that clients start from, and the aggregation of what they have trained, per stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpipe.config.federation import AttackConfig, FederationConfig
from fedpipe.distributed.comm import Comm
from fedpipe.federation.aggregation import (
    BUCKET_ELEMENTS,
    LEDGER,
    Aggregator,
    make_aggregator,
)
from fedpipe.federation.rules import ServerOptimizer
from fedpipe.models.split import StageRole, part_of
from fedpipe.models.stage import StageModule, trainable
from fedpipe.models.weights import stable_seed

SHARED_LEDGER = "shared_gradients"
"""Entry of the traffic ledger."""


class Synchronizer:
    """One stage's parameters across clients: averaged, kept by the client, or handed on.

    *Averaged* ones start every turn from the global weights; the round's clients are aggregated,
    and a server optimizer moves the global weights there, per stage.
    Source: Reddi et al. 2021, algorithm 1, https://arxiv.org/abs/2003.00295; with the default rule
    and optimizer it is FedAvg, McMahan et al. 2017, https://arxiv.org/abs/1602.05629.

    Parts that ``federation.average`` switches off are *kept*: every client starts from the run's
    first values and finds its own again at its next turn, on any replica.

    With ``federation.server`` sequential, or shared on a server stage, the rest is *handed on*:
    a turn starts where the one before it ended. A shared stage is one model on all replicas: their
    gradients are averaged in every step.

    *Copied* ones, such as a decoder that begins every turn as the word embedding, are left alone:
    they neither travel nor stay with a client.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        federation: FederationConfig,
        *,
        seed: int,
        comm: Comm,
        kept: Collection[str] = (),
        copied: Collection[str] = (),
        stage_id: int = 0,
        role: StageRole = StageRole.CLIENT,
    ) -> None:
        """Remember the global weights.

        Args:
            parameters: What is trained, by full name, with its first values; identical on every
                replica.
            federation: The rule, the server and the parts that are averaged.
            seed: Of the updates that attackers falsify.
            comm: Its replica group holds the parameters once per replica.
            kept: Names of those that stay with their client.
            copied: Names of those that neither travel nor stay.
            stage_id: The stage whose parameters they are.
            role: Whether the stage belongs to the client or to the server.
        """
        self._federation, self._seed = federation, seed
        self._stage_id, self._comm = stage_id, comm
        self._parameters = parameters
        is_server = role is StageRole.SERVER
        self._shared = federation.server == "shared" and is_server
        handed_on = self._shared or federation.server == "sequential"
        self.optimizer_goes_on = handed_on and is_server
        """The optimizer state is the stage's, not the client's: no turn resets or exchanges it."""

        own = {n: p for n, p in parameters.items() if n not in copied}
        self._averaged = {n: p for n, p in own.items() if n not in kept}
        self._kept = {n: p for n, p in own.items() if n in kept}
        self._start_N = _flat(self._averaged.values())
        sizes = [p.numel() for p in self._averaged.values()]
        views = zip(self._averaged.items(), self._start_N.split(sizes), strict=True)
        self._global = {n: part.view_as(p) for (n, p), part in views}
        self._global |= {n: p.detach().clone() for n, p in self._kept.items()}
        self._aggregator: Aggregator | None = None
        if self._averaged and not handed_on:
            self._aggregator = make_aggregator(
                federation, stage_id=stage_id, numel=self._start_N.numel(), comm=comm
            )
            self._optimizer = ServerOptimizer(federation.server_optimizer, like=self._start_N)

    @classmethod
    def of_stage(
        cls, stage: StageModule, federation: FederationConfig, *, seed: int, comm: Comm
    ) -> Synchronizer:
        """Return the synchronizer of a stage of the pipeline.

        Args:
            stage: With its first weights; identical on every replica.
            federation: The rule, the server and the parts that are averaged.
            seed: Of the updates that attackers falsify.
            comm: Its replica group holds this stage once per replica.
        """
        spec, parameters = stage.spec, trainable(stage)
        return cls(
            parameters,
            federation,
            seed=seed,
            comm=comm,
            kept={n for n in parameters if not getattr(federation.average, part_of(n, spec))},
            copied=stage.copied.keys(),
            stage_id=spec.stage_id,
            role=spec.role,
        )

    @property
    def keeps_parts(self) -> bool:
        """Some parameters stay with their client."""
        return bool(self._kept)

    @property
    def averaged_names(self) -> list[str]:
        """Full names of the parameters that do not stay with a client."""
        return list(self._averaged)

    @property
    def averaged_numel(self) -> int:
        """Parameters that are averaged, and so sent to and by every client."""
        return self._start_N.numel()

    @torch.no_grad()
    def set_weights(self, kept: Mapping[str, Tensor] | None) -> None:
        """Set the stage to the global weights and a client's own kept parts.

        Args:
            kept: What ``kept_state`` returned at the end of the client's last turn; None at its
                first, which starts from the run's first values.
        """
        for name, start in self._global.items():
            self._parameters[name].copy_((kept or {}).get(name, start))

    @torch.no_grad()
    def before_step(self) -> None:
        """Complete the gradients of a local step, before they are clipped.

        A shared stage: ``g <- sum_r g_r / R`` over the replicas. With FedProx, on the averaged
        parameters of other stages: ``g <- g + mu (w - w_global)``.
        Source: FedProx, Li et al. 2020, equation 2, https://arxiv.org/abs/1812.06127.

        Collective: this stage and data index of every replica, where the stage is shared.
        """
        if self._shared:
            self._average_gradients()
        elif self._federation.fedprox_mu:
            mu = self._federation.fedprox_mu
            for name, parameter in self._averaged.items():
                # The difference first: where it is zero Adam would blow up what rounding leaves.
                parameter.grad.add_(parameter - self._global[name], alpha=mu)

    def _average_gradients(self) -> None:
        replicas = self._federation.num_replicas
        if replicas == 1:
            return
        gradients = [p.grad for p in self._parameters.values()]
        flat_N = torch.cat([g.flatten() for g in gradients])
        for bucket in flat_N.split(BUCKET_ELEMENTS):
            self._comm.sum_over_replicas_(self._stage_id, bucket, label=SHARED_LEDGER)
        parts = flat_N.div_(replicas).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def take_update(self, client_id: int, *, weight: float, round_id: int) -> None:
        """Take what a client has trained into the round, or hand it on.

        Args:
            client_id: The client that has trained.
            weight: Its share of the round.
            round_id: Of the round.
        """
        if self._aggregator is not None:
            self._aggregator.add(self._update(client_id, round_id), weight=weight)
            return
        for name, parameter in self._averaged.items():
            self._global[name].copy_(parameter)

    def leave_out(self) -> None:
        """Leave out what a client has trained: the next turn starts from the same weights."""
        if self._aggregator is not None:
            self._aggregator.leave_out()

    @torch.no_grad()
    def is_finite(self, client_id: int, *, round_id: int) -> bool:
        """Whether what a client would send and keep holds neither nan nor inf."""
        return all_finite([*self._update(client_id, round_id), *self._kept.values()])

    def _update(self, client_id: int, round_id: int) -> Sequence[Tensor]:
        """What a client sends, N elements in all."""
        weights = list(self._averaged.values())
        attack = self._federation.attack
        if attack.kind == "none" or client_id >= attack.num_attackers or not weights:
            return weights
        seed = stable_seed(self._seed, "attack", round_id, client_id, self._stage_id)
        change_N = _flat(weights).sub_(self._start_N)
        return [falsify(change_N, attack, seed=seed).add_(self._start_N)]

    def kept_state(self) -> dict[str, Tensor]:
        """Parameters that stay with the client that trained last; empty if all are averaged."""
        return {n: p.detach().cpu().clone() for n, p in self._kept.items()}

    @torch.no_grad()
    def synchronize(
        self,
        num_clients: int | None = None,
        *,
        left_out: Collection[int] = (),
        share: float = 1.0,
    ) -> int:
        """Make one model of the round's clients; it becomes the global weights and the stage's.

        A replica that trained nobody takes part; a stage that is handed on has nothing to do.

        Args:
            num_clients: Clients whose turns have ended, on all replicas; client k of them on
                replica ``k mod R``. None means federation.clients_per_round.
            left_out: Those of them whose turns were refused.
            share: What the weights of the others sum to.

        Returns:
            Bytes this rank sent.

        Collective: this stage and data index of every replica, with the stream drained.
        """
        if self._aggregator is None:
            return 0
        before = self._comm.sent_bytes[LEDGER]
        num_clients = num_clients or self._federation.clients_per_round
        aggregate_N = self._aggregator.reduce(
            self._start_N, num_clients=num_clients, left_out=left_out, share=share
        )
        self._optimizer.step_(self._start_N, aggregate_N)
        for name, parameter in self._averaged.items():
            parameter.copy_(self._global[name])
        return self._comm.sent_bytes[LEDGER] - before

    def forget_round(self) -> None:
        """Leave the global weights as they are, whatever the round's clients have sent."""
        if self._aggregator is not None:
            self._aggregator.forget()

    @property
    def is_global_finite(self) -> bool:
        """Whether the global weights, and what comes with them, hold neither nan nor inf."""
        return all_finite(
            [self._start_N, *self.moments.values(), *self.residuals.values()]
            if self._aggregator
            else list(self._global.values())
        )

    @property
    def is_shared(self) -> bool:
        """One model on all replicas, which a single client's update cannot be taken out of."""
        return self._shared

    def global_state(self) -> dict[str, Tensor]:
        """Global weights by full name; kept parts with the run's first values."""
        return dict(self._global)

    def load_global_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the global weights; the stage takes them at the next ``set_weights``."""
        restore(self._global, state)

    @property
    def moments(self) -> Mapping[str, Tensor]:
        """The server optimizer's, live; the same on every replica."""
        return self._optimizer.moments if self._aggregator else {}

    @property
    def residuals(self) -> Mapping[str, Tensor]:
        """What this replica has rounded off and owes to the next round, live."""
        return self._aggregator.residuals if self._aggregator else {}

    @property
    def unfinished_round(self) -> Mapping[str, Tensor]:
        """The unfinished round, live: what ``take_update`` has taken so far."""
        return self._aggregator.unfinished_round if self._aggregator else {}


def restore(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the live ones of the same names."""
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    pieces = [t.detach().flatten().float() for t in tensors]
    return torch.cat(pieces) if pieces else torch.empty(0)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor holds nan or inf, by the least and the largest value of each."""
    extremes = [torch.stack(torch.aminmax(t.detach())) for t in tensors if t.numel()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def falsify(change_N: Tensor, attack: AttackConfig, *, seed: int) -> Tensor:
    """Return what an attacker sends instead of its change of the global weights.

    sign_flip: ``-scale change``. noise: ``change + scale std(change) z``, z standard normal.

    Args:
        change_N: float32.
        attack: Kind, not "none", and scale.
        seed: Of z, which is drawn on the CPU and so is the same on every device.
    """
    if attack.kind == "sign_flip":
        return change_N * -attack.scale
    noise_N = torch.randn(change_N.shape, generator=torch.Generator().manual_seed(seed))
    return change_N + noise_N.to(change_N.device) * (attack.scale * change_N.std())
