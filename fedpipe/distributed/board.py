"""Short texts that the ranks of a run leave for each other, signed with the run's secret. No torch.

What a rank reads here is JSON that carries the signature of whoever knows the secret. Without one,
in the private folder of a local run or before the ranks have met, values are not signed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from fedpipe.errors import LaunchError


class Store(Protocol):
    """What a board needs of torch's store."""

    def set(self, key: str, value: str) -> Any:
        """Write a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def multi_get(self, keys: list[str]) -> Sequence[bytes]:
        """Read values that are there."""


class Board:
    """Values by key that every rank of a run can write and read; nothing here waits for a rank."""

    def __init__(self, store: Store, *, attempt: int) -> None:
        """Use a store.

        Args:
            store: Reached by every rank; kept alive. Its calls never return while its host is
                stopped.
            attempt: What an earlier attempt has left under another one is not read.
        """
        self._store, self._attempt = store, attempt
        self.secret = b""
        """Signs every value from now on."""
        self._counting = threading.Lock()
        self._num_asked, self._num_answered = 0, 0

    def post(self, key: str, value: Any) -> None:
        """Leave a value that JSON can hold, from any thread.

        Raises:
            ConnectionError: The store is gone.
        """
        text = json.dumps(value)
        with self._question():
            self._store.set(self._path(key), f"{self._sign(key, text)} {text}")

    def posted(self, keys: Sequence[str]) -> list[Any] | None:
        """Return what was left under some keys, None until all of it is there.

        Raises:
            LaunchError: A value is not signed by a rank of this run.
            ConnectionError: The store is gone.
        """
        texts = self._texts(keys)
        if texts is None:
            return None
        return [self._open(key, text) for key, text in zip(keys, texts, strict=True)]

    def peek(self, keys: Sequence[str]) -> list[Any] | None:
        """As ``posted``, whoever wrote it: never to be relied on."""
        texts = self._texts(keys)
        if texts is None:
            return None
        values: list[Any] = []
        for text in texts:
            values.append(None)
            with contextlib.suppress(ValueError):
                values[-1] = json.loads(text.partition(" ")[2])
        return values

    def _texts(self, keys: Sequence[str]) -> list[str] | None:
        paths = [self._path(key) for key in keys]
        with self._question():
            if not self._store.check(paths):
                return None
            return [bytes(value).decode(errors="replace") for value in self._store.multi_get(paths)]

    def _open(self, key: str, signed: str) -> Any:
        signature, _, text = signed.partition(" ")
        try:
            if hmac.compare_digest(signature.encode(), self._sign(key, text).encode()):
                return json.loads(text)
        except ValueError:
            pass
        raise LaunchError(
            f"MASTER_ADDR, MASTER_PORT: expected values signed by this run's ranks, got another one"
            f" under {key!r}. Another program writes there: start the run again with another"
            " MASTER_PORT."
        )

    def unanswered(self) -> int:
        """Number of the question that the store has not answered yet; 0 while it owes none."""
        with self._counting:
            return self._num_answered + 1 if self._num_asked > self._num_answered else 0

    @contextlib.contextmanager
    def _question(self) -> Iterator[None]:
        """Count what the store is asked, and tell its end from torch's other errors."""
        with self._counting:
            self._num_asked += 1
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(
                "the store of the run is gone: rank 0 or the launcher that hosts it has ended"
            ) from error
        finally:
            with self._counting:
                self._num_answered += 1

    def _sign(self, key: str, text: str) -> str:
        if not self.secret:
            return "-"
        message = f"{self._path(key)}\n{text}".encode()
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()

    def _path(self, key: str) -> str:
        return f"board/{self._attempt}/{key}"
