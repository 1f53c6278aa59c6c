"""``fedpipe report``: write report.html, report.md and the plots of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedpipe.commands import options
from fedpipe.run.run_dir import RunDir
from fedpipe.terminal import show


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe report``."""
    options.add_run(command)


def run(args: argparse.Namespace) -> int:
    """Write the report of a run, and print its path."""
    show(str(report(options.existing_run(args, "pretrain", "finetune"))))
    return 0


def report(run: RunDir) -> Path:
    """Write the report of a run; return the path of report.html."""
    if run.kind == "finetune":
        from fedpipe.commands.finetune.report import write_finetune_report

        return write_finetune_report(run.path)
    from fedpipe.commands.pretrain.report import write_report

    return write_report(run.path)
