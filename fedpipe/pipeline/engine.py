"""The pipeline of one replica, as far as it lives in this process: streams, driven by a schedule.

One stage, the first stage and the head that is at home with it, or all stages as threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe.config.schema import PipelineConfig
from fedpipe.distributed.device import Draws, OwnStream
from fedpipe.models.split import placement
from fedpipe.pipeline import schedule as ops
from fedpipe.pipeline.p2p import QueueLink
from fedpipe.pipeline.stage_engine import MicroBatchSource, StageEngine, StepResult


class SplitPipelineEngine:
    """The stages of one replica that live in this process."""

    def __init__(self, stages: list[StageEngine], pipeline: PipelineConfig) -> None:
        """Take the stages of one process of the pipe axis, or all of a replica as threads.

        Args:
            stages: In order of their ids.
            pipeline: Micro-batches and window.
        """
        self.stages, self._pipeline = stages, pipeline
        by_id = {stage.spec.stage_id: stage for stage in stages}
        held = placement([stage.spec for stage in stages])
        self._threads = [[by_id[spec.stage_id] for spec in specs] for specs in held]
        self._streams = [OwnStream(threads[0].device) for threads in self._threads]
        # Threads that draw take turns in their forward passes; without dropout nobody draws.
        several = len(self._threads) > 1 and any(map(_drops_out, stages))
        for together in self._threads if several else ():
            draws = Draws(together[0].device, shared=True)
            for stage in together:
                stage.draws = draws

    def seed_draws(self, seed: Callable[[tuple[int, ...]], int]) -> None:
        """Seed what the stages draw, as if every thread were a process.

        Args:
            seed: Of the ids of the stages that are computed together.
        """
        for held in self._threads:
            held[0].draws.seed(seed(tuple(stage.spec.stage_id for stage in held)))

    @property
    def draws(self) -> dict[str, Any]:
        """Where the stages go on drawing, for ``torch.save``."""
        states = [held[0].draws.state for held in self._threads]
        return {"threads": states} if len(states) > 1 else states[0]

    @draws.setter
    def draws(self, state: dict[str, Any]) -> None:
        states = state.get("threads", [state])
        for held, own in zip(self._threads, states, strict=True):
            held[0].draws.state = own

    def train(
        self,
        steps: range,
        *,
        source: MicroBatchSource | None,
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
        until: Callable[[int], int] | None = None,
    ) -> None:
        """Run local steps of one client on every stage of this process and drain the links.

        Args:
            steps: Indices of the steps inside the client's turn.
            source: Micro-batches for the first stage; None where it is not in this process.
            lr: Learning rate of a step.
            on_step: Called with the stage and the result after each step of each stage.
            until: Asked by every stage before a step: up to which one the steps are certain to be
                run. This step itself ends the run, the same one on all stages of the replica; the
                others reach at least ``lookahead`` steps further.

        Collective: every process of the replica, with the same ``steps``.
        """
        certain = until or (lambda step: steps.stop)

        def run(stages: list[StageEngine]) -> None:
            for stage in stages:
                first = stage.spec.is_first
                stage.begin_training(
                    steps.start,
                    source=source if first else None,
                    lr=lr,
                    on_step=on_step,
                    until=certain,
                )
            self._execute(
                stages,
                ops.SCHEDULES[stages[0].schedule],
                num_micro_batches=self._pipeline.num_micro_batches,
                steps=lambda: takewhile(lambda step: certain(step) > step, steps),
            )

        self._in_threads(run)

    @property
    def lookahead(self) -> int:
        """Steps, this one included, for whose messages a stage may have posted receives."""
        return 2 + (self._pipeline.in_flight - 1) // self._pipeline.num_micro_batches

    def evaluate(
        self, num_micro_batches: int, *, source: MicroBatchSource | None
    ) -> dict[int, Tensor]:
        """Score micro-batches without training.

        Args:
            num_micro_batches: How many.
            source: As in ``train``.

        Returns:
            By stage, for those with a head: (num_micro_batches, B, M) float32, what its ``score``
            says, on the CPU.

        Collective: every process of the replica, with the same number.
        """
        losses: dict[int, Tensor] = {}

        def run(stages: list[StageEngine]) -> None:
            for stage in stages:
                first = stage.spec.is_first
                stage.begin_evaluation(num_micro_batches, source=source if first else None)
            with torch.no_grad():  # is per thread
                self._execute(
                    stages,
                    ops.evaluation,
                    num_micro_batches=num_micro_batches,
                    steps=lambda: range(1),
                )
            for stage in stages:
                scored = stage.take_losses()
                if scored is not None:
                    losses[stage.spec.stage_id] = scored.cpu()

        self._in_threads(run)
        return losses

    def _execute(
        self,
        stages: list[StageEngine],
        schedule: ops.Schedule,
        *,
        num_micro_batches: int,
        steps: Callable[[], Iterable[int]],
    ) -> None:
        stream = ops.rank_stream(
            schedule,
            [stage.spec for stage in stages],
            num_micro_batches=num_micro_batches,
            in_flight=self._pipeline.in_flight,
            steps=steps,
        )
        by_id = {stage.spec.stage_id: stage for stage in stages}
        for stage_id, instruction in stream:
            by_id[stage_id].execute(instruction)
        for stage in stages:
            stage.drain()

    def _in_threads(self, action: Callable[[list[StageEngine]], None]) -> None:
        if len(self._threads) == 1:
            action(self._threads[0])
            return
        failures: list[BaseException] = []

        def guarded(stages: list[StageEngine], stream: OwnStream) -> None:
            try:
                with stream.current():
                    action(stages)
            except BaseException as failure:
                failures.append(failure)
                for link in (link for s in self.stages for link in s.links.all()):
                    if isinstance(link, QueueLink):
                        link.close()

        threads = [
            threading.Thread(target=guarded, args=held)
            for held in zip(self._threads, self._streams, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _drops_out(stage: StageEngine) -> bool:
    """Whether a stage's forward pass draws from torch's generator."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in stage.stage.modules())
