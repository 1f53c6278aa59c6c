"""``fedpipe reproduce``: repeat a published experiment on this machine, from text to figures.

Pre-training runs run one at a time, so that their times can be compared. Then every model is
fine-tuned and scored, with a process per core or GPU. All processes are forked from one server.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedpipe.cluster.launched import note_attempt, position_of
from fedpipe.cluster.local import fork_server
from fedpipe.cluster.rank import JobRun, View
from fedpipe.commands import options
from fedpipe.commands.evaluate.evaluation import PRELOAD, Evaluation
from fedpipe.commands.evaluate.setup import set_up_evaluation
from fedpipe.commands.pretrain import ranks as pretrain_ranks
from fedpipe.commands.reproduce.config import EXPERIMENTS, SCALES
from fedpipe.commands.reproduce.report import blocks, draw_losses, draw_scores
from fedpipe.commands.reproduce.results import Content, read_curves, summarise, wanted_models
from fedpipe.commands.reproduce.setup import (
    EVALUATION,
    RESULT_FILE,
    Reproduction,
    SystemCell,
    plan_reproduction,
)
from fedpipe.commands.study.pool import (
    NOTHING_STARTED,
    check_all_done,
    last_line,
    redirect_output,
    run_cells,
)
from fedpipe.commands.study.study import ONE_TASK
from fedpipe.distributed.env import num_gpus
from fedpipe.distributed.signals import (
    EXIT_INTERRUPTED,
    Interrupted,
    Signals,
    end_with_parent,
)
from fedpipe.errors import LaunchError, error_in
from fedpipe.files import write_text
from fedpipe.report.console import RunConsole
from fedpipe.report.document import Figure, write_page
from fedpipe.report.drawing import render
from fedpipe.report.format import count
from fedpipe.run.checkpoint import Position, find_latest
from fedpipe.run.run_dir import locked

_PRELOAD = (*pretrain_ranks.PROGRAM.preload, *PRELOAD)
_EXPORT_LOG = "logs/models.log"
_CAPTIONS = {
    "scores.png": "Score against pre-training time, one fine-tuning per round, task and seed; the "
    "points are ends of rounds (hollow: not trained, the clock goes on with the mean), the first "
    "one is the untrained model.",
    "loss.png": "Masked-LM loss of the final head against pre-training time.",
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe reproduce``."""
    command.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        choices=EXPERIMENTS,
        help=f"name of the experiment: {', '.join(EXPERIMENTS)}",
    )
    add_job_arguments(command)


def add_job_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit reproduce``."""
    command.add_argument(
        "--scale", choices=SCALES, help="size of the experiment; default: that of DIR, or tiny"
    )
    options.add_path(
        command,
        "--data",
        metavar="DIR",
        help="folder with the files of the eight tasks; default: a packaged slice of one",
    )
    options.add_seeds(command, text="pre-train every system once per seed; default: 0")
    options.add_directory(command, default="runs/EXPERIMENT-SCALE")


def run(args: argparse.Namespace) -> int:
    """Run the experiment that the arguments name."""
    return reproduce(
        args.experiment,
        args.overrides,
        args.run_dir,
        scale=args.scale,
        data=args.data,
        seeds=_seeds_of(args),
    )


def _seeds_of(args: argparse.Namespace) -> tuple[int, ...] | None:
    return None if args.seeds is None else options.seeds(args.seeds)


def to_submit(args: argparse.Namespace) -> JobRun:
    """Check the reproduction of the arguments, and return it as one job for submission."""
    plan = plan_reproduction(
        EXPERIMENTS[0],
        args.scale,
        args.overrides,
        args.run_dir,
        data=args.data,
        seeds=_seeds_of(args),
    )

    def write() -> str:
        plan.write()
        runs, tasks = count(len(plan.cells), plan.noun), plan.config.evaluation.tasks
        return f"{plan.job_name}  {runs}, scored on {', '.join(tasks)}"

    return JobRun(
        run_dir=plan.directory,
        name=plan.job_name,
        grid=ONE_TASK,
        workers=max(cell.grid.world_size for cell in plan.cells),
        done=lambda: _done_line(plan),
        job=f"{__name__}:go_on",
        reserve=write,
        view=lambda: View(console=RunConsole(interactive=False)),
        closing=partial(_reproduced_lines, plan),
    )


def reproduce(
    experiment: str,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    scale: str | None = None,
    data: str | None = None,
    seeds: tuple[int, ...] | None = None,
    signals: Signals | None = None,
) -> int:
    """Run the remaining parts of an experiment. This is all that ``fedpipe reproduce`` does.

    Args:
        experiment: Name of the experiment.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory of the reproduction, or None for the default one.
        scale: Name of the packaged settings, or None.
        data: Folder with the files of the tasks, or None.
        seeds: Seeds of pre-training, or None.
        signals: Signals to catch meanwhile; a caller passes its own to learn which one came.

    Returns:
        0 when all is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been started.
        LaunchError: A run failed; the others are done.
    """
    console = RunConsole()
    signals = signals or Signals()
    plan: Reproduction | None = None
    try:
        with signals.caught():
            plan = plan_reproduction(experiment, scale, overrides, run_dir, data=data, seeds=seeds)
            plan.write()
            with locked(plan.directory):
                _run(plan, signals, console)
    except Interrupted:
        console.text(plan.interruption_message() if plan else NOTHING_STARTED)
        return EXIT_INTERRUPTED
    finally:
        console.close()
    console.text("\n".join(_reproduced_lines(plan)))
    return 0


def go_on(run_dir: str, *, job_id: str, signals: Signals) -> int:
    """Start or resume an experiment in a job of one task; see ``reproduce``."""
    note_attempt(Path(run_dir), _position(Path(run_dir)), job_id=job_id)
    return reproduce(EXPERIMENTS[0], [], run_dir, signals=signals)


def _position(directory: Path) -> Position:
    """Return a position that grows with every round, step and scored cell, as proof of progress."""
    positions = [position_of(find_latest(run)[0]) for run in directory.glob("cells/*")]
    scored = len(list(directory.glob(f"{EVALUATION}/cells/*/result.json")))
    return Position(
        round_id=scored + sum(p.round_id for p in positions), step=sum(p.step for p in positions)
    )


def _done_line(plan: Reproduction) -> str:
    """Say that the directory shows that the whole experiment is done; empty where it does not."""
    if plan.pending() or not (plan.directory / RESULT_FILE).is_file():
        return ""
    if plan.content()["environment"]["repeat"] != _repeat(plan):
        return ""
    return f"{plan.directory} is done: see {plan.directory / 'report.html'}"


def _reproduced_lines(plan: Reproduction) -> list[str]:
    """Return the lines that a finished reproduction shows."""
    return [plan.write_tables(), f"report  {plan.page}"]


def _run(plan: Reproduction, signals: Signals, console: RunConsole) -> None:
    """Run the remaining pre-trainings and fine-tunings, and write the results."""
    pending, way_out = plan.pending(), f"Run them again with: {plan.resume_command()}"
    if pending:
        fork_server(_PRELOAD)
        plan.prepare(pending, progress=console.preparing)
        _export(plan, plan.untrained())
        # With the untrained model, what is wrong with a task is found before hours of training.
        _evaluation(plan, plan.untrained(), console)
        console.close()
        refused = run_cells(
            plan, pending, parallel=1, console=console, signals=signals, gathers=False
        )
        check_all_done(plan, what=plan.noun, refused=refused, way_out=way_out)
    curves = read_curves(plan)
    models = wanted_models(plan, curves)
    _export(plan, models)
    evaluation = _evaluation(plan, models, console)
    cells, refused = evaluation.pending(), {}
    if cells:
        parallel = num_gpus() or len(os.sched_getaffinity(0))
        refused = run_cells(
            evaluation, cells, parallel=parallel, console=console, signals=signals, gathers=False
        )
    check_all_done(
        evaluation, task=plan.task, what="scored model", refused=refused, way_out=way_out
    )
    _write(plan, summarise(plan, evaluation, curves))


def _evaluation(
    plan: Reproduction, models: Sequence[tuple[SystemCell, int]], console: RunConsole
) -> Evaluation:
    paths = tuple(str(plan.model(run, round_id)) for run, round_id in models)
    config = replace(plan.config, evaluation=replace(plan.config.evaluation, models=paths))
    several = len(models) > len(plan.config.reproduce.seeds)
    return set_up_evaluation(
        config,
        plan.directory / EVALUATION,
        progress=console.preparing,
        notify=(lambda line: None) if several else console.text,
    )


def _export(plan: Reproduction, models: Sequence[tuple[SystemCell, int]]) -> None:
    """Export the missing models, in a process that imports torch.

    Raises:
        LaunchError: The process failed.
    """
    missing = [
        (run.run_dir, round_id, plan.model(run, round_id))
        for run, round_id in models
        if not (plan.model(run, round_id) / "config.json").is_file()
    ]
    if not missing:
        return
    log = plan.directory / _EXPORT_LOG
    log.parent.mkdir(exist_ok=True)
    process = fork_server(_PRELOAD).Process(
        target=_work, args=(missing, str(log.absolute())), daemon=True
    )
    process.start()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    if process.exitcode != 0:
        reason = last_line(log) or "it was killed"
        error = error_in(reason) if process.exitcode == 2 else None
        if error is not None:
            raise error
        raise LaunchError(f"writing the models failed: {reason.rstrip('.')}. Full log: {log}")


def _work(missing: Sequence[tuple[Path, int, Path]], log: str) -> None:
    """Export models in this process, which ends afterwards; output goes to the log."""
    end_with_parent()
    with redirect_output(log, anew=True):
        from fedpipe.commands.reproduce.models import export_models

        export_models(missing)


def _write(plan: Reproduction, content: Content) -> None:
    """Write reproduce.json, .md, .html and the figures."""
    content["environment"]["repeat"] = _repeat(plan)
    scores, height = draw_scores(content)
    svgs = {
        "scores.png": render(scores, plan.directory / "scores.png", height=height),
        "loss.png": render(draw_losses(content), plan.directory / "loss.png", height=3.9),
    }
    figures = [Figure(file=name, svg=svgs[name], caption=_CAPTIONS[name]) for name in svgs]
    page = blocks(content, figures)
    title = f"{content['experiment']}, {content['scale']}: fedpipe beside FedBERT"
    write_text(plan.directory / RESULT_FILE, json.dumps(content, indent=1) + "\n")
    write_page(plan.directory / "reproduce.html", title, page)


def _repeat(plan: Reproduction) -> str:
    """Return the command that repeats the experiment in a new directory."""
    return shlex.join(
        [
            "fedpipe",
            "reproduce",
            plan.experiment,
            "--scale",
            plan.config.reproduce.scale,
            "--run-dir",
            f"{plan.directory}-again",
            *_chosen(plan),
        ]
    )


def _chosen(plan: Reproduction) -> list[str]:
    """Return the overrides that turn the packaged settings into those of this reproduction."""
    from fedpipe.commands.reproduce.config import load_reproduction
    from fedpipe.config.load import diff, to_dict

    usual = load_reproduction(None, [], scale=plan.config.reproduce.scale)
    words = []
    for key in diff(usual, plan.config):
        value = to_dict(plan.config)
        for part in key.split("."):
            value = value[part]
        words.append(f"{key}={json.dumps(value)}")
    return words
