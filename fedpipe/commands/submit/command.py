"""``fedpipe submit``: check a run or a study of another command, and send it as jobs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.cluster.rank import Located, RunRequest, View
from fedpipe.cluster.submit import Cluster, CommandJob, RankJob, Run, check_folder, submit
from fedpipe.commands import options
from fedpipe.commands.evaluate.command import add_choice, choice_of
from fedpipe.commands.evaluate.setup import read_evaluation, set_up_evaluation
from fedpipe.commands.finetune import ranks as tuning
from fedpipe.commands.finetune.command import check_library, task_overrides
from fedpipe.commands.finetune.grid import check_tuning, find_grid
from fedpipe.commands.pretrain import ranks as pretraining
from fedpipe.commands.pretrain.setup import reserve
from fedpipe.commands.reproduce.command import add_scale, is_reproduced, reproduced_lines
from fedpipe.commands.reproduce.config import EXPERIMENTS
from fedpipe.commands.reproduce.setup import plan_reproduction
from fedpipe.commands.study.array import submit_array
from fedpipe.commands.study.study import ONE_TASK, Study
from fedpipe.commands.study.sweep import set_up_sweep
from fedpipe.commands.throughput import ranks as measuring
from fedpipe.commands.throughput.command import add_settings, settings_of
from fedpipe.commands.throughput.ranks import Measuring
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.errors import ConfigError
from fedpipe.report.format import count
from fedpipe.run.run_dir import inputs_of
from fedpipe.terminal import show as show_line

_TASKS = ("pretrain", "throughput", "sweep", "evaluate", "finetune", "reproduce")
"""Commands that can be jobs."""

_OPTIONS = {
    "models": ("--model", ("evaluate",)),
    "tasks": ("--tasks", ("evaluate",)),
    "task_files": ("--task-file", ("evaluate", "finetune")),
    "data": ("--data", ("evaluate", "reproduce")),
    "seeds": ("--seeds", ("evaluate", "reproduce")),
    "scale": ("--scale", ("reproduce",)),
}
"""Options by the field that they set, and the tasks that have them."""

Show = Callable[[str], None]
"""Shows a line."""
PIPELINE_RUNS = {"pretrain": pretraining.PROGRAM, "throughput": measuring.PROGRAM}
"""Programs of the commands whose jobs have one rank per SLURM task."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit``: those of every task that can be a job."""
    command.add_argument(
        "task", metavar="TASK", choices=_TASKS, help=f"what to run: {', '.join(_TASKS)}"
    )
    options.add_run(command)
    add_settings(command)
    options.add_path(
        command, "--profile", metavar="FILE", help="what a node of the site is; see slurm/profiles"
    )
    command.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="slurm (default), local: this machine, debug: this process",
    )
    command.add_argument(
        "--follow", action="store_true", help="show the progress; the exit code is the job's"
    )
    add_scale(command)
    options.add_grid(
        command,
        text="sweep and finetune: every combination of the values is a job of an array",
    )
    add_choice(command)
    options.add_parallel(command)


def run(args: argparse.Namespace) -> int:
    """Submit what the arguments say."""
    return submit_request(
        args.task,
        RunRequest(
            config_path=args.config,
            overrides=args.overrides,
            run_dir=args.run_dir,
            preset=args.preset,
            options=Measuring(settings=settings_of(args)),
        ),
        axes=args.grid,
        chosen=choice_of(args) | ({"scale": args.scale} if args.scale else {}),
        profile_path=args.profile,
        cluster=args.cluster,
        parallel=args.parallel,
        follows=args.follow,
        show=show_line,
    )


def submit_request(
    task: str,
    request: RunRequest,
    *,
    axes: Sequence[str],
    chosen: Mapping[str, Any],
    profile_path: str | None,
    cluster: Cluster,
    parallel: int | None,
    follows: bool,
    show: Show,
) -> int:
    """Check what a user asks for, and submit it: the whole of ``fedpipe submit TASK``.

    Args:
        task: What a job does, in the user's word.
        request: Its configuration.
        axes: A grid; empty for none, or for that of the directory.
        chosen: What options of some tasks set, by their field.
        profile_path: YAML of submitit's parameters; None only where there is no scheduler.
        cluster: Where.
        parallel: Cells of an array that may run at once; None sets no limit.
        follows: See ``submit`` and ``submit_array``.
        show: Shows a line.

    Returns:
        The exit code.

    Raises:
        FedPipeError: What the user can mend; nothing has been submitted.
        LaunchError: A job that was followed has failed.
    """
    if axes and task not in ("sweep", "finetune"):
        raise ConfigError(
            f"--grid: expected submit sweep or finetune, got submit {task}. Change the task."
        )
    _check_options(task, chosen)
    if request.run_dir:
        check_folder(Path(request.run_dir))
    what: Run | Study[Any]
    arguments = (request.config_path, request.overrides)
    if task == "sweep":
        what = set_up_sweep(*arguments, axes, request.run_dir, preset=request.preset)
    elif task == "evaluate":
        if request.preset:
            raise ConfigError(
                f"--preset: expected none with submit evaluate, got {request.preset}. A preset says"
                " how to pre-train; --model names what is evaluated."
            )
        asked = read_evaluation(*arguments, request.run_dir, chosen=dict(chosen))
        what = set_up_evaluation(*asked, notify=show)
    elif task == "finetune":
        own = task_overrides(chosen.get("task_files", ()))
        what = finetuning(replace(request, overrides=[*request.overrides, *own]), axes)
    elif task == "reproduce":
        what = reproduction(request, chosen)
    else:
        what = pipeline_run(PIPELINE_RUNS[task], request)
    if isinstance(what, Run):
        return submit(what, profile_path=profile_path, cluster=cluster, follows=follows, show=show)
    return submit_array(
        what,
        profile_path=profile_path,
        cluster=cluster,
        parallel=parallel,
        follows=follows,
        show=show,
    )


def _check_options(task: str, chosen: Mapping[str, Any]) -> None:
    """Refuse options of another task."""
    for field in chosen:
        option, tasks = _OPTIONS[field]
        if task not in tasks:
            raise ConfigError(
                f"{option}: expected submit {' or '.join(tasks)}, got submit {task}."
                " Change the task."
            )


def pipeline_run(program: pretraining.PretrainingRanks, request: RunRequest) -> Run:
    """Check a pre-training or a measurement: a rank per task.

    Args:
        program: What the ranks do.
        request: As the user says it.

    Returns:
        The run; where the cut is to be measured, the job does that.

    Raises:
        FedPipeError: What the user can mend.
    """
    found = program.locate(request)
    run, config, run_dir = found.run, found.config, found.run.path
    run.check_content(deepspeed_config(config), partial(inputs_of, config))
    pretrains = program is pretraining.PROGRAM
    steps = config.federation.num_local_steps  # the text, which may have fewer, is not ready
    return Run(
        run_dir=run_dir,
        name=config.name,
        grid=found.grid,
        is_done=lambda: pretrains and run.is_done(num_rounds=config.federation.num_rounds),
        job=RankJob(program.name, RunRequest(run_dir=str(run_dir), options=request.options)),
        reserve=partial(reserve, run, config),
        view=partial(pretraining.view, config, num_local_steps=steps),
        closing=partial(program.closing, run_dir),
    )


def _command_job(name: str, run_dir: Path) -> CommandJob:
    """Return a job that goes on with a directory, by the function for it in a command's module."""
    return CommandJob(f"fedpipe.commands.{name}.command:go_on", str(run_dir))


def finetuning(request: RunRequest, axes: Sequence[str]) -> Run | Study[Any]:
    """Check a fine-tuning, or a grid of them: a job has one task, which starts the workers.

    Args:
        request: The configuration.
        axes: The grid; empty for that of the directory, or for a single run.

    Raises:
        FedPipeError: What the user can mend.
    """
    check_library()
    path, overrides, run_dir = request.config_path, request.overrides, request.run_dir
    grid = find_grid(path, overrides, axes, run_dir, preset=request.preset)
    return grid if grid is not None else _finetuning_run(tuning.PROGRAM.locate(request))


def _finetuning_run(found: Located) -> Run:
    run, config = found.run, found.config
    check_tuning(run, config)
    num_rounds = config.federation.num_rounds

    def write() -> str:
        lines: list[str] = []
        tuning.PROGRAM.set_up(found, notify=lines.append)
        return "\n".join(lines)

    return Run(
        run_dir=run.path,
        name=config.name,
        grid=ONE_TASK,
        workers=found.grid.world_size,
        is_done=partial(run.is_done, num_rounds=num_rounds),
        job=_command_job("finetune", run.path),
        reserve=write,
        view=partial(tuning.view, num_rounds=num_rounds),
        closing=partial(tuning.PROGRAM.closing, run.path),
    )


def reproduction(request: RunRequest, chosen: Mapping[str, Any]) -> Run:
    """Check a reproduction: a job of one task, which does everything one thing after another.

    Args:
        request: Its overrides.
        chosen: Scale, folder of the tasks and seeds, where options set them.

    Raises:
        FedPipeError: What the user can mend.
    """
    for name, value in (("config", request.config_path), ("preset", request.preset)):
        if value:
            raise ConfigError(
                f"--{name}: expected none with submit reproduce, got {value}. Its settings are "
                "those of --scale: write what differs as section.key=value."
            )
    plan = plan_reproduction(
        EXPERIMENTS[0],
        chosen.get("scale"),
        request.overrides,
        request.run_dir,
        data=chosen.get("data"),
        seeds=chosen.get("seeds"),
    )

    def write() -> str:
        plan.write()
        runs, tasks = count(len(plan.cells), plan.noun), plan.config.evaluation.tasks
        return f"{plan.job_name}  {runs}, scored on {', '.join(tasks)}"

    return Run(
        run_dir=plan.directory,
        name=plan.job_name,
        grid=ONE_TASK,
        workers=max(cell.grid.world_size for cell in plan.cells),
        is_done=lambda: is_reproduced(plan),
        job=_command_job("reproduce", plan.directory),
        reserve=write,
        view=lambda: View(console=tuning.plain_console()),
        closing=partial(reproduced_lines, plan),
    )
