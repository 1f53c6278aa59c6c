"""How long a run takes to reach a score, and how many times sooner another one does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# All lists are by round, the first entry after round 1.


def best(clock: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """Return the best score and when it is reached first."""
    score = max(scores)
    return score, clock[list(scores).index(score)]


def time_to(target: float, clock: Sequence[float], scores: Sequence[float]) -> float | None:
    """Return when a score is reached: between two rounds on the line, before round 1 never.

    Args:
        target: The score.
        clock: Seconds of training at the end of every round, increasing.
        scores: After every round.

    Returns:
        Seconds; None where no round has that score.
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
    """One task: the best score of a baseline, and when another run reaches it."""

    task: str
    target: float
    """The baseline's best score."""
    baseline_s: float
    """Training time until then."""
    own_s: float | None
    """The other run's; None: never."""
    learnt: bool
    """The baseline's best is above the untrained model's score by more than chance."""

    @property
    def ratio(self) -> float | None:
        """How many times sooner; None where the score is never reached, or needs no training."""
        if self.own_s is None or not self.learnt:
            return None
        return self.baseline_s / self.own_s


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedUp:
    """All tasks together."""

    mean: float | None
    """Over the tasks whose score is reached; None where there is none."""
    peak: float | None
    reached: int
    """Tasks whose score is reached."""
    never: tuple[str, ...]
    """Tasks whose score is not."""
    unlearnt: tuple[str, ...]
    """Tasks on which the baseline is at best as good as the untrained model, up to chance."""


def race(
    task: str,
    *,
    learnt: bool,
    baseline: tuple[Sequence[float], Sequence[float]],
    own: tuple[Sequence[float], Sequence[float]],
) -> Race:
    """Compare two runs on a task.

    Args:
        task: Its name.
        learnt: Whether the baseline's best score is above the untrained model's.
        baseline: Clock and scores.
        own: Likewise, of the other run.
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
    """Put the tasks together."""
    ratios = [race.ratio for race in races if race.ratio is not None]
    return SpeedUp(
        mean=sum(ratios) / len(ratios) if ratios else None,
        peak=max(ratios, default=None),
        reached=len(ratios),
        never=tuple(race.task for race in races if race.learnt and race.own_s is None),
        unlearnt=tuple(race.task for race in races if not race.learnt),
    )
