"""``fedpipe submit``: check a run or a study of another command, and submit it as jobs.

The module of a command that can be a job has two functions. ``add_job_arguments(parser)`` declares
the arguments that describe the run, and ``to_submit(args)`` checks that run and returns it as a
``JobRun`` or a ``Study``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedpipe.cluster.rank import JobRun
from fedpipe.cluster.submit import check_folder, submit
from fedpipe.commands import options
from fedpipe.commands.parsers import add_commands
from fedpipe.commands.study.array import submit_array
from fedpipe.commands.study.study import Study
from fedpipe.terminal import show

_TASKS = {
    "pretrain": ("pretrain.command", "pre-train in one job with a rank per SLURM task"),
    "throughput": ("throughput.command", "measure in one job with a rank per SLURM task"),
    "sweep": ("study.sweep", "pre-train every cell of a grid in a job of an array"),
    "evaluate": ("evaluate.command", "fine-tune every model, task and seed in a job of an array"),
    "finetune": (
        "finetune.command",
        "fine-tune in one job on one node, a grid in an array of them",
    ),
    "reproduce": ("reproduce.command", "run a published experiment in one job on one node"),
}
"""Commands that can be jobs: module in ``fedpipe.commands``, and line of help."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit``: a command, and the arguments of that command."""
    command.epilog = "fedpipe submit TASK --help shows the options of a task."
    add_commands(command, _TASKS, _declare, title="tasks", metavar="TASK")


def _declare(command: argparse.ArgumentParser, task: Any) -> None:
    """Declare the arguments of a command and of its jobs."""
    task.add_job_arguments(command)
    options.add_path(
        command,
        "--profile",
        metavar="FILE",
        help="YAML file that describes a node of the site; see slurm/profiles",
    )
    command.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="where jobs run: slurm (default), local (this machine) or debug (this process)",
    )
    command.add_argument(
        "--follow",
        action="store_true",
        help="show the progress until the end, and return the exit code of the job",
    )
    command.set_defaults(to_submit=task.to_submit)


def run(args: argparse.Namespace) -> int:
    """Submit the run or the study that the arguments describe."""
    if args.run_dir:
        check_folder(Path(args.run_dir))
    what: JobRun | Study[Any] = args.to_submit(args)
    if isinstance(what, JobRun):
        return submit(
            what,
            profile_path=args.profile,
            cluster=args.cluster,
            follows=args.follow,
            show=show,
        )
    return submit_array(
        what,
        profile_path=args.profile,
        cluster=args.cluster,
        parallel=args.parallel,
        follows=args.follow,
        show=show,
    )
