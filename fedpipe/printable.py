"""Make text from files and users safe to show on a terminal, in a log or in a report."""

from __future__ import annotations

import re
import unicodedata

_NOT_PLAIN = re.compile(r"[^\n\t\x20-\x7e]")


def printable(text: str) -> str:
    r"""Escape characters that a terminal or a page would obey instead of showing them.

    Control characters (such as the one that opens a terminal command), marks that change the
    direction of writing, halves of surrogate pairs and unassigned characters become their escape,
    such as ``\x1b``. A space of any width becomes an ordinary space. Line ends and tabs stay.

    Args:
        text: Any text, for example a line of a file, a file name or a value that a user gave.

    Returns:
        The text, which holds only printable characters, line ends and tabs.
    """
    return _NOT_PLAIN.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")
