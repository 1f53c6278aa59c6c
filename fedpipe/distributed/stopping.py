"""Where all ranks stop when a run is asked to: found while they go on working. No torch."""

from __future__ import annotations

import threading

Moment = tuple[int, int]
"""(round, local steps of a replica in it); moments compare by time."""


class StopPoint:
    """The moment at which the run stops, as one rank knows it.

    A rank *commits* itself to a moment before it goes there: the end of the local steps it is
    certain to run. Asked to stop, every rank freezes its commitment and publishes it; the run stops
    at the largest of all. So nobody has passed it, and since a commitment is frozen in the middle
    of a step as well as between two, nobody has to get anywhere before the others can go on.
    A rank waits here only if it wants to commit itself further in the moment between the two.
    """

    def __init__(self) -> None:
        """Start with nothing committed and nobody asking to stop."""
        self._changed = threading.Condition()
        self._committed: Moment = (0, 0)
        self._frozen = False
        self._failure: BaseException | None = None
        self.end: Moment | None = None
        """The agreed moment; None while there is none."""

    def commit(self, moment: Moment) -> Moment:
        """Commit this rank to a moment.

        Args:
            moment: Where a stage of this rank wants to be sure to get.

        Returns:
            The moment, or the earlier one at which the run stops.

        Raises:
            ConnectionError: The others cannot be reached any more.
        """
        with self._changed:
            if not self._frozen or moment <= self._committed:
                self._committed = max(self._committed, moment)
                return moment
            self._changed.wait_for(lambda: self.end is not None or self._failure is not None)
            if self.end is None:
                raise ConnectionError("the ranks could not agree where to stop") from self._failure
            return min(moment, self.end)

    def freeze(self) -> Moment:
        """Commit to nothing more until ``settle``; return what this rank is committed to."""
        with self._changed:
            self._frozen = True
            return self._committed

    def settle(self, end: Moment) -> None:
        """Take the largest commitment of all ranks."""
        with self._changed:
            self.end = end
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """Wake who waits for an agreement that will not come."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
