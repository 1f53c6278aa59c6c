"""Measure the schedules against each other; every process of the run executes this module.

In every repetition all schedules run on the same processes, one after the other and in another
order each time, so that a disturbance of the machine affects all of them. Ratios are taken within a
repetition.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpipe.commands.plan.flops import layer_flops, masked_layer_flops
from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.commands.throughput.instruments import PeakMemory, matmul_flops_per_s, operands
from fedpipe.commands.throughput.report import (
    Measurement,
    StageWindow,
    ThroughputSettings,
    single_replica,
)
from fedpipe.commands.throughput.utilisation import Product
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.board import Board
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.device import device_name
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.models.split import Edge, pipeline_edges
from fedpipe.pipeline.emulate import emulate_
from fedpipe.pipeline.stage_engine import MicroBatchSource, StageEngine, StepResult
from fedpipe.pipeline.stock import StockPipeline

WARM_UP_STEPS = 2
"""Local steps of each schedule before the first repetition, to fill caches and open connections."""
_LEARNING_RATE = 1e-5
"""A small rate, because training goes on for the whole measurement and must not diverge."""


class Peer(Protocol):
    """A schedule to measure, with its stages of this process."""

    engines: list[Any]
    """A ``StageEngine`` or ``StockPipeline`` per stage."""

    def run(self, steps: range, on_step: Callable[[int, StepResult], None]) -> None:
        """Run local steps, until no message is in flight."""

    def sent_bytes(self) -> dict[int, tuple[int, int]]:
        """Return the bytes that each stage has sent so far, forwards and backwards."""


class SplitPeer:
    """A schedule of fedpipe's own engine."""

    def __init__(
        self, replica: PretrainingReplica, schedule: str, *, source: MicroBatchSource | None
    ) -> None:
        """Wrap a replica, which several schedules may use in turn."""
        self._replica, self._schedule, self._source = replica, schedule, source
        self.engines: list[StageEngine] = replica.stages

    def run(self, steps: range, on_step: Callable[[int, StepResult], None]) -> None:
        """Run local steps. Collective: every process of the replica."""
        for engine in self.engines:
            engine.schedule = self._schedule
        self._replica.engine.train(
            steps, source=self._source, lr=lambda step: _LEARNING_RATE, on_step=on_step
        )

    def sent_bytes(self) -> dict[int, tuple[int, int]]:
        """Return the bytes that each stage has sent so far, forwards and backwards."""

        def sent(*links: Any) -> int:
            return sum(link.sent_bytes for link in links if link is not None)

        return {
            e.spec.stage_id: (
                sent(e.links.activations_out, e.links.home_out),
                sent(e.links.gradients_out),
            )
            for e in self.engines
        }


class StockPeer:
    """DeepSpeed's own pipeline."""

    def __init__(
        self, pipeline: StockPipeline, *, source: MicroBatchSource | None, targets: list[Tensor]
    ) -> None:
        """Wrap the pipeline, with the targets of as many steps as will be run at once."""
        self._pipeline, self._source, self._targets = pipeline, source, targets
        self.engines = [pipeline]

    def run(self, steps: range, on_step: Callable[[int, StepResult], None]) -> None:
        """Run local steps. Collective: every process."""
        self._pipeline.run_steps(
            steps,
            source=self._source,
            targets=self._targets,
            lr=lambda step: _LEARNING_RATE,
            on_step=on_step,
        )

    def sent_bytes(self) -> dict[int, tuple[int, int]]:
        """Return the bytes that each stage has sent so far, forwards and backwards."""
        stock = self._pipeline
        return {stock.spec.stage_id: (stock.sent_forward_bytes, stock.sent_backward_bytes)}


def measure(
    config: RunConfig,
    data: PreparedData,
    *,
    env: ProcessEnv,
    settings: ThroughputSettings,
    emit: Callable[[str, Any], None],
    board: Board | None = None,
) -> Measurement | None:
    """Measure every schedule on one replica.

    Args:
        config: The run; only one replica without data parallelism is measured.
        data: Prepared text, of which the first client's is read.
        env: Rank and rendezvous of this process.
        settings: Number of steps and repetitions.
        emit: Called on rank 0 after every repetition.
        board: The board of ranks that have met already, if they have.

    Returns:
        The measurement on rank 0, None elsewhere.

    Collective: every process; as many as stages, or one with ``pipeline.colocate``.
    """
    config = single_replica(config)
    comm = Comm(Grid.from_config(config), env, edges=edges_of_all_peers(config), board=board)
    try:
        peers = build_peers(config, data, comm=comm, settings=settings)
        product = Product.of(config, vocab_size=data.vocab_size)
        return _measure(
            peers,
            operands(
                product.rows,
                product.inner,
                product.columns,
                dtype=product.dtype,
                device=comm.device,
            ),
            comm=comm,
            settings=settings,
            emit=emit,
            vocab_size=data.vocab_size,
        )
    finally:
        comm.close()


def build_peers(
    config: RunConfig, data: PreparedData, *, comm: Comm, settings: ThroughputSettings
) -> dict[str, Peer]:
    """Build the pipelines with the same first weights and the same text.

    Args:
        config: The run, with a single replica.
        data: Prepared text.
        comm: Process groups with edges in both directions.
        settings: Number of steps, and emulated devices.

    Returns:
        The schedules by name: streaming, 1f1b, sequential and stock. DeepSpeed's own pipeline
        (stock) is missing with ``pipeline.colocate`` or a head at the client, because it cannot put
        two stages into a process, and with ``data.attention`` document, because its stages send
        nothing but hidden states.

    Collective: every process.
    """
    local = PretrainingReplica(_with_objective(config, "local_loss", "streaming"), data, comm=comm)
    end_to_end_config = _with_objective(config, "end_to_end", "1f1b")
    end_to_end = PretrainingReplica(end_to_end_config, data, comm=comm)
    source = local.training_source(0, start=0)
    peers: dict[str, Peer] = {
        "streaming": SplitPeer(local, "streaming", source=source),
        "1f1b": SplitPeer(end_to_end, "1f1b", source=source),
        "sequential": SplitPeer(end_to_end, "sequential", source=source),
    }
    stages = [engine.stage for engine in (*local.stages, *end_to_end.stages)]
    one_each = not config.pipeline.colocate and config.pipeline.head_location == "server"
    if one_each and config.data.attention == "block":
        stock = StockPipeline(
            end_to_end.specs,
            hf_config=end_to_end.hf_config,
            config=end_to_end_config,
            deepspeed_config=deepspeed_config(config),
            stage_id=comm.stages[0],
            device=comm.device,
        )
        targets = _targets(source, config, comm=comm, num_steps=settings.num_steps)
        peers["stock"] = StockPeer(stock, source=source, targets=targets)
        stages.append(stock.stage)
    if settings.emulate_ms:
        layer_s = settings.emulate_ms / 1000
        masked_layer, head = _in_layers(config, vocab_size=data.vocab_size)
        for stage in stages:
            emulate_(
                stage,
                layer_forward_s=layer_s,
                masked_layer_forward_s=masked_layer * layer_s,
                head_forward_s=head * layer_s,
            )
    return peers


def edges_of_all_peers(config: RunConfig) -> list[Edge]:
    """List the edges of all schedules, with the backward direction if one of them needs it."""
    found: dict[tuple[int, int], bool] = {}
    for objective, schedule in (("local_loss", "streaming"), ("end_to_end", "1f1b")):
        for source, target, backward in pipeline_edges(
            _with_objective(config, objective, schedule).pipeline
        ):
            found[source, target] = found.get((source, target), False) or backward
    return [Edge(*ends, backward) for ends, backward in found.items()]


def _in_layers(config: RunConfig, *, vocab_size: int) -> tuple[float, float]:
    """Return the FLOPs of the last layer and of a head, in units of the first encoder layer."""
    shape = model_shape(config, vocab_size=vocab_size)
    sequences, layer = config.pipeline.micro_batch_size, layer_flops(config, shape, 0)
    head = sequences * config.data.num_scored * shape.head_flops_per_token()
    last = masked_layer_flops(config, shape, shape.num_hidden_layers - 1)
    return last / layer, head / layer


def _with_objective(config: RunConfig, objective: Any, schedule: Any) -> RunConfig:
    pipeline = replace(config.pipeline, objective=objective, schedule=schedule)
    return replace(config, pipeline=pipeline)


def _targets(
    source: MicroBatchSource | None, config: RunConfig, *, comm: Comm, num_steps: int
) -> list[Tensor]:
    """Return the targets of all micro-batches on every process, for DeepSpeed's last stage."""
    targets: list[Tensor] = []
    if source is not None:
        for step in range(num_steps):
            for micro_batch in range(config.pipeline.num_micro_batches):
                targets.append(source(step, micro_batch)[1])
    return comm.broadcast(targets)


def _measure(
    peers: dict[str, Peer],
    matrices: tuple[Tensor, Tensor],
    *,
    comm: Comm,
    settings: ThroughputSettings,
    emit: Callable[[str, Any], None],
    vocab_size: int,
) -> Measurement | None:
    names = list(peers)
    synchronous = comm.device.type == "cpu"  # on a GPU a trace waits for every kernel
    for name in names:
        _window(peers[name], comm=comm, num_steps=WARM_UP_STEPS, traced=False)

    def window(name: str, *, traced: bool) -> list[StageWindow]:
        return _window(peers[name], comm=comm, num_steps=settings.num_steps, traced=traced)

    ceiling: list[float] = []
    windows: dict[str, list[list[StageWindow]]] = {name: [] for name in names}
    traces = windows if synchronous else {name: [] for name in names}
    for repetition in range(settings.repetitions):
        if not settings.emulate_ms:
            comm.barrier()  # all processes at once, so that they compete as in training
            ceiling.append(matmul_flops_per_s(matrices))
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            windows[name].append(window(name, traced=synchronous))
            if not synchronous:
                traces[name].append(window(name, traced=True))
        if comm.is_master():
            emit("note", f"repetition {repetition + 1}/{settings.repetitions}")
    memory = {name: _peak_memory(peers[name], comm=comm) for name in names}
    gathered = comm.gather((windows, traces, memory, ceiling))
    if gathered is None:
        return None
    return Measurement(
        windows=_by_stage([part[0] for part in gathered]),
        traces=_by_stage([part[1] for part in gathered]),
        peak_memory_bytes={name: [part[2][name] for part in gathered] for name in names},
        matmul_flops_per_s=[part[3] for part in gathered if part[3]],
        vocab_size=vocab_size,
        device=device_name(comm.device),
        threads_per_process=torch.get_num_threads(),
    )


def _window(peer: Peer, *, comm: Comm, num_steps: int, traced: bool) -> list[StageWindow]:
    """Run steps, and record for every stage of this process when each step has ended."""
    ends: dict[int, list[float]] = {e.spec.stage_id: [] for e in peer.engines}
    for engine in peer.engines:
        engine.trace.steps = range(num_steps) if traced else range(0)
        engine.trace.events = []
    before = peer.sent_bytes()
    comm.barrier()
    peer.run(range(num_steps), lambda stage, result: ends[stage].append(time.monotonic()))
    after = peer.sent_bytes()
    return [
        StageWindow(
            stage=engine.spec.stage_id,
            ends=tuple(ends[engine.spec.stage_id]),
            events=tuple(engine.trace.events),
            forward_bytes=after[engine.spec.stage_id][0] - before[engine.spec.stage_id][0],
            backward_bytes=after[engine.spec.stage_id][1] - before[engine.spec.stage_id][1],
        )
        for engine in peer.engines
    ]


def _peak_memory(peer: Peer, *, comm: Comm) -> int:
    """Return the peak memory of this process in another run, which is not timed."""
    comm.barrier()
    watch = PeakMemory(
        [engine.stage for engine in peer.engines],
        [engine.optimizer for engine in peer.engines],
        device=comm.device,
    )
    peer.run(range(WARM_UP_STEPS), lambda stage, result: None)
    return watch.read()


def _by_stage(
    parts: list[dict[str, list[list[StageWindow]]]],
) -> dict[str, list[list[StageWindow]]]:
    """Unite the windows of all processes, by schedule and repetition, in order of the stages."""
    return {
        name: [
            sorted((w for part in parts for w in part[name][repetition]), key=lambda w: w.stage)
            for repetition in range(len(parts[0][name]))
        ]
        for name in parts[0]
    }
