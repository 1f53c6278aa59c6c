"""The end of a round: which updates are taken, the average of those, and whether it is finite."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Protocol

from fedpipe.config.federation import AggregationConfig
from fedpipe.distributed.comm import Comm
from fedpipe.federation.refusal import Outcome, Refused, Turn, judge, not_finite_together


class Trainer(Protocol):
    """What trains the clients of a round in this process."""

    refused: list[Refused]
    """Clients of the round under way whose updates have been left out here."""

    def synchronize(
        self, num_clients: int, *, left_out: Collection[int] = (), share: float = 1.0
    ) -> int:
        """Average the round's clients; return the bytes that this rank sent."""

    def forget_round(self) -> None:
        """Leave the global weights as they are."""

    def stages_not_finite(self) -> list[str]:
        """Name the stages here whose global weights are not finite."""


def average_round(
    trainer: Trainer,
    turns: Sequence[Turn],
    *,
    aggregation: AggregationConfig,
    round_id: int,
    comm: Comm,
) -> tuple[Outcome, int]:
    """Agree which updates are left out, average the others, and see that the result is finite.

    Args:
        trainer: Has trained its turns of the round.
        turns: Of the round, in the order of the cohort.
        aggregation: The rule.
        round_id: From 0.
        comm: Of this process.

    Returns:
        What the updates came to, and the bytes that this rank sent.

    Raises:
        TrainingError: No update is finite, or the average is not.

    Collective: every rank.
    """
    own = json.dumps([fault.record() for fault in trainer.refused])
    told = comm.agree(not trainer.refused, message=own)
    refused = [Refused(**fault) for text in told for fault in json.loads(text)]
    outcome = judge(turns, refused, aggregation=aggregation, round_id=round_id)
    trainer.refused.clear()
    sent = 0
    if outcome.is_averaged:
        sent = trainer.synchronize(len(turns), left_out=outcome.left_out, share=outcome.share)
    else:
        trainer.forget_round()
    spoilt = trainer.stages_not_finite()
    told = comm.agree(not spoilt, message=", ".join(spoilt))
    if told:
        raise not_finite_together(told, round_id=round_id)
    return outcome, sent
