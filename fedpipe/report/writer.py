"""The record of a run: ``metrics.jsonl``, one JSON object a line.

The file is the truth. Console, report and sinks are views of it, so a resumed run cuts it at the
checkpoint and goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe.errors import CheckpointError
from fedpipe.files import with_file_name
from fedpipe.report.records import Record
from fedpipe.report.sinks import Sinks

METRICS_FILE = "metrics.jsonl"
"""Name of the record inside a run directory."""


class MetricsWriter:
    """Appends records to ``RUN_DIR/metrics.jsonl``, and gives their numbers to the sinks.

    One writer per run. Opening an existing file continues it; a last line that a killed process
    left unfinished is cut off first.
    """

    def __init__(self, run_dir: Path | str, *, sinks: Sequence[str] = ()) -> None:
        """Open the record for appending.

        Args:
            run_dir: Existing run directory.
            sinks: ``log.to`` of the configuration; they are opened with the first record.
        """
        self._path = Path(run_dir) / METRICS_FILE
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._fd, _complete_bytes(self._path.read_bytes()))
        self._names = sinks
        self._sinks: Sinks | None = None

    @property
    def offset(self) -> int:
        """Bytes written so far; a checkpoint stores it, after ``flush``, for ``truncate``."""
        return os.fstat(self._fd).st_size

    def write(self, records: Sequence[Record]) -> None:
        """Append a batch of records in one system call; NaN and infinity become null."""
        cleaned = [finite(record) for record in records]
        if self._sinks is None and self._names:
            self._sinks = Sinks(self._names, self._path.parent, read_metrics(self._path))
        lines = (json.dumps(r, allow_nan=False, separators=(",", ":")) for r in cleaned)
        pending = "".join(line + "\n" for line in lines).encode("ascii")
        with with_file_name(self._path):
            while pending:  # a second turn only where the file system takes part of a write
                pending = pending[os.write(self._fd, pending) :]
        if self._sinks is not None:
            self._sinks.add(cleaned)

    def flush(self) -> None:
        """Return once everything written is on the disk."""
        with with_file_name(self._path):
            os.fsync(self._fd)

    def truncate(self, offset: int) -> None:
        """Forget every record after a checkpoint.

        Args:
            offset: Value of ``offset`` when the checkpoint was made.

        Raises:
            CheckpointError: The file is shorter, or was not written by the run of the checkpoint.
        """
        size = self.offset
        if not 0 <= offset <= size:
            raise CheckpointError(
                f"{METRICS_FILE}: expected at least the {offset} bytes that the checkpoint counts, "
                f"got {size}. Restore the file or start in a new run directory."
            )
        if offset and os.pread(self._fd, 1, offset - 1) != b"\n":
            raise CheckpointError(
                f"{METRICS_FILE}: expected a record to end at byte {offset}, got the middle "
                "of one. Restore the checkpoint's own file or start in a new run directory."
            )
        os.ftruncate(self._fd, offset)
        os.fsync(self._fd)
        self._end_sinks()  # the next record opens them where the file ends now

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._fd < 0:
            return
        self.flush()
        os.close(self._fd)
        self._fd = -1
        self._end_sinks()

    def _end_sinks(self) -> None:
        if self._sinks is not None:
            self._sinks.close()
            self._sinks = None


def read_metrics(path: Path | str) -> list[Any]:
    """Read the records of a ``metrics.jsonl``; a torn last line is left out.

    Returns:
        Each is a ``Record``; whoever asks for a kind knows of which class.

    Raises:
        CheckpointError: A line that is not the last one is no JSON object.
    """
    data = Path(path).read_bytes()
    records: list[Any] = []
    for number, line in enumerate(data[: _complete_bytes(data)].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            found = line[:40].decode(errors="replace")
            raise CheckpointError(
                f"{path}:{number}: expected a JSON object, got {found!r}. "
                "Remove the line or restore the file."
            )
        records.append(record)
    return records


def finite(value: Any) -> Any:
    """Copy a JSON value with null in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _complete_bytes(data: bytes) -> int:
    """Count the bytes up to and with the last end of line."""
    return data.rfind(b"\n") + 1
