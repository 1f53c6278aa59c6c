"""Digests of files, kept in the cache until a file changes.

They tell whether text, a tokenizer, a task or a model is still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpipe.errors import CorpusError

FileDigests = list[tuple[str, str]]
"""Names of files, without their folders, and the digests of their bytes."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")

# A file that changes twice within the resolution of its time stamp looks unchanged, so no digest is
# kept of a file that has just changed.
_SETTLED_S = 2.0
_NAME_LENGTH = 24


def file_digest(path: str | Path, *, key: str, root: Path | None) -> str:
    """Compute the digest of a file; the file is read again only if its status has changed.

    Size and modification time can be set back (``cp -p``, ``touch -d``, ``rsync -t``), so the
    inode and the change time, which only the file system sets, are compared as well.

    Args:
        path: The file.
        key: The configuration key that names the file, for errors.
        root: The cache directory that keeps digests; None to keep none.

    Returns:
        SHA-256, hexadecimal.

    Raises:
        CorpusError: The file cannot be read.
    """
    location = os.path.abspath(path)
    try:
        with open(location, "rb") as file:
            status = os.fstat(file.fileno())
            stamp = _stamp(location, status)
            known = load_memo(location, root)
            if known.get("stamp") == stamp:
                return str(known["digest"])
            is_settled = time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(
            f"{key}: expected a readable file, got {str(path)!r}: {error.strerror}. "
            "Check its permissions."
        ) from error
    if is_settled:
        save_memo(location, {"stamp": stamp, "digest": content}, root)
    return content


def cached_digest(path: str | Path, *, root: Path) -> str | None:
    """Return the kept digest of a file; None if there is none or the file has changed."""
    location = os.path.abspath(path)
    known = load_memo(location, root)
    try:
        is_same = known.get("stamp") == _stamp(location, os.stat(location))
    except OSError:
        return None
    return str(known["digest"]) if is_same else None


def file_digests(paths: Iterable[str | Path], *, key: str, root: Path | None) -> FileDigests:
    """Compute the digests of several files.

    Args:
        paths: The files, in any order.
        key: The configuration key that names them, for errors.
        root: The cache directory that keeps digests; None to keep none.

    Returns:
        Name and digest of each file, in the order of their paths.

    Raises:
        CorpusError: A file cannot be read.
    """
    ordered = sorted({str(path) for path in paths})
    return [(Path(path).name, file_digest(path, key=key, root=root)) for path in ordered]


def model_files(folder: Path) -> list[Path]:
    """List the configuration and weight files of a Hugging Face folder."""
    return _listed(folder, ("config.json", *_WEIGHTS))


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a Hugging Face folder that a tokenizer of any kind is read from."""
    return _listed(folder, _TOKENIZER)


def digest(content: object) -> str:
    """Compute the digest of a value that JSON can hold: SHA-256, hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_memo(name: str, root: Path | None) -> dict[str, Any]:
    """Return what ``save_memo`` has stored under a name; empty if nothing readable is there."""
    if root is None:
        return {}
    try:
        content = json.loads(_memo(name, root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def save_memo(name: str, content: dict[str, Any], root: Path | None) -> None:
    """Store a small value under a name; if that fails, the value is computed again next time."""
    if root is None:
        return
    path = _memo(name, root)
    aside = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content), encoding="utf-8")
        aside.rename(path)


def _stamp(location: str, status: os.stat_result) -> list[str | int]:
    return [location, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _listed(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _memo(name: str, root: Path) -> Path:
    return root / "content" / f"{digest(name)[:_NAME_LENGTH]}.json"
