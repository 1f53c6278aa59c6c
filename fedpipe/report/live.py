"""The live display of a terminal: a progress bar, the losses, and the hosted clients."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from fedpipe.report.format import integer, number, tokens_per_s
from fedpipe.report.progress import RunProgress

if TYPE_CHECKING:
    from rich.console import RenderableType

_REFRESH_PER_S = 8
_MAX_HOSTED = 8
"""Replicas that are shown by name; the others are counted."""


class LiveDisplay:
    """Draws a ``RunProgress`` at the bottom of a terminal; printed lines scroll above it."""

    def __init__(self, progress: RunProgress, *, stream: TextIO) -> None:
        """Create the display without drawing it.

        Args:
            progress: The state to show; the caller updates it and then calls ``refresh``.
            stream: The terminal.
        """
        from rich.console import Console
        from rich.live import Live

        self._progress = progress
        self._preparing: tuple[str, int, int] | None = None
        self._first: tuple[float, int] | None = None  # clock and steps when training was first seen
        self._console = Console(file=stream, highlight=False, force_terminal=True)
        self._live = Live(
            console=self._console,
            refresh_per_second=_REFRESH_PER_S,
            get_renderable=self._render,
            transient=True,
        )

    def print(self, text: str) -> None:
        """Print text above the display, exactly as it is."""
        self._console.print(text, markup=False, emoji=False, soft_wrap=True)

    def preparing(self, label: str, done: int, total: int) -> None:
        """Show a preparation in place of the training progress."""
        if total > 0 and done >= total:
            self._preparing = None
            self._live.stop()  # workers are forked next and must not inherit a live screen
            self.print(f"{time.strftime('%H:%M:%S')} {label} {integer(done)}/{integer(total)}")
        else:
            self._preparing = (label, done, total)
            self._live.start()

    def refresh(self) -> None:
        """Show new steps; the screen is redrawn a few times per second."""
        self._preparing = None
        if self._first is None:
            self._first = (time.monotonic(), self._progress.steps_done)
            self._live.start()

    def close(self) -> None:
        """Remove the display from the screen."""
        self._live.stop()

    def _render(self) -> RenderableType:
        from rich.text import Text

        if self._preparing is not None:
            label, done, total = self._preparing
            return self._bar(label, done, total, "")
        if self._first is None:
            return Text("")
        return self._training()

    def _training(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        p = self._progress
        round_id = min((p.round_id or 0) + 1, p.num_rounds)
        label = f"round {round_id}/{p.num_rounds}  step {p.step_in_round}/{p.steps_per_round}"
        losses = Text("  loss    ", style="dim")
        for stage_id, loss in enumerate(p.losses()):
            losses.append(f"stage {stage_id} ", style="dim")
            losses.append(f"{number(loss, 3):<8}", style="bold")
        losses.append(f"  {tokens_per_s(p.tokens_per_s())} tok/s", style="cyan")
        return Group(
            self._bar(label, p.steps_done, p.total_steps, self._clock()),
            losses,
            self._hosted(),
        )

    def _bar(self, label: str, done: int, total: int, note: str) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row = Table.grid(padding=(0, 1), expand=True)
        for _ in range(4):
            row.add_column(no_wrap=True)
        row.columns[1].ratio = 1
        share = f"{100 * done / total:3.0f} %" if total > 0 else integer(done)
        bar = ProgressBar(total=total if total > 0 else None, completed=done, pulse=total <= 0)
        row.add_row(f"  {label}", bar, share, note)
        return row

    def _clock(self) -> str:
        if self._first is None:
            return ""
        start, first_steps = self._first
        elapsed = time.monotonic() - start
        made = self._progress.steps_done - first_steps
        if made <= 0:
            return f"elapsed {_clock_text(elapsed)}"
        left = elapsed / made * (self._progress.total_steps - self._progress.steps_done)
        return f"elapsed {_clock_text(elapsed)}  left {_clock_text(left)}"

    def _hosted(self) -> RenderableType:
        from rich.text import Text

        line = Text("  clients ", style="dim")
        hosted = self._progress.hosted()
        for replica, client in hosted[:_MAX_HOSTED]:
            line.append(f"replica {replica} ", style="dim")
            line.append(f"{client:<4}", style="bold")
        if len(hosted) > _MAX_HOSTED:
            line.append(f"and {len(hosted) - _MAX_HOSTED} more replicas", style="dim")
        return line


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
