"""TensorBoard's view of the records, written with its own protobufs: torch is never imported."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class TensorBoardMirror:
    """Writes scalars against the tokens trained so far.

    Files are written by the calling thread, so a killed process loses nothing.
    """

    def __init__(self, directory: Path) -> None:
        """Open a new event file.

        Args:
            directory: Created if missing; holds one file per start of the run.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        # The pid and the clock keep files of successive starts apart and in order.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        self._file = open(directory / name, "wb")  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._file)
        self._tokens = TokenCount()
        self._write(file_version="brain.Event:2")

    def restart(self, kept: Iterable[dict[str, Any]]) -> None:
        """Hide the events after the last of the kept records; later ones continue from there."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._tokens = TokenCount()
        for record in kept:
            self._tokens.add(record)
        # TensorBoard drops what an earlier file has at this step or later.
        self._write(step=self._tokens.total + 1, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Mirror a batch of records."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for record in records:
            self._tokens.add(record)
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in scalars(record)
                if isinstance(value, int | float)
            ]
            if values:
                self._write(step=self._tokens.total, summary=Summary(value=values))
        self.flush()  # so that an open TensorBoard follows the run

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._records.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class TokenCount:
    """Counts trained tokens while records pass by; every stage sees each token once."""

    def __init__(self) -> None:
        """Start at zero."""
        self._per_stage: dict[int, int] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Count a record; only steps carry new tokens."""
        if record.get("kind") == "step":
            stage = record.get("stage") or 0
            self._per_stage[stage] = self._per_stage.get(stage, 0) + (record.get("tokens") or 0)

    @property
    def total(self) -> int:
        """Tokens that the stage furthest ahead has seen."""
        return max(self._per_stage.values(), default=0)


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the scalars of a record; values may be ``None``."""
    kind = record.get("kind")
    if kind == "step":
        stage = f"stage_{record.get('stage') or 0:02d}"
        for name in ("loss", "lr", "grad_norm"):
            yield f"train/{name}/{stage}", record.get(name)
    elif kind == "round":
        for name in ("tokens_per_s", "seconds", "sync_s", "sync_bytes"):
            yield f"round/{name}", record.get(name)
        for stage_id, loss in enumerate(record.get("loss") or []):
            yield f"round/loss/stage_{stage_id:02d}", loss
    elif kind == "eval":
        for entry in record.get("stages") or []:
            for name in ("loss", "perplexity", "worst_loss"):
                yield f"eval/{name}/stage_{entry.get('stage') or 0:02d}", entry.get(name)
    elif kind == "traffic":
        for edge in record.get("edges") or []:
            for direction in ("forward", "backward"):
                tag = f"traffic/{edge.get('from')}_to_{edge.get('to')}/bytes_{direction}"
                yield tag, edge.get(f"bytes_{direction}")
        for name, value in (record.get("collectives") or {}).items():
            yield f"traffic/collectives/{name}_bytes", value
