"""``fedpipe submit sweep``: the cells of a grid as job arrays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import EXIT_INTERRUPTED
from fedpipe.errors import ConfigError, FedPipeError, LaunchError
from fedpipe.launcher.external import RunRequest
from fedpipe.launcher.follow import conclude
from fedpipe.launcher.slurm import cells_in_queue, job_state
from fedpipe.launcher.submit import Cluster, plan_job, send, slurm_job
from fedpipe.metrics.format import count, number
from fedpipe.metrics.sweep_report import read_result
from fedpipe.workflows.run_dir import locked
from fedpipe.workflows.sweep import Cell, Sweep, gather, prepare_texts, set_up_sweep

JOBS_FILE = "logs/jobs.json"
"""The job that every cell was submitted in last, below the directory of the sweep."""
_PERIOD_S = 2.0


def submit_sweep(
    request: RunRequest,
    axes: Sequence[str],
    *,
    profile_path: str | None,
    cluster: Cluster,
    parallel: int | None,
    follows: bool,
    show: Callable[[str], None],
) -> int:
    """Submit the cells of a sweep that are neither done nor in the queue; gather what is done.

    Args:
        request: The configuration that the grid is laid over.
        axes: The grid; empty for that of the sweep in the run directory.
        profile_path: YAML of submitit's parameters.
        cluster: slurm; on this machine ``fedpipe sweep`` runs cells.
        parallel: Cells that may run at once; None sets no limit.
        follows: Wait for all cells, and say how each has ended.
        show: Shows a line.

    Returns:
        0 when all is submitted, or with ``follows`` done; 75 when cells were interrupted only.

    Raises:
        FedPipeError: What the user can mend; nothing has been submitted.
        LaunchError: Cells have failed; the others are done.
    """
    if cluster != "slurm":
        raise ConfigError(
            f"--cluster: expected slurm for a sweep, got {cluster}. On this machine use: fedpipe "
            "sweep --parallel N"
        )
    sweep = set_up_sweep(
        request.config_path, request.overrides, axes, request.run_dir, preset=request.preset
    )
    jobs = _read_jobs(sweep.directory)
    queued = cells_in_queue(list(jobs.values()))
    new = [cell for cell in sweep.pending() if jobs.get(cell.name) not in queued]
    shapes = [plan_job(Grid.from_config(c.config), profile_path=profile_path, cluster=cluster)
              for c in new]  # fmt: skip
    if new:
        with locked(sweep.directory):
            prepare_texts(new)
    # An array has one shape; cells of another number of processes are an array of their own.
    for shape in dict.fromkeys(shape for _, shape in shapes):
        cells = [cell for cell, (_, other) in zip(new, shapes, strict=True) if other == shape]
        sent = send(
            [RunRequest(run_dir=str(cell.run_dir)) for cell in cells],
            folder=sweep.directory / "logs", name=cells[0].config.name, profile=shapes[0][0],
            shape=shape, cluster=cluster, parallel=parallel,
        )  # fmt: skip
        jobs |= {cell.name: job.job_id for cell, job in zip(cells, sent, strict=True)}
        _write_jobs(sweep.directory, jobs)
        array = sent[0].job_id.partition("_")[0]
        show(f"job     {array} on slurm: {count(len(cells), 'cell')}, each {shape}")
    waiting = {cell.name for cell in sweep.pending()} - {cell.name for cell in new}
    if waiting:
        show(f"queue   {count(len(waiting), 'cell')} of an earlier submission")
    show(f"logs    {sweep.directory / 'logs'}/JOB_CELL_RANK_log.out, .err")
    show(f"sweep   {sweep.directory}")
    code = _follow(sweep, jobs, show=show) if follows else 0
    show(gather(sweep))
    if code == 0 and not follows and sweep.pending():
        show("the same command gathers again, and submits what is neither done nor in the queue")
    return code


def _follow(sweep: Sweep, jobs: dict[str, str], *, show: Callable[[str], None]) -> int:
    """Wait for the cells that are not done.

    Returns:
        0 when all are done, 75 when the others were interrupted.

    Raises:
        LaunchError: Some have failed.
    """
    waiting = {cell.name: cell for cell in sweep.pending()}
    failed: list[str] = []
    try:
        while waiting:
            queued = cells_in_queue([jobs[name] for name in waiting])
            for name in [name for name in waiting if jobs[name] not in queued]:
                ended = _ended(waiting[name], sweep, jobs[name], show=show)
                if ended is not None:
                    del waiting[name]
                    failed += [name] if ended == 1 else []
            time.sleep(_PERIOD_S)
    except KeyboardInterrupt:
        show("the cells go on; the same command follows them again, scancel ends them")
        return EXIT_INTERRUPTED
    if failed:
        gather(sweep)
        raise LaunchError(
            f"sweep: expected {count(len(sweep.cells), 'finished cell')}, got "
            f"{len(sweep.cells) - len(sweep.pending())}: failed are {', '.join(failed)}. The same "
            "command submits them again"
        )
    return EXIT_INTERRUPTED if sweep.pending() else 0


def _ended(cell: Cell, sweep: Sweep, job_id: str, *, show: Callable[[str], None]) -> int | None:
    """Say how a cell has ended: 0, 75, 1; None if it has not, or nobody can tell just now."""
    state = job_state(job_id)
    if state is None or not state.has_ended:
        return None
    grid = Grid.from_config(cell.config)
    job: Any = slurm_job(sweep.directory, job_id, num_tasks=grid.world_size)
    lines: list[str] = []
    try:
        code = conclude(job, state, run_dir=cell.run_dir, grid=grid, show=lines.append)
    except FedPipeError as error:
        code, lines = 1, [str(error)]
    if code == 0:
        lines = [f"done, loss {number(read_result(cell.run_dir).loss, 3)}"]
    show(f"{time.strftime('%H:%M:%S')} cell {cell.name}: {lines[-1]}")
    return code


def _read_jobs(directory: Path) -> dict[str, str]:
    try:
        return dict(json.loads((directory / JOBS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write_jobs(directory: Path, jobs: dict[str, str]) -> None:
    path = directory / JOBS_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(jobs, indent=1) + "\n", encoding="utf-8")
