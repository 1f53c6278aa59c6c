"""Checkpoints: complete or absent, verified before they are used, never half-written.

Every rank writes its files into a hidden folder and fsyncs them, and the folders that name them.
Rank 0 then writes ``state.json`` with the size and SHA-256 of each file and renames the folder:
that is the commit. What belongs to a client (kept parts, optimizer state) lies in
``RUN_DIR/clients`` once per round in which the client trained, and is listed in the manifest too.

Reading needs no torch, so a corrupt checkpoint is found before any process starts. Nothing that is
newer than what is read is ever deleted: a damaged checkpoint is set aside under another name, and
stays until the run has saved one as late.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedpipe.errors import CheckpointError, OutputError
from fedpipe.files import retry_reads, sync, write_atomically, write_text
from fedpipe.report.writer import METRICS_FILE

if TYPE_CHECKING:
    from fedpipe.distributed.comm import Comm

T = TypeVar("T")

STATE = "state.json"
CHECKPOINTS = "checkpoints"
STAGE = "stage_"
"""Begins the name of a stage's global weights."""
CLIENTS = "clients"
DAMAGED = "damaged_"
"""Begins the name of a checkpoint that has been set aside."""
_AGAIN_S = 1.0
"""After this a checkpoint that looks damaged is looked at once more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands."""

    round_id: int = 0
    """Rounds that are done."""
    step: int = 0
    """Steps that each replica has made in the next round; a replica with fewer has made all."""

    @property
    def name(self) -> str:
        """Folder of the checkpoint; names sort by time."""
        inside = f"_step_{self.step:06d}" if self.step else ""
        return f"round_{self.round_id:06d}{inside}"

    def __str__(self) -> str:
        """Say it to people, who count rounds from 1."""
        if self == Position():
            return "the start"
        inside = f"local step {self.step} of " if self.step else ""
        return f"{inside}round {self.round_id + bool(self.step)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    position: Position
    metrics_offset: int
    """Bytes of metrics.jsonl that belong to it."""
    seconds: float = 0.0
    """Seconds already spent in the unfinished round; 0 between rounds."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Rounds, from and up to, that were not trained: those of outer rounds that the site missed."""
    base_sha256: str = ""
    """Of the weights that the latest outer round began with; "" without other sites."""

    def to_message(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        return asdict(self) | {"path": str(self.path)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Checkpoint:
        """Make it again from ``to_message``."""
        position = Position(**message["position"])
        skipped = tuple((int(first), int(end)) for first, end in message["skipped"])
        path = Path(message["path"])
        return cls(**{**message, "path": path, "position": position, "skipped": skipped})


class CheckpointWriter:
    """Writes a run's checkpoints; one per process."""

    def __init__(self, run_dir: Path, *, comm: Comm, keep_last: int) -> None:
        """Write below ``run_dir``.

        Args:
            run_dir: Exists.
            comm: For the commit.
            keep_last: Checkpoints to keep.
        """
        self._run_dir, self._comm, self._keep_last = run_dir, comm, keep_last
        self._new_client_files: dict[str, tuple[int, str]] = {}
        self._client_failure = ""
        self._to_sync: set[Path] = set()
        self._listed_clients: dict[str, Any] | None = None
        """On rank 0, client files of the newest checkpoint; None until it is known."""

    def save_client(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a client's file below ``clients``; the next ``save`` lists it.

        A failure is raised there too, on every rank: here the others would wait for this one.
        """
        path = self._run_dir / CLIENTS / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = write_atomically(path, write)
            self._to_sync |= {path.parent, path.parent.parent}
        except _write_errors() as error:
            self._client_failure = f"rank {self._comm.rank}: {error}"
            return
        self._new_client_files[str(Path(CLIENTS, name))] = entry

    def save(
        self,
        position: Position,
        files: Mapping[str, Callable[[Path], None]],
        *,
        metrics_offset: int,
        seconds: float = 0.0,
        skipped: Sequence[tuple[int, int]] = (),
        base_sha256: str = "",
    ) -> None:
        """Write a checkpoint and commit it.

        Args:
            position: Where the run stands.
            files: This rank's files: name -> function that writes it to a path.
            metrics_offset: Size of metrics.jsonl; counts on rank 0.
            seconds: Already spent in the unfinished round; counts on rank 0.
            skipped: Rounds that the run has not trained; counts on rank 0.
            base_sha256: Of the weights of the latest outer round; counts on rank 0.

        Raises:
            OutputError: A rank could not write; no checkpoint appears then.

        Collective: every rank.
        """
        folder = self._run_dir / CHECKPOINTS / position.name
        aside = folder.with_name(f".{position.name}.tmp")
        failure = self._client_failure
        if self._comm.is_master():
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            except OSError as error:
                failure = f"rank {self._comm.rank}: {error}"
        self._raise_together(failure, aside)  # and wait for the folder
        entries = dict(self._new_client_files)
        try:
            for name, write in files.items():
                entry = write_atomically(aside / name, write)
                entries[str(Path(CHECKPOINTS, position.name, name))] = entry
            for written in (aside, *self._to_sync):
                sync(written)
            self._to_sync.clear()
        except _write_errors() as error:
            failure = f"rank {self._comm.rank}: {error}"
        self._raise_together(failure, aside)
        self._new_client_files.clear()
        gathered = self._comm.gather(entries)
        if gathered is not None:
            try:
                state: dict[str, Any] = {"metrics_offset": metrics_offset, "seconds": seconds}
                if base_sha256:
                    state |= {"skipped": list(skipped), "base_sha256": base_sha256}
                self._commit(aside, folder, position, gathered, state)
            except OSError as error:
                failure = f"rank 0: {error}"
        self._raise_together(failure, aside)

    def _raise_together(self, failure: str, aside: Path) -> None:
        failures = self._comm.agree(not failure, message=failure)
        if failures:
            if self._comm.is_master():  # a full disk needs the space
                shutil.rmtree(aside, ignore_errors=True)
            reason = " ".join(failures[0].split())
            raise OutputError(
                f"checkpoint: could not be written ({reason}). Free space or fix the "
                f"permissions of {self._run_dir}, then resume with --run-dir "
                f"{shlex.quote(str(self._run_dir))}."
            )

    def _commit(
        self,
        aside: Path,
        folder: Path,
        position: Position,
        gathered: list[dict[str, tuple[int, str]]],
        state: dict[str, Any],
    ) -> None:
        if self._listed_clients is None:  # of the checkpoint that the run has gone on from
            earlier = [p for p in _folders(self._run_dir) if p.name < position.name]
            self._listed_clients = _client_entries(_listed(earlier[-1])) if earlier else {}
        files = dict(self._listed_clients)  # those of earlier rounds stay valid
        for entries in gathered:
            files |= entries
        files = _newest_of_each_client(files)
        state = asdict(position) | state | {"files": files}
        write_atomically(
            aside / STATE, lambda p: p.write_text(json.dumps(state, indent=1), encoding="utf-8")
        )
        sync(aside)
        if folder.exists():
            _set_aside(folder)
        os.replace(aside, folder)
        sync(folder.parent)
        sync(self._run_dir)
        self._listed_clients = _client_entries(files)
        _point_latest(self._run_dir, position)
        with contextlib.suppress(OSError):  # what stays now goes with the next one
            self._prune(position)

    def _prune(self, newest: Position) -> None:
        folders = _folders(self._run_dir)
        for folder in folders[: -self._keep_last]:
            shutil.rmtree(folder)
        kept = folders[-self._keep_last :]
        for folder in _damaged_folders(self._run_dir):
            if folder.name.removeprefix(DAMAGED) <= newest.name:
                shutil.rmtree(folder)
            else:
                kept.append(folder)
        # A manifest that cannot be read now may list any of them: then none is removed.
        used = {name for folder in kept for name in _listed(folder)}
        for path in (self._run_dir / CLIENTS).glob("*/*"):
            name = str(path.relative_to(self._run_dir))
            if name not in used:  # every listed file may be needed to resume from its checkpoint
                path.unlink()


def stage_file(stage_id: int) -> str:
    """Name of a stage's global weights."""
    return f"{STAGE}{stage_id:02d}.safetensors"


def client_file(client_id: int, stage_id: int, data: int, *, round_id: int) -> str:
    """Name, below ``clients``, of what a client keeps of a stage after a round."""
    return f"client_{client_id:04d}/stage_{stage_id:02d}_data_{data:02d}.round_{round_id:06d}.pt"


def client_files(checkpoint: Checkpoint) -> list[str]:
    """Names, below ``clients``, of the files that belong to a checkpoint."""
    names = _listed(checkpoint.path)
    return [n.removeprefix(f"{CLIENTS}/") for n in names if n.startswith(f"{CLIENTS}/")]


def last_rounds(checkpoint: Checkpoint) -> dict[int, int]:
    """By client that keeps something, the round of its newest file in a checkpoint."""
    found = (re.match(r"client_(\d+)/.*\.round_(\d+)\.pt$", n) for n in client_files(checkpoint))
    return {int(match[1]): int(match[2]) for match in found if match}


def _newest_of_each_client(files: Mapping[str, Any]) -> dict[str, Any]:
    newest: dict[str, str] = {}
    for name in sorted(files):  # names of one client and stage sort by round
        newest[name.partition(".round_")[0] if name.startswith(CLIENTS) else name] = name
    return {name: files[name] for name in newest.values()}


def set_aside_after(run_dir: Path, position: Position) -> list[str]:
    """Give the (damaged) checkpoints after the one that a run resumes from another name.

    Returns:
        Their new names; they stay until the run has saved a checkpoint as late as they are.

    Raises:
        CheckpointError: They cannot be renamed.
    """
    later = [folder for folder in _folders(run_dir) if folder.name > position.name]
    if not later:
        return []
    try:
        _point_latest(run_dir, position)
        return [str(_set_aside(folder).relative_to(run_dir)) for folder in later]
    except OSError as error:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: expected to rename {later[0].name}, got"
            f" {error.strerror or error}. Nothing was removed; check the permissions, then give the"
            " same command again."
        ) from error


def _set_aside(folder: Path) -> Path:
    name, number = f"{DAMAGED}{folder.name}", 1
    while (target := folder.with_name(name)).exists():
        number += 1
        name = f"{DAMAGED}{folder.name}_{number}"
    os.replace(folder, target)
    sync(folder.parent)
    return target


def _point_latest(run_dir: Path, position: Position) -> None:
    latest = run_dir / CHECKPOINTS / "latest"
    write_text(latest, position.name + "\n")


def _write_errors() -> tuple[type[Exception], ...]:
    """What a full disk or a missing folder raises: torch.save and safetensors have their own."""
    from safetensors import SafetensorError

    return OSError, RuntimeError, SafetensorError


def _folders(run_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first, damaged ones included."""
    return sorted(p for p in (run_dir / CHECKPOINTS).glob("round_*") if p.is_dir())


def _damaged_folders(run_dir: Path) -> list[Path]:
    return sorted(p for p in (run_dir / CHECKPOINTS).glob(f"{DAMAGED}*") if p.is_dir())


def _listed(folder: Path) -> dict[str, Any]:
    """Files that a checkpoint needs; none if its manifest is damaged, for it is never used then.

    Raises:
        OSError: It cannot be read.
    """
    text = retry_reads(lambda: _text(folder / STATE))
    try:
        return dict(json.loads(text or "")["files"])
    except (ValueError, KeyError, TypeError):
        return {}


def _text(path: Path) -> str | None:
    """Read a file; None where it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None


def _client_entries(files: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in files.items() if name.startswith(f"{CLIENTS}/")}


def find_latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint whose every file is there and unchanged.

    Args:
        run_dir: A run directory.

    Returns:
        The checkpoint, or None where there is none at all, and one line for each newer one that had
        to be passed over.

    Raises:
        CheckpointError: There are checkpoints, and all of them are damaged, or the file system
            does not say.
    """
    passed_over: list[str] = []
    folders = _look_again(run_dir, partial(_folders, run_dir), wrong=_is_lost(run_dir))
    for folder in reversed(folders):
        problem = _look_again(run_dir, partial(_problem, run_dir, folder), wrong=bool)
        if problem is None:
            return _read(folder), passed_over
        passed_over.append(f"checkpoint {folder.name} is damaged: {problem}")
    if passed_over:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: expected an intact checkpoint, got none "
            f"({passed_over[0]}). Restore one from a backup or start in a new --run-dir."
        )
    return None, passed_over


def is_in_mid_round(run_dir: Path) -> bool:
    """Whether the newest checkpoint, intact or not, is of a round that has begun."""
    folders = _folders(run_dir)
    return bool(folders) and "_step_" in folders[-1].name


def find_round(run_dir: Path, num_rounds: int) -> Checkpoint:
    """Find the checkpoint that was saved after ``num_rounds`` rounds.

    Raises:
        CheckpointError: It is not there, or damaged.
    """
    folder = run_dir / CHECKPOINTS / Position(round_id=num_rounds).name
    problem = _look_again(run_dir, partial(_problem, run_dir, folder), wrong=bool)
    if problem is not None:
        raise CheckpointError(
            f"{folder}: expected an intact checkpoint, got one of which {problem}. Remove {run_dir}"
            " and run it again."
        )
    return _read(folder)


def _is_lost(run_dir: Path) -> Callable[[list[Path]], bool]:
    """Whether no checkpoint is found of a run that has recorded something."""
    return lambda folders: not folders and (run_dir / METRICS_FILE).exists()


def _look_again(run_dir: Path, look: Callable[[], T], *, wrong: Callable[[T], bool]) -> T:
    """Look at checkpoints; what seems wrong may only do so for a moment, on a network file system.

    Raises:
        CheckpointError: The file system does not answer.
    """
    try:
        found = retry_reads(look)
        if wrong(found):
            time.sleep(_AGAIN_S)
            found = retry_reads(look)
        return found
    except OSError as error:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: expected a file system that answers, got"
            f" {error.strerror or error} for {error.filename}. Nothing was changed; give the same"
            " command again when the files can be read."
        ) from error


def _read(folder: Path) -> Checkpoint:
    """Read the manifest of a checkpoint that has no problem."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(
        path=folder,
        position=Position(round_id=state["round_id"], step=state["step"]),
        metrics_offset=state["metrics_offset"],
        seconds=float(state.get("seconds", 0.0)),
        skipped=tuple((first, end) for first, end in state.get("skipped", ())),
        base_sha256=state.get("base_sha256", ""),
    )


def _problem(run_dir: Path, folder: Path) -> str | None:
    text = _text(folder / STATE)
    try:
        state = json.loads(text or "")
        files = dict(state["files"])
        offset = int(state["metrics_offset"])
        position = Position(round_id=int(state["round_id"]), step=int(state["step"]))
        entries = [(str(name), int(size), str(digest)) for name, (size, digest) in files.items()]
    except (ValueError, KeyError, TypeError):
        return f"{STATE} cannot be read"
    if position.name != folder.name or offset < 0:
        return f"{STATE} is that of another checkpoint"
    for name, size, digest in entries:
        try:
            with open(run_dir / name, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{name} has {found} bytes instead of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} has other content than was written"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
    return None
