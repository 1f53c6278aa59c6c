"""The instruction streams: DeepSpeed's order, no gradients where none belong, no deadlock."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from fedpipe.pipeline import schedule as ops
from fedpipe.pipeline.schedule import SCHEDULES, evaluation

GRIDS = list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 5, 6)))
EVERY = {**SCHEDULES, "evaluation": evaluation}
SENDS = {ops.SendActivation: +1, ops.SendGrad: -1}
RECEIVES = {ops.RecvActivation: -1, ops.RecvGrad: +1}


def streams(name: str, stages: int, micro_batches: int) -> list[list[ops.Instruction]]:
    return [
        list(EVERY[name](stage, num_stages=stages, num_micro_batches=micro_batches))
        for stage in range(stages)
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


@pytest.mark.parametrize(("stages", "micro_batches"), GRIDS)
def test_1f1b_is_deepspeeds_train_schedule(stages: int, micro_batches: int) -> None:
    for stage, stream in enumerate(streams("1f1b", stages, micro_batches)):
        ours = [(type(i).__name__, getattr(i, "micro_batch", -1)) for i in stream]
        assert ours == deepspeed_order(stage, stages, micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), GRIDS)
def test_streaming_never_moves_a_gradient(stages: int, micro_batches: int) -> None:
    kinds = {type(i) for stream in streams("streaming", stages, micro_batches) for i in stream}
    assert not kinds & {ops.SendGrad, ops.RecvGrad, ops.BackwardPass}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("stages", "micro_batches"), GRIDS)
def test_every_send_meets_its_receive_in_order(name: str, stages: int, micro_batches: int) -> None:
    sent: dict[tuple[int, int], list[int]] = {}
    received: dict[tuple[int, int], list[int]] = {}
    for stage, stream in enumerate(streams(name, stages, micro_batches)):
        for i in stream:
            if type(i) in SENDS:
                sent.setdefault((stage, stage + SENDS[type(i)]), []).append(i.micro_batch)
            if type(i) in RECEIVES:
                received.setdefault((stage + RECEIVES[type(i)], stage), []).append(i.micro_batch)
    assert sent == received
    assert all(order == list(range(micro_batches)) for order in sent.values())


def execute(stages: list[list[ops.Instruction]], *, window: int) -> list[int]:
    """Run streams under rendezvous links without receives posted ahead; return what is left."""
    position = [0] * len(stages)
    pending: Counter[tuple[int, int]] = Counter()
    moved = True
    while moved:
        moved = False
        for stage, stream in enumerate(stages):
            while position[stage] < len(stream):
                kind = type(stream[position[stage]])
                if kind in SENDS:
                    edge = (stage, stage + SENDS[kind])
                    if pending[edge] == window:
                        break
                    pending[edge] += 1
                elif kind in RECEIVES:
                    edge = (stage + RECEIVES[kind], stage)
                    if not pending[edge]:
                        break
                    pending[edge] -= 1
                position[stage] += 1
                moved = True
    return [len(stream) - at for stream, at in zip(stages, position, strict=True)]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("stages", "micro_batches"), GRIDS)
def test_no_schedule_deadlocks(name: str, stages: int, micro_batches: int, window: int) -> None:
    steps = [stream * 2 for stream in streams(name, stages, micro_batches)]
    assert execute(steps, window=window) == [0] * stages


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), GRIDS)
def test_every_micro_batch_is_trained_once_and_then_one_step_is_taken(
    name: str, stages: int, micro_batches: int
) -> None:
    for stage, stream in enumerate(streams(name, stages, micro_batches)):
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
