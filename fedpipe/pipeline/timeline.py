"""Simulate a schedule, to get the ideal with which a measured run is compared.

This is a discrete-event simulation of the same instruction streams that the engine executes, with
the rules of the links: a receive blocks, and ``in_flight`` receives are posted ahead; a message is
transferred once it is sent *and* its receive is posted (as gloo does); messages of an edge are
transferred one after the other; a send waits only while ``in_flight`` earlier ones are pending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedpipe.models.split import StageSpec, edges, placement
from fedpipe.pipeline.schedule import (
    SCHEDULES,
    BackwardPass,
    ForwardPass,
    Instruction,
    LocalBackwardPass,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    RecvHomeGrad,
    SendActivation,
    SendGrad,
    SendHome,
    rank_stream,
)

COMPUTE = ("forward", "local_backward", "backward", "optimizer_step")
"""Events in which a stage computes; in all others it waits for a neighbour."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of computation of a stage."""

    forward_s: float
    """Forward pass of the layers for one micro-batch."""
    backward_s: float
    """Backward pass of the layers for one micro-batch."""
    head_s: float = 0.0
    """Forward and backward pass of the head for one micro-batch; 0 without a head."""
    optimizer_s: float = 0.0
    """The optimizer step, once per local step."""


class Event(NamedTuple):
    """One executed instruction of one stage."""

    stage: int
    name: str
    """Name as in ``timeline.json``: forward, recv_activation, ..."""
    micro_batch: int
    """Index within the local step; -1 for the optimizer step."""
    batch: int
    """Local step."""
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of all stages, and their figures in steady state."""

    events: list[Event]
    """Every instruction, process by process, in order of time."""
    step_s: float
    """Seconds per local step in steady state."""
    stage_busy_pct: list[float]
    """Share of ``step_s`` in which each process computes, that is, one number per encoder stage;
    heads at the client belong to the process of the first stage."""

    @property
    def bubble_pct(self) -> float:
        """Mean idle share of the processes in steady state.

        A flush counts, because it happens in every step. The fill of the streaming schedule does
        not, because it happens once in a client's turn, before the steady state.
        """
        return 100.0 - sum(self.stage_busy_pct) / len(self.stage_busy_pct)


@dataclass(slots=True)
class _Edge:
    """Messages from one stage to a neighbour, in order."""

    posted_s: list[float]
    """When each receive was posted."""
    sent_s: list[float] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)

    def transfer(self, transfer_s: float) -> None:
        """Transfer every message that has been sent and whose receive is posted."""
        while len(self.arrived_s) < min(len(self.sent_s), len(self.posted_s)):
            index = len(self.arrived_s)
            ready_s = max(self.sent_s[index], self.posted_s[index])
            before_s = self.arrived_s[-1] if index else 0.0
            self.arrived_s.append(max(ready_s, before_s) + transfer_s)


class _Rank:
    """One process that executes the instructions of its stages."""

    def __init__(self, stages: Sequence[int], *, stream: Iterator[tuple[int, Instruction]]) -> None:
        self.stages = stages
        self.stream = stream
        self.next = next(stream, None)
        self.now_s = 0.0
        self.events: list[Event] = []
        self._batch = dict.fromkeys(stages, 0)

    def complete(self, end_s: float) -> None:
        """Record the present instruction as done, and go to the next one."""
        assert self.next is not None
        stage, instruction = self.next
        micro_batch = getattr(instruction, "micro_batch", -1)
        name, batch = instruction.trace_name, self._batch[stage]
        self.events.append(Event(stage, name, micro_batch, batch, self.now_s, end_s))
        if isinstance(instruction, OptimizerStep):
            self._batch[stage] += 1
        self.now_s = end_s
        self.next = next(self.stream, None)


def simulate(
    schedule: str,
    specs: Sequence[StageSpec],
    costs: Sequence[StageCost],
    *,
    num_micro_batches: int,
    num_batches: int = 16,
    in_flight: int = 2,
    transfer_s: float = 0.0,
) -> Timeline:
    """Simulate a schedule on stages of given cost.

    Args:
        schedule: A key of ``SCHEDULES``.
        specs: The stages, of an objective that the schedule can train.
        costs: Cost of each stage.
        num_micro_batches: Micro-batches per local step.
        num_batches: Local steps to simulate, 2 or more. The first half is warm-up, and the last
            quarter is not counted either.
        in_flight: Per edge and direction, receives that are posted ahead, and messages that may be
            pending before a send waits.
        transfer_s: Seconds of the transfer of a message.

    Returns:
        Events and steady-state figures.
    """
    assert num_batches >= 2, num_batches
    ranks = [
        _Rank(
            [s.stage_id for s in held],
            stream=rank_stream(
                SCHEDULES[schedule],
                held,
                num_micro_batches=num_micro_batches,
                in_flight=in_flight,
                steps=lambda: range(num_batches),
            ),
        )
        for held in placement(specs)
    ]
    links = {
        ends: _Edge(posted_s=[0.0] * in_flight)
        for a, b, _ in edges(specs)
        for ends in ((a, b), (b, a))
    }
    progress = True
    while progress:
        progress = False
        for rank in ranks:
            while rank.next is not None and _advance(
                rank, specs, costs, links, in_flight=in_flight, transfer_s=transfer_s
            ):
                progress = True
    stuck = [f"stage {rank.next[0]} at {rank.next[1]}" for rank in ranks if rank.next]
    assert not stuck, f"the schedule {schedule} is in deadlock: {', '.join(stuck)}"
    return _summarise(ranks, num_stages=len(specs), num_batches=num_batches)


def to_chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Return the events as a Chrome trace, in the format of a run's ``timeline.json``.

    Args:
        timeline: A simulated run.

    Returns:
        The trace as an object for JSON, in microseconds, with one thread per stage.
    """
    return {
        "traceEvents": [
            {
                "name": event.name,
                "cat": "compute" if event.name in COMPUTE else "wait",
                "ph": "X",
                "ts": event.start_s * 1e6,
                "dur": (event.end_s - event.start_s) * 1e6,
                "pid": 0,
                "tid": event.stage,
                "args": {"micro_batch": event.micro_batch, "step": event.batch},
            }
            for event in sorted(timeline.events, key=lambda event: (event.start_s, event.stage))
        ]
    }


def _advance(
    rank: _Rank,
    specs: Sequence[StageSpec],
    costs: Sequence[StageCost],
    links: dict[tuple[int, int], _Edge],
    *,
    in_flight: int,
    transfer_s: float,
) -> bool:
    """Execute the next instruction; return False if another process must do something first."""
    assert rank.next is not None
    here, instruction = rank.next
    there = _peer(specs[here], instruction)
    if isinstance(instruction, (RecvActivation, RecvGrad, RecvHomeGrad)):
        return _receive(rank, links[there, here], in_flight=in_flight, transfer_s=transfer_s)
    if isinstance(instruction, (SendActivation, SendGrad, SendHome)):
        return _send(rank, links[here, there], in_flight=in_flight, transfer_s=transfer_s)
    rank.complete(rank.now_s + _compute_s(instruction, costs[here]))
    return True


def _peer(spec: StageSpec, instruction: Instruction) -> int:
    """Return the other stage of a send or receive."""
    if isinstance(instruction, (SendHome, RecvHomeGrad)):
        assert spec.home_head is not None
        return spec.home_head
    if isinstance(instruction, (SendActivation, RecvGrad)):
        assert spec.next_stage is not None
        return spec.next_stage
    return spec.previous_stage


def _receive(rank: _Rank, edge: _Edge, *, in_flight: int, transfer_s: float) -> bool:
    edge.transfer(transfer_s)
    # ``in_flight`` receives are posted at the start, and one more whenever one is done.
    index = len(edge.posted_s) - in_flight
    if index >= len(edge.arrived_s):
        return False
    rank.complete(max(rank.now_s, edge.arrived_s[index]))
    edge.posted_s.append(rank.now_s)
    return True


def _send(rank: _Rank, edge: _Edge, *, in_flight: int, transfer_s: float) -> bool:
    edge.transfer(transfer_s)
    oldest = len(edge.sent_s) - in_flight
    if oldest >= len(edge.arrived_s):
        return False
    rank.complete(max(rank.now_s, edge.arrived_s[oldest] if oldest >= 0 else 0.0))
    edge.sent_s.append(rank.now_s)
    return True


def _compute_s(instruction: Instruction, cost: StageCost) -> float:
    if isinstance(instruction, ForwardPass):
        return cost.forward_s
    if isinstance(instruction, (LocalBackwardPass, BackwardPass)):
        return cost.backward_s + cost.head_s
    return cost.optimizer_s if isinstance(instruction, OptimizerStep) else 0.0


def _summarise(ranks: list[_Rank], *, num_stages: int, num_batches: int) -> Timeline:
    events = [event for rank in ranks for event in rank.events]
    # Fast early stages run ahead as far as the links allow, so the last stage gives the pace. The
    # end is not counted, because a first stage that has finished leaves its process to the heads.
    done_s = [e.end_s for e in events if e.name == "optimizer_step" and e.stage == num_stages - 1]
    warm_up = num_batches // 2 - 1
    end = num_batches - 1 - num_batches // 4
    step_s = (done_s[end] - done_s[warm_up]) / (end - warm_up)
    busy = []
    for rank in ranks:
        busy_s = sum(e.end_s - e.start_s for e in rank.events if e.name in COMPUTE) / num_batches
        busy.append(100.0 * busy_s / step_s if step_s > 0 else 100.0)
    return Timeline(events=events, step_s=step_s, stage_busy_pct=busy)
