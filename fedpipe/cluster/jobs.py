"""What submitit runs on a cluster: one rank per task or a whole command, and what requeues the job.

Everything that a job needs lies in its run directory, so a requeued job is the same job again: it
reads ``config.yaml`` and goes on from the newest checkpoint, whether it could save before it was
stopped or not.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit

from fedpipe.cluster.attempts import note_attempt, position_of
from fedpipe.cluster.external import Ended, RunRequest, run_rank
from fedpipe.commands.reproduce.config import EXPERIMENTS
from fedpipe.distributed.binding import bind
from fedpipe.distributed.env import ProcessEnv, detect
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals, StopSignals
from fedpipe.run.checkpoint import Position, find_latest
from fedpipe.terminal import prepare_output

STARTS = "fedpipe starts as"
"""Opens the part of a job's log that belongs to one attempt."""
_KILLED_WITHIN_S = 900.0
"""SIGTERM announces the end: scancel's comes after KillWait, pre-emption's after GraceTime."""
_ALONE = ProcessEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous="")


class _Job(submitit.helpers.Checkpointable):
    """Part of a run; submitit pickles it and calls it in every task of the job."""

    def __init__(self, request: RunRequest) -> None:
        """Remember what to run.

        Args:
            request: Its run directory holds the configuration.
        """
        self.request = request

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
        ended = self._run(job)
        if ended.code == EXIT_INTERRUPTED:
            if ended.signal == signal.SIGUSR2:
                signal.signal(signal.SIGUSR2, requeue)
                signal.raise_signal(signal.SIGUSR2)  # submitit's; it returns on other ranks
            elif ended.signal == signal.SIGTERM and job.cluster == "slurm":
                time.sleep(_KILLED_WITHIN_S)
        return ended.code

    def _run(self, job: Any) -> Ended:
        raise NotImplementedError


class RankJob(_Job):
    """One rank of a run: every task of the job is one."""

    def _run(self, job: Any) -> Ended:
        _set_up_environment(job)
        return run_rank(
            self.request,
            env=detect(),
            signals=StopSignals(),
            on_set_up=lambda setup: note_attempt(
                setup.run_dir, position_of(setup.checkpoint), job_id=job.job_id
            ),
        )


class CommandJob(_Job):
    """A command in the only task of the job, which starts processes of its own."""

    def _run(self, job: Any) -> Ended:
        from fedpipe.commands.evaluate.command import run_one
        from fedpipe.commands.finetune.command import finetune
        from fedpipe.commands.reproduce.command import reproduce

        run_dir = str(self.request.run_dir)
        note_attempt(Path(run_dir), _position_below(Path(run_dir)), job_id=job.job_id)
        signals = Signals()
        try:
            if self.request.task == "finetune":
                code = finetune(None, [], run_dir, signals=signals)
            elif self.request.task == "reproduce":
                code = reproduce(EXPERIMENTS[0], [], run_dir, signals=signals)
            else:
                bind(_ALONE)
                with signals.caught():
                    code = run_one(run_dir)
        except Interrupted:
            code = EXIT_INTERRUPTED
        return Ended(code=code, signal=signals.number)


def job_of(request: RunRequest) -> _Job:
    """Return what a job does for a request: as many ranks as it has tasks, or a command."""
    commands = ("evaluate", "finetune", "reproduce")
    return (CommandJob if request.task in commands else RankJob)(request)


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


def _position_below(run_dir: Path) -> Position:
    """Where a command stands: rounds and steps of all runs below, and cells that are scored."""
    runs = [run_dir, *run_dir.glob("cells/*")]
    positions = [position_of(find_latest(run)[0]) for run in runs]
    scored = len(list(run_dir.glob("evaluation/cells/*/result.json")))
    return Position(
        round_id=scored + sum(p.round_id for p in positions), step=sum(p.step for p in positions)
    )
