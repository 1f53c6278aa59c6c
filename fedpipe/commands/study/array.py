"""Run the cells of a study as job arrays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import submitit

from fedpipe.cluster.follow import exit_code_of, state_of
from fedpipe.cluster.profile import JobShape, Profile
from fedpipe.cluster.slurm import cells_in_queue
from fedpipe.cluster.submit import (
    Cluster,
    check_folder,
    job_of,
    plan_job,
    result_here,
    send,
    slurm_job,
)
from fedpipe.commands.study.pool import check_all_done
from fedpipe.commands.study.study import Cell, Study
from fedpipe.distributed.signals import EXIT_INTERRUPTED
from fedpipe.errors import FedPipeError, is_users
from fedpipe.files import write_text
from fedpipe.report.format import count
from fedpipe.run.run_dir import locked

JOBS_FILE = "logs/jobs.json"
"""File with the last job of every cell, in the directory of the array."""
_PERIOD_S = 2.0
_LOOK_S = 0.2


def submit_array(
    study: Study[Any],
    *,
    profile_path: str | None,
    cluster: Cluster,
    parallel: int | None,
    follows: bool,
    show: Callable[[str], None],
) -> int:
    """Submit the cells that are neither done nor in the queue, and write the tables of the rest.

    Args:
        study: The study, with checked cells.
        profile_path: YAML file with parameters of submitit; None only without a scheduler.
        cluster: slurm, local or debug. Without a scheduler the command lasts as long as its cells.
        parallel: Number of cells that may run at once; None sets no limit.
        follows: Wait for all cells, and show how each cell ends.
        show: Called with a line for the user.

    Returns:
        0 when all cells are submitted, or with ``follows`` when all are done; 75 when some cells
        were interrupted and none failed.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been submitted.
        LaunchError: Some cells failed; the others are done.
    """
    check_folder(study.directory)
    jobs = _read_jobs(study.directory) if cluster == "slurm" else {}
    queued = cells_in_queue(list(jobs.values()))
    new = [cell for cell in study.pending() if jobs.get(cell.name) not in queued]
    plans = {
        size: plan_job(size[0], workers=size[1], profile_path=profile_path, cluster=cluster)
        for size in dict.fromkeys((cell.grid, cell.workers) for cell in new)
    }
    if new:
        with locked(study.directory):
            study.reserve(new)
    # An array has one shape; cells of another number of processes are an array of their own.
    arrays = [
        ([cell for cell in new if (cell.grid, cell.workers) == size], *plan)
        for size, plan in plans.items()
    ]
    if cluster == "slurm":
        for cells, profile, shape in arrays:
            sent = _send(study, cells, profile, shape, cluster=cluster, parallel=parallel)
            jobs |= {cell.name: job.job_id for cell, job in zip(cells, sent, strict=True)}
            _write_jobs(study.directory, jobs)
            first = sent[0].job_id.partition("_")[0]
            show(f"job     {first} on slurm: {count(len(cells), 'cell')}, each {shape}")
        waiting = len(study.pending()) - len(new)
        if waiting > 0:
            show(f"queue   {count(waiting, 'cell')} of an earlier submission")
    show(f"logs    {study.directory / 'logs'}/JOB_CELL_RANK_log.out, .err")
    show(f"run     {study.directory}")
    try:
        if cluster != "slurm":
            failed = _run_here(study, arrays, cluster=cluster, parallel=parallel or 1, show=show)
        elif follows:
            failed = _follow(study, jobs, show=show)
        else:
            failed = {}
    except KeyboardInterrupt:
        show("the cells at work go on; the same command takes up the others")
        return EXIT_INTERRUPTED
    show(study.write_tables())
    if study.page.is_file():
        show(f"report  {study.page}")
    if failed:
        refused = {name: error for name, error in failed.items() if is_users(error)}
        way_out = "The same command submits them again"
        check_all_done(study, way_out=way_out, refused=refused)
    waited = follows or cluster != "slurm"
    if waited or not study.pending():
        return EXIT_INTERRUPTED if study.pending() else 0
    show("the same command gathers again, and submits what is neither done nor in the queue")
    return 0


def _send(
    study: Study[Any],
    cells: Sequence[Cell[Any]],
    profile: Profile,
    shape: JobShape,
    *,
    cluster: Cluster,
    parallel: int | None = None,
) -> list[Any]:
    return send(
        [job_of(study.job, cell.run_dir) for cell in cells],
        folder=study.directory / "logs",
        name=study.job_name,
        profile=profile,
        shape=shape,
        cluster=cluster,
        parallel=parallel,
    )


def _run_here(
    study: Study[Any],
    arrays: Sequence[tuple[Sequence[Cell[Any]], Profile, JobShape]],
    *,
    cluster: Cluster,
    parallel: int,
    show: Callable[[str], None],
) -> dict[str, FedPipeError]:
    """Run cells as jobs of this machine, some at a time; return the errors of failed cells."""
    waiting = [(cell, profile, shape) for cells, profile, shape in arrays for cell in cells]
    running: list[tuple[Cell[Any], Any]] = []
    failed: dict[str, FedPipeError] = {}
    while waiting or running:
        while waiting and len(running) < parallel:
            cell, profile, shape = waiting.pop(0)
            (job,) = _send(study, [cell], profile, shape, cluster=cluster)
            show(f"{time.strftime('%H:%M:%S')} cell {cell.name}: job {job.job_id} on {cluster}")
            running.append((cell, job))
        for cell, job in running.copy():
            ended = _ended(study, cell, job, show=show)
            if ended is not None:
                running.remove((cell, job))
                if isinstance(ended, FedPipeError):
                    failed[cell.name] = ended
        if running:
            time.sleep(_LOOK_S)
    return failed


def _follow(
    study: Study[Any], jobs: dict[str, str], *, show: Callable[[str], None]
) -> dict[str, FedPipeError]:
    """Wait for the cells in the queue; return the errors of failed cells."""
    waiting = {cell.name: cell for cell in study.pending()}
    failed: dict[str, FedPipeError] = {}
    while waiting:
        queued = cells_in_queue([jobs[name] for name in waiting])
        for name in [name for name in waiting if jobs[name] not in queued]:
            cell = waiting[name]
            job = slurm_job(study.directory, jobs[name], num_tasks=cell.grid.world_size)
            ended = _ended(study, cell, job, show=show)
            if ended is not None:
                del waiting[name]
                if isinstance(ended, FedPipeError):
                    failed[name] = ended
        time.sleep(_PERIOD_S)
    return failed


def _ended(
    study: Study[Any], cell: Cell[Any], job: Any, *, show: Callable[[str], None]
) -> int | FedPipeError | None:
    """Return the end of a cell: 0, 75, or its error; None if it runs or SLURM does not answer.

    A job of the cluster "debug" runs to its end inside this call.
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
        lines = [f"done, {study.outcome(cell)}"]
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
