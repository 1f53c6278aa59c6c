"""The progress of a run, computed from its records."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from fedpipe.report.format import integer, is_number
from fedpipe.report.records import RoundRecord, StepRecord


class RunProgress:
    """Collects step and round records into the numbers that a console shows.

    The step of the round is that of the replica that is furthest ahead, so it never decreases
    within a round.
    """

    def __init__(
        self, *, num_rounds: int, steps_per_round: int, num_stages: int, window: int
    ) -> None:
        """Start before the first round.

        Args:
            num_rounds: Rounds of the whole run.
            steps_per_round: Local steps that one replica makes in a round, over all its clients.
            num_stages: Stages of the pipeline.
            window: Number of latest steps over which a replica's tokens per second are averaged.
        """
        self.num_rounds = num_rounds
        self.steps_per_round = steps_per_round
        self.num_stages = num_stages
        self.round_id: int | None = None
        self._done_rounds = 0
        self._between_rounds = False
        self._window = max(window, 1)
        self._turns: dict[int, dict[int, int]] = {}  # replica -> client -> steps of its turn
        self._latest: dict[tuple[int, int], StepRecord] = {}  # (replica, stage) -> record
        self._speed: dict[int, deque[tuple[float, float]]] = {}  # replica -> (tokens, seconds)

    def step(self, record: StepRecord) -> None:
        """Add a step record of any replica and stage."""
        round_id, replica = record.get("round") or 0, record.get("replica") or 0
        if round_id != self.round_id or self._between_rounds:
            self._start_round(round_id)
        stage_id = record.get("stage") or 0
        self._latest[replica, stage_id] = record
        if stage_id != self.num_stages - 1:
            return
        turns = self._turns.setdefault(replica, {})
        client = record.get("client", -1)
        turns[client] = max(turns.get(client, 0), (record.get("step") or 0) + 1)
        if record.get("tokens") and record.get("seconds"):
            speed = self._speed.setdefault(replica, deque(maxlen=self._window))
            speed.append((record["tokens"], record["seconds"]))

    def round(self, record: RoundRecord) -> None:
        """Add a round record, which completes the round whatever the number of its steps."""
        self._start_round(record.get("round") or 0)
        self._done_rounds = (record.get("round") or 0) + 1
        self._between_rounds = True

    @property
    def step_in_round(self) -> int:
        """Local steps of the replica that is furthest ahead; all steps during averaging."""
        if self._between_rounds:
            return self.steps_per_round
        return max((sum(turns.values()) for turns in self._turns.values()), default=0)

    @property
    def total_steps(self) -> int:
        """Local steps of a replica in the whole run."""
        return self.num_rounds * self.steps_per_round

    @property
    def steps_done(self) -> int:
        """Local steps of a replica so far, including those before a resume."""
        in_round = 0 if self._between_rounds else min(self.step_in_round, self.steps_per_round)
        return min(self._done_rounds * self.steps_per_round + in_round, self.total_steps)

    def losses(self) -> list[float | None]:
        """Return the latest loss of every stage, averaged over the replicas; ``None`` without one.

        The latest steps of different processes may be some steps apart.
        """
        return [self._mean("loss", stage_id) for stage_id in range(self.num_stages)]

    def grad_norms(self) -> list[float | None]:
        """Return the latest gradient norm of every stage, averaged over the replicas."""
        return [self._mean("grad_norm", stage_id) for stage_id in range(self.num_stages)]

    def hosted(self) -> list[tuple[int, str]]:
        """Return pairs of a replica and the client that it hosts."""
        latest = {replica: integer(r.get("client")) for (replica, _), r in self._latest.items()}
        return sorted(latest.items())

    def tokens_per_s(self) -> float | None:
        """Return the trained tokens per second of all replicas, without the time between rounds."""
        if not self._speed:
            return None
        return sum(
            sum(tokens for tokens, _ in speed) / sum(seconds for _, seconds in speed)
            for speed in self._speed.values()
        )

    def _start_round(self, round_id: int) -> None:
        self.round_id = round_id
        self._done_rounds = round_id
        self._between_rounds = False
        self._turns.clear()

    def _mean(self, name: Literal["loss", "grad_norm"], stage_id: int) -> float | None:
        values = [r.get(name) for (_, stage), r in self._latest.items() if stage == stage_id]
        known = [value for value in values if isinstance(value, int | float)]
        if not all(map(is_number, known)):
            return math.nan
        return statistics.fmean(known) if known else None
