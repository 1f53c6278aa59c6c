"""Ranks under somebody else's launcher meet before any process group exists."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpipe.distributed.board import Board
from fedpipe.distributed.comm import host_store, tcp_store
from fedpipe.distributed.env import ProcessEnv, why_a_rank
from fedpipe.errors import FedPipeError, LaunchError, TopologyError, error_named
from fedpipe.printable import printable

JOIN_S = 600.0
"""So long ranks wait for one that has not shown up yet; they say so meanwhile."""
_KNOWN_S = 8.0
"""A host that does not resolve, or that there is no way to, may be so for a moment only."""
_ANSWER_S = 15.0
"""The store answers at once; what accepts a connection and does not is another program."""
_TELL_S = 10.0
"""After this a wait is told of, and then now and again."""
_POLL_S = 0.1
_CONNECT_S = 5.0
_FAREWELL_S = 60.0
"""So long rank 0 waits for the others to learn why it cannot start; they may still import torch."""
SHARED_WITHIN_S = 5.0
"""A network file system shows a new file, asked for the first time, within this."""
_TOKEN = re.compile(r"\.meeting-[0-9a-f]{32}\.part")
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)

Notify = Callable[[str], None]
"""Shows a line."""


class Meeting:
    """Where ranks under somebody else's launcher meet before any process group exists.

    Rank 0 hosts the store of the rendezvous, unless the launcher does, as long as this lives.
    """

    def __init__(self, env: ProcessEnv, *, notify: Notify) -> None:
        """Connect, or wait until rank 0 is there.

        Args:
            env: This process' place in the run.
            notify: Told of a wait.

        Raises:
            TopologyError: The address of the rendezvous cannot be used.
            LaunchError: Nobody has come.

        Collective: every rank, before its ``Comm``.
        """
        self._env, self._notify = env, notify
        self.board: Board | None = None
        """Of the run; None for a single process."""
        if env.world_size > 1:
            if not env.hosts_store:
                _wait_for_host(env, notify)
                store = _within(_ANSWER_S, env, lambda: tcp_store(env))
            else:
                listener = listen(env)
                store = _within(_ANSWER_S, env, lambda: host_store(listener))
            self.board = Board(store, attempt=env.attempt)

    def share_secret(self, choose: Callable[[], Path]) -> None:
        """Agree on a secret that signs everything from now on: a file of this user alone.

        Args:
            choose: Called on rank 0; returns the directory of the run, which exists.

        Raises:
            FedPipeError: What ``choose`` raised, on every rank.
            TopologyError: Not every rank sees the directory, or not as its user's.
            LaunchError: A rank has not come.

        Collective: every rank, once.
        """
        board = self.board
        if board is None:
            choose()
            return
        with contextlib.ExitStack() as stack:
            objection = ""
            if self._env.rank == 0:
                with self._refusal_told():
                    token = stack.enter_context(_token(choose()))
                    board.secret = _read(token)
                    board.post("hello", str(token))
            else:
                hello = self._from_rank_0("hello", patience_s=JOIN_S, signed=False)
                token = Path(str(hello))
                try:
                    board.secret = _read(token)
                    board.posted(["hello"])  # is signed with it
                except OSError:
                    objection = str(token.parent)
            for where in self.agree("secret", objection, patience_s=JOIN_S):
                folder, _, host = where.rpartition(" ")
                raise not_shared("--run-dir", folder, host)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """Make a value on rank 0, however long it takes, and hand it to every rank.

        Args:
            make: Called on rank 0; returns what JSON can hold.

        Returns:
            The value.

        Raises:
            FedPipeError: What ``make`` raised, on every rank.

        Collective: every rank, once.
        """
        if self.board is None:
            return make()
        if self._env.rank > 0:
            return self._from_rank_0("value", patience_s=None, signed=True)
        with self._refusal_told():
            value = make()
        self.board.post("value", value)
        return value

    def agree(self, subject: str, objection: str, *, patience_s: float | None = None) -> list[str]:
        """Tell every rank what any of them objects to.

        Args:
            subject: To what; a word that is used once.
            objection: What keeps this rank from going on; empty if nothing does.
            patience_s: For ranks that nobody has seen yet; None waits for as long as they live.

        Returns:
            Every rank's objections, each followed by its host; the empty ones left out.

        Raises:
            LaunchError: Not all ranks have come in time.

        Collective: every rank, once.
        """
        host = socket.gethostname()
        if self.board is None:
            return [f"{objection} {host}"] if objection else []
        board, ranks = self.board, range(self._env.world_size)
        # Whoever does not see the secret cannot sign: an objection may only refuse a start.
        board.post(f"{subject}/{self._env.rank}", f"{objection} {host}" if objection else "")
        keys = [f"{subject}/{rank}" for rank in ranks]
        for waited_s in self._wait():
            found = board.peek(keys)
            if found is not None:
                break
            self._check_patience(
                waited_s, patience_s, lambda: [r for r in ranks if board.peek([keys[r]]) is None]
            )
        self._leave_last(f"{subject}-read")
        return [printable(str(text)) for text in found or () if text]

    # -- waiting -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _refusal_told(self) -> Iterator[None]:
        """Tell the other ranks what is wrong on rank 0; it goes when they know."""
        try:
            yield
        except FedPipeError as error:
            assert self.board is not None
            self.board.post("refused", [type(error).__name__, str(error)])
            self._leave_last("refused-read")
            raise

    def _from_rank_0(self, key: str, *, patience_s: float | None, signed: bool) -> Any:
        board = self.board
        assert board is not None
        for waited_s in self._wait():
            if (refused := board.peek(["refused"])) is not None:
                kind, text = map(str, refused[0])
                self._leave_last("refused-read")
                error = error_named(kind, text) or LaunchError(text)
                error.reported = True
                raise error
            found = board.peek([key])
            if found is not None:
                break
            self._check_patience(waited_s, patience_s, lambda: [0])
        if not signed:
            return found and found[0]
        values = board.posted([key])
        assert values is not None, "it was there"
        return values[0]

    def _leave_last(self, key: str) -> None:
        """Note that this rank has read; the host of the store waits for all, who read from it."""
        assert self.board is not None
        keys = [f"{key}/{rank}" for rank in range(self._env.world_size)]
        self.board.post(keys[self._env.rank], True)
        deadline = time.monotonic() + _FAREWELL_S
        while self._env.rank == 0 and self.board.peek(keys) is None:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)

    def _wait(self) -> Iterator[float]:
        """Give the seconds waited so far, again and again; a signal can end it."""
        started = time.monotonic()
        self._tell_at = _TELL_S
        while True:
            yield time.monotonic() - started
            time.sleep(_POLL_S)

    def _check_patience(
        self, waited_s: float, patience_s: float | None, missing: Callable[[], list[int]]
    ) -> None:
        if patience_s is None or waited_s < min(self._tell_at, patience_s):
            return
        ranks = missing()
        whom = f"rank {', '.join(map(str, ranks))}"
        if waited_s >= patience_s:
            raise LaunchError(
                f"{whom}: expected to meet within {patience_s:.0f} s, got no sign of life. See the "
                f"launcher's log of it, and start all ranks again. {why_a_rank()}."
            )
        self._tell_at = 2 * waited_s
        if self._env.rank == 0 or ranks == [0]:  # one rank tells that another is missing
            left = f"{patience_s - waited_s:.0f} s more"
            self._notify(f"waiting for {whom}, {left}. {why_a_rank()}")


def not_shared(key: str, folder: str, host: str) -> TopologyError:
    """The error that says which folder another node does not see."""
    return TopologyError(
        f"{key}: expected a folder that all nodes share, got {folder}, which is another one on "
        f"{host}. Choose a folder of the network file system."
    )


# -- the secret ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _token(directory: Path) -> Iterator[Path]:
    """Leave the secret in a file that only this user reads; take it away again."""
    path = directory / f".meeting-{secrets.token_hex(16)}.part"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_hex(32).encode())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    """Read the secret of a run, as soon as the file system shows it.

    Raises:
        OSError: It does not.
        TopologyError: It may be somebody else's.
    """
    if not _TOKEN.fullmatch(path.name):
        raise _foreign(path)
    deadline = time.monotonic() + SHARED_WITHIN_S
    while True:
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                    raise _foreign(path)
                if secret := file.read():
                    return secret
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def _foreign(path: Path) -> TopologyError:
    return TopologyError(
        f"--run-dir: expected a folder whose files belong to the user of this rank, got "
        f"{path}. Start all ranks as one user, on a file system that keeps owners, or "
        "choose another MASTER_PORT if it is not a file of this run."
    )


# -- the address -----------------------------------------------------------------------------------


def listen(env: ProcessEnv) -> socket.socket:
    """Listen at the address of the rendezvous: where it is one of this host, nowhere else.

    Args:
        env: Of rank 0.

    Returns:
        The socket.

    Raises:
        TopologyError: The host does not resolve, or its port is taken.
    """
    host, port = env.address
    local = host == "localhost" or _is_loopback(host)
    places: list[tuple[socket.AddressFamily, str]] = [
        (family, address) for family, address in _resolve(env) if local or not _is_loopback(address)
    ]
    # A name may mean another address elsewhere than here (a loopback one, one behind a gateway).
    for family, address in [*places, (socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address == "::":
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((address, port))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise TopologyError(
                    f"MASTER_PORT: expected a free port of {socket.gethostname()}, got {port} "
                    f"({error.strerror}). Choose another one."
                ) from None
            continue
        return listener
    raise TopologyError(
        f"MASTER_ADDR: expected an address of {socket.gethostname()}, where rank 0 is, got {host}. "
        "Name this host, or start rank 0 on the other one."
    )


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _resolve(env: ProcessEnv) -> Sequence[tuple[socket.AddressFamily, str]]:
    """Addresses of the rendezvous, version 4 first.

    Raises:
        TopologyError: There are none.
    """
    host, port = env.address
    deadline = time.monotonic() + _KNOWN_S
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return sorted({(entry[0], str(entry[4][0])) for entry in found})
        except OSError as error:
            if time.monotonic() > deadline:
                raise _unknown_host(host, error) from None
            time.sleep(_POLL_S)


def _unknown_host(host: str, error: OSError) -> TopologyError:
    return TopologyError(
        f"MASTER_ADDR: expected a host that {socket.gethostname()} can reach, got {host} "
        f"({error.strerror}). Name the host of rank 0 as all nodes know it."
    )


def _wait_for_host(env: ProcessEnv, notify: Notify) -> None:
    """Wait until somebody listens; unlike torch's own waiting, a signal can end this.

    Raises:
        TopologyError: The host is not known, or there is no way to it.
        LaunchError: Nobody has come.
    """
    host, port = env.address
    started, tell_at = time.monotonic(), _TELL_S
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
            return
        except OSError as error:
            waited_s = time.monotonic() - started
            cause = error.strerror or "no answer"
            known = isinstance(error, socket.gaierror) or error.errno in _NO_WAY
            if known and waited_s > _KNOWN_S:
                raise _unknown_host(host, error) from None
            if waited_s > JOIN_S:
                raise LaunchError(
                    f"rank 0: expected it at {host}:{port} within {JOIN_S:.0f} s, got none "
                    f"({cause}). See its log, and whether MASTER_ADDR and MASTER_PORT are its own. "
                    f"{why_a_rank()}."
                ) from None
            if waited_s > tell_at:
                tell_at = 2 * waited_s
                left = f"{JOIN_S - waited_s:.0f} s more"
                whom = f"rank {env.rank} waits for rank 0 at {host}:{port}"
                notify(f"{whom} ({cause}), {left}. {why_a_rank()}")
            time.sleep(_POLL_S)


def _within(limit_s: float, env: ProcessEnv, connect: Callable[[], Any]) -> Any:
    """Connect to a store; torch would wait for ever for one that does not speak its protocol.

    Raises:
        TopologyError: It does not.
    """
    made: list[Any] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # torch goes on trying; here it has had its time
            made.append(connect())

    thread = threading.Thread(target=run, name="connect", daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(_POLL_S)  # a signal is taken between two
    if made:
        return made[0]
    host, port = env.address
    raise TopologyError(
        f"MASTER_PORT: expected the store of rank 0 at {host}:{port}, got another program, which "
        "does not answer like it. Choose another port."
    )
