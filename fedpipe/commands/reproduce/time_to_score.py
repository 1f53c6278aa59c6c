"""The time that a run needs to reach a score, and the speed-up of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# All lists are by round, the first entry after round 1.


def best(clock: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """Return the best score and the time at which it is first reached."""
    score = max(scores)
    return score, clock[list(scores).index(score)]


def time_to(target: float, clock: Sequence[float], scores: Sequence[float]) -> float | None:
    """Return the time at which a score is reached, linear between rounds and not before round 1.

    Args:
        target: The score.
        clock: Seconds of training at the end of every round, increasing.
        scores: Score after every round.

    Returns:
        Seconds of training; None if no round has that score.
    """
    for index, score in enumerate(scores):
        if score >= target:
            if index == 0:
                return clock[0]
            low, high = scores[index - 1], score
            share = (target - low) / (high - low)
            return clock[index - 1] + share * (clock[index] - clock[index - 1])
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Race:
    """The best score of a baseline on a task, and the time at which another run reaches it."""

    task: str
    target: float
    """The baseline's best score."""
    baseline_s: float
    """Training time of the baseline until then."""
    own_s: float | None
    """Training time of the other run; None if it never reaches the score."""
    learnt: bool
    """Whether the baseline's scores are significantly above the untrained model's."""

    @property
    def ratio(self) -> float | None:
        """Return the speed-up; None if the score is never reached, or needs no training."""
        if self.own_s is None or not self.learnt:
            return None
        return self.baseline_s / self.own_s


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedUp:
    """The speed-up over all tasks."""

    mean: float | None
    """Mean speed-up over the tasks whose score is reached; None if there is none."""
    peak: float | None
    reached: int
    """Tasks whose score is reached."""
    never: tuple[str, ...]
    """Tasks whose score is never reached."""
    unlearnt: tuple[str, ...]
    """Tasks on which the baseline is not significantly better than the untrained model."""


def race(
    task: str,
    *,
    learnt: bool,
    baseline: tuple[Sequence[float], Sequence[float]],
    own: tuple[Sequence[float], Sequence[float]],
) -> Race:
    """Compare two runs on a task.

    Args:
        task: Name of the task.
        learnt: Whether the baseline's scores are above the untrained model's.
        baseline: Clock and scores of the baseline.
        own: Clock and scores of the other run.
    """
    target, reached_s = best(*baseline)
    return Race(
        task=task,
        target=target,
        baseline_s=reached_s,
        own_s=time_to(target, *own),
        learnt=learnt,
    )


def speed_up(races: Sequence[Race]) -> SpeedUp:
    """Average the speed-ups of the tasks."""
    ratios = [race.ratio for race in races if race.ratio is not None]
    return SpeedUp(
        mean=sum(ratios) / len(ratios) if ratios else None,
        peak=max(ratios, default=None),
        reached=len(ratios),
        never=tuple(race.task for race in races if race.learnt and race.own_s is None),
        unlearnt=tuple(race.task for race in races if not race.learnt),
    )
