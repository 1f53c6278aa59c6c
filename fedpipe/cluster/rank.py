"""The one program of a rank: be set up, train, write the results. No torch at the top.

A command says in a ``RankProgram`` what its ranks do, and hands it over by the name of the module
that has it as ``PROGRAM``. There are three starters: ``local`` forks the ranks of this machine,
``launched`` makes a rank of a process that torchrun, deepspeed or srun has started, and a job of
submitit (``submit``) makes one of each of its tasks.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from fedpipe import log
from fedpipe.config.tree import Node
from fedpipe.distributed.binding import bind
from fedpipe.distributed.env import ProcessEnv, num_gpus
from fedpipe.distributed.signals import EXIT_INTERRUPTED, StopSignals
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Watch, WatchObserver
from fedpipe.files import system_errors_named
from fedpipe.report.console import RunConsole
from fedpipe.report.records import Emit
from fedpipe.run.checkpoint import Position
from fedpipe.run.run_dir import RunDir, resolve

LOST_PEER = re.compile(r"Connection (closed|reset)|BrokenPipe|Broken pipe|peer")
"""The error of a rank whose neighbour has gone; this rank is not to blame."""

Notify = Callable[[str], None]
"""Shows a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """What a user asks of a run."""

    config_path: str | Node | None = None
    overrides: Sequence[str] = ()
    run_dir: str | None = None
    preset: str | None = None
    options: Any = None
    """What a command adds to the configuration; its own program reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedRun:
    """A run that is known from its configuration alone; nothing is written yet."""

    run: RunDir
    config: Any
    """The configuration, of the command's own class."""
    grid: Grid
    """Its processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Where a run is shown, and what of it."""

    console: RunConsole
    shows: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    """What shows a record, by its kind."""
    log_every: int = 0
    """Local steps between progress lines for those who follow from elsewhere; 0 for none."""

    def show(self, kind: str, value: Any) -> None:
        """Show a record or a note; what has no place here is left out."""
        if kind == "note":
            self.console.text(value)
        elif kind in self.shows:
            self.shows[kind](value)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRun:
    """A run that one job trains; it has been checked, and nothing is written yet."""

    run_dir: Path
    name: str
    """Name of the job in the queue."""
    grid: Grid
    """The job's tasks."""
    workers: int = 1
    """Processes that each task starts itself."""
    done: Callable[[], str]
    """Says that the run has nothing to do now; empty where it has something to do."""
    job: str
    """What each task does: the module of its ranks' program, or MODULE:FUNCTION."""
    options: Any = None
    """Of the request, for the program."""
    reserve: Callable[[], str]
    """Writes the directory; returns the plan."""
    view: Callable[[], View]
    """Where the run is shown."""
    closing: Callable[[], Sequence[str]]
    """Returns what the finished run has to show."""


class RankProgram(ABC):
    """What the ranks of a command do; setups are the command's own, and passed on as they are."""

    command: str
    """What a user calls it."""
    preload: Sequence[str]
    """Modules that a rank needs and that take seconds to import."""
    stops = "within a few local steps"
    """When a run that is asked to stop does so, for people."""
    kind: Literal["pretrain", "finetune"]
    """Kind of the run's directory."""

    @property
    def name(self) -> str:
        """Name of the module that has the program as ``PROGRAM``."""
        return type(self).__module__

    def locate(self, request: RunRequest) -> LocatedRun:
        """Return what a run will be, from the configuration alone, which is read once.

        Raises:
            FedPipeError: The configuration is wrong, or is not that of the run in the directory.
        """
        run, config = resolve(
            self.kind,
            request.config_path,
            request.overrides,
            request.run_dir,
            preset=request.preset,
        )
        return self.located_run(run, config)

    def located_run(self, run: RunDir, config: Any) -> LocatedRun:
        """Return what a run of a configuration will be."""
        return LocatedRun(run=run, config=config, grid=self.grid_of(config))

    @abstractmethod
    def grid_of(self, config: Any) -> Grid:
        """Return the processes that a configuration asks for."""

    @abstractmethod
    def set_up(
        self,
        found: LocatedRun,
        *,
        notify: Notify,
        progress: Callable[[str, int, int], None] | None = None,
        on_checked: Callable[[], object] = lambda: None,
        threads: int | None = None,
    ) -> Any:
        """Check the run and write its directory; once, in the process that starts it, or on rank 0.

        Args:
            found: From ``locate``.
            notify: Shows a line to the user.
            progress: Shows a preparation: (label, done, total).
            on_checked: Called when what takes no time has been checked.
            threads: That this process computes with, a rank; None where it must not import torch.

        Returns:
            The setup.

        Raises:
            FedPipeError: Anything a user can get wrong.
        """

    @abstractmethod
    def from_message(self, message: Mapping[str, Any], *, started_at: float) -> Any:
        """Make a setup again from its message; the rank began at ``started_at`` of its clock."""

    @abstractmethod
    def folders(self, setup: Any) -> Mapping[str, Path]:
        """Return what every rank must see besides the run directory, by the key that names it."""

    def grid(self, setup: Any) -> Grid:
        """Return the processes of a run."""
        return self.grid_of(setup.config)

    @abstractmethod
    def run(
        self, setup: Any, options: Any, *, env: ProcessEnv, emit: Emit, watch: Watch
    ) -> Position | None:
        """Do a rank's work.

        Args:
            setup: The run.
            options: Options of the request.
            env: This process' place in the run.
            emit: Told what people may want to see.
            watch: Says what the rank does, and when to stop.

        Returns:
            None when the run is done; otherwise where it has stopped, saved.

        Collective: every process of the run.
        """

    @abstractmethod
    def write_results(self, setup: Any, *, notify: Notify) -> None:
        """Write what a finished run leaves behind. On rank 0."""

    @abstractmethod
    def view(self, setup: Any, *, interactive: bool | None = None) -> View:
        """Return where a run is shown; see ``RunConsole`` for ``interactive``."""

    @abstractmethod
    def closing(self, run_dir: Path) -> Sequence[str]:
        """Return what a finished run has to show."""


def load_program(name: str) -> RankProgram:
    """Return the program that a module has as ``PROGRAM``."""
    program: RankProgram = import_module(name).PROGRAM
    return program


class Starter(WatchObserver, Protocol):
    """What depends on who has started a rank. The watch of the rank reports to it, too."""

    @property
    def signals(self) -> StopSignals:
        """Caught once the ranks can agree where to stop."""

    def set_up(self, program: RankProgram, watch: Watch) -> AbstractContextManager[Any]:
        """Prepare or receive the run's setup, for the length of the context.

        Raises:
            FedPipeError: On every rank: what the user can mend.
        """

    def emit(self, kind: str, value: Any) -> None:
        """Take a record or a note of the rank."""

    def training_ended(self) -> None:
        """Learn that the rank trains no longer, whether it is done or has failed."""

    def show_end(self, program: RankProgram, setup: Any, stopped_at: Position | None) -> None:
        """Show how the run has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResult:
    """How a rank's part of a run has ended."""

    code: int
    """0 done, 75 interrupted and saved."""
    signal: int = 0
    """The one that has interrupted the run, whichever rank it reached."""


@system_errors_named()
def run_rank(
    program: RankProgram, starter: Starter, *, env: ProcessEnv, options: Any
) -> RankResult:
    """Run one rank from its first line to its last, whatever has started it.

    Args:
        program: What to run.
        starter: Who has started it, and how it reaches the others.
        env: This process' place in the run.
        options: Of the request.

    Returns:
        How it has ended.

    Raises:
        FedPipeError: On every rank what the user can mend.

    Collective: every process of the run.
    """
    if not num_gpus():  # DeepSpeed probes for accelerators otherwise
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bind(env)
    log.setup(rank=env.rank)
    with (
        Watch(signals=starter.signals, observer=starter) as watch,
        starter.set_up(program, watch) as setup,
    ):
        try:
            stopped_at = program.run(setup, options, env=env, emit=starter.emit, watch=watch)
        finally:
            starter.training_ended()
        if stopped_at is None and env.rank == 0:
            program.write_results(setup, notify=lambda line: starter.emit("note", line))
        starter.show_end(program, setup, stopped_at)
        if stopped_at is None:
            return RankResult(code=0)
        return RankResult(code=EXIT_INTERRUPTED, signal=watch.stop_signal)
