"""What every rank is doing, and which one hangs. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedpipe.distributed.topology import Grid

_LONGEST_TICK_S = 2.0
"""More than this between two looks is time in which the watcher itself did not run (Ctrl-Z)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What a rank is doing; two that are equal show no progress between them."""

    doing: str = "starting"
    """For people: round, local step and instruction, or what goes on between them."""
    waiting: bool = True
    """It cannot be to blame if this takes long: it waits for others, or for a disk."""
    client_id: int | None = None
    """The client that it hosts."""


class Ticks:
    """A clock that stands still while its process is stopped."""

    def __init__(self) -> None:
        """Start at 0."""
        self._now = 0.0
        self._looked_at: float | None = None

    def __call__(self, clock_s: float) -> float:
        """Return the time; ``clock_s`` is that of a clock that goes on steadily."""
        if self._looked_at is not None:
            self._now += min(clock_s - self._looked_at, _LONGEST_TICK_S)
        self._looked_at = clock_s
        return self._now


class Heartbeats:
    """The last activity of every rank, and since when it has not changed."""

    def __init__(self, *, timeout_s: float) -> None:
        """Start with nobody.

        Args:
            timeout_s: After this a rank hangs; 0 means never.
        """
        self.timeout_s = timeout_s
        self._activities: dict[int, Activity] = {}
        self._heard_at: dict[int, float] = {}
        self._changed_at: dict[int, float] = {}
        self._now, self._ticks = 0.0, Ticks()

    def hear(self, rank: int, activity: Activity) -> None:
        """Take a sign of life."""
        self._heard_at[rank] = self._now
        if activity != self._activities.get(rank):
            self._activities[rank] = activity
            self._changed_at[rank] = self._now

    def name(self, rank: int, grid: Grid | None) -> str:
        """Name a rank by all that it holds, as far as that is known."""
        if grid is None:
            return f"rank {rank}"
        stages, replica, _ = grid.coordinates(rank)
        client_id = self._activities.get(rank, Activity()).client_id
        client = "" if client_id is None else f", client {client_id}"
        return f"rank {rank} (stage {', '.join(map(str, stages))}, replica {replica}{client})"

    def find_hung(self, running: Iterable[int], *, clock_s: float) -> tuple[int, str] | None:
        """Name the rank that keeps the others waiting.

        A rank that gives no sign of life is stopped or starved; one that gives them, but has been
        in the same instruction for too long, is stuck in it. Those that wait for a message only
        suffer from it.

        Args:
            running: Ranks that have not ended.
            clock_s: Of a clock that goes on steadily.

        Returns:
            The rank and what is wrong with it, or None.
        """
        self._now = self._ticks(clock_s)
        heard = [rank for rank in running if rank in self._activities]
        if not self.timeout_s or not heard:
            return None
        since = {
            rank: (self._heard_at if self._activities[rank].waiting else self._changed_at)[rank]
            for rank in heard
        }
        rank = min(heard, key=since.__getitem__)  # who stopped first: others may stop for it
        if self._now - since[rank] < self.timeout_s:
            return None
        doing, silent_s = self._activities[rank].doing, self._now - self._heard_at[rank]
        if silent_s >= self.timeout_s / 2:
            return rank, f"no sign of life for {silent_s:.0f} s, last seen in {doing}"
        return rank, f"in {doing} for {self._now - since[rank]:.0f} s"
