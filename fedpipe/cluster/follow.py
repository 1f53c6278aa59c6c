"""Follow a job from outside: its progress from ``metrics.jsonl``, its state from the scheduler.

Nothing here talks to the job's processes, so it may be left and taken up again at any time.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from fedpipe.cluster.rank import LOST_PEER, View
from fedpipe.cluster.slurm import JobState, cells_in_queue, job_state
from fedpipe.distributed.activity import Heartbeats
from fedpipe.distributed.signals import EXIT_INTERRUPTED
from fedpipe.distributed.topology import Grid
from fedpipe.errors import FedPipeError, LaunchError, TopologyError
from fedpipe.report.writer import METRICS_FILE

_PERIOD_S = 1.0
STARTS = "fedpipe starts as"
"""Opens the part of a job's log that belongs to one attempt."""
_SETTLE_S = 15.0
"""A network file system may show what a job wrote last only after this."""
_FULL_BYTES = 1 << 20
"""A disk with fewer free bytes counts as full."""
_SRUN_ERROR = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*)$", re.MULTILINE)
_VERDICT = re.compile(r"^LaunchError: rank .*$", re.MULTILINE)
"""What rank 0 says of a rank that hangs, before it ends without a result."""
_OUR_ERROR = re.compile(r"^(?:fedpipe\.errors\.)?([A-Z]\w*(?:Error|Exception|Exit)\b.*)$", re.M)


Closing = Callable[[], Sequence[str]]
"""Returns what a finished run has to show."""


def follow(
    job: Any,
    *,
    run_dir: Path,
    grid: Grid,
    view: View,
    show: Callable[[str], None],
    closing: Closing,
) -> int:
    """Show a job's progress until it has ended for good; a requeued job is waited for.

    Args:
        job: submitit's.
        run_dir: Directory of the run.
        grid: Its processes, for names.
        view: Where the run is shown.
        show: Shows a line about the job itself.
        closing: What a finished run has to show.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed.

    Raises:
        LaunchError: The job failed; says which rank, why, and where its log is.
        FedPipeError: What the job could not work with, as its ranks said.
    """
    progress = Progress(run_dir / METRICS_FILE, view)
    announce = _Announcer(job.job_id, view.console.text)
    try:
        while True:
            state = state_of(job)
            progress.read()
            if state is not None:
                announce(state)
                # A job that is being requeued shows how it was stopped, for a moment.
                if state.has_ended and not (
                    isinstance(job, submitit.SlurmJob) and cells_in_queue([job.job_id])
                ):
                    break
            time.sleep(_PERIOD_S)
        progress.read()
    except KeyboardInterrupt:
        show(f"job {job.job_id} goes on; the same command follows it again, scancel ends it")
        return EXIT_INTERRUPTED
    finally:
        view.console.close()
    return exit_code_of(job, state, run_dir=run_dir, grid=grid, show=show, closing=closing)


class Progress:
    """Hands new records of a run to what shows them."""

    def __init__(self, path: Path, view: View) -> None:
        """Start at the end of what is there: it is history."""
        self._path, self._view = path, view
        self._offset = path.stat().st_size if path.is_file() else 0

    def read(self) -> None:
        """Show what is new."""
        for record in self._new_records():
            if record.get("event") == "progress":
                for step in record["steps"]:
                    self._view.show("step", step)
            else:
                self._view.show(record["kind"], record)

    def _new_records(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                size = file.seek(0, 2)
                # A resumed run has cut the record at its checkpoint.
                self._offset = min(self._offset, size)
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # cut and written again between two looks
                continue


class _Announcer:
    """Says once what has become of the job."""

    def __init__(self, job_id: str, show: Callable[[str], None]) -> None:
        self._job_id, self._show = job_id, show
        self._last = ""
        self._restarts = 0

    def __call__(self, state: JobState) -> None:
        if state.restarts > self._restarts:
            self._say(f"was requeued (start {state.restarts + 1})")
            self._restarts = state.restarts
        if state.waits:
            self._say(f"waits: {state.reason}" if state.reason else "waits in the queue")
        elif state.state == "RUNNING":
            self._say(f"runs on {state.nodes or 'this machine'}")

    def _say(self, what: str) -> None:
        if what != self._last:
            self._last = what
            self._show(f"{time.strftime('%H:%M:%S')} job {self._job_id} {what}")


def state_of(job: Any) -> JobState | None:
    """State of a job on SLURM or on this machine; None if SLURM did not answer."""
    if isinstance(job, submitit.SlurmJob):
        return job_state(job.job_id)
    state = job.get_info()["jobState"]
    return JobState(state="RUNNING" if state == "RUNNING" else "COMPLETED")


def exit_code_of(
    job: Any,
    state: JobState,
    *,
    run_dir: Path,
    grid: Grid,
    show: Callable[[str], None],
    closing: Closing,
) -> int:
    """Find out how a job has ended.

    Returns:
        0 done, 75 interrupted.

    Raises:
        FedPipeError: It failed.
    """
    code = _result(job) if state.state == "COMPLETED" else None
    if code == 0:
        for line in closing():
            show(line)
        return 0
    why = _INTERRUPTED.get(state.state)
    if code == EXIT_INTERRUPTED or why:
        show(
            f"job {job.job_id} {why or 'was asked to stop'}; what it saved is in {run_dir}. Full "
            f"log: {log_of(job, 0)}. The same command goes on with it"
        )
        return EXIT_INTERRUPTED
    failure = find_failure(job)
    if failure is None:
        raise _unexplained(job, state, run_dir=run_dir)
    raise failure.error(job, grid=grid, run_dir=run_dir)


_INTERRUPTED = {
    "CANCELLED": "was cancelled",
    "TIMEOUT": "reached its time limit before it could save and requeue",
    "NODE_FAIL": "lost a node and was not requeued",
    "PREEMPTED": "was pre-empted and not requeued",
    "BOOT_FAIL": "could not boot its nodes",
    "DEADLINE": "reached its deadline",
}


_OURS: dict[str, type[FedPipeError]] = {
    kind.__name__: kind for kind in (*FedPipeError.__subclasses__(), FedPipeError)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The rank to blame for a failed job."""

    rank: int
    what: str
    """Class and text of its exception, or what srun says of it."""

    def error(self, job: Any, *, grid: Grid, run_dir: Path) -> FedPipeError:
        """The exception that says so."""
        log = log_of(job, self.rank)
        kind, _, text = self.what.partition(": ")
        if kind in _OURS:
            return _OURS[kind](f"job {job.job_id}: {text} Full log: {log}")
        name = Heartbeats(timeout_s=0).name(self.rank, grid)
        # A full disk takes a rank's own account of it as well.
        what = "; ".join(filter(None, (self.what.rstrip("."), _full_disk(run_dir))))
        return LaunchError(
            f"job {job.job_id} failed on {name}: {what}. Full log: {log}. The same command "
            f"resumes {run_dir}"
        )


def find_failure(job: Any) -> Failure | None:
    """Name the rank that failed first by cause: the others only lost their connection to it.

    A rank that ends with an exception leaves it in submitit's result; one that is killed leaves
    nothing, but srun's message in the job's own log.
    """
    errors: dict[int, tuple[float, str]] = {}
    for rank in range(job.num_tasks):
        result = job.task(rank).paths.result_pickle
        if result.is_file():
            error = job.task(rank).exception()
            if error is not None:
                errors[rank] = (result.stat().st_mtime, _last_error(str(error)))
    first = sorted(errors, key=lambda rank: errors[rank][0])
    original = [rank for rank in first if not LOST_PEER.search(errors[rank][1])]
    ours = [rank for rank in original if errors[rank][1].partition(":")[0] in _OURS]
    for rank in ours or original:
        return Failure(rank=rank, what=errors[rank][1])
    log = _text(log_of(job, 0)).rpartition(STARTS)[2]
    verdicts = _VERDICT.findall(log)
    for node, tasks, what in _SRUN_ERROR.findall(log):
        if what.startswith("Exited with exit code") and verdicts:
            break
        if not what.startswith("Exited with exit code") or not errors:
            return Failure(rank=int(re.split("[,-]", tasks)[0]), what=f"{what} on {node}")
    if verdicts:
        return Failure(rank=0, what=verdicts[-1])
    if first:
        return Failure(rank=first[0], what=errors[first[0]][1])
    return None


def _last_error(text: str) -> str:
    """The last line of a traceback that names an exception."""
    lines: list[str] = _OUR_ERROR.findall(text) or text.strip().splitlines()
    return lines[-1].strip()


def _unexplained(job: Any, state: JobState, *, run_dir: Path) -> FedPipeError:
    """What can still be said where no rank has said anything."""
    if not log_of(job, 0).exists():
        return TopologyError(
            f"--run-dir: expected a folder that all nodes share, got {run_dir}, where job "
            f"{job.job_id} could not even open its log on {state.nodes or 'its node'}. Choose a "
            "folder of the network file system."
        )
    if full := _full_disk(run_dir):
        what = full
    elif state.state == "OUT_OF_MEMORY":
        what = "it needs more memory than it asked for: raise mem_gb"
    else:
        lines = [line for line in _text(log_of(job, 0)).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "its logs are empty"
        what = f"state {state.state}, {state.reason or 'no reason given'}: {last}"
    return LaunchError(
        f"job {job.job_id} failed: {what}. Full log: {log_of(job, 0)}. The same command resumes "
        f"{run_dir}"
    )


def _full_disk(run_dir: Path) -> str:
    free = shutil.disk_usage(run_dir).free
    return f"the disk of {run_dir} is full ({free} bytes are free)" if free < _FULL_BYTES else ""


def _result(job: Any) -> int | None:
    """What rank 0 has returned; None where it left nothing."""
    task = job.task(0)
    deadline = time.monotonic() + _SETTLE_S
    while not task.paths.result_pickle.is_file():
        if time.monotonic() > deadline:
            return None
        time.sleep(_PERIOD_S)
    return None if task.exception() else int(task.result())


def log_of(job: Any, rank: int) -> Path:
    """Where a rank's errors are; rank 0's also has what srun said."""
    return Path(job.task(rank).paths.stderr)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
