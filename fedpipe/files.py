"""Write files and folders that are complete or absent, whenever the machine stops. No torch.

A rename reaches the disk when its folder is fsynced, possibly before the content of the renamed
file does. So the content is fsynced first, then the file is renamed, then its folder is fsynced.
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
_SYSTEM = _NO_ROOM | {
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENAMETOOLONG,
    errno.ENOLCK,
    errno.ENODEV,
}
"""Errors whose cause is the machine; every other ``OSError`` is a bug of fedpipe."""

_TRANSIENT = {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN}
"""Errors of a network file system that pass once its server is reachable again."""
_WAITS_S = (0.2, 0.5, 1.0, 2.0)
_PROBE_BYTES = 2**20


@contextmanager
def system_errors_named() -> Iterator[None]:
    """Replace an ``OSError`` of the machine by a message of one line; also usable as a decorator.

    Raises:
        OutputError: An ``OSError`` came up whose cause is outside of this program.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _SYSTEM:
            raise
        way_out = "Free space there" if error.errno in _NO_ROOM else "Correct that"
        raise OutputError(
            f"{error.filename or 'a file'}: expected to read or write it, got"
            f" {error.strerror}. {way_out}, then give the same command again."
        ) from error


@contextmanager
def with_file_name(path: Path) -> Iterator[None]:
    """Add a file name to an ``OSError`` that has none, as when a write finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def retry_reads(look: Callable[[], T]) -> T:
    """Read files, again after a pause while a network file system does not answer.

    Args:
        look: Reads, and changes nothing. Raises ``OSError`` where it cannot read.

    Raises:
        OSError: Reading still fails after some seconds, or the error is not a transient one.
    """
    for wait_s in _WAITS_S:
        try:
            return look()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
        time.sleep(wait_s)
    return look()


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not support fsync of a folder: there is nothing to wait for.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> tuple[int, str]:
    """Write a file under a temporary name, fsync it, and rename it.

    The caller fsyncs the folder, once for all files in it.

    Args:
        path: The finished file.
        write: Writes the content to the path that it is given.

    Returns:
        Bytes and SHA-256 of the file.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with with_file_name(path):
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
    """Write a file; where a library hides an error of the system, raise the system's error."""
    try:
        write(path)
    except Exception as error:
        _raise_cause(error, path)
        raise


def _raise_cause(error: Exception, path: Path) -> None:
    """Raise the ``OSError`` behind a library's failure to write, if there is one."""
    if isinstance(error, OSError):
        return
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    if path.is_file():  # torch does not report the cause, so write once more to find it
        with open(path, "ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent, and on the disk when this returns."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    sync(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder that is complete or absent, and replace the one that is there.

    Whoever may read the folder may read its files.

    Args:
        folder: The finished folder.
        write: Makes and fills the folder at the path that it is given.
    """
    aside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with with_file_name(folder):
            try:
                write(aside)
            except Exception as error:
                _raise_cause(error, folder)
                raise
            readable = aside.stat().st_mode & 0o666  # safetensors makes files for the owner only
            for path in (*aside.rglob("*"), aside):
                if path.is_file():
                    path.chmod(readable)
                sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
