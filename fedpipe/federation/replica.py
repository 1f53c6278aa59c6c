"""A replica trains one client after another, from global weights and the client's own parts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedpipe.config.federation import AverageConfig, FederationConfig
from fedpipe.distributed.comm import Comm
from fedpipe.federation.cohort import Turn
from fedpipe.federation.refusal import NO_FAULT, Refused, stop_error
from fedpipe.federation.synchronizer import Synchronizer, restore
from fedpipe.models.stage import trainable
from fedpipe.pipeline.stage_engine import StepResult
from fedpipe.run.checkpoint import CLIENTS, Checkpoint, CheckpointWriter, client_file, stage_file
from fedpipe.run.tensor_file import TensorFile


class Engine(Protocol):
    """What computes one stage, or a whole model, which is stage 0."""

    stage: nn.Module
    faults: dict[str, int]
    """The first step of the current turn at which a number was not finite, by its name: "loss" or
    "grad_norm"."""

    def weights_changed(self) -> None:
        """Tell the optimizer that the parameters were written from outside."""

    def optimizer_state(self) -> dict[str, Any]:
        """Moments and counters of the optimizer."""

    def load_optimizer_state(self, state: dict[str, Any] | None) -> None:
        """Take moments over from ``optimizer_state``; None starts afresh."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Computation:
    """What a replica computes in this process."""

    what: str
    step: int | None = None
    """Local step of the turn under way; None where that is not known."""
    waits: bool = False
    """It waits for another process."""


class Replica(ABC):
    """The part of a replica that lives in this process: one engine and synchronizer per stage.

    A subclass says how a client is trained and scored, and what its dropout draws.
    """

    lookahead = 1
    """Local steps, the one that begins included, that are certain to be run once one begins."""
    whole_model: ClassVar[str] = ""
    """Name of the file of a model that is not cut, in a checkpoint; "" where stages have files."""

    def __init__(
        self,
        engines: Mapping[int, Engine],
        synchronizers: Mapping[int, Synchronizer],
        *,
        federation: FederationConfig,
        seed: int,
        comm: Comm,
        run_dir: Path | None,
    ) -> None:
        """Start with no client.

        Args:
            engines: By stage id.
            synchronizers: By stage id.
            federation: What is averaged, and what stays.
            seed: Of the run.
            comm: This process' groups.
            run_dir: Where clients keep what is not averaged; None for a run without clients.
        """
        self.engines, self.synchronizers = engines, synchronizers
        self.federation, self.seed, self.comm = federation, seed, comm
        self._run_dir = run_dir
        self.refused: list[Refused] = []
        """Clients of the round under way whose updates this replica has left out."""
        self._turn_start: dict[int, dict[str, Any]] = {}
        """By stage whose optimizer goes on: its state when the turn under way began."""

    # -- what a subclass says ----------------------------------------------------------------

    @abstractmethod
    def train(
        self,
        turn: Turn,
        steps: range,
        *,
        round_id: int,
        seen: int,
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
        until: Callable[[int], int],
    ) -> None:
        """Make local steps of the client whose turn has begun.

        Args:
            turn: Whose.
            steps: Indices of the steps inside the turn.
            round_id: Of the round.
            seen: Blocks or examples that the client has trained on before this round.
            lr: Learning rate of a step.
            on_step: Told of each step of each stage, in order.
            until: Asked before a step: up to which one the steps are certain to be run. This step
                itself ends the call.

        Collective: every process of the replica.
        """

    @abstractmethod
    def score(self, client_id: int) -> dict[int, Any]:
        """Score the client whose weights are in place on its held-out examples.

        Returns:
            By stage with a head, what ``evaluate`` gathers.

        Collective: every process of the replica with data index 0.
        """

    @abstractmethod
    def seed_dropout(self, client_id: int, *, round_id: int) -> None:
        """Seed dropout for a turn; nothing else draws from torch's generator."""

    @property
    @abstractmethod
    def dropout_state(self) -> dict[str, Any]:
        """Where dropout goes on drawing, for ``torch.save``; may be set."""

    @dropout_state.setter
    @abstractmethod
    def dropout_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def computation(self) -> Computation | None:
        """Say what is computed now, in the watch's thread; None for nothing."""

    def sent(self) -> dict[str, int]:
        """Bytes and messages that this process has sent since it started, by ledger entry."""
        return dict(self.comm.sent_bytes)

    # -- a turn ------------------------------------------------------------------------------

    def begin_turn(self, turn: Turn, *, round_id: int, last_round: int | None) -> None:
        """Start a turn: load global weights, kept parts and optimizer state, and seed dropout.

        Args:
            turn: Whose.
            round_id: Of the round.
            last_round: The round in which the client trained last; None at its first.

        Collective: every process of the replica.
        """
        states = self.set_weights(turn.client_id, last_round)
        for stage_id, engine in self.engines.items():
            engine.weights_changed()
            engine.faults.clear()
            if self.synchronizers[stage_id].optimizer_goes_on:
                self._turn_start[stage_id] = copy.deepcopy(engine.optimizer_state())
            else:
                engine.load_optimizer_state(states[stage_id].get("optimizer"))
        self.seed_dropout(turn.client_id, round_id=round_id)

    def set_weights(self, client_id: int, last_round: int | None) -> dict[int, dict[str, Any]]:
        """Set every stage to the global weights and a client's kept parts.

        Returns:
            By stage, all that the client has kept.

        Collective: every process of the replica.
        """
        states = {}
        for stage_id, synchronizer in self.synchronizers.items():
            states[stage_id] = self._client_state(client_id, stage_id, last_round)
            synchronizer.set_weights(states[stage_id].get("kept"))
        return states

    def end_turn(
        self, turn: Turn, *, round_id: int, last_round: int | None, writer: CheckpointWriter
    ) -> None:
        """Take the client's weights into the round and put away what stays with the client.

        Where a number of the turn is not finite, on any stage or data rank, the client's whole
        update is refused: its share of the round is empty, and it keeps what it began with.

        Args:
            turn: Whose.
            round_id: Of the round.
            last_round: As ``begin_turn`` was given it.
            writer: Takes what stays with the client.

        Raises:
            TrainingError: It is refused with ``federation.on_bad_update=stop``.

        Collective: every process of the replica.
        """
        fault = self._first_fault(turn, round_id)
        if fault is not None:
            if self.federation.on_bad_update == "stop":
                raise stop_error(fault, round_id=round_id)
            self.refused.append(fault)
        for stage_id, engine in self.engines.items():
            synchronizer = self.synchronizers[stage_id]
            spoilt = fault is not None
            if synchronizer.is_shared:
                # The others have trained it too, and have its gradients: all replicas see the same.
                spoilt = bool(engine.faults.keys() & {"grad_norm", "weights"})
            if spoilt:
                synchronizer.leave_out()
                if synchronizer.optimizer_goes_on:
                    engine.load_optimizer_state(self._turn_start[stage_id])
            else:
                synchronizer.take_update(turn.client_id, weight=turn.weight, round_id=round_id)
            self._turn_start.pop(stage_id, None)
            if not self._keeps_state(stage_id):
                continue
            if fault is None:
                state: dict[str, Any] = {"kept": synchronizer.kept_state()}
                if self._keeps_optimizer(stage_id):
                    state["optimizer"] = engine.optimizer_state()
            else:
                state = self._client_state(turn.client_id, stage_id, last_round)
            name = client_file(turn.client_id, stage_id, self.comm.data, round_id=round_id)
            writer.save_client(name, partial(torch.save, state))

    def _first_fault(self, turn: Turn, round_id: int) -> Refused | None:
        """The first number of a turn that is not finite, on the whole replica; None without one."""
        codes = [NO_FAULT]
        for stage_id, engine in self.engines.items():
            if not self.synchronizers[stage_id].is_finite(turn.client_id, round_id=round_id):
                engine.faults["weights"] = turn.num_steps - 1
            codes += [
                Refused(client=turn.client_id, stage=stage_id, step=step, what=what).code
                for what, step in engine.faults.items()
            ]
        code = self.comm.min_over_replica(min(codes))
        return None if code == NO_FAULT else Refused.from_code(turn.client_id, code)

    # -- between rounds ----------------------------------------------------------------------

    def synchronize(
        self, num_clients: int, *, left_out: Collection[int] = (), share: float = 1.0
    ) -> int:
        """Average the round's clients; return the bytes that this rank sent.

        Arguments are those of ``Synchronizer.synchronize``.

        Collective: every rank.
        """
        return sum(
            synchronizer.synchronize(num_clients, left_out=left_out, share=share)
            for synchronizer in self.synchronizers.values()
        )

    def forget_round(self) -> None:
        """Leave the global weights as they are, whatever the round's clients have sent."""
        for synchronizer in self.synchronizers.values():
            synchronizer.forget_round()

    def stages_not_finite(self) -> list[str]:
        """Name the stages of this process whose global weights are not finite."""
        synchronizers = self.synchronizers.items()
        bad = [stage_id for stage_id, own in synchronizers if not own.is_global_finite]
        return ["the model" if self.whole_model else f"stage {stage_id}" for stage_id in bad]

    def evaluate(
        self, client_ids: Sequence[int], *, last_rounds: Sequence[int | None]
    ) -> dict[int, dict[int, Any]]:
        """Score the global weights on held-out examples of some clients, with their kept parts.

        Args:
            client_ids: Clients that this replica scores.
            last_rounds: By client id, the round in which it trained last.

        Returns:
            stage -> client -> what ``score`` says; stages with a head only. Data index 0 computes,
            the others return nothing.

        Collective: every process of the replica.
        """
        found: dict[int, dict[int, Any]] = {}
        keeps_parts = self.federation.average != AverageConfig()  # the same on all processes
        for index, client_id in enumerate(client_ids if self.comm.data == 0 else ()):
            if index == 0 or keeps_parts:
                self.set_weights(client_id, last_rounds[client_id])
            for stage_id, score in self.score(client_id).items():
                found.setdefault(stage_id, {})[client_id] = score
        return found

    # -- what a client keeps -----------------------------------------------------------------

    def _client_state(
        self, client_id: int, stage_id: int, last_round: int | None
    ) -> dict[str, Any]:
        if last_round is None or not self._keeps_state(stage_id):
            return {}
        assert self._run_dir is not None, "a run with kept state has a directory"
        name = client_file(client_id, stage_id, self.comm.data, round_id=last_round)
        path = self._run_dir / CLIENTS / name
        return dict(torch.load(path, map_location=self.comm.device, weights_only=True))

    def _keeps_state(self, stage_id: int) -> bool:
        """Whether a client has a file of its own for a stage."""
        return self.synchronizers[stage_id].keeps_parts or self._keeps_optimizer(stage_id)

    def _keeps_optimizer(self, stage_id: int) -> bool:
        goes_on = self.synchronizers[stage_id].optimizer_goes_on
        return self.federation.optimizer_state == "keep" and not goes_on

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint_files(
        self, unfinished: Mapping[str, Any] | None = None
    ) -> dict[str, Callable[[Path], None]]:
        """What this rank writes: what all replicas share once per stage, then its own state.

        Args:
            unfinished: In mid-round, what ``load_checkpoint`` is to return; None between rounds.
        """
        files: dict[str, Callable[[Path], None]] = {}
        for stage_id, engine in self.engines.items() if self.comm.replica == 0 else ():
            synchronizer = self.synchronizers[stage_id]
            if self.comm.data == 0:
                weights = {n: t.contiguous() for n, t in synchronizer.global_state().items()}
                files[self._weights_file(stage_id)] = partial(save_file, weights)
            server: dict[str, Any] = {"moments": dict(synchronizer.moments)}
            if synchronizer.optimizer_goes_on and unfinished is None:
                server["optimizer"] = engine.optimizer_state()
            if any(server.values()):
                files[_server_file(stage_id, self.comm.data)] = partial(torch.save, server)
        residuals = {s: dict(sync.residuals) for s, sync in self.synchronizers.items()}
        own: dict[str, Any] = {"residuals": residuals}
        if unfinished is not None:
            own |= dict(unfinished) | {"rng": self.dropout_state}
            own["stages"] = {s: self._unfinished_stage(s) for s in self.engines}
            own["refused"] = [fault.record() for fault in self.refused]
        if unfinished is not None or any(residuals.values()):
            files[self._own_file] = partial(torch.save, own)
        return files

    def _unfinished_stage(self, stage_id: int) -> dict[str, Any]:
        engine = self.engines[stage_id]
        return {
            # Without what DeepSpeed has hung on them, process groups among it.
            "parameters": {n: p.detach() for n, p in trainable(engine.stage).items()},
            "optimizer": engine.optimizer_state(),
            "partial": dict(self.synchronizers[stage_id].unfinished_round),
            "faults": dict(engine.faults),
            "turn_start": self._turn_start.get(stage_id),
        }

    def load_checkpoint(self, checkpoint: Checkpoint, *, in_mid_round: bool) -> dict[str, Any]:
        """Take over what all replicas share and this rank's own state, the unfinished round's too.

        Args:
            checkpoint: To go on from.
            in_mid_round: Go on with the round that it stands in; otherwise a new one begins.

        Returns:
            What ``checkpoint_files`` was given in mid-round, and more; empty between rounds.
        """
        device = self.comm.device
        for stage_id, engine in self.engines.items():
            synchronizer = self.synchronizers[stage_id]
            path = checkpoint.path / self._weights_file(stage_id)
            synchronizer.load_global_state(load_file(path, device=str(device)))
            path = checkpoint.path / _server_file(stage_id, self.comm.data)
            if path.is_file():  # the manifest lists it where this configuration needs it
                server = torch.load(path, map_location=device, weights_only=True)
                restore(synchronizer.moments, server["moments"])
                if "optimizer" in server:
                    engine.load_optimizer_state(server["optimizer"])
        path = checkpoint.path / self._own_file
        if not path.is_file():
            return {}
        own = torch.load(path, map_location=device, weights_only=True)
        for stage_id, synchronizer in self.synchronizers.items():
            restore(synchronizer.residuals, own["residuals"][stage_id])
        if not in_mid_round:
            return {}
        for stage_id in self.engines:
            self._load_unfinished_stage(stage_id, own["stages"][stage_id])
        self.refused = [Refused(**fault) for fault in own.get("refused", [])]
        self.dropout_state = own["rng"]
        return dict(own)

    def load_averaged(self, weights: TensorFile) -> None:
        """Take global weights over, by full name, for all that is averaged or handed on."""
        for synchronizer in self.synchronizers.values():
            state = {n: torch.from_numpy(weights.read(n)) for n in synchronizer.averaged_names}
            synchronizer.load_global_state(synchronizer.global_state() | state)

    def _load_unfinished_stage(self, stage_id: int, state: Mapping[str, Any]) -> None:
        engine = self.engines[stage_id]
        with torch.no_grad():
            restore(trainable(engine.stage), state["parameters"])
        engine.weights_changed()
        engine.load_optimizer_state(state["optimizer"])
        restore(self.synchronizers[stage_id].unfinished_round, state["partial"])
        engine.faults.update(state.get("faults", {}))
        if state.get("turn_start") is not None:
            self._turn_start[stage_id] = state["turn_start"]

    def _weights_file(self, stage_id: int) -> str:
        return self.whole_model or stage_file(stage_id)

    @property
    def _own_file(self) -> str:
        return _own_file(self.comm.stages[0], self.comm.replica, self.comm.data)


def _server_file(stage_id: int, data: int) -> str:
    """File of what a stage carries from round to round beside its weights, in a checkpoint."""
    return f"server_{stage_id:02d}_data_{data:02d}.pt"


def _own_file(stage_id: int, replica: int, data: int) -> str:
    """File of a process' own state in a checkpoint, by the first stage that it holds."""
    return f"replica_{replica:04d}_stage_{stage_id:02d}_data_{data:02d}.pt"
