"""Paths that users write: ``~`` is a home directory wherever a path can stand, all are text."""

from __future__ import annotations

import os
from typing import Annotated

from fedpipe.errors import ConfigError

_MARK = "path"
_LONGEST_NAME = 255
"""Bytes, of every file system in use on Linux."""
UserPath = Annotated[str, _MARK]
"""Type of a field that holds a path, or a name that is none, such as ``packaged``."""


def is_path(kind: object) -> bool:
    """Whether the type of a field is ``UserPath``."""
    return _MARK in getattr(kind, "__metadata__", ())


def expanded(path: str, *, key: str) -> str:
    """Write a home directory out.

    Args:
        path: What the user has written.
        key: Of the configuration, or the option.

    Returns:
        The path; one that does not begin with ``~`` as it is.

    Raises:
        ConfigError: It begins with a user who is not known here, or cannot be written down.
    """
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:  # Python's stand-ins for bytes that the locale has no letter for
        raise ConfigError(
            f"{key}: expected a path that is UTF-8, got {path!r}. Rename it, or set LC_ALL=C.UTF-8 "
            "where it is."
        ) from None
    found = os.path.expanduser(path)
    if any(len(part) > _LONGEST_NAME for part in os.fsencode(found).split(b"/")):
        raise ConfigError(
            f"{key}: expected names of up to {_LONGEST_NAME} bytes in a path, got {path[:60]!r}..."
            " with a longer one. Shorten it."
        )
    if found.startswith("~"):
        raise ConfigError(
            f"{key}: expected the home directory of a known user, got {path!r}. Write the path out,"
            " or ./ before a file whose name begins with ~."
        )
    return found
