"""Export the models of all rounds as folders to fine-tune, in a process that imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpipe.config.load import load_config
from fedpipe.run.checkpoint import find_round
from fedpipe.run.export import export_checkpoint
from fedpipe.run.run_dir import RunDir


def export_models(wanted: Sequence[tuple[Path, int, Path]]) -> None:
    """Export models to Hugging Face folders.

    Args:
        wanted: By model, its run directory, number of rounds (0 for the first weights) and folder.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
    """
    for run_dir, num_rounds, target in wanted:
        checkpoint = find_round(run_dir, num_rounds) if num_rounds else None
        config = load_config(RunDir.open(run_dir, "pretrain").saved, [])
        export_checkpoint(run_dir, config, checkpoint, target)
