"""The commands that documents show."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands_of(document: str) -> list[str]:
    """Return the first commands that a document shows, by its path in the repository."""
    return first_commands((ROOT / document).read_text(encoding="utf-8"))


def first_commands(text: str) -> list[str]:
    """Return the first commands of a text, without their comments."""
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block, "the section shows commands"
    lines = [line.split(" #")[0].strip() for line in block.group(1).splitlines()]
    return [line for line in lines if line]
