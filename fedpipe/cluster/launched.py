"""Start a rank in a process that somebody else's launcher has started: torchrun, deepspeed, srun.

The environment says which rank it is. The ranks meet before any process group exists: rank 0 sets
the run up and tells the others. It also shows the run. No supervisor sees that a rank has ended or
hangs: the ranks watch each other (``peers``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.cluster.peers import Peers
from fedpipe.cluster.rank import (
    LocatedRun,
    RankProgram,
    RankResult,
    RunRequest,
    View,
    run_rank,
)
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.env import ProcessEnv, detect, threads_per_process
from fedpipe.distributed.signals import (
    EXIT_INTERRUPTED,
    STOP_SIGNALS,
    Interrupted,
    Signals,
    StopSignals,
)
from fedpipe.distributed.watch import Watch
from fedpipe.errors import FedPipeError, LaunchError
from fedpipe.report.console import RunConsole
from fedpipe.report.records import ProgressRecord, StepRecord
from fedpipe.report.writer import METRICS_FILE, finite
from fedpipe.run.checkpoint import Checkpoint, Position
from fedpipe.run.run_dir import Setup, check_writable, locked
from fedpipe.terminal import reader_has_gone

if TYPE_CHECKING:
    from fedpipe.distributed.meeting import Meeting

_LAST_SIGNAL_S = 2.0
"""A signal to all ranks may reach the host of the store this much earlier than another one."""
_AT_ONCE_S = 10.0
"""A rank that is asked to stop before it trains, and waits inside torch, is ended after this."""
_LOOK_S = 0.5
ATTEMPTS_FILE = "logs/attempts.jsonl"
"""Where every start of every job of a run left off, below the run directory."""
MAX_IDLE_ATTEMPTS = 3
"""So often in a row a job may be started and stopped without having saved anything new."""


def start_rank(program: RankProgram, request: RunRequest) -> int:
    """Run the rank that the environment describes, and return the exit code of the process.

    Args:
        program: What the ranks do.
        request: What the user asks for; rank 0's counts.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed, 2 for a user's error,
        1 for a failure, on every rank (one line on stderr, of the rank that has found it).
    """
    rank = 0
    try:
        with Signals(at_once_s=_AT_ONCE_S).caught(), stopped_with_launcher():
            env = detect()
            rank = env.rank
            requeued = "SLURM_RESTART_COUNT" in os.environ  # else somebody starts it by hand
            job_id = os.environ["SLURM_JOB_ID"] if requeued else ""
            return run_launched(program, request, env=env, job_id=job_id).code
    except (FedPipeError, Interrupted) as ending:
        for number in STOP_SIGNALS:  # none of them changes how this rank ends
            signal.signal(number, signal.SIG_IGN)
        error = _error_under(ending)
        if error is None:
            if rank == 0:
                sys.stdout.write("interrupted; give the same command again\n")
            return EXIT_INTERRUPTED
        if not error.reported:
            sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, LaunchError) else 2


def _error_under(ending: BaseException | None) -> FedPipeError | None:
    """Return the error of a rank, also where a signal came while the rank told it to the others.

    srun ends a job's other ranks as soon as one of them has ended.
    """
    while ending is not None and not isinstance(ending, FedPipeError):
        ending = ending.__context__
    return ending


def run_launched(
    program: RankProgram, request: RunRequest, *, env: ProcessEnv, job_id: str = ""
) -> RankResult:
    """Run a rank in this process.

    Args:
        program: What the ranks do.
        request: What the user asks for; rank 0's counts.
        env: This process' place in the run.
        job_id: Of a job that may be requeued: its starts are counted.

    Returns:
        How it has ended.

    Raises:
        FedPipeError: On every rank, before any process group exists, what the user can mend.

    Collective: every process of the run.
    """
    starter = _Launched(request, env=env, job_id=job_id)
    return run_rank(program, starter, env=env, options=request.options)


class _Launched(Peers):
    """Starter of a rank that watches its peers, and shows the run if it is rank 0."""

    def __init__(self, request: RunRequest, *, env: ProcessEnv, job_id: str) -> None:
        super().__init__(env)
        self.signals = StopSignals()
        self._request, self._job_id = request, job_id
        self._view = View(console=RunConsole(interactive=False))

    @contextlib.contextmanager
    def set_up(self, program: RankProgram, watch: Watch) -> Iterator[Setup]:
        env, notify, started_at = self._env, self._view.console.text, time.monotonic()
        threads = threads_per_process(env.local_world_size)
        with contextlib.ExitStack() as stack:
            found: LocatedRun

            def choose() -> Path:
                nonlocal found
                found = program.locate(self._request)
                found.grid.check_world_size(env.world_size)
                stack.enter_context(_new_directory(found.run.path))
                return found.run.path

            def prepare() -> dict[str, Any]:
                setup = program.set_up(found, notify=notify, threads=threads)
                stack.enter_context(locked(setup.run_dir))
                if self._job_id:
                    position = position_of(setup.checkpoint)
                    note_attempt(setup.run_dir, position, job_id=self._job_id)
                message: dict[str, Any] = setup.to_message()
                return message

            from fedpipe.distributed.meeting import Meeting

            if "TORCHELASTIC_RUN_ID" in os.environ:
                import torch

                torch.set_num_threads(threads)  # torchrun sets OMP_NUM_THREADS to 1
            stack.enter_context(_late_signal(self.signals))
            # Rank 0's hosts the store: it must live as long as the run.
            meeting = Meeting(env, notify=notify)
            meeting.share_secret(choose)
            if meeting.board is not None:
                watch.activity = partial(Activity, doing="preparing the text")
                watch.use_board(meeting.board)
            setup = program.from_message(meeting.from_rank_0(prepare), started_at=started_at)
            self.set_grid(program.grid(setup), timeout_s=setup.hang_timeout_s)
            for key, folder in program.folders(setup).items():
                _check_shared(meeting, key, folder)
            self._view = program.view(setup, interactive=False)
            if env.rank == 0 and self._view.log_every:
                self.on_steps = ProgressRecorder(setup.run_dir, self._view)
            yield setup

    def emit(self, kind: str, value: Any) -> None:
        if kind == "step":
            self.record_step(value)
        else:
            self._view.show(kind, value)

    def training_ended(self) -> None:
        self.signals.release()

    def show_end(self, program: RankProgram, setup: Setup, stopped_at: Position | None) -> None:
        if self._env.rank > 0:
            return
        lines = [f"interrupted after {stopped_at}; give the same command again to resume"]
        for line in program.closing(setup.run_dir) if stopped_at is None else lines:
            self._view.console.text(line)


@contextlib.contextmanager
def _new_directory(run_dir: Path) -> Iterator[None]:
    """Make a directory, and remove it again if it is still empty."""
    made = not run_dir.exists()
    check_writable(run_dir)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                run_dir.rmdir()


@contextlib.contextmanager
def _late_signal(signals: StopSignals) -> Iterator[None]:
    """Wait a little where another rank has gone: the signal that ended it may be on its way here.

    Once the ranks agree where to stop, ``signals`` catches it.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if not signals.catches:
            time.sleep(_LAST_SIGNAL_S)
        if isinstance(error, ConnectionError):
            raise LaunchError(
                f"{error}. See the log of rank 0, and start all ranks again."
            ) from None
        raise


def _check_shared(meeting: Meeting, key: str, folder: Path) -> None:
    """Refuse a folder that not every rank sees.

    Raises:
        TopologyError: On every rank.
    """
    from fedpipe.distributed.meeting import SHARED_WITHIN_S, not_shared

    deadline = time.monotonic() + SHARED_WITHIN_S
    while not (there := folder.exists()) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    for objection in meeting.agree(key, "" if there else str(folder.parent)):
        raise not_shared(key, str(folder.parent), objection.rpartition(" ")[2])


class ProgressRecorder:
    """Rank 0's view of all ranks' latest steps: on its console, and in the record of the run.

    Step records come together only where the ranks meet, at the end of a round; until then these
    ``{"kind": "system", "event": "progress"}`` lines tell whoever follows the file from elsewhere.
    """

    def __init__(self, run_dir: Path, view: View) -> None:
        """Remember where to write, and where to show every step record."""
        self._path, self._view = run_dir / METRICS_FILE, view
        self._last = (-1, -1)

    def __call__(self, records: list[StepRecord]) -> None:
        """Take the latest step record of every stage of every replica."""
        for record in records:
            self._view.show("step", record)
        moment = max((r["round"], (r["step"] + 1) // self._view.log_every) for r in records)
        if moment <= self._last or moment[1] == 0:
            return
        self._last = moment
        line: ProgressRecord = {
            "kind": "system",
            "event": "progress",
            "steps": [finite(r) for r in records],
        }
        with open(self._path, "ab", buffering=0) as file:  # one call, so lines stay whole
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


@contextlib.contextmanager
def stopped_with_launcher() -> Iterator[None]:
    """Send this process SIGTERM, once, when the process that started it has gone.

    A launcher that is killed says nothing to its ranks. Nor does one that has started them over ssh
    and ends with its terminal: a second launcher on the rank's node lives on, but what the ranks
    write leads nowhere. They would have no owner, and would keep the run's lock.
    """
    parent, closed = os.getppid(), threading.Event()

    def watch_parent() -> None:
        while not closed.wait(_LOOK_S):
            if os.getppid() != parent or reader_has_gone():
                sys.stderr.write("what started this rank has gone: it saves and stops\n")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch_parent, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


# -- attempts --------------------------------------------------------------------------------------


def position_of(checkpoint: Checkpoint | None) -> Position:
    """Return where a run goes on: from its newest checkpoint, or from the start."""
    return checkpoint.position if checkpoint else Position()


def note_attempt(run_dir: Path, position: Position, *, job_id: str) -> None:
    """Write down where a job starts, and refuse to go on for ever without getting anywhere.

    Args:
        run_dir: Directory of the run, before it trains.
        position: Where it goes on.
        job_id: The same for every attempt of a requeued job.

    Raises:
        LaunchError: Its last ``MAX_IDLE_ATTEMPTS`` starts were all from where it stands now.
    """
    here = {"job": job_id, "round": position.round_id, "step": position.step}
    path = run_dir / ATTEMPTS_FILE
    path.parent.mkdir(exist_ok=True)
    last = _attempts(path)[-MAX_IDLE_ATTEMPTS:]
    if len(last) == MAX_IDLE_ATTEMPTS and all(entry == here for entry in last):
        raise LaunchError(
            f"expected progress, got {MAX_IDLE_ATTEMPTS} starts in a row that were "
            f"stopped before anything new was saved (all from {position}). Raise the job's time, "
            "set checkpoint.every_steps in a new run, or see what stops it; then submit again."
        )
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(here) + "\n")


def _attempts(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # a job was killed while it wrote
            entries.append(None)
    return entries
