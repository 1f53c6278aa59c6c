"""Start ranks by forking them on this machine, listen to them, and stop all when one fails.

A fork server makes the slow imports once, while this process prepares the run without them. Ranks
are forked from the server. No torch.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from fedpipe.cluster.rank import (
    LOST_PEER,
    LocatedRun,
    RankProgram,
    View,
    load_program,
    run_rank,
)
from fedpipe.distributed.activity import Heartbeats
from fedpipe.distributed.env import ProcessEnv, num_gpus, threads_per_process
from fedpipe.distributed.signals import (
    STOP_SIGNALS,
    Interrupted,
    Signals,
    StopSignals,
    end_with_parent,
)
from fedpipe.distributed.topology import Grid, check_gpus
from fedpipe.distributed.watch import PassiveObserver, Watch
from fedpipe.errors import FedPipeError, LaunchError, TrainingError, error_in, is_users
from fedpipe.files import system_errors_named
from fedpipe.report.console import RunConsole
from fedpipe.run.checkpoint import Position
from fedpipe.run.run_dir import Setup
from fedpipe.terminal import prepare_output

REPORT_S = 2.0
"""After a rank has failed, how long the others may say why before all are stopped."""
_LOOK_S = 1.0
"""How often the supervisor looks for signals and hung ranks at least."""
_LONGEST_SOCKET = 107
"""Bytes of a path in sockaddr_un (unix(7)), the last one being zero."""
_SOCKET_NAME = len("/pymp-12345678/listener-12345678")
"""What multiprocessing appends to the directory for temporary files."""
_USERS_THREADS = os.environ.get("OMP_NUM_THREADS", "")
"""The user's own value: ``fork_server`` sets a default later, in this process too."""


# -- the supervisor --------------------------------------------------------------------------------


def set_up_here(program: RankProgram, found: LocatedRun, *, console: RunConsole) -> Any:
    """Set a run up, while the fork server makes the slow imports.

    Args:
        program: What its ranks do.
        found: From ``program.locate``.
        console: Shows the plan and the preparation.

    Returns:
        The setup.

    Raises:
        FedPipeError: Anything a user can get wrong.
    """
    return program.set_up(
        found,
        notify=console.text,
        progress=console.preparing,
        on_checked=partial(fork_server, [*program.preload, program.name]),
    )


def supervise(program: RankProgram, setup: Setup, options: Any = None, *, signals: Signals) -> None:
    """Run a program on every rank of its grid until all are done, and show it.

    Args:
        program: What they do.
        setup: The run; the caller holds its lock.
        options: Of the request.
        signals: Caught by the caller.

    Raises:
        TopologyError: There are more processes than GPUs.
        LaunchError: A rank failed or hangs; all have been stopped.
        FedPipeError: What a rank found that the user can mend; all have been stopped.
        Interrupted: The ranks have stopped because a signal asked them to, or (from the handler) a
            signal stops all at once.
    """
    grid, view = program.grid(setup), program.view(setup)
    check_gpus(grid.world_size, num_gpus())
    context = fork_server([*program.preload, program.name])
    ranks = Ranks(program.command, setup, grid=grid)
    threads = num_threads(threads_per_process(grid.world_size))
    pipes: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch:
        try:
            for rank in range(grid.world_size):
                env = ProcessEnv(
                    rank=rank,
                    world_size=grid.world_size,
                    local_rank=rank,
                    local_world_size=grid.world_size,
                    rendezvous=f"file://{scratch}/store",
                )
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_be_rank,
                    args=(program.name, setup, options, env, writer, threads),
                    daemon=True,
                )
                process.start()
                writer.close()
                ranks.processes.append(process)
                pipes[reader] = rank
            _listen(ranks, pipes, program, view, signals)
        finally:
            signals.patient = False
            ranks.kill()
            view.console.close()
    if ranks.stopped_at:
        raise Interrupted(ranks.stopped_at)


def _listen(
    ranks: Ranks, pipes: dict[Connection, int], program: RankProgram, view: View, signals: Signals
) -> None:
    open_pipes = dict(pipes)
    deadline: float | None = None  # after a failure, the time until which others may report
    forwarded = False
    while open_pipes and (deadline is None or time.monotonic() < deadline):
        for pipe in wait(list(open_pipes), timeout=_LOOK_S if deadline is None else 0.1):
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                del open_pipes[pipe]
                if ranks.has_failed(rank) and deadline is None:
                    deadline = time.monotonic() + REPORT_S
                continue
            if kind == "training":
                signals.patient = value
            elif not ranks.hear(rank, kind, value) and deadline is None:
                view.show(kind, value)
        if signals.asked and not forwarded:
            forwarded = True
            view.show("note", f"it saves and stops {program.stops}; a second signal stops at once")
            ranks.ask_to_stop()
        if deadline is None:
            ranks.check_alive(open_pipes.values())
    if deadline is not None:
        raise ranks.failure()


class Ranks:
    """Processes of a run on this machine: what they said last, and which one is to blame."""

    def __init__(self, command: str, setup: Setup, *, grid: Grid) -> None:
        """Start with no process.

        Args:
            command: What a user calls the run, for the advice in errors.
            setup: The run.
            grid: Says what a rank holds.
        """
        self.processes: list[BaseProcess] = []
        """By rank."""
        self.stopped_at = ""
        """Where the run has stopped because it was asked to."""
        self._command, self._setup, self._grid = command, setup, grid
        self._errors: dict[int, str] = {}
        self._heartbeats = Heartbeats(timeout_s=setup.hang_timeout_s)

    def hear(self, rank: int, kind: str, value: Any) -> bool:
        """Take a message; return whether it was for the supervisor, and not for people."""
        if kind == "activity":
            self._heartbeats.hear(rank, value)
        elif kind == "error":
            self._errors[rank] = value
        elif kind == "stopped":
            self.stopped_at = value
        else:
            return False
        return True

    def has_failed(self, rank: int) -> bool:
        """Whether a rank that has closed its pipe ended badly."""
        self.processes[rank].join()
        return self.processes[rank].exitcode != 0

    def check_alive(self, running: Iterable[int]) -> None:
        """Look for a rank that hangs.

        Raises:
            LaunchError: One does.
        """
        hung = self._heartbeats.find_hung(running, clock_s=time.monotonic())
        if hung is not None:
            rank, what = hung
            raise self._error(rank, f"hangs: {what}")

    def ask_to_stop(self) -> None:
        """Ask every rank to save and stop."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGUSR2)

    def failure(self) -> FedPipeError:
        """Name the rank that failed first by cause: its neighbours only lost their connection.

        What the user can mend is said as it is, and so is a training that diverges: it is no
        rank's, and the same command would find the same.
        """
        failed = [r for r, p in enumerate(self.processes) if p.exitcode not in (None, 0)]
        killed = [r for r in failed if r not in self._errors]
        original = [r for r in failed if not LOST_PEER.search(self._errors.get(r, ""))]
        rank = next(iter(killed or original or failed))
        known = error_in(self._errors.get(rank, ""))
        if known is not None and (is_users(known) or isinstance(known, TrainingError)):
            return known
        code = self.processes[rank].exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self._error(rank, f"failed: {self._errors.get(rank, how)}")

    def kill(self) -> None:
        """End all processes at once."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def _error(self, rank: int, what: str) -> LaunchError:
        run_dir = self._setup.run_dir
        return LaunchError(
            f"{self._heartbeats.name(rank, self._grid)} {what.removesuffix('.')}. "
            f"Full log: {run_dir / 'logs' / f'rank_{rank:05d}.log'}. "
            f"Run it again with: fedpipe {self._command} --run-dir {shlex.quote(str(run_dir))}"
        )


# -- a rank ----------------------------------------------------------------------------------------


class _Supervised(PassiveObserver):
    """Starter of a forked rank: all that the rank tells goes to the supervisor, who sees it end."""

    def __init__(self, setup: Setup, pipe: Connection) -> None:
        super().__init__(lambda activity: self.emit("activity", activity))
        self.signals = StopSignals()
        self._setup, self._pipe = setup, pipe
        self._sending = threading.Lock()

    @contextlib.contextmanager
    def set_up(self, program: RankProgram, watch: Watch) -> Iterator[Setup]:
        yield self._setup

    def emit(self, kind: str, value: Any) -> None:
        with self._sending:  # stages may be threads, and the watch is one
            self._pipe.send((kind, value))

    def training_ended(self) -> None:
        """The supervisor decides what a signal means from now on, and ends this rank."""

    def show_end(self, program: RankProgram, setup: Setup, stopped_at: Position | None) -> None:
        if stopped_at is not None:
            self.emit("stopped", f" after {stopped_at}")


def _be_rank(
    name: str, setup: Setup, options: Any, env: ProcessEnv, pipe: Connection, threads: int
) -> None:
    """Run one rank in this process, which ends with it; at worst ("error", text) is emitted."""
    import torch

    end_with_parent(signal.SIGKILL)  # the fork server, which ends with the supervisor
    starter = _Supervised(setup, pipe)
    try:
        with system_errors_named():
            _redirect_output(setup, env)
        prepare_output()
        random.seed(env.rank)
        torch.set_num_threads(threads)  # the fork server has imported torch already, with one
        run_rank(load_program(name), starter, env=env, options=options)
    except BaseException as error:
        starter.emit("error", f"{type(error).__name__}: {error}")
        if not isinstance(error, FedPipeError):
            with contextlib.suppress(OSError):  # the log may lie on the disk that is full
                traceback.print_exc()
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


def _redirect_output(setup: Setup, env: ProcessEnv) -> None:
    """Send everything that libraries print to RUN_DIR/logs; the console is the parent's."""
    folder = setup.run_dir / "logs"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(
        folder / f"rank_{env.rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


# -- the fork server -------------------------------------------------------------------------------


def num_threads(num_cores: int) -> int:
    """Return the threads of a process: OMP_NUM_THREADS if the user set it, else its cores."""
    asked = int(_USERS_THREADS) if _USERS_THREADS.isdigit() else 0
    return asked or num_cores


class _Process(ForkServerProcess):
    """A process that leaves the main module of this one alone.

    It may be a user's script, which multiprocessing would run again in every process.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # without a file or a name to import
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def fork_server(preload: Sequence[str]) -> Any:
    """Start importing torch, DeepSpeed and transformers, once, beside the supervisor's own work.

    Args:
        preload: Modules; those of the first call count.

    Returns:
        The context that forks ranks from the server; called again, the same one.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not num_gpus():  # DeepSpeed probes for accelerators otherwise
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Whoever asks torch for a GPU in the server must not open the driver: no child survives that.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = _Context()
    context.set_forkserver_preload(list(preload))
    _find_room_for_sockets()
    resource_tracker.ensure_running()  # it changes the mask, so not below
    # A terminal and a scheduler send signals to all processes of a run. The server must outlive
    # them; its children inherit the mask and take it off when they can stop in order.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _find_room_for_sockets() -> None:
    """Choose a folder for the sockets of multiprocessing whose path is short enough for the system.

    Raises:
        LaunchError: There is no such place.
    """
    usual = tempfile.tempdir
    for folder in (*_usual_folder(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) + _SOCKET_NAME > _LONGEST_SOCKET:
            continue
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # makes a folder, and remembers it for this process and its own
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = usual
    raise LaunchError(
        f"TMPDIR: expected a writable directory whose path has at most"
        f" {_LONGEST_SOCKET - _SOCKET_NAME} bytes, got {os.environ.get('TMPDIR', '')!r}. Set"
        " TMPDIR=/tmp and make room there: a socket's path cannot be longer."
    )


def _usual_folder() -> list[str]:
    """Directory for temporary files, if there is any that can be written."""
    try:
        return [tempfile.gettempdir()]
    except FileNotFoundError:
        return []
