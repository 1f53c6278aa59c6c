"""Run the stages of one replica that are in this process, as a schedule prescribes.

These are one stage, or the first stage with the heads at the client, or all stages as threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe.config.schema import PipelineConfig
from fedpipe.distributed.device import ThreadRandom, ThreadStream
from fedpipe.models.split import placement
from fedpipe.pipeline import schedule as ops
from fedpipe.pipeline.p2p import QueueLink
from fedpipe.pipeline.stage_engine import MicroBatchSource, StageEngine, StepResult


class SplitPipelineEngine:
    """The stages of one replica that are in this process."""

    def __init__(self, stages: list[StageEngine], pipeline: PipelineConfig) -> None:
        """Wrap stages; those that the ``pipe`` axis puts on different processes become threads.

        Args:
            stages: The stages, in order of their ids.
            pipeline: Number of micro-batches, and window of the links.
        """
        self.stages, self._pipeline = stages, pipeline
        by_id = {stage.spec.stage_id: stage for stage in stages}
        held = placement([stage.spec for stage in stages])
        self._threads = [[by_id[spec.stage_id] for spec in specs] for specs in held]
        self._streams = [ThreadStream(threads[0].device) for threads in self._threads]
        # Threads that draw random numbers take turns in their forward passes; without dropout none
        # draws.
        several = len(self._threads) > 1 and any(map(_has_dropout, stages))
        self._drawing: list[tuple[ThreadRandom, tuple[int, ...]]] = []
        """Every source of random numbers, with the ids of the stages that draw from it."""
        for together in self._threads:
            # In a stream a head at home lags behind the first stage and catches up where the run
            # stops. With random numbers in common, those of both would depend on where it stops.
            lags = pipeline.objective == "local_loss"
            heads = [s for s in together if lags and s.spec.is_home_head and _has_dropout(s)]
            encoders = [stage for stage in together if stage not in heads]
            for group in (encoders, *([head] for head in heads)):
                draws = group[0].draws
                if several or heads:
                    draws = ThreadRandom(group[0].device, shared=True)
                for stage in group:
                    stage.draws = draws
                self._drawing.append((draws, tuple(stage.spec.stage_id for stage in group)))

    def seed_dropout(self, seed: Callable[[tuple[int, ...]], int]) -> None:
        """Seed the random numbers of the stages, as if every thread were a process.

        Args:
            seed: Returns the seed for the ids of the stages that draw together.
        """
        for draws, stage_ids in self._drawing:
            draws.seed(seed(stage_ids))

    @property
    def dropout_state(self) -> dict[str, Any]:
        """State of the stages' random numbers, for ``torch.save``."""
        states = [draws.state for draws, _ in self._drawing]
        return {"threads": states} if len(states) > 1 else states[0]

    @dropout_state.setter
    def dropout_state(self, state: dict[str, Any]) -> None:
        states = state.get("threads", [state])
        for (draws, _), own in zip(self._drawing, states, strict=True):
            draws.state = own

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
            source: Micro-batches for the first stage; None if that is in another process.
            lr: Learning rate of a step.
            on_step: Called with the stage and the result after each step of each stage.
            until: Called by every stage before a step; returns the end of the steps that are
                certain to be run. If that is the step itself, the stage stops there, and so do all
                stages of the replica. Otherwise it is at least ``lookahead`` steps further.

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
        """Steps, including the present one, for which a stage may have posted receives."""
        return 2 + (self._pipeline.in_flight - 1) // self._pipeline.num_micro_batches

    def evaluate(
        self, num_micro_batches: int, *, source: MicroBatchSource | None
    ) -> dict[int, Tensor]:
        """Score micro-batches without training.

        Args:
            num_micro_batches: Number of micro-batches.
            source: As in ``train``.

        Returns:
            For every stage with a head the results of its ``score``, (num_micro_batches, B, M)
            float32, on the CPU.

        Collective: every process of the replica, with the same number.
        """
        losses: dict[int, Tensor] = {}

        def run(stages: list[StageEngine]) -> None:
            for stage in stages:
                first = stage.spec.is_first
                stage.begin_evaluation(num_micro_batches, source=source if first else None)
            with torch.no_grad():  # the setting is per thread
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

        def guarded(stages: list[StageEngine], stream: ThreadStream) -> None:
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


def _has_dropout(stage: StageEngine) -> bool:
    """Whether a stage has dropout, which draws from torch's generator."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in stage.stage.modules())
