"""The cache of prepared text: its directory, its keys, and entries that are complete or absent."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpipe.config.schema import RunConfig
from fedpipe.data.digests import (
    FileDigests,
    cached_digest,
    digest,
    file_digest,
    load_memo,
    save_memo,
)
from fedpipe.data.sources import Source, data_files
from fedpipe.errors import CorpusError
from fedpipe.files import sync

FORMAT = 2
"""Version of prepared files; increase it when their format or the packing into blocks changes."""

_KEY_LENGTH = 24


def cache_root(config: RunConfig) -> Path:
    """Create the cache directory if it is missing, readable for its owner only.

    Args:
        config: The run; an empty ``data.cache_dir`` means ``$XDG_CACHE_HOME/fedpipe``, or
            ~/.cache/fedpipe.

    Returns:
        An existing, writable directory.

    Raises:
        CorpusError: The directory cannot be created or written.
    """
    root = cache_path(config)
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=root).close()
    return root


def cache_path(config: RunConfig) -> Path:
    """Return the path of the cache directory, which need not exist; see ``cache_root``."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).absolute()
    try:
        usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise CorpusError(
            "data.cache_dir: expected a directory, got none, and there is no home directory to keep"
            " prepared text in. Set data.cache_dir, or the variable HOME."
        ) from None
    return Path(usual, "fedpipe").absolute()


def cached_digests(sources: tuple[Source, ...], root: Path) -> list[FileDigests] | None:
    """Return the result of ``content_digests`` from the cache alone; None if a file has none."""
    digests = []
    for source in sources:
        digests.append(_hub_digests(source, root))
        for path in data_files(source):
            known = cached_digest(path, root=root)
            if known is None:
                return None
            digests[-1].append((Path(path).name, known))
    return digests


def content_digests(
    sources: tuple[Source, ...], root: Path, *, progress: Callable[[int, int], None]
) -> list[FileDigests]:
    """Compute the digests of every source's files; an unchanged file is read once only.

    A hub dataset has the fingerprint under which it was last opened, or an empty one.

    Args:
        sources: The sources.
        root: The cache directory, which keeps the digests of files.
        progress: Called with the bytes read and the bytes of all files.

    Returns:
        Names and digests of each source's files, in reading order.
    """
    files = {source: data_files(source) for source in sources}
    total = sum(os.path.getsize(path) for paths in files.values() for path in paths)
    done = 0
    digests = []
    for source, paths in files.items():
        digests.append(_hub_digests(source, root))
        for path in paths:
            content = file_digest(path, key=source.key, root=root)
            digests[-1].append((Path(path).name, content))
            done += os.path.getsize(path)
            progress(done, total)
    return digests


def save_hub_digest(source: Source, fingerprint: str, root: Path) -> None:
    """Store the fingerprint of a hub dataset, so that the next run finds its prepared text."""
    save_memo(f"hub:{source.path}", {"digest": fingerprint}, root)


def cache_key(
    config: RunConfig,
    *,
    tokenizer: FileDigests,
    sources: tuple[Source, ...],
    digests: list[FileDigests],
) -> str:
    """Compute the key of prepared text from all that it depends on: content and settings, no paths.

    Args:
        config: The run.
        tokenizer: Digests of the tokenizer's files.
        sources: Training and held-out sources.
        digests: Digests of each source's files.

    Returns:
        The name of the directory for this prepared text.
    """
    data = config.data
    seeded = data.partition in ("iid", "dirichlet")
    by_column = data.partition in ("column", "dirichlet")
    settings = {
        "format": FORMAT,
        "sources": [
            [source.key, source.entry, source.kind, [content for _, content in files]]
            for source, files in zip(sources, digests, strict=True)
        ],
        "tokenizer": tokenizer,
        "sequence_length": data.sequence_length,
        "num_masked": data.num_masked,
        "text_column": data.text_column,
        "partition": data.partition,
        "partition_column": data.partition_column if by_column else "",
        "dirichlet_alpha": data.dirichlet_alpha if data.partition == "dirichlet" else 0,
        "num_clients": config.federation.num_clients,
        "seed": config.seed if seeded else 0,
    }
    return digest(settings)[:_KEY_LENGTH]


@contextmanager
def building(root: Path, key: str) -> Iterator[Path]:
    """Yield a directory to fill, which becomes ``root/prepared/key`` if no error comes up.

    Only its owner can read it, whatever the umask says, because tokens are text. A process that is
    killed before the rename leaves a directory under a temporary name, which the next build
    removes. If two processes build the same key, the result of the first one is kept.

    Args:
        root: The cache directory.
        key: Name of the finished directory; an incomplete one under that name is replaced.

    Yields:
        An empty directory on the same file system.

    Raises:
        CorpusError: The files cannot be written, for example because the disk is full.
    """
    home = root / "prepared"
    with _writing(home):
        home.mkdir(exist_ok=True)
        _remove_abandoned(home)
        temporary = _temporary(home)
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            _publish(temporary, home / key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def discard(directory: Path) -> None:
    """Remove a damaged directory from the cache: rename it first, then delete its files."""
    with _writing(directory):
        doomed = _temporary(directory.parent)
        with suppress(FileNotFoundError):
            directory.rename(doomed / "old")
        shutil.rmtree(doomed, ignore_errors=True)


def _temporary(home: Path) -> Path:
    prefix = f".building.{socket.gethostname()}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, dir=home))


def _publish(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if not (final / "manifest.json").is_file():
            raise
    sync(final.parent)


def _remove_abandoned(home: Path) -> None:
    """Delete what killed builds of this host have left; other hosts clean up after themselves."""
    host = socket.gethostname()
    for path in home.glob(f".building.{host}.*"):
        pid = path.name.removeprefix(f".building.{host}.").split(".")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"data.cache_dir: expected a writable directory, got {str(directory)!r}: "
            f"{error.strerror or error}. Set data.cache_dir to a place with room."
        ) from error


def _hub_digests(source: Source, root: Path) -> FileDigests:
    return [(f"hf:{source.path}", hub_digest(source, root))] if source.kind == "hub" else []


def hub_digest(source: Source, root: Path) -> str:
    """Return the stored fingerprint of a hub dataset; empty if it has never been opened."""
    return str(load_memo(f"hub:{source.path}", root).get("digest", ""))
