"""A client whose training goes bad at one step of one stage, in a real run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Poison:
    """Spoils a client's turns; called on every rank before the run."""

    clients: tuple[int, ...]
    stage: int = 1
    step: int = 1
    what: str = "loss"
    """"loss" makes it NaN, and with it the gradients; "weights" sets one afterwards."""
    value: float = math.inf
    rounds: tuple[int, ...] = (0,)

    def __call__(self) -> None:
        """Wrap the step of a stage."""
        from fedpipe.commands.pretrain.replica import PretrainingReplica
        from fedpipe.pipeline import schedule as ops
        from fedpipe.pipeline.stage_engine import StageEngine

        train, loss = PretrainingReplica.train, StageEngine._loss
        optimizer_step = StageEngine._optimizer_step
        hits: set[StageEngine] = set()

        def train_and_note(
            replica: PretrainingReplica, turn: Any, steps: range, **keywords: Any
        ) -> None:
            hits.clear()
            if turn.client_id in self.clients and keywords["round_id"] in self.rounds:
                hits.update(e for e in replica.stages if e.spec.stage_id == self.stage)
            train(replica, turn, steps, **keywords)

        def is_hit(engine: StageEngine, what: str) -> bool:
            return engine in hits and engine._step == self.step and self.what == what

        def bad_loss(engine: StageEngine, batch: Any) -> Any:
            value = loss(engine, batch)
            return value * math.nan if is_hit(engine, "loss") else value

        def bad_step(engine: StageEngine, cmd: Any) -> None:
            spoil = is_hit(engine, "weights")
            optimizer_step(engine, cmd)
            if spoil:
                next(iter(engine.stage.parameters())).data.view(-1)[0] = self.value

        PretrainingReplica.train = train_and_note  # type: ignore[method-assign]
        StageEngine._loss = bad_loss  # type: ignore[method-assign]
        StageEngine._INSTRUCTION_MAP = StageEngine._INSTRUCTION_MAP | {ops.OptimizerStep: bad_step}
