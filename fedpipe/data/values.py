"""One reading of the values that files hold, for text, owners, labels and tags alike. No torch.

Files of one table spell the same thing in several ways: a missing value is null in JSON, NaN after
pandas, blank in TSV and "None" after ``str``; a number becomes 1.0 as soon as one row of its column
is missing. What is missing and what is equal is decided here and nowhere else.
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal

# What pandas, R, SQL, JSON and Python write for a missing value, in the cases that they write.
_SPELLINGS = frozenset({
    "nan", "NaN", "NAN", "<NA>", "#N/A", "null", "Null", "NULL", "none", "None", "NONE", "NaT",
})  # fmt: skip

# A whole number that was written with decimals; "007" and "1.10" are codes, not numbers.
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")


def is_missing(value: object) -> bool:
    """Tell whether a cell of a table holds nothing.

    Missing are null, NaN, a blank text, and a text that spells null as tables do: ``nan``,
    ``null``, ``none``, ``<NA>``. A word inside a text or a list is no cell; where a task defines a
    label of such a name, ask for the label first.

    Args:
        value: As a JSON line, a Parquet file, a dataset or a line of text gave it.
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
        value: As the file gave it.

    Returns:
        The text as it is; ``None`` where it is missing. Half a surrogate pair, which JSON can spell
        and no tokenizer can encode, becomes a question mark.

    Raises:
        TypeError: It is neither text nor missing.
    """
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def name_of(value: object) -> str | None:
    """Read a cell that names something, such as the owner of a row: equal values, equal names.

    1, 1.0, "1", "1.0" and " 1 " are one name; so are two Unicode spellings of one word. "01" is
    another, because leading zeros belong to a code.

    Args:
        value: As the file gave it.

    Returns:
        The name on one line; ``None`` where it is missing.

    Raises:
        TypeError: It is no text, number or truth value, or an infinite number.
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
