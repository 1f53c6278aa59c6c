"""A thread beside a rank's work: signs of life, and the agreement where to stop. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from fedpipe.distributed.activity import Activity
from fedpipe.distributed.signals import StopSignals
from fedpipe.errors import FedPipeError

if TYPE_CHECKING:
    from fedpipe.distributed.board import Board
    from fedpipe.distributed.comm import Comm

_PERIOD_S = 0.25
_REQUEST = "stop/requested"

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


class WatchObserver(Protocol):
    """Is told what a watch sees."""

    def __call__(self, activity: Activity) -> None:
        """Take what the rank does, a few times a second and whenever it changes."""

    def on_board(self, board: Board) -> None:
        """Take where the ranks leave texts for each other, as soon as that is there."""

    def on_store_lost(self, failure: Exception, *, taking_part: Callable[[], bool]) -> None:
        """Take that the others cannot be reached any more; may end the process."""

    def on_leave(self) -> None:
        """Take that this rank's part is over, and that the others may be gone."""

    def on_error(self, error: BaseException) -> BaseException:
        """Take what the rank's work ends with, before it does; return what is to be raised."""


class PassiveObserver:
    """An observer that does nothing but tell a function what the rank does."""

    def __init__(self, tell: Callable[[Activity], None] = lambda activity: None) -> None:
        """Remember who is told."""
        self._tell = tell

    def __call__(self, activity: Activity) -> None:
        """Tell."""
        self._tell(activity)

    def on_board(self, board: Board) -> None:
        """Nothing to do."""

    def on_store_lost(self, failure: Exception, *, taking_part: Callable[[], bool]) -> None:
        """A supervisor sees the ranks end."""

    def on_leave(self) -> None:
        """Nothing to do."""

    def on_error(self, error: BaseException) -> BaseException:
        """A supervisor hears of it otherwise."""
        return error


class Watch:
    """Reports what a rank does, and finds where the run stops when any of its ranks is asked to.

    One thread, which looks a few times a second; the ranks meet on their board, so it works under
    every launcher, and the work itself never asks the store.
    """

    def __init__(
        self, *, signals: StopSignals | None = None, observer: WatchObserver | None = None
    ) -> None:
        """Make a watch; ``with`` starts and ends its thread.

        Args:
            signals: Caught as soon as the rank has joined the run; None for a process that is not
                asked itself.
            observer: Told what the rank does, by the watch's thread or another.
        """
        self.stop = StopPoint()
        self.stop_signal = 0
        """The signal that stops the run, whichever rank it reached; 0 while there is none."""
        self.board: Board | None = None
        """Where the ranks have met, before they join the run."""
        self.activity: Callable[[], Activity] = Activity
        """Says what the rank does; called in the watch's thread."""
        self._signals, self._observer = signals or StopSignals(), observer or PassiveObserver()
        self._catches = signals is not None
        self._comm: Comm | None = None
        self._left = False
        self._requested = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        """Start to report."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread; raises in the place of an error what explains it."""
        known = error and self._observer.on_error(error)
        self._closed.set()
        self._thread.join(timeout=_PERIOD_S)  # it may wait for a store that has gone
        if known is not None and known is not error:
            raise known from None

    def use_board(self, board: Board) -> None:
        """Watch the other ranks from now on: they are there, and sign what they say."""
        self.board = board
        self._observer.on_board(board)

    def join_run(self, comm: Comm) -> None:
        """Take part in agreements from now on, and catch signals."""
        if self.board is None:
            self.use_board(comm.board)
        self._comm = comm
        if self._catches:
            self._signals.catch()

    def leave_run(self) -> None:
        """Take part in nothing more: the run is over and the others may be gone."""
        self._comm, self._left = None, True
        self._observer.on_leave()
        self.activity = partial(Activity, doing="finishing")

    def beat(self) -> None:
        """Report now: what the rank does has just changed."""
        self._observer(self.activity())

    def _run(self) -> None:
        while not self._closed.wait(_PERIOD_S):
            try:
                self.beat()
                comm = self._comm
                if comm is not None and self.stop.end is None:
                    self._look_for_stop(comm)
            except (ConnectionError, FedPipeError) as failure:
                # The store is gone, with the process that hosted it, or somebody else writes there.
                self.stop.fail(failure)
                self._comm = None
                self._observer.on_store_lost(failure, taking_part=self._takes_part)

    def _takes_part(self) -> bool:
        """Whether the rank's work is still under way."""
        return not (self._left or self._closed.is_set())

    def _look_for_stop(self, comm: Comm) -> None:
        board = comm.board
        if not self._requested:
            if self._signals.asked:
                board.post(_REQUEST, self._signals.number)
            requests = board.posted([_REQUEST])
            if requests is None:
                return
            self._requested = True
            self.stop_signal = int(requests[0])
            board.post(f"stop/{comm.rank}", self.stop.freeze())
        moments = board.posted([f"stop/{rank}" for rank in range(comm.env.world_size)])
        if moments is not None:
            self.stop.settle(max(_moment(moment) for moment in moments))


def _moment(value: list[int]) -> Moment:
    round_id, step = map(int, value)
    return round_id, step
