"""``fedpipe evaluate``: fine-tune and score models on this machine, with a process per cell."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.cluster.launched import note_attempt
from fedpipe.cluster.local import fork_server
from fedpipe.commands import options
from fedpipe.commands.evaluate.evaluation import PRELOAD, Evaluation
from fedpipe.commands.evaluate.report import outcome_text
from fedpipe.commands.evaluate.setup import read_evaluation, set_up_evaluation
from fedpipe.commands.study.pool import run_study
from fedpipe.config.tree import Node
from fedpipe.distributed.binding import bind
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.signals import Signals
from fedpipe.run.checkpoint import Position
from fedpipe.run.run_dir import Kind, RunDir
from fedpipe.terminal import show


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe evaluate``."""
    add_job_arguments(command)
    options.add_path(
        command,
        "--compare",
        metavar="RUN",
        nargs=2,
        help="show the differences between two evaluations; start nothing. Write RUN:MODEL if"
        " RUN has several models, and RUN:MODEL,MODEL for one method with several seeds of"
        " pre-training",
    )


def add_job_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit evaluate``."""
    options.add_path(
        command, "--config", metavar="FILE", help="YAML file with a section evaluation"
    )
    options.add_directory(command, default="runs/NAME-evaluation")
    options.add_path(
        command,
        "--model",
        metavar="FOLDER",
        action="append",
        help="Hugging Face folder, or run directory with an export; give it several times to"
        " compare models; default: runs/quickstart",
    )
    command.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="names of tasks, see docs/how-to/evaluate.md; default: ncbi-disease",
    )
    options.add_task_files(command)
    options.add_path(
        command,
        "--data",
        metavar="DIR",
        help="folder with the files of the tasks, or hf:NAME; default: a packaged slice",
    )
    options.add_seeds(command, text="fine-tune every model once per task and seed; default: 0")
    options.add_parallel(command)


def _choice_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``EvaluationConfig`` that options of the command line set."""
    chosen: dict[str, Any] = {}
    if args.model:
        chosen["models"] = tuple(args.model)
    if args.tasks is not None:
        chosen["tasks"] = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    if args.task_file:
        chosen["task_files"] = tuple(args.task_file)
    if args.data is not None:
        chosen["data"] = args.data
    if args.seeds is not None:
        chosen["seeds"] = options.seeds(args.seeds)
    return chosen


def run(args: argparse.Namespace) -> int:
    """Evaluate models as the arguments say, repeat one cell, or compare two evaluations."""
    if args.compare:
        return _compare(args.compare, args.run_dir)
    kinds: tuple[Kind, ...] = ("evaluation", "evaluation cell")
    if args.run_dir and RunDir.at(args.run_dir, *kinds).kind == "evaluation cell":
        return run_one(args.run_dir)
    return evaluate(
        args.config,
        args.overrides,
        args.run_dir,
        chosen=_choice_of(args),
        parallel=args.parallel,
    )


def to_submit(args: argparse.Namespace) -> Evaluation:
    """Check the evaluation of the arguments, and return it for submission."""
    asked = read_evaluation(args.config, args.overrides, args.run_dir, chosen=_choice_of(args))
    return set_up_evaluation(*asked, notify=show)


def _compare(runs: Sequence[str], run_dir: str | None) -> int:
    from fedpipe.commands.evaluate import compare

    content = compare.compare(*runs)
    show(compare.terminal_text(content))
    if run_dir:
        compare.write_comparison(content, Path(run_dir))
        show(f"report  {Path(run_dir) / 'comparison.html'}")
    return 0


def evaluate(
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    chosen: Mapping[str, Any] | None = None,
    parallel: int = 1,
) -> int:
    """Run the cells that are not done yet. This is all that ``fedpipe evaluate`` does.

    Args:
        config_path: Path of a YAML file, or None.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory of the evaluation, or None for the default one.
        chosen: Fields of ``EvaluationConfig`` that options set.
        parallel: Number of cells at a time; they share the cores, and each has a GPU of its own.

    Returns:
        0 when all cells are done, 75 when the evaluation was interrupted and can be resumed.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been started.
        LaunchError: A cell failed; the others are done.
    """
    config, directory = read_evaluation(config_path, overrides, run_dir, chosen=dict(chosen or {}))
    return run_study(
        lambda console: set_up_evaluation(
            config,
            directory,
            notify=console.text,
            progress=console.preparing,
            on_checked=lambda: fork_server(PRELOAD),
        ),
        parallel=parallel,
    )


def run_one(run_dir: str) -> int:
    """Repeat a cell in this process, for ``fedpipe evaluate --run-dir EVALUATION/cells/NAME``.

    Args:
        run_dir: Folder of the cell, with its cell.json.

    Returns:
        0.

    Raises:
        FedPipeError: The model cannot be used.
    """
    from fedpipe.commands.evaluate.cell import run_cell

    result = run_cell(Path(run_dir))
    show(outcome_text(result))
    return 0


def go_on(run_dir: str, *, job_id: str, signals: Signals) -> int:
    """Run a cell in a job of one task; a cell saves nothing before it is done."""
    note_attempt(Path(run_dir), Position(), job_id=job_id)
    alone = ProcessEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous="")
    bind(alone)
    with signals.caught():
        return run_one(run_dir)
