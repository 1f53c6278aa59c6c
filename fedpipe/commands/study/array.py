"""Cells of a sweep, an evaluation or a grid of fine-tunings as job arrays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from fedpipe.cluster.follow import exit_code_of, state_of
from fedpipe.cluster.profile import JobShape, Profile
from fedpipe.cluster.slurm import cells_in_queue
from fedpipe.cluster.submit import (
    Cluster,
    Job,
    check_folder,
    plan_job,
    result_here,
    send,
    slurm_job,
)
from fedpipe.commands.study.pool import check_all_done
from fedpipe.distributed.signals import EXIT_INTERRUPTED
from fedpipe.distributed.topology import Grid
from fedpipe.errors import FedPipeError, is_users
from fedpipe.files import write_text
from fedpipe.report.format import count
from fedpipe.run.run_dir import locked

JOBS_FILE = "logs/jobs.json"
"""The job that every cell was submitted in last, below the directory of the array."""
_PERIOD_S = 2.0
_LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayCell:
    """One job of an array."""

    name: str
    """Of its folder."""
    run_dir: Path
    grid: Grid
    """The job's tasks."""
    workers: int = 1
    """Processes that each task starts itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """Cells that have been checked, whatever they are."""

    task: str
    """What a user calls all of them: sweep, evaluate, finetune."""
    job: Callable[[Path], Job]
    """Makes what a job does, of the run directory of its cell."""
    name: str
    """Of the jobs, in the queue."""
    directory: Path
    cells: tuple[ArrayCell, ...]
    is_done: Callable[[str], bool]
    """Tells of a cell by its name."""
    prepare: Callable[[Sequence[str]], None]
    """Makes everything ready that the cells about to be submitted read."""
    gather: Callable[[], str]
    """Writes the tables of what is done; returns what a terminal shows of them."""
    outcome: Callable[[str], str]
    """Says what a finished cell has reached."""

    def pending(self) -> list[ArrayCell]:
        """Cells that are not done, in their order."""
        return [cell for cell in self.cells if not self.is_done(cell.name)]


def submit_array(
    array: Array,
    *,
    profile_path: str | None,
    cluster: Cluster,
    parallel: int | None,
    follows: bool,
    show: Callable[[str], None],
) -> int:
    """Submit the cells that are neither done nor in the queue; gather what is done.

    Args:
        array: The cells.
        profile_path: YAML of submitit's parameters; None only where there is no scheduler.
        cluster: Where. Without a scheduler the command lasts as long as its cells.
        parallel: Cells that may run at once; None sets no limit.
        follows: Wait for all cells, and say how each has ended.
        show: Shows a line.

    Returns:
        0 when all is submitted, or with ``follows`` done; 75 when cells were interrupted only.

    Raises:
        FedPipeError: What the user can mend; nothing has been submitted.
        LaunchError: Cells have failed; the others are done.
    """
    check_folder(array.directory)
    jobs = _read_jobs(array.directory) if cluster == "slurm" else {}
    queued = cells_in_queue(list(jobs.values()))
    new = [cell for cell in array.pending() if jobs.get(cell.name) not in queued]
    plans = {
        size: plan_job(size[0], workers=size[1], profile_path=profile_path, cluster=cluster)
        for size in dict.fromkeys((cell.grid, cell.workers) for cell in new)
    }
    if new:
        with locked(array.directory):
            array.prepare([cell.name for cell in new])
    # An array has one shape; cells of another number of processes are an array of their own.
    arrays = [
        ([cell for cell in new if (cell.grid, cell.workers) == size], *plan)
        for size, plan in plans.items()
    ]
    if cluster == "slurm":
        for cells, profile, shape in arrays:
            sent = _send(array, cells, profile, shape, cluster=cluster, parallel=parallel)
            jobs |= {cell.name: job.job_id for cell, job in zip(cells, sent, strict=True)}
            _write_jobs(array.directory, jobs)
            first = sent[0].job_id.partition("_")[0]
            show(f"job     {first} on slurm: {count(len(cells), 'cell')}, each {shape}")
        waiting = len(array.pending()) - len(new)
        if waiting > 0:
            show(f"queue   {count(waiting, 'cell')} of an earlier submission")
    show(f"logs    {array.directory / 'logs'}/JOB_CELL_RANK_log.out, .err")
    show(f"run     {array.directory}")
    try:
        if cluster != "slurm":
            failed = _run_here(array, arrays, cluster=cluster, parallel=parallel or 1, show=show)
        elif follows:
            failed = _follow(array, jobs, show=show)
        else:
            failed = {}
    except KeyboardInterrupt:
        show("the cells at work go on; the same command takes up the others")
        return EXIT_INTERRUPTED
    show(array.gather())
    if failed:
        refused = {name: error for name, error in failed.items() if is_users(error)}
        way_out = "The same command submits them again"
        check_all_done(array.task, array, way_out=way_out, refused=refused)
    waited = follows or cluster != "slurm"
    if waited or not array.pending():
        return EXIT_INTERRUPTED if array.pending() else 0
    show("the same command gathers again, and submits what is neither done nor in the queue")
    return 0


def _send(
    array: Array,
    cells: Sequence[ArrayCell],
    profile: Profile,
    shape: JobShape,
    *,
    cluster: Cluster,
    parallel: int | None = None,
) -> list[Any]:
    return send(
        [array.job(cell.run_dir) for cell in cells],
        folder=array.directory / "logs", name=array.name, profile=profile, shape=shape,
        cluster=cluster, parallel=parallel,
    )  # fmt: skip


def _run_here(
    array: Array,
    arrays: Sequence[tuple[Sequence[ArrayCell], Profile, JobShape]],
    *,
    cluster: Cluster,
    parallel: int,
    show: Callable[[str], None],
) -> dict[str, FedPipeError]:
    """Run cells as jobs of this machine, some at a time; return the errors of those that fail."""
    waiting = [(cell, profile, shape) for cells, profile, shape in arrays for cell in cells]
    running: list[tuple[ArrayCell, Any]] = []
    failed: dict[str, FedPipeError] = {}
    while waiting or running:
        while waiting and len(running) < parallel:
            cell, profile, shape = waiting.pop(0)
            (job,) = _send(array, [cell], profile, shape, cluster=cluster)
            show(f"{time.strftime('%H:%M:%S')} cell {cell.name}: job {job.job_id} on {cluster}")
            running.append((cell, job))
        for cell, job in running.copy():
            ended = _ended(array, cell, job, show=show)
            if ended is not None:
                running.remove((cell, job))
                if isinstance(ended, FedPipeError):
                    failed[cell.name] = ended
        if running:
            time.sleep(_LOOK_S)
    return failed


def _follow(
    array: Array, jobs: dict[str, str], *, show: Callable[[str], None]
) -> dict[str, FedPipeError]:
    """Wait for the cells in the queue; return the errors of those that have failed."""
    waiting = {cell.name: cell for cell in array.pending()}
    failed: dict[str, FedPipeError] = {}
    while waiting:
        queued = cells_in_queue([jobs[name] for name in waiting])
        for name in [name for name in waiting if jobs[name] not in queued]:
            cell = waiting[name]
            job = slurm_job(array.directory, jobs[name], num_tasks=cell.grid.world_size)
            ended = _ended(array, cell, job, show=show)
            if ended is not None:
                del waiting[name]
                if isinstance(ended, FedPipeError):
                    failed[name] = ended
        time.sleep(_PERIOD_S)
    return failed


def _ended(
    array: Array, cell: ArrayCell, job: Any, *, show: Callable[[str], None]
) -> int | FedPipeError | None:
    """Say how a cell has ended: 0, 75, or its error; None if it has not, or nobody can tell now.

    A job of this process is run to its end.
    """
    lines: list[str] = []
    code: int | FedPipeError
    try:
        if isinstance(job, submitit.DebugJob):
            code = result_here(job)
        else:
            state = state_of(job)
            if state is None or not state.has_ended:
                return None
            code = exit_code_of(
                job, state, run_dir=cell.run_dir, grid=cell.grid, show=lines.append, closing=list
            )
    except FedPipeError as error:
        code, lines = error, [str(error)]
    if code == 0:
        lines = [f"done, {array.outcome(cell.name)}"]
    show(f"{time.strftime('%H:%M:%S')} cell {cell.name}: {(lines or ['interrupted'])[-1]}")
    return code


def _read_jobs(directory: Path) -> dict[str, str]:
    try:
        return dict(json.loads((directory / JOBS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write_jobs(directory: Path, jobs: dict[str, str]) -> None:
    path = directory / JOBS_FILE
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(jobs, indent=1) + "\n")
