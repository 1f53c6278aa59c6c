"""Read the cells of tables: text, names of owners, labels and tags. No torch.

The same value is spelt in several ways: a missing one is null in JSON, NaN after pandas, blank in
TSV and "None" after ``str``; a whole number becomes 1.0 as soon as one row of its column is
missing. This module alone decides which cells are missing and which are equal.
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal

# What pandas, R, SQL, JSON and Python write for a missing value, in the cases that they write.
_SPELLINGS = frozenset("nan NaN NAN <NA> #N/A null Null NULL none None NONE NaT".split())

# A whole number that was written with decimals; "007" and "1.10" are codes, not numbers.
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")


def is_missing(value: object) -> bool:
    """Tell whether a cell of a table is missing.

    Null, NaN, blank text and text that spells null as tables do (``nan``, ``null``, ``none``,
    ``<NA>``) are missing. Only whole cells are meant, not words of a text or items of a list. Where
    a task has a label of such a name, look for the label first.

    Args:
        value: The cell as the JSON line, Parquet file, dataset or text line holds it.
    """
    if value is None:
        return True
    if isinstance(value, str):
        stripped = value.strip()
        return not stripped or stripped in _SPELLINGS
    return isinstance(value, float | Decimal) and math.isnan(value)


def text_of(value: object) -> str | None:
    """Read a cell that must hold text.

    Args:
        value: The cell as the file holds it.

    Returns:
        The unchanged text; ``None`` if the cell is missing. Half a surrogate pair, which JSON can
        spell and no tokenizer can encode, becomes a question mark.

    Raises:
        TypeError: The cell is neither text nor missing.
    """
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def name_of(value: object) -> str | None:
    """Read a cell that names something, such as the owner of a row; equal values get equal names.

    1, 1.0, "1", "1.0" and " 1 " are the same name, and so are two Unicode spellings of one word.
    "01" is another name, because leading zeros belong to a code.

    Args:
        value: The cell as the file holds it.

    Returns:
        The name on one line; ``None`` if the cell is missing.

    Raises:
        TypeError: The cell is not text, a finite number or a truth value.
    """
    if is_missing(value):
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value):
        value = int(value) if value == int(value) else float(value)
    elif not isinstance(value, str | int):
        raise TypeError(f"expected text or a number, got {value!r}")
    text = str(value).encode("utf-8", "replace").decode()
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    whole = _WHOLE.fullmatch(text)
    if not whole:
        return text
    return "0" if whole[1] == "-0" else whole[1]
