"""What the machine refuses: one line with its cause and the file, and nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpipe.config.load import load_config
from fedpipe.data.cache import cache_path
from fedpipe.errors import CheckpointError, CorpusError, LaunchError, OutputError
from fedpipe.files import replace_folder, system_errors_named, with_file_name, write_text
from fedpipe.run.run_dir import locked
from tests.helpers.cli import REPOSITORY


def _raise(code: int, *path: str) -> None:
    raise OSError(code, os.strerror(code), *path)


def test_what_the_system_refuses_is_named_and_a_failure_not_the_users_error() -> None:
    with pytest.raises(
        OutputError, match=r"^/x: expected to read or write it, got No space left on device"
        r"\. Free space there, then give the same command again\.$"
    ) as found, system_errors_named():  # fmt: skip
        _raise(errno.ENOSPC, "/x")
    assert isinstance(found.value, LaunchError)
    with pytest.raises(OutputError, match=r"got Read-only file system\. Correct that"):
        with system_errors_named(), with_file_name(Path("/x")):
            _raise(errno.EROFS)
    with pytest.raises(FileNotFoundError), system_errors_named():  # a bug keeps its traceback
        _raise(errno.ENOENT, "/x")


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o700])
def test_whoever_may_read_a_folder_may_read_its_files(mode: int, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)
        (path / "weights").touch(mode=0o600)  # as safetensors does

    replace_folder(tmp_path / "folder", write)
    assert (tmp_path / "folder/weights").stat().st_mode & 0o777 == mode & 0o666


def test_a_write_that_fails_names_its_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "a", tmp_path / "b"
    write_text(file, "old")
    replace_folder(folder, lambda path: (path.mkdir(), (path / "old").touch()))

    def full(path: Path) -> None:
        path.mkdir()
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    with pytest.raises(OSError, match=r"No space left on device: '.*/b'"):
        replace_folder(folder, full)
    file.chmod(0o600)
    os.symlink("/dev/full", tmp_path / ".a.part")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "old"]


def test_a_file_system_without_locks_is_told_from_a_run_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path), pytest.raises(CheckpointError, match=r"got .* in use\. Wait for it"):
        with locked(tmp_path):
            pass
    monkeypatch.setattr(fcntl, "flock", lambda *_: _raise(errno.ENOLCK))
    with pytest.raises(
        CheckpointError, match=r"--run-dir: expected a file system that can lock a file, got .* on "
        r"one that cannot \(No locks available\)\. Choose a directory on another, or have it"
    ):  # fmt: skip
        with locked(tmp_path):
            pass


def test_a_home_directory_is_only_asked_for_where_nothing_else_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_path(load_config(None, [f"data.cache_dir={tmp_path}"])) == tmp_path
    with pytest.raises(
        CorpusError, match=r"data\.cache_dir: expected a directory, got none, and there is no home "
        r"directory to keep prepared text in\. Set data\.cache_dir"
    ):  # fmt: skip
        cache_path(load_config(None, []))


_START = """
import sys
from fedpipe.errors import LaunchError
from fedpipe.cluster import local as module
if len(sys.argv) > 1:
    module._LONGEST_SOCKET = 35
try:
    process = module.fork_server(["os"]).Process(target=print, args=("started",))
except LaunchError as error:
    sys.exit(str(error))
process.start()
process.join()
"""


def test_a_rank_starts_where_the_path_for_temporary_files_is_too_long_for_a_socket(
    tmp_path: Path,
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    variables = {**os.environ, "TMPDIR": str(long), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _START]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "started\n"
    refused = subprocess.run([*command, "x"], env=variables, capture_output=True, text=True)
    assert refused.stderr.startswith(
        "TMPDIR: expected a writable directory whose path has at most 3 bytes, got '"
    )
