"""A ledger: lines of JSON, each with the digest of the one before it, of what crosses. No torch.

Whoever changes or removes a line has to change all that follow, and the last digest, which the
other end has seen as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from fedpipe.errors import FederationError
from fedpipe.files import with_file_name
from fedpipe.run.tensor_file import TensorFile

LEDGER_FILE = "ledger.jsonl"
_FIRST = "0" * 64
"""Stands for the digest of the line before the first one."""


class Ledger:
    """The file of a ledger; several processes may write into it."""

    def __init__(self, path: Path) -> None:
        """Name the file; it need not exist."""
        self.path = path

    @property
    def size(self) -> int:
        """Bytes of the file; 0 while there is none."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def write(self, what: str, content: Mapping[str, Any]) -> None:
        """Append a line, and wait until it is on the disk.

        Args:
            what: Kind of the line.
            content: What JSON can hold.
        """
        with open(self.path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = _FIRST
            for line in file:
                before = _digest(line)
            end = file.tell()
            time_text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            text = json.dumps({"before": before, "time": time_text, "what": what, **content})
            try:
                with with_file_name(self.path):
                    _write_whole(file, text.encode() + b"\n")
                    os.fsync(file.fileno())
            except OSError:  # a half line would break the chain for ever
                os.ftruncate(file.fileno(), end)
                raise

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines in order.

        Raises:
            FederationError: One was changed or removed.
        """
        if not self.path.is_file():
            return
        before = _FIRST
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    content: dict[str, Any] = json.loads(line)
                    is_next = content["before"] == before
                except (ValueError, TypeError, KeyError):
                    is_next = False
                if not is_next:
                    raise FederationError(
                        f"{self.path}:{number}: expected the line that follows the one before it,"
                        " got another one: the ledger was changed. Restore it from a backup."
                    )
                before = _digest(line)
                yield content


def described(path: Path) -> dict[str, Any]:
    """Return what a ledger says of the tensors of a file: their number, and all names."""
    names = list(TensorFile(path).layouts)
    return {"bytes": path.stat().st_size, "tensors": names}


def _write_whole(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
