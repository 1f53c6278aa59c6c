"""Text of others made safe to show: on a terminal, in a log, in a report."""

from __future__ import annotations

import re
import unicodedata

_DOUBTFUL = re.compile(r"[^\n\t\x20-\x7e]")


def printable(text: str) -> str:
    r"""Replace what a terminal or a page would obey instead of showing it.

    Control characters, among them the escape that opens a terminal's commands, marks that turn the
    direction of writing, halves of surrogate pairs and unassigned characters become their escape,
    such as ``\x1b``; spaces of all widths become a space. Line ends and tabs stay.

    Args:
        text: From a file, a file's name, a column, a model's folder or a user.

    Returns:
        The text with nothing but printable characters, line ends and tabs.
    """
    return _DOUBTFUL.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")
