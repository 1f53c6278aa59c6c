"""Checkpoints: damage is noticed, said and survived; failures leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpipe import files
from fedpipe.distributed.env import ProcessEnv
from fedpipe.errors import CheckpointError
from fedpipe.report.writer import METRICS_FILE
from fedpipe.run import checkpoint
from fedpipe.run.checkpoint import (
    CHECKPOINTS,
    CLIENTS,
    STATE,
    CheckpointWriter,
    Position,
    client_file,
    client_files,
    find_latest,
    find_round,
    set_aside_after,
)
from tests.helpers.cases import every
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config


class _Alone:
    """The collectives of a run of one process."""

    rank = 0

    def is_master(self) -> bool:
        return True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, ok: bool, *, message: str = "") -> list[str]:
        return [] if ok else [message]

    def barrier(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look again without a pause at what seems damaged."""
    monkeypatch.setattr(checkpoint, "_AGAIN_S", 0.0)


def _writer(run_dir: Path, *, keep_last: int = 2) -> CheckpointWriter:
    return CheckpointWriter(run_dir, comm=_Alone(), keep_last=keep_last)  # type: ignore[arg-type]


def _content(text: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(text), None)[1]


def _save(writer: CheckpointWriter, round_id: int, step: int = 0) -> Position:
    position = Position(round_id=round_id, step=step)
    files = {n: _content(f"{n} of {position.name}") for n in ("stage_00", "stage_01")}
    writer.save(position, files, metrics_offset=100 * round_id + step, seconds=step / 2)
    return position


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir())


def _latest(run_dir: Path) -> tuple[Position, list[str]]:
    checkpoint, passed_over = find_latest(run_dir)
    assert checkpoint is not None
    return checkpoint.position, passed_over


def test_what_was_saved_last_is_found(tmp_path: Path) -> None:
    assert find_latest(tmp_path) == (None, [])
    writer = _writer(tmp_path)
    for round_id, step in ((1, 0), (1, 5), (1, 10), (2, 0)):
        position = _save(writer, round_id, step)
        checkpoint, passed_over = find_latest(tmp_path)
        assert checkpoint is not None and passed_over == []
        assert checkpoint.position == position
        assert checkpoint.metrics_offset == 100 * round_id + step
        assert checkpoint.seconds == step / 2
        assert (checkpoint.path / "stage_01").read_text() == f"stage_01 of {position.name}"
        assert (tmp_path / CHECKPOINTS / "latest").read_text() == f"{position.name}\n"
    assert _names(tmp_path) == ["latest", "round_000001_step_000010", "round_000002"]


def test_the_checkpoint_after_a_round_is_found_or_named(tmp_path: Path) -> None:
    writer = _writer(tmp_path, keep_last=9)
    for round_id in (1, 2, 3):
        _save(writer, round_id)
    assert find_round(tmp_path, 2).position == Position(round_id=2)
    _flip(tmp_path / CHECKPOINTS / "round_000002")
    with pytest.raises(CheckpointError, match="round_000002: expected an intact checkpoint, got"):
        find_round(tmp_path, 2)
    with pytest.raises(CheckpointError, match="round_000004"):
        find_round(tmp_path, 4)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "stage_01", 3)


def _flip(folder: Path) -> None:
    content = bytearray((folder / "stage_01").read_bytes())
    content[4] ^= 1
    (folder / "stage_01").write_bytes(content)


def _edit_state(folder: Path, **values: Any) -> None:
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(state | values))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (_truncate, "stage_01 has 3 bytes instead of"),
    "other content": (_flip, "stage_01 has other content than was written"),
    "missing": (lambda f: (f / "stage_01").unlink(), "stage_01 is missing"),
    "no manifest": (lambda f: (f / STATE).unlink(), "state.json cannot be read"),
    "torn manifest": (lambda f: os.truncate(f / STATE, 40), "state.json cannot be read"),
    "empty manifest": (lambda f: os.truncate(f / STATE, 0), "state.json cannot be read"),
    "binary manifest": (lambda f: (f / STATE).write_bytes(b"\xff\0"), "state.json cannot be read"),
    "list": (lambda f: (f / STATE).write_text("[]"), "state.json cannot be read"),
    "no files": (lambda f: _edit_state(f, files=None), "state.json cannot be read"),
    "no digest": (lambda f: _edit_state(f, files={"a": 1}), "state.json cannot be read"),
    "no number": (lambda f: _edit_state(f, step="x"), "state.json cannot be read"),
    "other round": (lambda f: _edit_state(f, round_id=7), "state.json is that of another"),
}


@every("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    first, second = _save(writer, 1), _save(writer, 2)
    spoil, problem = DAMAGES[damage]
    spoil(tmp_path / CHECKPOINTS / second.name)
    position, (line,) = _latest(tmp_path)
    assert position == first
    assert line.startswith("checkpoint round_000002 is damaged: ")
    assert problem in line

    assert set_aside_after(tmp_path, position) == [f"{CHECKPOINTS}/damaged_round_000002"]
    assert _names(tmp_path) == ["damaged_round_000002", "latest", "round_000001"]
    assert (tmp_path / CHECKPOINTS / "latest").read_text() == "round_000001\n"
    writer = _writer(tmp_path)
    _save(writer, 1, step=1)
    assert "damaged_round_000002" in _names(tmp_path), "nothing as late has been saved"
    assert _save(writer, 2) == second
    assert _latest(tmp_path) == (second, [])
    assert _names(tmp_path) == ["latest", "round_000001_step_000001", "round_000002"]


def test_what_is_set_aside_keeps_its_client_files_and_its_predecessor_of_the_same_name(
    tmp_path: Path,
) -> None:
    writer = _writer(tmp_path)
    first = _save(writer, 1)
    name = client_file(3, 1, 0, round_id=1)
    writer.save_client(name, _content("weights"))
    _save(writer, 3)
    (tmp_path / CHECKPOINTS / "damaged_round_000003").mkdir()
    assert set_aside_after(tmp_path, first) == [f"{CHECKPOINTS}/damaged_round_000003_2"]
    _save(_writer(tmp_path), 2)
    assert (tmp_path / CLIENTS / name).is_file()


def test_a_file_that_cannot_be_read_for_a_moment_is_waited_for_and_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that loses a handle, and one that does not show a file yet."""
    position = _save(_writer(tmp_path), 1)
    digest, answers = hashlib.file_digest, [errno.ESTALE, errno.EIO]

    def stale(file: Any, name: str) -> Any:
        if answers:
            code = answers.pop()
            raise OSError(code, os.strerror(code), file.name)
        return digest(file, name)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hashlib, "file_digest", stale)
    assert _latest(tmp_path) == (position, []) and not answers

    answers += [errno.ESTALE] * 99
    with pytest.raises(
        CheckpointError, match=r"checkpoints: expected a file system that answers, got Stale file "
        r"handle for .*stage_00. Nothing was changed; give the same command again"
    ):  # fmt: skip
        find_latest(tmp_path)
    assert _names(tmp_path) == ["latest", position.name]

    answers.clear()
    shown, hidden = tmp_path / CHECKPOINTS, tmp_path / "elsewhere"
    (tmp_path / METRICS_FILE).touch()
    for path in (shown / position.name / "stage_01", shown):
        path.rename(hidden)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.time, "sleep", lambda seconds, to=path: hidden.rename(to))
            assert _latest(tmp_path) == (position, [])


class _Disk:
    """What of a folder is on the disk: content and names as they were at their last fsync."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.folders: set[int] = set()

    def synced(self, path: Path) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            self.folders |= {e.inode() for e in os.scandir(path) if e.is_dir()}
        else:
            self.contents[inode] = path.read_bytes()

    def after_a_crash(self, target: Path, *, renamed: bool) -> Path:
        """Rebuild it; ``renamed``: the names are all there, whatever content has come with them."""
        shutil.rmtree(target, ignore_errors=True)
        if renamed:
            self._now(self.root, target)
        else:
            self._then(self.root.stat().st_ino, target)
        return target

    def _now(self, source: Path, target: Path) -> None:
        target.mkdir()
        for entry in os.scandir(source):
            if entry.is_dir():
                self._now(Path(entry), target / entry.name)
            else:
                (target / entry.name).write_bytes(self.contents.get(entry.inode(), b""))

    def _then(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, child in self.names.get(inode, {}).items():
            if child in self.folders:
                self._then(child, target / name)
            else:
                (target / name).write_bytes(self.contents.get(child, b""))


def test_a_crash_at_any_moment_of_a_save_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes that were not fsynced are lost: content alone, or names as well."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    disk = _Disk(run_dir)
    allowed: list[Position | None] = [None]
    moments = 0

    def check() -> None:
        nonlocal moments
        moments += 1
        busy.append(True)
        for renamed in (False, True):
            left = disk.after_a_crash(tmp_path / "crash", renamed=renamed)
            found, passed_over = find_latest(left)
            assert (found and found.position) in allowed and passed_over == [], moments
        busy.clear()

    def watched(name: str) -> None:
        operation = getattr(os, name)

        def watch(*arguments: Any, **keywords: Any) -> None:
            synced = Path(os.readlink(f"/proc/self/fd/{arguments[0]}")) if name == "fsync" else None
            operation(*arguments, **keywords)
            if busy or not (synced or name != "fsync"):
                return
            if synced is not None:
                disk.synced(synced)
            check()

        monkeypatch.setattr(os, name, watch)

    busy: list[bool] = []
    for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
        watched(name)
    writer = _writer(run_dir, keep_last=1)
    for round_id, step in ((0, 2), (1, 0), (2, 0)):
        position = Position(round_id=round_id, step=step)
        allowed.append(position)
        writer.save_client(client_file(round_id, 0, 0, round_id=round_id), _content("kept"))
        _save(writer, round_id, step)
        del allowed[:-1]
        check()
    assert moments > 60


@every("damage", DAMAGES)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(
    damage: str, tmp_path: Path
) -> None:
    writer = _writer(tmp_path)
    for round_id in (1, 2):
        DAMAGES[damage][0](tmp_path / CHECKPOINTS / _save(writer, round_id).name)
    with pytest.raises(
        CheckpointError, match=r"checkpoints: expected an intact checkpoint, got none "
        r"\(checkpoint round_000002 is damaged: .*\)\. Restore one from a backup or start in a new"
    ):  # fmt: skip
        find_latest(tmp_path)


@every("damage", DAMAGES)
def test_an_older_damaged_checkpoint_stops_neither_saving_nor_pruning(
    damage: str, tmp_path: Path
) -> None:
    writer = _writer(tmp_path)
    DAMAGES[damage][0](tmp_path / CHECKPOINTS / _save(writer, 1).name)
    _save(writer, 2)
    _save(writer, 3)
    assert _latest(tmp_path) == (Position(round_id=3), [])
    assert _names(tmp_path) == ["latest", "round_000002", "round_000003"]


def test_what_a_killed_save_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    first = _save(_writer(tmp_path), 1)
    aside = tmp_path / CHECKPOINTS / ".round_000002.tmp"
    aside.mkdir()
    (aside / "stage_00").write_text("half")
    (aside / "old").write_text("x")
    assert _latest(tmp_path) == (first, [])
    _save(_writer(tmp_path), 2)
    assert _latest(tmp_path) == (Position(round_id=2), [])
    assert not (tmp_path / CHECKPOINTS / "round_000002" / "old").exists()
    assert not aside.exists()


@every("keep_last", [1, 2, 3])
def test_pruning_keeps_the_newest(keep_last: int, tmp_path: Path) -> None:
    writer = _writer(tmp_path, keep_last=keep_last)
    for round_id in range(1, 6):
        _save(writer, round_id)
        expected = range(max(1, round_id - keep_last + 1), round_id + 1)
        folders = [n for n in _names(tmp_path) if n != "latest"]
        assert folders == [f"round_{r:06d}" for r in expected]


@every("keep_last", [1, 2, 3])
def test_no_client_file_that_a_kept_manifest_lists_is_pruned(
    keep_last: int, tmp_path: Path
) -> None:
    """Client 0 trains in every round, client 1 only in the first: its file must stay for ever."""
    writer = _writer(tmp_path, keep_last=keep_last)
    for round_id in range(7):
        for client_id in (0, 1) if round_id == 0 else (0,):
            name = client_file(client_id, 0, 0, round_id=round_id)
            writer.save_client(name, _content(f"{client_id} {round_id}"))
        if round_id % 2 == 0:
            _save(writer, round_id, step=1)
        _save(writer, round_id + 1)
        for folder in (tmp_path / CHECKPOINTS).glob("round_*"):
            for name in json.loads((folder / STATE).read_text())["files"]:
                assert (tmp_path / name).is_file(), f"{folder.name} needs {name}"
    checkpoint, passed_over = find_latest(tmp_path)
    assert checkpoint is not None and passed_over == []
    assert client_files(checkpoint) == [
        client_file(0, 0, 0, round_id=6), client_file(1, 0, 0, round_id=0)
    ]  # fmt: skip
    on_disk = {str(p.relative_to(tmp_path / CLIENTS)) for p in (tmp_path / CLIENTS).glob("*/*")}
    assert len(on_disk) <= keep_last + 1, "what no manifest lists is removed"


def test_a_damaged_client_file_damages_the_checkpoints_that_need_it(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    for round_id in (0, 1):
        name = client_file(3, 1, 0, round_id=round_id)
        writer.save_client(name, _content("weights"))
        _save(writer, round_id + 1)
    (tmp_path / CLIENTS / name).write_text("Weights")
    position, (line,) = _latest(tmp_path)
    assert position == Position(round_id=1)
    assert f"clients/{name} has other content" in line


@pytest.mark.parametrize("obstacle", [CHECKPOINTS, f"{CHECKPOINTS}/.round_000002.tmp"])
def test_a_folder_that_cannot_be_made_is_an_error_and_no_checkpoint(
    obstacle: str, tmp_path: Path
) -> None:
    if obstacle != CHECKPOINTS:
        _save(_writer(tmp_path), 1)
    (tmp_path / obstacle).write_text("a file where a folder should be")
    with pytest.raises(
        CheckpointError, match=r"^checkpoint: could not be written \(rank 0: .*\)\. Free space or "
        r"fix the permissions of .*, then resume with --run-dir "
    ):  # fmt: skip
        _save(_writer(tmp_path), 2)
    assert not (tmp_path / CHECKPOINTS / "round_000002").exists()


def test_a_client_file_that_cannot_be_written_is_an_error_of_the_next_save(tmp_path: Path) -> None:
    (tmp_path / CLIENTS).write_text("a file where a folder should be")
    writer = _writer(tmp_path)
    writer.save_client(client_file(0, 0, 0, round_id=0), _content("x"))
    with pytest.raises(CheckpointError, match=r"could not be written \(rank 0: .*clients"):
        _save(writer, 1)
    assert find_latest(tmp_path) == (None, [])


def _save_on_a_full_disk(env: ProcessEnv, run_dir: Path, library: str, owner: str) -> list[str]:
    """Let no file of this process grow beyond 4 KiB: writes then fail as on a full disk."""
    import torch
    from safetensors.torch import save_file

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    first = _save(_writer(run_dir), 1)
    tensors = {"weight": torch.ones(5000)}

    def write(path: Path) -> None:
        torch.save(tensors, path) if library == "torch" else save_file(tensors, path)

    writer = _writer(run_dir)
    files = {"stage_00": write}
    if owner == "client":
        writer.save_client(client_file(0, 0, 0, round_id=1), write)
        files = {}
    try:
        writer.save(Position(round_id=2), files, metrics_offset=0)
    except CheckpointError as error:
        assert _latest(run_dir) == (first, [])
        return [str(error)]
    return ["saved"]


@pytest.mark.parametrize("owner", ["stage", "client"])
@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_full_disk_is_an_error_in_one_line_and_no_checkpoint(
    library: str, owner: str, tmp_path: Path
) -> None:
    """torch.save and safetensors do not raise OSError where the disk is full.

    In a process of its own: the limit would also hold for the file that pytest's output goes to.
    """
    ((message,),) = run_distributed(_save_on_a_full_disk, 1, tmp_path, library, owner)
    assert re.search(r"could not be written \(rank 0: [^\n]*$", message)
    assert _names(tmp_path) == ["latest", "round_000001"], "what was half written makes room"


def _fail_on_one(env: ProcessEnv, run_dir: Path, failing: int) -> list[str]:
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid

    comm = Comm(Grid.from_config(tiny_config()), env, edges=())
    writer = CheckpointWriter(run_dir, comm=comm, keep_last=2)

    def write(path: Path) -> None:
        path.write_text("x")

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    results = []
    for round_id, bad in ((1, -1), (2, failing), (3, -1)):
        name = f"rank_{env.rank}"
        try:
            writer.save(
                Position(round_id=round_id),
                {name: fail if env.rank == bad else write},
                metrics_offset=0,
            )
            results.append("saved")
        except CheckpointError as error:
            results.append(str(error))
    comm.close()
    return results


def test_one_rank_that_cannot_write_fails_every_rank_and_hangs_none(tmp_path: Path) -> None:
    for results in run_distributed(_fail_on_one, 4, tmp_path, 2, timeout_s=180):
        assert results[0] == results[2] == "saved"
        assert "(rank 2: [Errno 28] No space left on device: '" in results[1]
    assert _names(tmp_path) == ["latest", "round_000001", "round_000003"]
    state = json.loads((tmp_path / CHECKPOINTS / "round_000003" / STATE).read_text())
    assert len(state["files"]) == 4, "every rank's file is listed"
