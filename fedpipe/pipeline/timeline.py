"""Simulate any schedule: the ideal that a measured run is compared with.

A discrete-event simulation of the very instruction streams that the engine executes, with the
links' rules: receives block; ``in_flight`` of them are posted ahead; a message moves once it is
sent *and* its receive is posted (a gloo send is a rendezvous); messages of an edge move one after
the other; a send waits only while ``in_flight`` earlier ones are pending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedpipe.pipeline.schedule import (
    SCHEDULES,
    BackwardPass,
    ForwardPass,
    Instruction,
    LocalBackwardPass,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)

COMPUTE = ("forward", "local_backward", "backward", "optimizer_step")
"""Events in which a stage is busy; the others wait for a neighbour."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds that a stage computes."""

    forward_s: float
    """Layers' forward for one micro-batch."""
    backward_s: float
    """Layers' backward for one micro-batch."""
    head_s: float = 0.0
    """The head's forward and backward for one micro-batch; 0 for a stage without a head."""
    optimizer_s: float = 0.0
    """The optimizer step, once per local step."""


class Event(NamedTuple):
    """One instruction of one stage."""

    stage: int
    name: str
    """As in ``timeline.json``: forward, recv_activation, ..."""
    micro_batch: int
    """Index within the local step; -1 for the optimizer step."""
    batch: int
    """Local step."""
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What every stage did when, and what that means in steady state."""

    events: list[Event]
    """Every instruction, stage by stage, in order of time."""
    step_s: float
    """Seconds per local step in steady state; the first half of the steps is warm-up."""
    stage_busy_pct: list[float]
    """Share of ``step_s`` that each stage computes."""

    @property
    def bubble_pct(self) -> float:
        """Idle share of the stages in steady state.

        A schedule that flushes pays for it in every step. The streaming fill happens once in a
        client's turn, before the steady state, and is not in here.
        """
        return 100.0 - sum(self.stage_busy_pct) / len(self.stage_busy_pct)


@dataclass(slots=True)
class _Edge:
    """Messages from one stage to a neighbour, in order."""

    posted_s: list[float]
    """When each receive was posted."""
    sent_s: list[float] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)

    def move(self, transfer_s: float) -> None:
        """Let every message arrive that is sent and awaited."""
        while len(self.arrived_s) < min(len(self.sent_s), len(self.posted_s)):
            index = len(self.arrived_s)
            ready_s = max(self.sent_s[index], self.posted_s[index])
            before_s = self.arrived_s[-1] if index else 0.0
            self.arrived_s.append(max(ready_s, before_s) + transfer_s)


class _Stage:
    """One stage on its way through its instructions."""

    def __init__(
        self, stage_id: int, cost: StageCost, *, stream: Iterator[tuple[int, Instruction]]
    ) -> None:
        self.stage_id = stage_id
        self.cost = cost
        self.stream = stream
        self.next = next(stream, None)
        self.now_s = 0.0
        self.events: list[Event] = []

    def finish(self, end_s: float) -> None:
        """Record the current instruction and take the next one."""
        assert self.next is not None
        batch, instruction = self.next
        micro_batch = getattr(instruction, "micro_batch", -1)
        name = instruction.trace_name
        self.events.append(Event(self.stage_id, name, micro_batch, batch, self.now_s, end_s))
        self.now_s = end_s
        self.next = next(self.stream, None)


def simulate(
    schedule: str,
    costs: Sequence[StageCost],
    *,
    num_micro_batches: int,
    num_batches: int = 8,
    in_flight: int = 2,
    transfer_s: float = 0.0,
) -> Timeline:
    """Run a schedule on stages of given cost.

    Args:
        schedule: A name in ``SCHEDULES``.
        costs: One entry per stage.
        num_micro_batches: Micro-batches per local step.
        num_batches: Local steps to simulate, 2 or more; the first half is warm-up.
        in_flight: Receives posted ahead, and messages pending before a send waits, per edge and
            direction.
        transfer_s: Seconds a message is on the wire.

    Returns:
        Events and steady-state figures.
    """
    assert num_batches >= 2, num_batches
    stages = [
        _Stage(
            stage, cost, stream=_stream(schedule, stage, len(costs), num_micro_batches, num_batches)
        )
        for stage, cost in enumerate(costs)
    ]
    edges = {
        (a, b): _Edge(posted_s=[0.0] * in_flight)
        for a in range(len(costs))
        for b in (a - 1, a + 1)
        if 0 <= b < len(costs)
    }
    progress = True
    while progress:
        progress = False
        for stage in stages:
            while stage.next is not None and _advance(
                stage, edges, in_flight=in_flight, transfer_s=transfer_s
            ):
                progress = True
    stuck = [f"stage {stage.stage_id} at {stage.next}" for stage in stages if stage.next]
    assert not stuck, f"the schedule {schedule} is in deadlock: {', '.join(stuck)}"
    return _summarise(stages, num_batches=num_batches)


def to_chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Return the events as a Chrome trace, in the form of a run's ``timeline.json``.

    Args:
        timeline: A simulated run.

    Returns:
        The trace as an object for JSON; microseconds, one thread per stage.
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


def _stream(
    schedule: str, stage: int, num_stages: int, num_micro_batches: int, num_batches: int
) -> Iterator[tuple[int, Instruction]]:
    for batch in range(num_batches):
        for instruction in SCHEDULES[schedule](
            stage, num_stages=num_stages, num_micro_batches=num_micro_batches
        ):
            yield batch, instruction


def _advance(
    stage: _Stage, edges: dict[tuple[int, int], _Edge], *, in_flight: int, transfer_s: float
) -> bool:
    """Execute the next instruction, or say that a neighbour must move first."""
    assert stage.next is not None
    _, instruction = stage.next
    here = stage.stage_id
    if isinstance(instruction, (RecvActivation, RecvGrad)):
        source = here - 1 if isinstance(instruction, RecvActivation) else here + 1
        return _receive(stage, edges[source, here], in_flight=in_flight, transfer_s=transfer_s)
    if isinstance(instruction, (SendActivation, SendGrad)):
        target = here + 1 if isinstance(instruction, SendActivation) else here - 1
        return _send(stage, edges[here, target], in_flight=in_flight, transfer_s=transfer_s)
    is_last = (here, here + 1) not in edges
    stage.finish(stage.now_s + _compute_s(instruction, stage.cost, is_last=is_last))
    return True


def _receive(stage: _Stage, edge: _Edge, *, in_flight: int, transfer_s: float) -> bool:
    edge.move(transfer_s)
    # The first receives are posted when the stream starts, then one more whenever one is done.
    index = len(edge.posted_s) - in_flight
    if index >= len(edge.arrived_s):
        return False
    stage.finish(max(stage.now_s, edge.arrived_s[index]))
    edge.posted_s.append(stage.now_s)
    return True


def _send(stage: _Stage, edge: _Edge, *, in_flight: int, transfer_s: float) -> bool:
    edge.move(transfer_s)
    oldest = len(edge.sent_s) - in_flight
    if oldest >= len(edge.arrived_s):
        return False
    stage.finish(max(stage.now_s, edge.arrived_s[oldest] if oldest >= 0 else 0.0))
    edge.sent_s.append(stage.now_s)
    return True


def _compute_s(instruction: Instruction, cost: StageCost, *, is_last: bool) -> float:
    if isinstance(instruction, ForwardPass):
        return cost.forward_s
    if isinstance(instruction, LocalBackwardPass):
        return cost.backward_s + cost.head_s
    if isinstance(instruction, BackwardPass):
        # Over the cut only the last stage has a head.
        return cost.backward_s + (cost.head_s if is_last else 0.0)
    return cost.optimizer_s if isinstance(instruction, OptimizerStep) else 0.0


def _summarise(stages: list[_Stage], *, num_batches: int) -> Timeline:
    # Fast stages in front run ahead by what the links hold, so the pace is the last stage's.
    done_s = [event.end_s for event in stages[-1].events if event.name == "optimizer_step"]
    warm_up = num_batches // 2 - 1
    step_s = (done_s[-1] - done_s[warm_up]) / (num_batches - 1 - warm_up)
    busy = []
    for stage in stages:
        busy_s = sum(e.end_s - e.start_s for e in stage.events if e.name in COMPUTE) / num_batches
        busy.append(100.0 * busy_s / step_s if step_s > 0 else 100.0)
    events = [event for stage in stages for event in stage.events]
    return Timeline(events=events, step_s=step_s, stage_busy_pct=busy)
