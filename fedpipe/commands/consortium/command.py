"""``fedpipe consortium``: the coordinator of sites that share no cluster."""

from __future__ import annotations

import argparse
import shlex

from fedpipe.commands import options
from fedpipe.commands.consortium.report import status_lines, write_consortium_report
from fedpipe.commands.consortium.run import Consortium, locate
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.run.run_dir import locked
from fedpipe.terminal import show


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe consortium``."""
    command.add_argument(
        "action",
        metavar="ACTION",
        choices=("run", "status"),
        help="run: hand weights out and take updates in until all outer rounds are done; status:"
        " say how far it is, and whom it waits for",
    )
    options.add_path(
        command, "--config", metavar="FILE", help="YAML, see docs/how-to/consortium.md"
    )
    options.add_directory(command)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say."""
    consortium = locate(args.config, args.overrides, args.run_dir)
    if args.action == "status":
        for line in status_lines(consortium):
            show(line)
        return 0
    return coordinate(consortium)


def coordinate(consortium: Consortium) -> int:
    """Be the coordinator until all outer rounds are done.

    Returns:
        0 when they are, 75 when interrupted; the same command goes on.

    Raises:
        FedPipeError: What the user can mend.
    """
    signals = Signals()
    try:
        with signals.caught():
            consortium.begin()
            with locked(consortium.path):
                for index in range(consortium.num_done, consortium.num_rounds):
                    consortium.train_round(index, show=show)
                    write_consortium_report(consortium)
                model = consortium.export()
    except Interrupted:
        again = shlex.join(["fedpipe", "consortium", "run", "--run-dir", str(consortium.path)])
        show(f"interrupted; the sites work on. Go on with: {again}")
        return EXIT_INTERRUPTED
    show(f"model   {model}" if model else "model   none: a part of it stays with the clients")
    show(f"report  {write_consortium_report(consortium)}")
    return 0
