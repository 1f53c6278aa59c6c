"""Pipeline schedules as pure generators of instructions, in DeepSpeed's vocabulary.

A schedule yields what one stage does in **one local step**; the engine maps every instruction type
to a method and ``fedpipe.pipeline.timeline`` simulates the very same streams. Instructions carry
DeepSpeed's names (``deepspeed.runtime.pipe.schedule``) and a micro-batch index instead of a buffer
index. Two are ours: ``LocalBackwardPass`` and ``EvaluateLoss``.

Sends do not block while fewer than ``pipeline.in_flight`` messages of an edge are pending; receives
block until their message is there. Messages of an edge and direction arrive in the order of the
micro-batches, so every send is paired with the receive of the same index in the neighbour's stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing a stage does."""

    trace_name: ClassVar[str] = ""
    """Name of the event in ``timeline.json``."""


@dataclass(frozen=True, slots=True)
class MicroBatchInstruction(Instruction):
    """An instruction that works on one micro-batch of the local step."""

    micro_batch: int
    """Index within the local step, from 0."""


@dataclass(frozen=True, slots=True)
class LoadMicroBatch(MicroBatchInstruction):
    """Take the next blocks of the client and mask them; first stage only."""

    trace_name: ClassVar[str] = "load"


@dataclass(frozen=True, slots=True)
class RecvActivation(MicroBatchInstruction):
    """Wait for the previous stage's activations and targets.

    Blocking, paired with the previous stage's ``SendActivation``. Roughly:
    ``inputs[m] = link_in.receive().requires_grad_(objective == "end_to_end")``.
    """

    trace_name: ClassVar[str] = "recv_activation"


@dataclass(frozen=True, slots=True)
class ForwardPass(MicroBatchInstruction):
    """Run the stage's layers. Roughly: ``outputs[m] = stage(inputs[m])``."""

    trace_name: ClassVar[str] = "forward"


@dataclass(frozen=True, slots=True)
class SendActivation(MicroBatchInstruction):
    """Hand the detached activations to the next stage.

    Waits only while ``in_flight`` earlier ones are pending. Roughly:
    ``link_out.send(outputs[m].detach(), targets[m])``.
    """

    trace_name: ClassVar[str] = "send_activation"


@dataclass(frozen=True, slots=True)
class LocalBackwardPass(MicroBatchInstruction):
    """Head, loss and backward inside the stage; no gradient leaves it.

    Roughly: ``(loss(head(outputs[m]), targets[m]) / num_micro_batches).backward()``.
    """

    trace_name: ClassVar[str] = "local_backward"


@dataclass(frozen=True, slots=True)
class RecvGrad(MicroBatchInstruction):
    """Wait for the gradient of the activations that were sent; blocking."""

    trace_name: ClassVar[str] = "recv_grad"


@dataclass(frozen=True, slots=True)
class BackwardPass(MicroBatchInstruction):
    """Back-propagate over the cut: from the next stage's gradient, or from the head's loss.

    Roughly: ``outputs[m].backward(grads[m])``; on the last stage head and loss come first.
    """

    trace_name: ClassVar[str] = "backward"


@dataclass(frozen=True, slots=True)
class SendGrad(MicroBatchInstruction):
    """Hand the gradient of the received activations back to the previous stage."""

    trace_name: ClassVar[str] = "send_grad"


@dataclass(frozen=True, slots=True)
class EvaluateLoss(MicroBatchInstruction):
    """Head and loss without gradients. Roughly: ``total += loss(head(outputs[m]), targets[m])``."""

    trace_name: ClassVar[str] = "evaluate_loss"


@dataclass(frozen=True, slots=True)
class OptimizerStep(Instruction):
    """Average gradients over the client's own ranks, clip per stage, step, advance the schedule."""

    trace_name: ClassVar[str] = "optimizer_step"


class Schedule(Protocol):
    """What ``SCHEDULES`` holds."""

    def __call__(
        self, stage_id: int, *, num_stages: int, num_micro_batches: int
    ) -> Iterator[Instruction]:
        """Yield the instructions of one stage for one local step."""
        ...


def _receive_input(stage_id: int, micro_batch: int) -> Instruction:
    return LoadMicroBatch(micro_batch) if stage_id == 0 else RecvActivation(micro_batch)


def streaming(stage_id: int, *, num_stages: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield the local-loss stream: activations leave at once and nothing ever comes back.

    Args:
        stage_id: Stage whose instructions are wanted.
        num_stages: Stages of the pipeline.
        num_micro_batches: Micro-batches of the local step.

    Yields:
        Per micro-batch load or receive, forward, send, local backward; then the optimizer step.
    """
    for micro_batch in range(num_micro_batches):
        yield _receive_input(stage_id, micro_batch)
        yield ForwardPass(micro_batch)
        if stage_id < num_stages - 1:
            yield SendActivation(micro_batch)
        yield LocalBackwardPass(micro_batch)
    yield OptimizerStep()


def one_f_one_b(stage_id: int, *, num_stages: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield 1F1B exactly as DeepSpeed's ``TrainSchedule`` orders it, flush included.

    In unit slots the forward of micro-batch m runs on stage s at slot ``2m + s``, its backward at
    ``2m + 2S - 1 - s``; messages move at the start of the slot after the one that made them.
    Source: DeepSpeed ``runtime/pipe/schedule.py`` (``TrainSchedule``); 1F1B is PipeDream-Flush,
    Narayanan et al. 2021, https://arxiv.org/abs/2104.04473. Unlike there only the first stage
    loads: labels reach the last stage with the activations.

    Args:
        stage_id: Stage whose instructions are wanted.
        num_stages: Stages of the pipeline.
        num_micro_batches: Micro-batches of the local step.

    Yields:
        The stage's instructions, ending with the optimizer step.
    """
    first, last = stage_id == 0, stage_id == num_stages - 1
    slots = range(num_micro_batches)
    for slot in range(2 * (num_micro_batches + num_stages - 1)):
        forward_id = (slot - stage_id) // 2
        backward_id = (slot - 2 * num_stages + 1 + stage_id) // 2
        if (slot - stage_id) % 2 == 0:
            # backward_id is rounded down here: the backward of the slot before this one.
            if not first and backward_id in slots:
                yield SendGrad(backward_id)
            if forward_id in slots:
                yield _receive_input(stage_id, forward_id)
                yield ForwardPass(forward_id)
        else:
            # forward_id is rounded down here: the forward of the slot before this one.
            if not last and backward_id in slots:
                yield RecvGrad(backward_id)
            if not last and forward_id in slots:
                yield SendActivation(forward_id)
            if backward_id in slots:
                yield BackwardPass(backward_id)
    yield OptimizerStep()


def sequential(stage_id: int, *, num_stages: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield FedBERT's order: one micro-batch goes through all stages and back before the next.

    Source: FedBERT, Tian et al. 2022, https://doi.org/10.1145/3510033.

    Args:
        stage_id: Stage whose instructions are wanted.
        num_stages: Stages of the pipeline.
        num_micro_batches: Micro-batches of the local step.

    Yields:
        Per micro-batch forward and backward with their messages; then the optimizer step.
    """
    for micro_batch in range(num_micro_batches):
        yield _receive_input(stage_id, micro_batch)
        yield ForwardPass(micro_batch)
        if stage_id < num_stages - 1:
            yield SendActivation(micro_batch)
            yield RecvGrad(micro_batch)
        yield BackwardPass(micro_batch)
        if stage_id > 0:
            yield SendGrad(micro_batch)
    yield OptimizerStep()


def evaluation(stage_id: int, *, num_stages: int, num_micro_batches: int) -> Iterator[Instruction]:
    """Yield the scoring of held-out blocks: forward only, every head's loss, no optimizer.

    Args:
        stage_id: Stage whose instructions are wanted.
        num_stages: Stages of the pipeline.
        num_micro_batches: Micro-batches to score.

    Yields:
        Per micro-batch load or receive, forward, send, evaluate.
    """
    for micro_batch in range(num_micro_batches):
        yield _receive_input(stage_id, micro_batch)
        yield ForwardPass(micro_batch)
        if stage_id < num_stages - 1:
            yield SendActivation(micro_batch)
        yield EvaluateLoss(micro_batch)


SCHEDULES: dict[str, Schedule] = {
    "streaming": streaming,
    "1f1b": one_f_one_b,
    "sequential": sequential,
}
"""Training schedules by their name in ``pipeline.schedule``."""
