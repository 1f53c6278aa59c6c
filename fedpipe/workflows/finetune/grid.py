"""Fine-tunings that are run one after another and compared: the cells of a grid. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpipe.errors import CheckpointError
from fedpipe.files import write_text
from fedpipe.workflows.run_dir import check_new, check_writable

EXAMPLE = ("method.name=lora,full",)
"""What is compared where the user asks for nothing."""
_FILE = "cells.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of a grid."""

    name: str
    """Its directory below the grid's."""
    config_path: str | None
    preset: str | None
    overrides: list[str]


def write_cells(directory: Path, cells: Sequence[Cell]) -> None:
    """Write down what a grid consists of.

    Raises:
        CheckpointError: The directory holds another grid, a run or something else.
    """
    if (directory / _FILE).is_file():
        if read_cells(directory) != list(cells):
            raise CheckpointError(
                f"--run-dir: expected the grid that is in {directory}, got another one. Resume with"
                " --run-dir alone, or choose a new --run-dir."
            )
        return
    check_new(directory)
    check_writable(directory)
    text = json.dumps([asdict(cell) for cell in cells], indent=1)
    write_text(directory / _FILE, text + "\n")


def read_cells(directory: Path) -> list[Cell]:
    """Read what ``write_cells`` wrote."""
    content = json.loads((directory / _FILE).read_text(encoding="utf-8"))
    return [Cell(**cell) for cell in content]
