"""What a file is: a digest of its bytes, remembered for as long as the file is not touched.

Everything that asks whether text, a tokenizer, a task or a model is still the same asks here.
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

# A file changed twice within the resolution of its time stamp would keep its old digest.
_SETTLED_S = 2.0
_NAME_LENGTH = 24


def file_digest(path: str | Path, *, key: str, root: Path | None) -> str:
    """Digest the bytes of a file; they are read again once anything has touched the file.

    Size and modification time can be put back (``cp -p``, ``touch -d``, ``rsync -t``), so the
    inode and the time of its last change, which only the file system sets, count as well.

    Args:
        path: The file.
        key: What it was given as, for errors.
        root: The cache directory, which remembers; None remembers nothing.

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
    """Return the digest of a file without reading it; None if it is unknown or was touched."""
    location = os.path.abspath(path)
    known = load_memo(location, root)
    try:
        is_same = known.get("stamp") == _stamp(location, os.stat(location))
    except OSError:
        return None
    return str(known["digest"]) if is_same else None


def file_digests(paths: Iterable[str | Path], *, key: str, root: Path | None) -> FileDigests:
    """Digest files that belong together.

    Args:
        paths: In any order.
        key: What they were given as, for errors.
        root: The cache directory, which remembers; None remembers nothing.

    Returns:
        Name and digest of each, in the order of the paths' names.

    Raises:
        CorpusError: A file cannot be read.
    """
    ordered = sorted({str(path) for path in paths})
    return [(Path(path).name, file_digest(path, key=key, root=root)) for path in ordered]


def model_files(folder: Path) -> list[Path]:
    """List the files of a Hugging Face folder that a model is read from, the tokenizer's not."""
    return _listed(folder, ("config.json", *_WEIGHTS))


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a Hugging Face folder that a tokenizer of any kind is read from."""
    return _listed(folder, _TOKENIZER)


def digest(content: object) -> str:
    """Digest what JSON can hold: SHA-256, hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_memo(name: str, root: Path | None) -> dict[str, Any]:
    """Return what ``save_memo`` has kept under a name; empty where that is nothing readable."""
    if root is None:
        return {}
    try:
        content = json.loads(_memo(name, root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def save_memo(name: str, content: dict[str, Any], root: Path | None) -> None:
    """Keep something small under a name; where that cannot be written it is found out again."""
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
