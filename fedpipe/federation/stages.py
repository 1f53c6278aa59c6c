"""The stages of a replica that live in this process: build, connect, train and save them."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.wire import TensorSpec
from fedpipe.federation.cohort import Turn
from fedpipe.federation.replica import Computation, Replica
from fedpipe.federation.synchronizer import Synchronizer
from fedpipe.models.split import StageSpec, edges
from fedpipe.models.stage import StageModule
from fedpipe.models.weights import stable_seed
from fedpipe.pipeline.engine import SplitPipelineEngine
from fedpipe.pipeline.messages import EdgeMessages, WireTensor
from fedpipe.pipeline.optimizer import build_optimizer
from fedpipe.pipeline.p2p import DistLink, Link, QueueLink
from fedpipe.pipeline.stage_engine import Links, MicroBatchSource, StageEngine, StepResult


class StageReplica(Replica):
    """This process' stages, their synchronizers, and the links to the others.

    A subclass says what the first stage reads.
    """

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
        self.pipeline, self.specs = pipeline, specs
        # Of several objectives measured side by side, one may have fewer heads at home.
        stage_ids = [s for s in comm.stages if s < len(specs)]
        self.reads_text: bool = 0 in stage_ids
        """This process holds the first stage."""
        links = self._build_links(messages, stage_ids, comm)
        synchronizers, engines = {}, {}
        for stage_id in stage_ids:
            stage = build(specs[stage_id]).to(comm.device)
            synchronizers[stage_id] = Synchronizer.of_stage(
                stage, config.federation, seed=config.seed, comm=comm
            )
            engines[stage_id] = StageEngine(
                stage,
                build_optimizer(stage, config.optimizer),
                deepspeed_config=deepspeed,
                mpu=comm.stage_mpu(stage_id),
                pipeline=pipeline,
                max_grad_norm=config.optimizer.max_grad_norm,
                links=links[stage_id],
                device=comm.device,
                before_step=synchronizers[stage_id].before_step,
            )
        super().__init__(
            engines,
            synchronizers,
            federation=config.federation,
            seed=config.seed,
            comm=comm,
            run_dir=run_dir,
        )
        self.stages = list(engines.values())
        self.engine = SplitPipelineEngine(self.stages, pipeline)
        self.lookahead = self.engine.lookahead

    def _build_links(
        self, every_edge: tuple[EdgeMessages, ...], stage_ids: list[int], comm: Comm
    ) -> dict[int, Links]:
        """One link per edge and direction that has an end in this process."""
        links = {stage: Links() for stage in stage_ids}
        self._links: dict[tuple[int, int], Link] = {}
        for messages in every_edge:
            source, target, _ = messages.edge
            if not {source, target} & set(links):
                continue
            forward = self._link(source, target, messages.forward, comm)
            back = messages.backward
            backward = self._link(target, source, back, comm) if back else None
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

    def _link(self, source: int, target: int, message: tuple[WireTensor, ...], comm: Comm) -> Link:
        specs, window = _specs(message), self.pipeline.in_flight
        link: Link
        if comm.grid.colocate:
            link = QueueLink(specs, window=window)
        else:
            channel = comm.channel(source, target)
            link = DistLink(channel, specs, window=window, device=comm.device)
        self._links[source, target] = link
        return link

    def resize_links(self, every_edge: tuple[EdgeMessages, ...]) -> None:
        """Give the messages over all edges other sizes, while none is under way.

        Args:
            every_edge: The messages that follow, over the edges that there are.

        Collective: every process of the replica, before it sends or receives such a message.
        """
        for messages in every_edge:
            source, target, _ = messages.edge
            if link := self._links.get((source, target)):
                link.resize(_specs(messages.forward))
            if link := self._links.get((target, source)):
                link.resize(_specs(messages.backward))

    # -- training ----------------------------------------------------------------------------

    @abstractmethod
    def turn_source(self, turn: Turn, *, round_id: int, seen: int) -> MicroBatchSource | None:
        """Return the micro-batches of a turn; None where the first stage is not in this process.

        Arguments are those of ``train``.
        """

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
        """See ``Replica.train``."""
        source = self.turn_source(turn, round_id=round_id, seen=seen)
        self.engine.train(steps, source=source, lr=lr, on_step=on_step, until=until)

    def seed_dropout(self, client_id: int, *, round_id: int) -> None:
        """Seed the dropout of every thread, as if it were a process."""
        of_turn, rank = (self.seed, round_id, client_id), self.comm.data
        self.engine.seed_dropout(lambda stages: stable_seed(*of_turn, stages, rank))

    @property
    def dropout_state(self) -> dict[str, Any]:
        """Where the stages' dropout goes on drawing."""
        return self.engine.dropout_state

    @dropout_state.setter
    def dropout_state(self, state: dict[str, Any]) -> None:
        self.engine.dropout_state = state

    def computation(self) -> Computation | None:
        """The instruction under way; where a stage waits and another computes, the latter's."""
        under_way = [engine.doing for engine in self.stages if engine.doing is not None]
        if not under_way:
            return None
        # One that computes may be to blame; one that waits is not.
        step, instruction = min(under_way, key=lambda doing: doing[1].waits)
        what = f"{instruction.trace_name} of micro-batch {getattr(instruction, 'micro_batch', 0)}"
        return Computation(what=what, step=step, waits=instruction.waits)

    # -- the ledger --------------------------------------------------------------------------

    def sent(self) -> dict[str, int]:
        """Bytes and messages sent since the process started, those inside a client included."""
        gradients = sum(engine.gradient_bytes for engine in self.stages)
        return super().sent() | {"gradients": gradients} | self.sent_over_edges()

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


def _specs(message: tuple[WireTensor, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.shape, getattr(torch, t.dtype), t.wire) for t in message)
