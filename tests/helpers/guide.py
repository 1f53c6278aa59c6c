"""What documents show: commands, Python and files.

A fenced block of ``sh`` or ``python`` runs where the reader is. One with a title needs what the
title says (a cluster, another node), or is, in another language, the file that it names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    title: str
    text: str


def blocks_of(document: str | Path) -> list[Block]:
    """Return the fenced blocks of a document, by its path in the repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [Block(*found) for found in _FENCE.findall(text)]


def commands_of(document: str | Path) -> list[str]:
    """Return the commands that a document shows for every reader, without their comments."""
    shown = [b.text for b in blocks_of(document) if b.language == "sh" and not b.title]
    return [command for text in shown for command in commands(text)]


def commands(text: str) -> list[str]:
    """Return the lines of a script, joined where one goes on, without comments."""
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]
