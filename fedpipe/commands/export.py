"""``fedpipe export``: write the newest checkpoint of a run in formats of other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedpipe.commands import options
from fedpipe.run.run_dir import RunDir
from fedpipe.terminal import show


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe export``."""
    options.add_run(command)


def run(args: argparse.Namespace) -> int:
    """Export a run, and print the folders."""
    for folder in export(options.existing_run(args, "pretrain", "finetune")):
        show(str(folder))
    return 0


def export(run: RunDir) -> list[Path]:
    """Export the newest checkpoint of a run to folders of other libraries; return the folders."""
    if run.kind == "finetune":
        from fedpipe.commands.finetune.export import export_finetuned

        return export_finetuned(run.path)
    from fedpipe.run.export import export_run

    return [export_run(run.path)]
