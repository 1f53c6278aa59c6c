"""Files and folders that are complete or absent, whenever a machine stops. No torch.

A rename is on the disk once the folder that it happened in has been fsynced, and may get there
before the content of what was renamed. So content comes first, then the name, then its folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fedpipe.errors import OutputError

T = TypeVar("T")

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SYSTEM = {
    *_NO_ROOM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ENOLCK, errno.ENODEV,
}  # fmt: skip
"""What the machine refuses; anything else that the system says is a bug of ours."""

_PASSING = {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN}
"""What a network file system answers while a server or a path to it changes."""
_WAITS_S = (0.2, 0.5, 1.0, 2.0)
_PROBE_BYTES = 2**20


@contextmanager
def system_errors_named() -> Iterator[None]:
    """Turn what the machine refuses into one line; also a decorator.

    Raises:
        OutputError: In the place of an ``OSError`` whose cause lies outside of this program.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _SYSTEM:
            raise
        way_out = "Free space there" if error.errno in _NO_ROOM else "Mend that"
        raise OutputError(
            f"{error.filename or 'a file'}: expected to be let read or write it, got"
            f" {error.strerror}. {way_out}, then give the same command again."
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an ``OSError`` without a file's name say this one: a full write does not know its own."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def patiently(look: Callable[[], T]) -> T:
    """Return what a look at files finds; a file system that does not answer is asked again.

    Args:
        look: Raises ``OSError`` where it cannot see; changes nothing.

    Raises:
        OSError: It still cannot after some seconds, or for a reason that does not pass.
    """
    for wait_s in _WAITS_S:
        try:
            return look()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(wait_s)
    return look()


def sync(path: Path) -> None:
    """Return once a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no fsync for folders: their names need none, or nothing helps.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> tuple[int, str]:
    """Write aside, fsync, rename; return size and SHA-256. Whoever needs the name syncs the folder.

    Args:
        path: Of the file.
        write: Writes its content to the path that it is given.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with naming(path):
            _write(aside, write)
        with open(aside, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # a full disk needs the space
        raise
    return size, digest


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file; where a library fails for a reason of the system, raise that."""
    try:
        write(path)
    except Exception as error:
        _raise_cause(error, path)
        raise


def _raise_cause(error: Exception, path: Path) -> None:
    """Raise what the system said to a library that has failed to write, if that was it."""
    if isinstance(error, OSError):
        return
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    if path.is_file():  # torch does not pass it on
        with open(path, "ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or absent, and on the disk when this returns."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    sync(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder that is complete or absent, in the place of what is there.

    Args:
        folder: Its path.
        write: Makes and fills the folder at the path that it is given.
    """
    aside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with naming(folder):
            try:
                write(aside)
            except Exception as error:
                _raise_cause(error, folder)
                raise
            for path in (*aside.rglob("*"), aside):
                sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
