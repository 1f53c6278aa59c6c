"""The stages of a replica that live in one process: connected, trained for clients, saved."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.wire import TensorSpec
from fedpipe.federation.cohort import Turn
from fedpipe.federation.refusal import NO_FAULT, Refused, stopped
from fedpipe.federation.synchronizer import Synchronizer, restore
from fedpipe.federation.turns import TuningTurn
from fedpipe.models.families import stable_seed
from fedpipe.models.split import StageSpec, edges
from fedpipe.models.stage import StageModule
from fedpipe.pipeline.engine import SplitPipelineEngine
from fedpipe.pipeline.messages import EdgeMessages, WireTensor
from fedpipe.pipeline.optimizer import build_optimizer
from fedpipe.pipeline.p2p import DistLink, Link, QueueLink
from fedpipe.pipeline.stage_engine import Links, StageEngine
from fedpipe.run.checkpoint import CLIENTS, Checkpoint, CheckpointWriter, client_file, stage_file


class HostedStages:
    """This process' stages, their synchronizers, and the links to the others."""

    def __init__(
        self,
        config: RunConfig | FinetuneConfig,
        *,
        pipeline: PipelineConfig,
        specs: tuple[StageSpec, ...],
        build: Callable[[StageSpec], StageModule],
        messages: tuple[EdgeMessages, ...],
        deepspeed: dict[str, Any],
        comm: Comm,
        run_dir: Path | None,
    ) -> None:
        """Build the stages and connect them.

        Args:
            config: Federation, optimizer and seed.
            pipeline: Micro-batches, schedule and window.
            specs: All stages.
            build: Makes a stage with its first weights, the same on every replica.
            messages: Of every edge.
            deepspeed: What every stage's DeepSpeed engine is given.
            comm: This process' groups.
            run_dir: Where clients keep what is not averaged; None for a run without clients.

        Collective: every rank.
        """
        self.comm, self.pipeline, self.specs = comm, pipeline, specs
        self._settings, self._deepspeed, self._run_dir = config, deepspeed, run_dir
        # Of several objectives measured side by side, one may have fewer heads at home.
        self._stage_ids = [s for s in comm.stages if s < len(specs)]
        self.synchronizers: dict[int, Synchronizer] = {}
        links = self._build_links(messages)
        self.stages = [self._host(build(specs[s]), links[s]) for s in self._stage_ids]
        self.engine = SplitPipelineEngine(self.stages, pipeline)
        self.refused: list[Refused] = []
        """Clients of the round under way whose updates this replica has left out."""
        self._turn_start: dict[int, dict[str, Any]] = {}
        """By stage whose optimizer goes on: its state when the turn under way began."""

    @property
    def reads_text(self) -> bool:
        """This process holds the first stage."""
        return 0 in self.comm.stages

    def _host(self, stage: StageModule, links: Links) -> StageEngine:
        config, stage_id = self._settings, stage.spec.stage_id
        synchronizer = Synchronizer.of_stage(stage.to(self.comm.device), config, comm=self.comm)
        self.synchronizers[stage_id] = synchronizer
        return StageEngine(
            stage,
            build_optimizer(stage, config.optimizer),
            deepspeed_config=self._deepspeed,
            mpu=self.comm.stage_mpu(stage_id),
            pipeline=self.pipeline,
            max_grad_norm=config.optimizer.max_grad_norm,
            links=links,
            device=self.comm.device,
            before_step=synchronizer.before_step,
        )

    def _build_links(self, every_edge: tuple[EdgeMessages, ...]) -> dict[int, Links]:
        """One link per edge and direction that has an end in this process."""
        links = {stage: Links() for stage in self._stage_ids}
        for messages in every_edge:
            source, target, _ = messages.edge
            if not {source, target} & set(links):
                continue
            forward = self._link(source, target, messages.forward)
            back = messages.backward
            backward = self._link(target, source, back) if back else None
            if source in links and target == self.specs[source].home_head:
                links[source].home_out, links[source].home_grads_in = forward, backward
            elif source in links:
                links[source].activations_out, links[source].gradients_in = forward, backward
            if target in links:
                links[target].activations_in, links[target].gradients_out = forward, backward
        if self.reads_text:
            for head in (spec.stage_id for spec in self.specs if spec.is_home_head):
                labels: deque[Tensor] = deque()
                links[head].labels_in = labels
                links[0].labels_out.append(labels)
        return links

    def _link(self, source: int, target: int, message: tuple[WireTensor, ...]) -> Link:
        specs = tuple(TensorSpec(t.shape, getattr(torch, t.dtype), t.wire) for t in message)
        window = self.pipeline.in_flight
        if self.comm.grid.colocate:
            return QueueLink(specs, window=window)
        channel = self.comm.channel(source, target)
        return DistLink(channel, specs, window=window, device=self.comm.device)

    def sent_over_edges(self) -> dict[str, int]:
        """Bytes and messages that this process has sent, by direction and index of the edge."""
        sent = {}
        for index, (source, target, _) in enumerate(edges(self.specs)):
            for engine in self.stages:
                links, stage_id = engine.links, engine.spec.stage_id
                link = None
                if stage_id == source:
                    home = target == engine.spec.home_head
                    direction, link = "forward", links.home_out if home else links.activations_out
                elif stage_id == target:
                    direction, link = "backward", links.gradients_out
                if link is not None:
                    sent[f"{direction}/bytes/{index}"] = link.sent_bytes
                    sent[f"{direction}/messages/{index}"] = link.sent_messages
        return sent

    # -- training ----------------------------------------------------------------------------

    def begin_turn(self, turn: Turn | TuningTurn, *, round_id: int, last_round: int | None) -> None:
        """Become a client: global weights, the client's kept parts, optimizer state and seed.

        Args:
            turn: Whose.
            round_id: Of the round.
            last_round: The round in which the client trained last; None at its first.
        """
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            state = self._client_state(turn.client_id, stage_id, last_round)
            synchronizer.begin_turn(state.get("kept"))
            engine.weights_changed()
            engine.faults.clear()
            if synchronizer.optimizer_goes_on:
                self._turn_start[stage_id] = copy.deepcopy(engine.optimizer_state())
            else:
                engine.load_optimizer_state(state.get("optimizer"))
        # Dropout; nothing else draws from torch's generator.
        of_turn, rank = (self._settings.seed, round_id, turn.client_id), self.comm.data
        self.engine.seed_draws(lambda stages: stable_seed(*of_turn, stages, rank))

    def end_turn(
        self,
        turn: Turn | TuningTurn,
        *,
        round_id: int,
        last_round: int | None,
        writer: CheckpointWriter,
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
            if self._settings.federation.on_bad_update == "stop":
                raise stopped(fault, round_id=round_id)
            self.refused.append(fault)
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            spoilt = fault is not None
            if synchronizer.is_shared:
                # The others have trained it too, and have its gradients: all replicas see the same.
                spoilt = bool(engine.faults.keys() & {"grad_norm", "weights"})
            if spoilt:
                synchronizer.refuse_turn()
                if synchronizer.optimizer_goes_on:
                    engine.load_optimizer_state(self._turn_start[stage_id])
            else:
                synchronizer.end_turn(turn.client_id, weight=turn.weight, round_id=round_id)
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

    def _first_fault(self, turn: Turn | TuningTurn, round_id: int) -> Refused | None:
        """The first number of a turn that is not finite, on the whole replica; None without one."""
        codes = [NO_FAULT]
        for engine in self.stages:
            stage_id, client_id = engine.spec.stage_id, turn.client_id
            if not self.synchronizers[stage_id].is_finite(client_id, round_id=round_id):
                engine.faults["weights"] = turn.num_steps - 1
            codes += [
                Refused(client=client_id, stage=stage_id, step=step, what=what).code
                for what, step in engine.faults.items()
            ]
        code = self.comm.least_in_replica(min(codes))
        return None if code == NO_FAULT else Refused.from_code(turn.client_id, code)

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
        return [f"stage {stage}" for stage, own in synchronizers if not own.is_global_finite]

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
        return self._settings.federation.optimizer_state == "keep" and not goes_on

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint_files(
        self, *, sent: Mapping[str, int] | None = None
    ) -> dict[str, Callable[[Path], None]]:
        """What this rank writes: what all replicas share once per stage, then its own state.

        Args:
            sent: In mid-round, the ledger of the round so far; None between rounds.
        """
        files: dict[str, Callable[[Path], None]] = {}
        for engine in self.stages if self.comm.replica == 0 else ():
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            if self.comm.data == 0:
                weights = {n: t.contiguous() for n, t in synchronizer.global_state().items()}
                files[stage_file(stage_id)] = partial(save_file, weights)
            server: dict[str, Any] = {"moments": dict(synchronizer.moments)}
            if synchronizer.optimizer_goes_on and sent is None:
                server["optimizer"] = engine.optimizer_state()
            if any(server.values()):
                files[server_file(stage_id, self.comm.data)] = partial(torch.save, server)
        residuals = {s: dict(sync.residuals) for s, sync in self.synchronizers.items()}
        own: dict[str, Any] = {"residuals": residuals}
        if sent is not None:
            own |= {"sent": dict(sent), "rng": self.engine.draws}
            own["stages"] = {
                engine.spec.stage_id: {
                    # Without what DeepSpeed has hung on them, process groups among it.
                    "parameters": {n: p.detach() for n, p in engine.stage.named_parameters()},
                    "optimizer": engine.optimizer_state(),
                    "partial": dict(self.synchronizers[engine.spec.stage_id].partial),
                    "faults": dict(engine.faults),
                    "turn_start": self._turn_start.get(engine.spec.stage_id),
                }
                for engine in self.stages
            }
            own["refused"] = [fault.record() for fault in self.refused]
        if sent is not None or any(residuals.values()):
            files[self._own_file] = partial(torch.save, own)
        return files

    @property
    def _own_file(self) -> str:
        return own_file(self.comm.stages[0], self.comm.replica, self.comm.data)

    def load_checkpoint(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Take over what all replicas share and this rank's own state, the unfinished round's too.

        Returns:
            The ledger of the unfinished round; empty between rounds.
        """
        device = self.comm.device
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            weights = load_file(checkpoint.path / stage_file(stage_id), device=str(device))
            synchronizer.load_global_state(weights)
            path = checkpoint.path / server_file(stage_id, self.comm.data)
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
        return self._load_unfinished(own) if checkpoint.position.step else {}

    def _load_unfinished(self, own: Mapping[str, Any]) -> dict[str, int]:
        """Continue in mid-round; return the ledger of the round so far."""
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            state = own["stages"][stage_id]
            with torch.no_grad():
                restore(dict(engine.stage.named_parameters()), state["parameters"])
            engine.weights_changed()
            engine.load_optimizer_state(state["optimizer"])
            restore(self.synchronizers[stage_id].partial, state["partial"])
            engine.faults = dict(state.get("faults", {}))
            if state.get("turn_start") is not None:
                self._turn_start[stage_id] = state["turn_start"]
        self.refused = [Refused(**fault) for fault in own.get("refused", [])]
        self.engine.draws = own["rng"]
        return dict(own["sent"])


def server_file(stage_id: int, data: int) -> str:
    """File of what a stage carries from round to round beside its weights, in a checkpoint."""
    return f"server_{stage_id:02d}_data_{data:02d}.pt"


def own_file(stage_id: int, replica: int, data: int) -> str:
    """File of a process' own state in a checkpoint, by the first stage that it holds."""
    return f"replica_{replica:04d}_stage_{stage_id:02d}_data_{data:02d}.pt"
