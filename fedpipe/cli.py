"""The command line: parse, call one command, turn errors into one line and an exit code.

0 done, 2 the user's error (one line), 1 a failure, 75 interrupted and resumable (``EX_TEMPFAIL``).
A command is a module with two functions: ``add_arguments(parser)`` declares what it takes, and
``run(args)`` does it and returns the exit code. Only the module of the command that was asked for
is imported, and none imports torch at its top: ``--help``, ``plan`` and configuration errors answer
at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fedpipe import __version__
from fedpipe.commands import options
from fedpipe.commands.parsers import Formatter, Parser, add_commands
from fedpipe.errors import FedPipeError, LaunchError
from fedpipe.files import system_errors_named
from fedpipe.terminal import prepare_output

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 75

_COMMANDS = {
    "plan": ("plan.command", "show grid, stages, bytes, memory and ideal bubble; start nothing"),
    "pretrain": ("pretrain.command", "pre-train a model on this machine, or resume the run in DIR"),
    "finetune": ("finetune.command", "fine-tune a model over clients, whole or with an adapter"),
    "export": ("export", "write the newest checkpoint of a run as a Hugging Face folder"),
    "report": ("report", "write report.html, report.md and the plots of a run"),
    "throughput": ("throughput.command", "measure every schedule in one interleaved run"),
    "sweep": ("study.sweep", "pre-train once per cell of a grid of values, and compare the runs"),
    "evaluate": (
        "evaluate.command",
        "fine-tune models on labelled tasks, and score and compare them",
    ),
    "reproduce": (
        "reproduce.command",
        "run a published experiment with its baselines, and draw its figures",
    ),
    "consortium": (
        "consortium.command",
        "be the coordinator of sites that share no cluster and train one model",
    ),
    "site": (
        "site.command",
        "be a site of a consortium: join it, and wait for outer rounds",
    ),
    "submit": ("submit.command", "run one of these commands as jobs on SLURM, through submitit"),
}
"""Every command: its module in ``fedpipe.commands``, and its line in the help."""

_DESCRIPTION = (
    "Federated pre-training of BERT-like models over a pipeline of locally trained stages."
)
_EPILOG = """\
exit codes:
  0   done
  1   a process of the run failed
  2   a mistake that you can correct, named in one line
  75  interrupted; the same command with --run-dir DIR resumes

An override wins over --config, --config over the preset, and the preset over the defaults. Without
preset and file, the packaged quick start is used:
  fedpipe pretrain --preset fedbiobert-4-8 --config FILE --run-dir runs/mine optimizer.lr=5e-4
"""


def main(argv: Sequence[str] | None = None, *, launched: bool = False) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
        launched: A launcher has started this process as a rank, also where the environment leaves
            that open.

    Returns:
        The exit code.
    """
    prepare_output()
    try:
        args = _parse(argv)
        args.launched = launched
        command: Callable[[argparse.Namespace], int] = args.run
        with system_errors_named():
            code = command(args)
        sys.stdout.flush()
        return code
    except FedPipeError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return EXIT_FAILURE if isinstance(error, LaunchError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="fedpipe",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedpipe {__version__}")
    options.add_launcher(parser)
    add_commands(parser, _COMMANDS, _declare, title="commands", metavar="COMMAND")
    args, rest = parser.parse_known_args(argv)
    args.overrides = [*args.overrides, *rest]
    return args


def _declare(parser: argparse.ArgumentParser, command: Any) -> None:
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)
