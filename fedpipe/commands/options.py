"""Options that several commands share, and the functions that read their values."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.config.load import preset_names, read_config
from fedpipe.config.paths import expanded
from fedpipe.distributed.env import is_rank
from fedpipe.errors import ConfigError

if TYPE_CHECKING:
    from fedpipe.cluster.rank import RunRequest
    from fedpipe.run.run_dir import Kind, RunDir


def add_path(command: argparse.ArgumentParser, name: str, **keywords: Any) -> None:
    """Add an option whose value is a path; ``~`` is a home directory, also after ``=``."""
    command.add_argument(name, type=partial(expanded, key=name), **keywords)


def add_run(command: argparse.ArgumentParser, *, presets: str = "") -> None:
    """Add the options that describe a run: preset, file, directory and overrides.

    Args:
        command: Parser of the command.
        presets: Help text of ``--preset``; by default it lists the systems of pre-training.
    """
    presets = presets or f"a published system: {', '.join(preset_names())}"
    command.add_argument("--preset", metavar="NAME", help=presets)
    add_path(
        command,
        "--config",
        metavar="FILE",
        help="YAML file, which overrides the preset; default: the quick start",
    )
    add_directory(command)


def add_directory(command: argparse.ArgumentParser, *, default: str = "runs/NAME") -> None:
    """Add the directory of the run and the overrides."""
    add_path(command, "--run-dir", metavar="DIR", help=f"directory of the run; default: {default}")
    command.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="value that overrides the file"
    )


def add_grid(command: argparse.ArgumentParser, *, text: str) -> None:
    """Add the option for a grid of values."""
    command.add_argument(
        "--grid",
        metavar="section.key=value,value",
        nargs="+",
        action="extend",
        default=[],
        help=text,
    )


def add_parallel(command: argparse.ArgumentParser) -> None:
    """Add the option for the number of runs at a time."""
    command.add_argument(
        "--parallel",
        metavar="N",
        type=whole_number,
        default=1,
        help="number of runs at a time; default: 1",
    )


def add_task_files(command: argparse.ArgumentParser) -> None:
    """Add the option for files that describe the user's own tasks."""
    add_path(
        command,
        "--task-file",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file that describes your own labelled task, see docs/how-to/evaluate.md",
    )


def add_seeds(command: argparse.ArgumentParser, *, text: str) -> None:
    """Add the option for a list of seeds, which ``seeds`` parses."""
    command.add_argument("--seeds", metavar="N,N", help=text)


def whole_number(text: str) -> int:
    """Parse a whole number by the rule of the configuration, by which ``1_0`` is a word.

    Raises:
        ArgumentTypeError: It is none.
    """
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text.strip()):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def seeds(text: str) -> tuple[int, ...]:
    """Parse the value of ``--seeds``.

    Raises:
        ConfigError: A seed is not a whole number.
    """
    try:
        return tuple(whole_number(word) for word in text.split(","))
    except argparse.ArgumentTypeError:
        raise ConfigError(
            f"--seeds: expected whole numbers, got {text!r}. Write for example --seeds 0,1,2."
        ) from None


def existing_run(args: argparse.Namespace, *kinds: Kind) -> RunDir:
    """Open the directory of an existing run of one of the given kinds.

    Raises:
        CheckpointError: The directory has no such run.
    """
    from fedpipe.run.run_dir import RunDir  # not at the top: help and plans need no numpy

    if args.run_dir:
        return RunDir.open(args.run_dir, *kinds)
    config = read_config(args.config, args.overrides, preset=args.preset)
    return RunDir.open(Path("runs") / config.name, *kinds)


def add_launcher(command: argparse.ArgumentParser) -> None:
    """Accept the arguments that some launchers add; their environment variables say the same."""
    command.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def is_launched(args: argparse.Namespace) -> bool:
    """Whether this process is a rank that a launcher has started.

    Raises:
        ConfigError: It is a rank, and the arguments have a grid; a launcher runs one run only.
    """
    if not (args.launched or is_rank()):
        return False
    if getattr(args, "grid", ()):
        raise ConfigError(
            "--grid: expected none where a launcher has started the ranks of one run, got "
            f"{' '.join(args.grid)}. Start the command without the launcher."
        )
    return True


def request_of(args: argparse.Namespace, *, options: Any = None) -> RunRequest:
    """Return the arguments as a request for a run."""
    from fedpipe.cluster.rank import RunRequest

    return RunRequest(
        config_path=args.config,
        overrides=args.overrides,
        run_dir=args.run_dir,
        preset=args.preset,
        options=options,
    )
