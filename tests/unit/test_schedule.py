"""The instruction streams: DeepSpeed's order, no gradients where none belong, no deadlock."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from fedpipe.models.split import StageRole, StageSpec, placement
from fedpipe.pipeline import schedule as ops
from fedpipe.pipeline.schedule import SCHEDULES, evaluation, rank_stream
from tests.helpers.cases import every
from tests.helpers.tiny import stage_chain

GRIDS = list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 5, 6)))
EVERY = {**SCHEDULES, "evaluation": evaluation}
SENDS = (ops.SendActivation, ops.SendGrad, ops.SendHome)
RECEIVES = (ops.RecvActivation, ops.RecvGrad, ops.RecvHomeGrad)


def peer(spec: StageSpec, instruction: ops.Instruction) -> int | None:
    """The stage at the other end of a message."""
    if isinstance(instruction, (ops.SendHome, ops.RecvHomeGrad)):
        return spec.home_head
    if isinstance(instruction, (ops.SendActivation, ops.RecvGrad)):
        return spec.next_stage
    return spec.previous_stage


def streams(
    name: str, stages: int, micro_batches: int, *, head_location: str = "server", in_flight: int = 2
) -> list[list[ops.Instruction]]:
    return [
        [
            instruction
            for slot in EVERY[name](spec, num_micro_batches=micro_batches, in_flight=in_flight)
            for instruction in slot
        ]
        for spec in stage_chain(name, stages, head_location=head_location)
    ]


def deepspeed_order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """DeepSpeed's TrainSchedule with micro-batches counted instead of buffers."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    counts: Counter[str] = Counter()
    order = []
    for step in TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage):
        for command in step:
            name = type(command).__name__
            # Our last stage gets its labels with the activations, so only the first one loads.
            if name in ("ReduceTiedGrads", "ReduceGrads") or (name == "LoadMicroBatch" and stage):
                continue
            # Each kind of command visits the micro-batches in order.
            order.append((name, -1 if name == "OptimizerStep" else counts[name]))
            counts[name] += 1
    return order


@every(("stages", "micro_batches"), GRIDS)
def test_1f1b_is_deepspeeds_train_schedule(stages: int, micro_batches: int) -> None:
    for stage, stream in enumerate(streams("1f1b", stages, micro_batches)):
        ours = [(type(i).__name__, getattr(i, "micro_batch", -1)) for i in stream]
        assert ours == deepspeed_order(stage, stages, micro_batches)


@every(("stages", "micro_batches"), GRIDS)
def test_streaming_never_moves_a_gradient(stages: int, micro_batches: int) -> None:
    kinds = {type(i) for stream in streams("streaming", stages, micro_batches) for i in stream}
    assert not kinds & {ops.SendGrad, ops.RecvGrad, ops.BackwardPass}


def places(stages: int) -> list[str]:
    return ["server", "client"] if stages > 1 else ["server"]


CASES = [
    (name, stages, micro_batches, head_location)
    for name in EVERY
    for stages, micro_batches in GRIDS
    for head_location in places(stages)
]


@every(("name", "stages", "micro_batches", "head_location"), CASES)
def test_every_send_meets_its_receive_in_order(
    name: str, stages: int, micro_batches: int, head_location: str
) -> None:
    sent: dict[tuple[int, int | None], list[int]] = {}
    received: dict[tuple[int | None, int], list[int]] = {}
    specs = stage_chain(name, stages, head_location=head_location)
    every = streams(name, stages, micro_batches, head_location=head_location)
    for stage, stream in enumerate(every):
        for i in stream:
            if isinstance(i, SENDS):
                sent.setdefault((stage, peer(specs[stage], i)), []).append(i.micro_batch)
            if isinstance(i, RECEIVES):
                received.setdefault((peer(specs[stage], i), stage), []).append(i.micro_batch)
    assert sent == received
    assert all(order == list(range(micro_batches)) for order in sent.values())


@every(("stages", "micro_batches"), GRIDS)
def test_no_gradient_reaches_a_client_stage_of_the_local_loss_stream(
    stages: int, micro_batches: int
) -> None:
    if stages == 1:
        return
    specs = stage_chain("streaming", stages, head_location="client")
    every = streams("streaming", stages, micro_batches, head_location="client")
    backwards = {ops.RecvGrad, ops.SendGrad, ops.RecvHomeGrad, ops.BackwardPass}
    assert not {type(i) for i in every[0]} & backwards
    for spec, stream in zip(specs, every, strict=True):
        kinds = {type(i) for i in stream}
        assert ops.RecvGrad not in kinds, "and no server stage trains another"
        if spec.role is StageRole.SERVER:
            assert ops.RecvHomeGrad in kinds and ops.SendGrad not in kinds
        if spec.is_home_head:
            assert ops.SendGrad in kinds


def execute(
    ranks: list[list[tuple[int, ops.Instruction]]], specs: Sequence[StageSpec], *, window: int
) -> list[int]:
    """Run processes under rendezvous links without receives posted ahead; return what is left."""
    position = [0] * len(ranks)
    pending: Counter[tuple[int | None, int | None]] = Counter()
    moved = True
    while moved:
        moved = False
        for rank, stream in enumerate(ranks):
            while position[rank] < len(stream):
                stage, instruction = stream[position[rank]]
                there = peer(specs[stage], instruction)
                if isinstance(instruction, SENDS):
                    if pending[stage, there] == window:
                        break
                    pending[stage, there] += 1
                elif isinstance(instruction, RECEIVES):
                    if not pending[there, stage]:
                        break
                    pending[there, stage] -= 1
                position[rank] += 1
                moved = True
    return [len(stream) - at for stream, at in zip(ranks, position, strict=True)]


@pytest.mark.parametrize("window", [1, 2, 3])
@every(("name", "stages", "micro_batches", "head_location"), CASES)
def test_no_schedule_deadlocks(
    name: str, stages: int, micro_batches: int, head_location: str, window: int
) -> None:
    specs = stage_chain(name, stages, head_location=head_location)
    ranks = [
        list(
            rank_stream(
                EVERY[name], held, num_micro_batches=micro_batches, in_flight=window,
                steps=lambda: range(3),
            )
        )
        for held in placement(specs)
    ]  # fmt: skip
    assert execute(ranks, specs, window=window) == [0] * stages


def test_a_head_at_home_lags_behind_the_first_stage_across_steps() -> None:
    first, *_ = placement(stage_chain("streaming", 2, head_location="client"))
    stream = rank_stream(
        SCHEDULES["streaming"], first, num_micro_batches=1, in_flight=2, steps=lambda: range(2)
    )
    kinds = [(stage, i.trace_name) for stage, i in stream]
    own = ["load", "forward", "send_activation", "local_backward", "optimizer_step"]
    head = ["recv_activation", "forward", "backward", "send_grad", "optimizer_step"]
    order = ((0, own), (0, own), (2, head), (2, head))
    assert kinds == [(stage, name) for stage, names in order for name in names]


def test_stages_of_a_process_ask_for_every_step_when_they_start_it() -> None:
    first, *_ = placement(stage_chain("streaming", 2, head_location="client"))
    asked: list[str] = []

    def steps() -> Iterator[int]:
        for step in range(2):
            asked.append(f"step {step}")
            yield step

    stream = rank_stream(
        SCHEDULES["streaming"], first, num_micro_batches=3, in_flight=2, steps=steps
    )
    for stage, instruction in stream:
        if isinstance(instruction, ops.OptimizerStep):
            asked.append(f"stage {stage} done")
    assert asked == [
        "step 0", "stage 0 done", "step 0", "step 1", "stage 2 done", "stage 0 done", "step 1",
        "stage 2 done",
    ]  # fmt: skip


@every("name", SCHEDULES)
@every(("stages", "micro_batches"), GRIDS)
def test_every_micro_batch_is_trained_once_and_then_one_step_is_taken(
    name: str, stages: int, micro_batches: int
) -> None:
    for head_location in places(stages):
        every = streams(name, stages, micro_batches, head_location=head_location)
        for stage, stream in enumerate(every):
            seen: dict[int, list[str]] = {}
            for i in stream[:-1]:
                seen.setdefault(i.micro_batch, []).append(i.trace_name)
            assert isinstance(stream[-1], ops.OptimizerStep)
            assert sorted(seen) == list(range(micro_batches))
            source = "recv_activation" if stage else "load"
            for names in seen.values():
                assert names[:2] == [source, "forward"]
                assert len([n for n in names if n in ("backward", "local_backward")]) == 1


def test_sequential_keeps_one_micro_batch_in_flight() -> None:
    for stream in streams("sequential", 3, 4):
        order = [i.micro_batch for i in stream[:-1]]
        assert order == sorted(order)


def test_evaluation_changes_no_weights() -> None:
    kinds = {type(i) for stream in streams("evaluation", 3, 2) for i in stream}
    assert not kinds & {ops.OptimizerStep, ops.BackwardPass, ops.LocalBackwardPass}
    assert ops.EvaluateLoss in kinds


def test_activations_leave_before_the_local_backward() -> None:
    names = [i.trace_name for i in streams("streaming", 2, 1)[0]]
    assert names == ["load", "forward", "send_activation", "local_backward", "optimizer_step"]


def test_instructions_are_values() -> None:
    assert ops.ForwardPass(3) == ops.ForwardPass(3) != ops.ForwardPass(4)
    with pytest.raises(AttributeError):
        ops.ForwardPass(3).micro_batch = 4  # type: ignore[misc]
