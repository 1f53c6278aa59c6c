"""Pipeline schedules as pure generators of instructions, in DeepSpeed's vocabulary.

A schedule yields, slot by slot, the instructions of one stage for **one local step**;
``rank_stream`` interleaves the stages of one process over a client's turn. The engine maps every
instruction type to a method, and ``fedpipe.pipeline.timeline`` simulates the same streams.
Instructions have DeepSpeed's names (``deepspeed.runtime.pipe.schedule``), and a micro-batch index
instead of a buffer index. ``LocalBackwardPass``, ``EvaluateLoss``, ``SendHome`` and
``RecvHomeGrad`` are additions of fedpipe.

With heads at the client (U-shape) the first process holds several virtual stages: the first stage
and the heads, similar to the V of ZBV (Qi et al. 2024, https://arxiv.org/abs/2405.15362).

A send does not block while fewer than ``pipeline.in_flight`` messages of its edge are pending; a
receive blocks until its message has arrived. Messages of an edge and direction arrive in the order
of the micro-batches, so a send is paired with the receive of the same index at the neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Protocol

from fedpipe.models.split import StageSpec


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation of a stage."""

    trace_name: ClassVar[str] = ""
    """Name of the event in ``timeline.json``."""

    @property
    def waits(self) -> bool:
        """Whether the instruction may wait for another stage."""
        return self.trace_name.startswith(("send", "recv"))


@dataclass(frozen=True, slots=True)
class MicroBatchInstruction(Instruction):
    """An instruction that works on one micro-batch of the local step."""

    micro_batch: int
    """Index within the local step, from 0."""


@dataclass(frozen=True, slots=True)
class LoadMicroBatch(MicroBatchInstruction):
    """Read and mask the next blocks of the client; first stage only."""

    trace_name: ClassVar[str] = "load"


@dataclass(frozen=True, slots=True)
class RecvActivation(MicroBatchInstruction):
    """Wait for the previous stage's activations and targets.

    Blocking, paired with the previous stage's ``SendActivation``. Roughly:
    ``inputs[m] = link_in.receive().requires_grad_(spec.sends_grad)``.
    """

    trace_name: ClassVar[str] = "recv_activation"


@dataclass(frozen=True, slots=True)
class ForwardPass(MicroBatchInstruction):
    """Run the stage's layers. Roughly: ``outputs[m] = stage(inputs[m])``."""

    trace_name: ClassVar[str] = "forward"


@dataclass(frozen=True, slots=True)
class SendActivation(MicroBatchInstruction):
    """Send the detached activations to the next stage.

    Waits only while ``in_flight`` earlier sends are pending. Roughly:
    ``link_out.send(outputs[m].detach(), targets[m])``.
    """

    trace_name: ClassVar[str] = "send_activation"


@dataclass(frozen=True, slots=True)
class SendHome(MicroBatchInstruction):
    """Send the detached hidden states of the masked positions to the stage's head at the client.

    Waits as ``SendActivation`` does. Roughly:
    ``masked[m] = gather(outputs[m], positions[m]); link_home.send(masked[m].detach())``.
    """

    trace_name: ClassVar[str] = "send_home"


@dataclass(frozen=True, slots=True)
class RecvHomeGrad(MicroBatchInstruction):
    """Wait for the gradient of the hidden states that ``SendHome`` has sent; blocking."""

    trace_name: ClassVar[str] = "recv_home_grad"


@dataclass(frozen=True, slots=True)
class LocalBackwardPass(MicroBatchInstruction):
    """Compute the loss of the stage's head and back-propagate inside the stage.

    Roughly: ``(loss(head(outputs[m]), targets[m]) / num_micro_batches).backward()``.
    """

    trace_name: ClassVar[str] = "local_backward"


@dataclass(frozen=True, slots=True)
class RecvGrad(MicroBatchInstruction):
    """Wait for the gradient of the activations from the next stage; blocking."""

    trace_name: ClassVar[str] = "recv_grad"


@dataclass(frozen=True, slots=True)
class BackwardPass(MicroBatchInstruction):
    """Back-propagate from the next stage's gradient or the head's loss to the stage's inputs.

    Roughly: ``outputs[m].backward(grads[m])``; a stage with a head computes its loss first.
    """

    trace_name: ClassVar[str] = "backward"


@dataclass(frozen=True, slots=True)
class SendGrad(MicroBatchInstruction):
    """Send the gradient of the received activations back to the previous stage."""

    trace_name: ClassVar[str] = "send_grad"


@dataclass(frozen=True, slots=True)
class EvaluateLoss(MicroBatchInstruction):
    """Compute the loss without gradients: ``total += loss(head(outputs[m]), targets[m])``."""

    trace_name: ClassVar[str] = "evaluate_loss"


@dataclass(frozen=True, slots=True)
class OptimizerStep(Instruction):
    """Average gradients over the client's data-parallel ranks, clip them per stage, and step."""

    trace_name: ClassVar[str] = "optimizer_step"


class Schedule(Protocol):
    """Signature of a schedule."""

    def __call__(
        self, spec: StageSpec, *, num_micro_batches: int, in_flight: int
    ) -> Iterator[list[Instruction]]:
        """Yield the instructions of one stage for one local step, slot by slot."""
        ...


def streaming(
    spec: StageSpec, *, num_micro_batches: int, in_flight: int
) -> Iterator[list[Instruction]]:
    """Yield the local-loss schedule: activations are sent at once, and no client stage waits.

    A stage with its own head runs the backward pass of a micro-batch at once. A stage whose head is
    at the client runs ``in_flight`` forward passes ahead, so that it computes while hidden states
    travel to the head and gradients back.

    Args:
        spec: The stage.
        num_micro_batches: Micro-batches of the local step.
        in_flight: Forward passes ahead of the backward pass, with a head at the client.

    Yields:
        A slot per micro-batch: load or receive, forward, send, and the backward of this or an
        earlier micro-batch. The last slot ends with the optimizer step.
    """
    ahead = min(in_flight, num_micro_batches) if spec.home_head is not None else 0
    for slot in range(num_micro_batches + ahead):
        instructions: list[Instruction] = []
        if slot < num_micro_batches:
            instructions += _forward(spec, slot)
        if slot >= ahead:
            instructions += _backward(spec, slot - ahead)
        if slot == num_micro_batches + ahead - 1:
            instructions.append(OptimizerStep())
        yield instructions


def one_f_one_b(
    spec: StageSpec, *, num_micro_batches: int, in_flight: int
) -> Iterator[list[Instruction]]:
    """Yield 1F1B exactly as DeepSpeed's ``TrainSchedule`` orders it, including the flush.

    In unit slots the forward of micro-batch m runs on stage s at slot ``2m + s``, its backward at
    ``2m + 2S - 1 - s``. A message is sent at the start of the slot after its computation.
    Source: DeepSpeed ``runtime/pipe/schedule.py`` (``TrainSchedule``); 1F1B is PipeDream-Flush,
    Narayanan et al. 2021, https://arxiv.org/abs/2104.04473. Unlike there, only the first stage
    loads data: labels reach the last stage with the activations.

    Args:
        spec: The stage.
        num_micro_batches: Micro-batches of the local step.
        in_flight: Not used, because the distance to the last stage sets how far a stage runs ahead.

    Yields:
        The slots of the stage; the last one ends with the optimizer step.
    """
    num_stages = spec.num_stages
    valid = range(num_micro_batches)
    slots = 2 * (num_micro_batches + num_stages - 1)
    for slot in range(slots):
        forward_id = (slot - spec.stage_id) // 2
        backward_id = (slot - 2 * num_stages + 1 + spec.stage_id) // 2
        instructions: list[Instruction] = []
        if (slot - spec.stage_id) % 2 == 0:
            # The division has rounded backward_id down to the backward of the previous slot.
            if spec.sends_grad and backward_id in valid:
                instructions.append(SendGrad(backward_id))
            if forward_id in valid:
                instructions += [_receive_input(spec, forward_id), ForwardPass(forward_id)]
        else:
            # The division has rounded forward_id down to the forward of the previous slot.
            if backward_id in valid:
                instructions += _receive_grads(spec, backward_id)
            if forward_id in valid:
                instructions += _send(spec, forward_id)
            if backward_id in valid:
                instructions.append(BackwardPass(backward_id))
        if slot == slots - 1:
            instructions.append(OptimizerStep())
        yield instructions


def sequential(
    spec: StageSpec, *, num_micro_batches: int, in_flight: int
) -> Iterator[list[Instruction]]:
    """Yield FedBERT's order: a micro-batch goes through all stages and back before the next one.

    Source: FedBERT, Tian et al. 2022, https://doi.org/10.1145/3510033.

    Args:
        spec: The stage.
        num_micro_batches: Micro-batches of the local step.
        in_flight: Not used, because one micro-batch is in flight.

    Yields:
        A forward slot and a backward slot per micro-batch. The last stage does both passes in its
        forward slot. The last slot ends with the optimizer step.
    """
    for micro_batch in range(num_micro_batches):
        forward, backward = _forward(spec, micro_batch), _backward(spec, micro_batch)
        if spec.is_last:
            forward, backward = [*forward, *backward], []
        if micro_batch == num_micro_batches - 1:
            backward.append(OptimizerStep())
        yield forward
        yield backward


def evaluation(
    spec: StageSpec, *, num_micro_batches: int, in_flight: int
) -> Iterator[list[Instruction]]:
    """Yield the scoring of held-out blocks: forward passes and the loss of every head.

    Args:
        spec: The stage.
        num_micro_batches: Micro-batches to score.
        in_flight: Not used, because nothing is sent back.

    Yields:
        A slot per micro-batch: load or receive, forward, send, evaluate.
    """
    for micro_batch in range(num_micro_batches):
        yield [*_forward(spec, micro_batch), EvaluateLoss(micro_batch)]


SCHEDULES: dict[str, Schedule] = {
    "streaming": streaming,
    "1f1b": one_f_one_b,
    "sequential": sequential,
}
"""Training schedules by their name in ``pipeline.schedule``."""


def rank_stream(
    schedule: Schedule,
    specs: Sequence[StageSpec],
    *,
    num_micro_batches: int,
    in_flight: int,
    steps: Callable[[], Iterable[int]],
) -> Iterator[tuple[int, Instruction]]:
    """Yield the instructions of one process for several local steps.

    With heads at the client, their slots follow those of the first stage. Under ``streaming`` a
    head lags behind the first stage by the micro-batches that are on their way through the server,
    so that the process does not wait for them. At the end of a local step, when its server stage
    only waits for the last gradients, a head catches up: its slots then follow the first
    micro-batches of the next step. With one server stage this order has no bubble in the
    simulation; with a constant lag the process would be idle for the head's time in every step.

    Args:
        schedule: An entry of ``SCHEDULES``, or ``evaluation``.
        specs: The stages of this process: one, or the first stage and the heads at the client.
        num_micro_batches: Micro-batches of a local step.
        in_flight: Messages of an edge that may be pending.
        steps: Returns the local steps, the same for every stage; iterated as a stage starts them.

    Yields:
        ``(stage_id, instruction)``.
    """

    def slots(spec: StageSpec) -> Iterator[list[tuple[int, Instruction]]]:
        for _ in steps():
            for slot in schedule(spec, num_micro_batches=num_micro_batches, in_flight=in_flight):
                yield [(spec.stage_id, instruction) for instruction in slot]

    own, *heads = (slots(spec) for spec in specs)
    # With a lag beyond the window, client and server would wait for each other.
    lags = [
        0 if schedule in (one_f_one_b, sequential) else min(spec.scores, in_flight + 1)
        for spec in specs[1:]
    ]
    done = [0] * len(heads)
    for index, slot in enumerate(own):
        yield from slot
        for k, (head, lag) in enumerate(zip(heads, lags, strict=True)):
            due = _due(index, num_micro_batches, lag)
            for slot_behind in islice(head, max(0, due - done[k])):
                yield from slot_behind
            done[k] = max(done[k], due)
    for head in heads:
        for slot in head:
            yield from slot


def _due(index: int, num_micro_batches: int, lag: int) -> int:
    """Return the slots that a head must have done after slot ``index`` of the first stage.

    ``lag`` is the number of stages between the two. In a local step the head of the first server
    stage is two slots behind, and every further head one more; a head completes a step when the
    first stage has done ``lag`` slots of the next one.
    """
    if lag == 0:
        return index + 1
    step, micro_batch = divmod(index, num_micro_batches)
    return step * num_micro_batches + max(min(0, micro_batch + 1 - lag), micro_batch - lag)


def _receive_input(spec: StageSpec, micro_batch: int) -> Instruction:
    return LoadMicroBatch(micro_batch) if spec.is_first else RecvActivation(micro_batch)


def _forward(spec: StageSpec, micro_batch: int) -> list[Instruction]:
    return [_receive_input(spec, micro_batch), ForwardPass(micro_batch), *_send(spec, micro_batch)]


def _send(spec: StageSpec, micro_batch: int) -> list[Instruction]:
    onwards = [SendActivation(micro_batch)] if spec.next_stage is not None else []
    return onwards + ([SendHome(micro_batch)] if spec.home_head is not None else [])


def _receive_grads(spec: StageSpec, micro_batch: int) -> list[Instruction]:
    onwards = [RecvGrad(micro_batch)] if spec.receives_grad else []
    return onwards + ([RecvHomeGrad(micro_batch)] if spec.home_head is not None else [])


def _backward(spec: StageSpec, micro_batch: int) -> list[Instruction]:
    received = _receive_grads(spec, micro_batch)
    if not received and not spec.sends_grad:
        return [LocalBackwardPass(micro_batch)]
    sent = [SendGrad(micro_batch)] if spec.sends_grad else []
    return [*received, BackwardPass(micro_batch), *sent]
