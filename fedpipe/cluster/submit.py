"""A run as a job of submitit: on SLURM, on this machine, or in this process.

All that a job needs lies in its run directory, so a requeued job is the same job again: it reads
``config.yaml`` and goes on from the newest checkpoint, whether it could save before it was stopped
or not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import submitit

from fedpipe.cluster.follow import STARTS, follow
from fedpipe.cluster.launched import run_launched
from fedpipe.cluster.profile import SIGNAL_DELAY_S, JobShape, Profile, load_profile
from fedpipe.cluster.rank import JobRun, RankResult, RunRequest, load_program
from fedpipe.cluster.slurm import (
    cells_in_queue,
    check_site,
    job_from,
    login_environment,
    not_submitted,
    without_rank,
)
from fedpipe.distributed.env import detect, kept_environment
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.distributed.topology import Grid
from fedpipe.errors import CheckpointError, ConfigError, TopologyError
from fedpipe.files import write_text
from fedpipe.terminal import prepare_output

Cluster = Literal["slurm", "local", "debug"]
"""submitit's executors."""

JOB_FILE = "logs/job.json"
"""The job that was submitted last, below the run directory."""
_SRUN_ARGS = ("--kill-on-bad-exit=1", "--distribution=block")
"""One failed rank ends the step; ranks are numbered node by node (see ``Grid``)."""
_FOR_EVER = 1_000_000
"""Time limits that submitit lets pass: ``note_attempt`` stops what gets nowhere."""
_KILLED_WITHIN_S = 900.0
"""SIGTERM announces the end: scancel's comes after KillWait, pre-emption's after GraceTime."""


# -- what a job does -------------------------------------------------------------------------------


class Job(submitit.helpers.Checkpointable):
    """Part of a run; submitit pickles it and calls it in every task of the job."""

    def __call__(self) -> int:
        """Do this task's part, and see to it that an interrupted job comes back.

        A warning (SIGUSR2: time limit, pre-emption) saves and requeues. SIGTERM saves and waits for
        the end, because only SLURM knows whether it cancels the job or requeues it by itself.

        Returns:
            0 when the run is done, 75 when it is saved and can be resumed.

        Raises:
            FedPipeError: What is wrong, on every rank where all of them can know it.
        """
        prepare_output()
        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of an earlier attempt
        # SLURM signals every process of a step. A forked child has submitit's handler and would
        # save and requeue the job a second time; ignoring survives exec as well.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))
        if job.global_rank == 0:
            sys.stderr.write(f"{STARTS} job {job.job_id}\n")  # srun's own messages follow it
        requeue = signal.getsignal(signal.SIGUSR2)
        result = self._run(job)
        if result.code == EXIT_INTERRUPTED:
            if result.signal == signal.SIGUSR2:
                signal.signal(signal.SIGUSR2, requeue)
                signal.raise_signal(signal.SIGUSR2)  # submitit's; it returns on other ranks
            elif result.signal == signal.SIGTERM and job.cluster == "slurm":
                time.sleep(_KILLED_WITHIN_S)
        return result.code

    def _run(self, job: Any) -> RankResult:
        raise NotImplementedError


class RankJob(Job):
    """One rank of a run: every task of the job is one."""

    def __init__(self, name: str, request: RunRequest) -> None:
        """Remember what to run.

        Args:
            name: Module of the program.
            request: Its run directory holds the configuration.
        """
        self.name, self.request = name, request

    def _run(self, job: Any) -> RankResult:
        _set_up_environment(job)
        program = load_program(self.name)
        return run_launched(program, self.request, env=detect(), job_id=job.job_id)


class CommandJob(Job):
    """A command in the only task of the job, which starts processes of its own."""

    def __init__(self, name: str, run_dir: str) -> None:
        """Remember what to run.

        Args:
            name: ``MODULE:FUNCTION``; takes the run directory, the id of the job, and the signals
                to catch meanwhile, and returns the exit code.
            run_dir: Holds all that the command needs to know.
        """
        self.name, self.run_dir = name, run_dir

    def _run(self, job: Any) -> RankResult:
        module, _, function = self.name.partition(":")
        signals = Signals()
        try:
            run = getattr(import_module(module), function)
            code = run(self.run_dir, job_id=job.job_id, signals=signals)
        except Interrupted:
            code = EXIT_INTERRUPTED
        return RankResult(code=code, signal=signals.number)


def _set_up_environment(job: Any) -> None:
    """Export what ``detect`` and torch look for."""
    submitit.helpers.TorchDistributedEnvironment().export(
        set_cuda_visible_devices=False, overwrite=True
    )
    os.environ.update(own_gpu(os.environ, local_rank=job.local_rank))
    if job.cluster != "slurm":  # one machine, whose name need not resolve
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def own_gpu(environ: Mapping[str, str], *, local_rank: int) -> dict[str, str]:
    """Return the variable that leaves a rank one of its node's GPUs; empty if it has one already.

    Args:
        environ: ``CUDA_VISIBLE_DEVICES`` as SLURM sets it: the GPUs of the node that are the job's.
        local_rank: Index of the rank on its node.
    """
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(visible) < 2 or local_rank >= len(visible):
        return {}
    return {"CUDA_VISIBLE_DEVICES": visible[local_rank]}


def job_of(name: str, run_dir: Path, *, options: Any = None) -> Job:
    """Return the job of a run whose directory is written.

    Args:
        name: What it does: the module of its ranks' program, or ``MODULE:FUNCTION`` of a command.
        run_dir: Holds the configuration.
        options: Of the request, for the program.
    """
    if ":" in name:
        return CommandJob(name, str(run_dir))
    return RankJob(name, RunRequest(run_dir=str(run_dir), options=options))


# -- how it is submitted ---------------------------------------------------------------------------


def submit(
    run: JobRun,
    *,
    profile_path: str | None,
    cluster: Cluster,
    follows: bool,
    show: Callable[[str], None],
) -> int:
    """Submit a run, and follow it if asked to.

    Args:
        run: What to run.
        profile_path: YAML of submitit's parameters; None only where there is no scheduler.
        cluster: Where.
        follows: Show the progress and return the job's own exit code. A job of this run that is in
            the queue already is followed instead of submitted again.
        show: Shows a line.

    Returns:
        0 when the job is submitted; with ``follows``, when it is done, 75 when it was interrupted
        and the same command goes on with it.

    Raises:
        FedPipeError: What the user can mend, before anything is submitted where it can be known.
        LaunchError: The job failed.
    """
    run_dir = run.run_dir
    check_folder(run_dir)
    profile, shape = plan_job(
        run.grid, workers=run.workers, profile_path=profile_path, cluster=cluster
    )
    job_id = _job_in_queue(run_dir) if cluster == "slurm" else None
    if job_id is not None and not follows:
        raise CheckpointError(
            f"--run-dir: expected a run without a job in the queue, got {run_dir} of job {job_id}. "
            f"Add --follow to see it, or end it with: scancel {job_id}"
        )
    if done := run.done():
        show(done)
        return 0
    if job_id is not None:
        job: Any = slurm_job(run_dir, job_id, num_tasks=run.grid.world_size)
        _complete(job)
        _write_job(run_dir, job)
        show(f"job     {job_id} is in the queue already")
    else:
        show(run.reserve())
        (job,) = send(
            [job_of(run.job, run_dir, options=run.options)],
            folder=run_dir / "logs",
            name=run.name,
            profile=profile,
            shape=shape,
            cluster=cluster,
        )
        _write_job(run_dir, job)
        show(f"job     {job.job_id} on {cluster}: {shape}")
    show(f"logs    {log_paths(job)}")
    show(f"run     {run_dir}")
    if cluster == "debug":
        return result_here(job)
    if not follows:
        return 0
    return follow(
        job, run_dir=run_dir, grid=run.grid, view=run.view(), show=show, closing=run.closing
    )


def plan_job(
    grid: Grid, *, workers: int = 1, profile_path: str | None, cluster: Cluster
) -> tuple[Profile, JobShape]:
    """Find the nodes that a grid takes, and refuse what the site cannot give.

    Args:
        grid: The job's tasks.
        workers: Processes that each of them starts itself.
        profile_path: YAML of submitit's parameters; None only where there is no scheduler.
        cluster: Where.

    Returns:
        The profile, and the job's shape.

    Raises:
        FedPipeError: The profile is wrong, or does not fit the grid or the site.
    """
    if profile_path is not None:
        profile = load_profile(profile_path)
    elif cluster == "slurm":
        raise ConfigError(
            "--profile: expected a file that says what a node of the site is, got none. Start from "
            "slurm/profiles/cpu.yaml or gpu.yaml, or set --cluster local."
        )
    else:
        profile = Profile(source="")
    if cluster != "slurm":
        # one machine, whatever the profile says of nodes
        gpus = grid.world_size * workers if profile.get("gpus_per_node", 0) else 0
        shape = JobShape(
            nodes=1,
            tasks_per_node=grid.world_size,
            gpus_per_node=gpus,
            cpus_per_task=profile.get("cpus_per_task", 1) * workers,
        )
        if cluster == "debug" and grid.world_size > 1:
            raise TopologyError(
                f"--cluster: expected local or slurm for a grid of {grid.world_size} processes, "
                "got debug, which has one. Set pipeline.colocate=true federation.num_replicas=1 "
                "federation.data_parallel_degree=1, or --cluster local."
            )
        return profile, shape
    shape = profile.shape(grid, workers=workers)
    check_site(profile, shape)
    return profile, shape


def send(
    jobs: Sequence[Job],
    *,
    folder: Path,
    name: str,
    profile: Profile,
    shape: JobShape,
    cluster: Cluster,
    parallel: int | None = None,
) -> list[Any]:
    """Hand jobs of the same shape to submitit, several as one job array.

    Args:
        jobs: What they do; their run directories hold the configurations.
        folder: For submitit's files and the logs, on a file system that all nodes share.
        name: Name of the job in the queue.
        profile: The site's parameters.
        shape: Nodes and tasks.
        cluster: Where.
        parallel: Jobs of the array that may run at once; None sets no limit.

    Returns:
        submitit's jobs, in order.

    Raises:
        ConfigError: The scheduler refuses them.
        SchedulerError: It does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_FOR_EVER)
    executor.update_parameters(
        **_parameters(profile, shape, name=name, cluster=cluster, parallel=parallel)
    )
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),  # submitit shows what it raises as well
            _environment_of(cluster, profile),
        ):
            return list(executor.submit_array(list(jobs)))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise not_submitted(str(error), source=profile.source) from None


def _parameters(
    profile: Profile, shape: JobShape, *, name: str, cluster: Cluster, parallel: int | None
) -> dict[str, Any]:
    """By submitit's names: the profile's own, and what follows from the run."""
    parameters = dict(profile.parameters) | {
        "name": name,
        "nodes": shape.nodes,
        "tasks_per_node": shape.tasks_per_node,
        "cpus_per_task": shape.cpus_per_task,
        "gpus_per_node": shape.gpus_per_node or None,
        "timeout_min": profile.get("timeout_min", 24 * 60),
        "slurm_srun_args": [
            *_SRUN_ARGS,
            f"--cpus-per-task={shape.cpus_per_task}",
            *profile.get("srun_args", ()),
        ],
        "slurm_additional_parameters": {"requeue": True} | profile.get("additional_parameters", {}),
        "slurm_signal_delay_s": profile.get("signal_delay_s", SIGNAL_DELAY_S),
    }
    if parallel is not None:
        parameters["slurm_array_parallelism"] = parallel
    if cluster != "slurm":  # submitit lets other executors have few of them
        parameters = {k: v for k, v in parameters.items() if not k.startswith("slurm_")}
    return parameters


def log_paths(job: Any) -> str:
    """Where a job's ranks write, for people."""
    folder, job_id = Path(job.paths.folder), job.job_id
    return str(folder / f"{job_id}_RANK_log.out") + ", .err"


def _write_job(run_dir: Path, job: Any) -> None:
    write_text(run_dir / JOB_FILE, json.dumps({"job_id": job.job_id}) + "\n")


def _job_in_queue(run_dir: Path) -> str | None:
    """Find the job of a run, also where the process that submitted it has not noted its id."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        content = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))
        if cells_in_queue([job_id := str(content["job_id"])]):
            return job_id
    return job_from(run_dir / "logs")


def _complete(job: Any) -> None:
    """Do what is left of a submission that was killed: a job looks for what it does by its id."""
    path = Path(job.paths.submitted_pickle)
    for left in path.parent.glob(f"{'[0-9a-f]' * 32}.pkl"):  # each does the same
        if not path.exists():
            left.rename(path)


def slurm_job(run_dir: Path, job_id: str, *, num_tasks: int) -> Any:
    """Take up a job again that was submitted for a run directory."""
    return submitit.SlurmJob(run_dir / "logs", job_id, tasks=range(num_tasks))


def result_here(job: Any) -> int:
    """Run a job in this process, which keeps its environment.

    Returns:
        0 done, 75 interrupted.

    Raises:
        FedPipeError: It failed.
    """
    with kept_environment():
        os.environ.update(job.environ, SUBMITIT_FOLDER=str(job.paths.folder))
        error = job.exception()
        if error is not None:
            raise error
        return int(job.result())


@contextlib.contextmanager
def _environment_of(cluster: Cluster, profile: Profile) -> Iterator[None]:
    """Hand a job the environment of a login node, or of this machine's user, not of a rank."""
    with kept_environment():
        here = without_rank(os.environ)
        clean = login_environment(here, profile=profile) if cluster == "slurm" else here
        os.environ.clear()
        os.environ.update(clean)
        yield


def check_folder(folder: Path) -> None:
    """Refuse a directory that SLURM or submitit would not read as it is written.

    Raises:
        ConfigError: sbatch's own patterns and escapes are in its name.
    """
    found = sorted({c for c in str(folder.absolute()) if c in "%\\" or not c.isprintable()})
    if found:
        raise ConfigError(
            f"--run-dir: expected a path without % and \\ and on one line, got "
            f"{str(folder)!r}. SLURM reads a pattern or an escape there: choose another directory."
        )
