"""Options that only some commands have."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from fedpipe.commands.reproduce.config import EXPERIMENTS, SCALES
from fedpipe.config.paths import expanded


def add_path(command: argparse.ArgumentParser, name: str, **keywords: Any) -> None:
    """Add an option whose value is a path; ``~`` is a home directory, after ``=``, too."""
    command.add_argument(name, type=partial(expanded, key=name), **keywords)


def add_measurement(command: argparse.ArgumentParser) -> None:
    """How a throughput run measures."""
    command.add_argument(
        "--repetitions", metavar="N", type=int, default=6, help="windows per schedule; default: 6"
    )
    command.add_argument(
        "--steps", metavar="N", type=int, default=6, help="local steps per window; default: 6"
    )
    command.add_argument(
        "--emulate-ms",
        metavar="MS",
        type=float,
        default=0.0,
        help="a layer's forward sleeps this long instead of computing (backward twice that)",
    )


def add_job(command: argparse.ArgumentParser) -> None:
    """Where a job runs."""
    add_path(
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


def add_grid(command: argparse.ArgumentParser, *, text: str) -> None:
    """A grid of values."""
    command.add_argument(
        "--grid",
        metavar="section.key=value,value",
        nargs="+",
        action="extend",
        default=[],
        help=text,
    )


def add_parallel(command: argparse.ArgumentParser) -> None:
    """Runs at a time."""
    command.add_argument(
        "--parallel", metavar="N", type=int, default=1, help="runs at a time; default: 1"
    )


def add_evaluation(command: argparse.ArgumentParser) -> None:
    """Models, tasks and seeds."""
    add_path(
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
    add_path(
        command,
        "--data",
        metavar="DIR",
        help="folder with the tasks' files, or hf:NAME; default: a packaged slice",
    )
    command.add_argument("--seeds", metavar="N,N", help="fine-tune each once per seed; default: 0")


def add_comparison(command: argparse.ArgumentParser) -> None:
    """Two evaluations to subtract."""
    add_path(
        command,
        "--compare",
        metavar="RUN",
        nargs=2,
        help="differences between two evaluations (RUN:MODEL where one has several, RUN:MODEL,MODEL"
        " for one method with several seeds of pre-training); starts nothing",
    )


def add_reproduction(command: argparse.ArgumentParser) -> None:
    """What is reproduced, how large, and on what."""
    command.add_argument(
        "experiment", metavar="EXPERIMENT", choices=EXPERIMENTS,
        help=f"what to reproduce: {', '.join(EXPERIMENTS)}",
    )  # fmt: skip
    add_scale(command)
    add_path(
        command,
        "--data",
        metavar="DIR",
        help="folder with the files of the eight tasks; default: a packaged slice of one",
    )
    command.add_argument(
        "--seeds", metavar="N,N", help="pre-train every system once per seed; default: 0"
    )


def add_scale(command: argparse.ArgumentParser) -> None:
    """How large a reproduction is."""
    command.add_argument(
        "--scale", choices=SCALES, help="of a reproduction; default: that of DIR, else tiny"
    )
