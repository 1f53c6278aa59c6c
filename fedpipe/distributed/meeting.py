"""Ranks under somebody else's launcher meet before any process group exists."""

from __future__ import annotations

import base64
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fedpipe.distributed.comm import TIMEOUT_S, tcp_store
from fedpipe.distributed.env import ProcessEnv
from fedpipe.errors import FedPipeError

_POLL_S = 0.1
_CONNECT_S = 5.0
_FAREWELL_S = 60.0
"""So long rank 0 waits for the others to learn why it cannot start; they may still import torch."""

T = TypeVar("T")


class Meeting:
    """Where ranks under somebody else's launcher meet before any process group exists.

    Rank 0 hosts the store of the rendezvous, unless the launcher does, as long as this lives.
    """

    def __init__(self, env: ProcessEnv) -> None:
        """Connect, or wait until rank 0 is there. Every rank, before its ``Comm``."""
        self._env = env
        if env.world_size > 1:
            if not env.hosts_store:
                _wait_for_host(env)
            self._store = tcp_store(env, is_master=env.hosts_store)

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """Make a picklable value on rank 0, however long it takes, and hand it to every rank.

        Args:
            make: Called on rank 0.

        Returns:
            The value.

        Raises:
            FedPipeError: What ``make`` raised, on every rank.

        Collective: every rank, once.
        """
        if self._env.world_size == 1:
            return make()
        if self._env.rank > 0:
            return self._from_rank_0()
        try:
            value = make()
        except FedPipeError as error:
            self._put(error)
            deadline = time.monotonic() + _FAREWELL_S
            while self._store.add(self._key("read"), 0) < self._env.world_size - 1:
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
            raise
        self._put(value)
        return value

    def agree(self, objection: str) -> list[str]:
        """Tell every rank what any of them objects to.

        Args:
            objection: What keeps this rank from going on; empty if nothing does.

        Returns:
            Every rank's objections, the empty ones left out.

        Collective: every rank, once.
        """
        if self._env.world_size == 1:
            return [objection] if objection else []
        keys = [self._key(f"objection/{rank}") for rank in range(self._env.world_size)]
        self._store.set(keys[self._env.rank], objection)
        deadline = time.monotonic() + TIMEOUT_S
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                raise ConnectionError(f"not all {len(keys)} ranks met within {TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        objections = [text.decode() for text in self._store.multi_get(keys)]
        # The host of the store leaves last: the others read from it.
        self._store.add(self._key("agreed"), 1)
        while self._env.hosts_store and self._store.add(self._key("agreed"), 0) < len(keys):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return [text for text in objections if text]

    def _put(self, value: Any) -> None:
        self._store.set(self._key("value"), base64.b64encode(pickle.dumps(value)).decode())

    def _from_rank_0(self) -> Any:
        while not self._store.check([self._key("value")]):
            time.sleep(_POLL_S)
        value = pickle.loads(base64.b64decode(self._store.get(self._key("value"))))
        self._store.add(self._key("read"), 1)
        if isinstance(value, FedPipeError):
            raise value
        return value

    def _key(self, name: str) -> str:
        return f"meeting/{self._env.attempt}/{name}"


def _wait_for_host(env: ProcessEnv) -> None:
    """Wait until somebody listens; unlike torch's own waiting, a signal can end this."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(env.address, timeout=_CONNECT_S).close()
            return
        except OSError:
            time.sleep(_POLL_S)
