"""``fedpipe evaluate``: models, tasks and seeds on this machine, each cell a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.cluster.launched import note_attempt
from fedpipe.cluster.local import fork_server, num_threads
from fedpipe.commands import options
from fedpipe.commands.evaluate.gather import gather
from fedpipe.commands.evaluate.report import outcome_text, terminal_text
from fedpipe.commands.evaluate.setup import (
    Cell,
    Evaluation,
    read_evaluation,
    set_up_evaluation,
)
from fedpipe.commands.study.pool import (
    CellRunner,
    Slot,
    again,
    check_all_done,
    interrupted,
    save_when_the_parent_dies,
    saying_to,
)
from fedpipe.config.tree import Node
from fedpipe.distributed.binding import bind
from fedpipe.distributed.env import ProcessEnv, num_gpus
from fedpipe.distributed.signals import (
    EXIT_INTERRUPTED,
    STOP_SIGNALS,
    Interrupted,
    Signals,
    stop_signals,
)
from fedpipe.errors import ConfigError, FedPipeError
from fedpipe.report.console import RunConsole
from fedpipe.report.format import count
from fedpipe.report.writer import METRICS_FILE
from fedpipe.run.checkpoint import Position
from fedpipe.run.run_dir import Kind, RunDir, locked
from fedpipe.terminal import show

PRELOAD = (
    "fedpipe.commands.evaluate.cell",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
    "scipy.stats",
    "seqeval.metrics",
    "sklearn.metrics",
)
"""What the fork server imports before the first cell; other families are imported by theirs."""
_LOOK_S = 1.0
"""How often the progress of running cells is looked at."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe evaluate``."""
    options.add_path(command, "--config", metavar="FILE", help="YAML with a section evaluation")
    options.add_directory(command, default="runs/NAME-evaluation")
    add_choice(command)
    options.add_path(
        command,
        "--compare",
        metavar="RUN",
        nargs=2,
        help="differences between two evaluations (RUN:MODEL where one has several, RUN:MODEL,MODEL"
        " for one method with several seeds of pre-training); starts nothing",
    )
    options.add_parallel(command)


def add_choice(command: argparse.ArgumentParser) -> None:
    """Declare which models are scored, on which tasks, with which seeds."""
    options.add_path(
        command,
        "--model",
        metavar="FOLDER",
        action="append",
        help="Hugging Face folder, or a run with an export; several are compared in one table;"
        " default: runs/quickstart",
    )
    command.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="tasks, see docs/how-to/evaluate.md; default: ncbi-disease",
    )
    options.add_task_files(command)
    options.add_path(
        command,
        "--data",
        metavar="DIR",
        help="folder with the tasks' files, or hf:NAME; default: a packaged slice",
    )
    options.add_seeds(command, text="fine-tune each once per seed; default: 0")


def choice_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``EvaluationConfig`` that the arguments set."""
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
    """Evaluate what the arguments say, run one cell again, or compare two evaluations."""
    if args.compare:
        return _compare(args.compare, args.run_dir)
    kinds: tuple[Kind, ...] = ("evaluation", "evaluation cell")
    if args.run_dir and RunDir.at(args.run_dir, *kinds).kind == "evaluation cell":
        return run_one(args.run_dir)
    return evaluate(
        args.config,
        args.overrides,
        args.run_dir,
        chosen=choice_of(args),
        parallel=args.parallel,
    )


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
    """Fine-tune and score what is not done yet; the whole of ``fedpipe evaluate``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the evaluation, or None.
        chosen: Fields of ``EvaluationConfig`` that options set.
        parallel: Cells at a time; they share the cores, on a GPU each has one.

    Returns:
        0 when all cells are done, 75 when the evaluation was interrupted and can be resumed.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A cell failed; the others are done.
    """
    if parallel < 1:
        raise ConfigError(f"--parallel: expected 1 or more, got {parallel}. 1 is usual.")
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0)
    signals = Signals()
    plan: Evaluation | None = None
    config, directory = read_evaluation(config_path, overrides, run_dir, chosen=dict(chosen or {}))
    command = again("evaluate", directory, parallel=parallel)
    try:
        with signals.caught():
            plan = set_up_evaluation(
                config, directory, notify=console.text, progress=console.preparing,
                on_checked=lambda: fork_server(PRELOAD),
            )  # fmt: skip
            pending = plan.pending()
            refused: dict[str, FedPipeError] = {}
            if pending:
                with locked(directory):
                    refused = run_cells(
                        plan, pending, signals, console=console, parallel=parallel,
                        gather=partial(gather, plan),
                    )  # fmt: skip
    except Interrupted:
        console.text(interrupted(plan, command))
        return EXIT_INTERRUPTED
    finally:
        console.close()
    content = gather(plan)
    console.text(terminal_text(content))
    check_all_done("evaluate", plan, way_out=f"Run them again with: {command}", refused=refused)
    if not pending:
        console.text(f"nothing to do: all {count(len(plan.cells), 'cell')} are done")
    console.text(f"report  {directory / 'evaluation.html'}")
    return 0


def run_cells(
    plan: Evaluation,
    pending: Sequence[Cell],
    signals: Signals,
    *,
    console: RunConsole,
    parallel: int,
    gather: Callable[[], object],
) -> dict[str, FedPipeError]:
    """Run cells of an evaluation; one that fails does not take the others along.

    Args:
        plan: The evaluation.
        pending: Its cells that are to run.
        signals: Caught by the caller.
        console: Shows what happens.
        parallel: Cells at a time.
        gather: Writes tables of what is done.

    Returns:
        What cells found that the user can mend, by their names.

    Raises:
        Interrupted: Asked to stop; the cells have.
    """
    gpus = num_gpus()
    cells = {cell.name: cell for cell in plan.cells}
    runner = CellRunner(
        plan.cells,
        pending,
        parallel=min(parallel, gpus) if gpus else parallel,
        logs=plan.directory / "logs",
        start=lambda name, slot, log: _Process(cells[name], slot, log),
        gather=gather,
        outcome=lambda name: outcome_text(cells[name].result()),
        console=console,
        look=_Progress(pending, console).look,
    )
    return runner.run(signals)


def run_one(run_dir: str) -> int:
    """Run a cell again in this process: ``fedpipe evaluate --run-dir EVALUATION/cells/NAME``.

    Args:
        run_dir: With a cell.json.

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
    """Run a cell in a job of one task: there is nothing to save before it is done."""
    note_attempt(Path(run_dir), Position(), job_id=job_id)
    alone = ProcessEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous="")
    bind(alone)
    with signals.caught():
        return run_one(run_dir)


class _Process:
    """A cell, forked from the server that has imported torch and transformers."""

    def __init__(self, cell: Cell, slot: Slot, log: Path) -> None:
        """Start it."""
        self._process = fork_server(PRELOAD).Process(
            target=_work, daemon=True,
            args=(
                str(cell.run_dir), str(log.absolute()), slot.index, slot.cores,
                num_threads(len(slot.cores)),
            ),
        )  # fmt: skip
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return int(self._process.pid)

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for its end; False if that has not come."""
        self._process.join(timeout_s)
        return self.code is not None


def _work(run_dir: str, log: str, index: int, cores: frozenset[int], threads: int) -> None:
    """Run a cell in this process, which ends with it; what it says goes to its log."""
    os.setsid()
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    save_when_the_parent_dies()
    with saying_to(log):
        import torch

        from fedpipe.commands.evaluate.cell import run_cell

        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        run_cell(Path(run_dir), local_rank=index)


class _Progress:
    """Shows how many optimizer steps are done, of all that are to be made."""

    def __init__(self, pending: Sequence[Cell], console: RunConsole) -> None:
        """Start before the first step."""
        self._pending, self._console = pending, console
        self._next_look = 0.0

    def look(self, running: Sequence[str]) -> None:
        """Look at the records of running cells, but not all the time."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        total = sum(cell.num_steps for cell in self._pending)
        done = 0
        for cell in self._pending:
            if cell.name in running:
                done += _steps(cell.run_dir / METRICS_FILE)
            elif cell.result() is not None:
                done += cell.num_steps
        if 0 < done < total:
            self._console.preparing("fine-tuning, steps", done, total)


def _steps(path: Path) -> int:
    """Read the last step of a record that is being written."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0
