"""Assign documents to clients: pure functions of column values, sizes and a seed.

The rule is derived from the training text and applied to the held-out text too, so that a client is
scored on the kind of text that it trains on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpipe.errors import CorpusError

UNASSIGNED = -1
"""Client id of a held-out document whose column value does not occur in the training text."""

# Makes the random streams of the partition differ from other streams of the same seed.
_STREAM = 0x70617274


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """What a partition depends on: the documents of a split, in corpus order."""

    codes: NDArray[np.int32]
    """(documents,) index into ``values``; index of the entry for ``paths``, 0 for ``iid``."""
    values: tuple[str, ...]
    """Distinct values of the partition column; empty without such a column."""
    sizes: tuple[int, ...]
    """Characters of text for each value."""

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return len(self.codes)


def by_column(
    train: Documents, valid: Documents | None, *, num_clients: int, column: str
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Give every column value, with all its documents, to one client.

    The values are taken in order of their text, the largest first, and each goes to the client with
    the least text so far. With as many values as clients, every client gets one.

    Args:
        train: Training documents.
        valid: Held-out documents, assigned by the values of the training text.
        num_clients: Number of clients.
        column: Name of the column, for the error.

    Returns:
        Client ids of the training and of the held-out documents; ``UNASSIGNED`` for a held-out
        document whose value does not occur in the training text.

    Raises:
        CorpusError: There are fewer values than clients.
    """
    if len(train.values) < num_clients:
        raise CorpusError(
            f"data.partition_column: expected at least {num_clients} values of {column!r} "
            f"(federation.num_clients), got {len(train.values)}. "
            f"Set federation.num_clients={max(1, len(train.values))} or data.partition=iid."
        )
    order = sorted(range(len(train.values)), key=lambda i: (-train.sizes[i], train.values[i]))
    client_of = np.empty(len(train.values), dtype=np.int32)
    filled = np.zeros(num_clients, dtype=np.int64)
    for index in order:
        client_of[index] = client = int(filled.argmin())
        # A value without text counts as one character, or its client would get the next one too.
        filled[client] += max(1, train.sizes[index])
    return client_of[train.codes], _apply_map(train.values, client_of, valid)


def iid(
    train: Documents, valid: Documents | None, *, num_clients: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Assign shuffled documents to the clients in turn; their numbers differ by one at most.

    Args:
        train: Training documents.
        valid: Held-out documents, assigned likewise from a random stream of their own. If there are
            fewer than clients, some clients get none.
        num_clients: Number of clients.
        seed: Seed of the shuffle.

    Returns:
        Client ids of the training and of the held-out documents.

    Raises:
        CorpusError: There are fewer training documents than clients.
    """
    assigned = []
    for index, documents in enumerate((train, valid)):
        if documents is None:
            assigned.append(np.empty(0, dtype=np.int32))
            continue
        if documents is train:
            _require_documents(documents, num_clients)
        clients = np.arange(documents.num_documents, dtype=np.int32) % num_clients
        _generator(seed, index).shuffle(clients)
        assigned.append(clients)
    return assigned[0], assigned[1]


def dirichlet(
    train: Documents, valid: Documents | None, *, num_clients: int, alpha: float, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Divide the documents of each value by proportions ``p ~ Dir(alpha)`` over the clients.

    Source: Hsu et al. 2019, https://arxiv.org/abs/1909.06335, with the roles as in Li et al. 2022
    (NIID-Bench): one draw per value. A client that a small ``alpha`` leaves without a document
    takes one from the client that has the most. Held-out documents use the same proportions.

    Args:
        train: Training documents.
        valid: Held-out documents.
        num_clients: Number of clients.
        alpha: Concentration; with a small one each client has few column values.
        seed: Seed of the proportions and of the draws.

    Returns:
        Client ids of the training and of the held-out documents; ``UNASSIGNED`` for a held-out
        document whose value does not occur in the training text.

    Raises:
        CorpusError: There are fewer training documents than clients.
    """
    rng = _generator(seed, 0)
    by_name = sorted(range(len(train.values)), key=train.values.__getitem__)
    shares = np.empty((len(train.values), num_clients))
    for index in by_name:
        shares[index] = rng.dirichlet(np.full(num_clients, alpha))
    assigned = [_draw(train.codes, shares, _generator(seed, 1))]
    _require_documents(train, num_clients)
    _give_everyone_one(assigned[0], num_clients)
    if valid is None:
        return assigned[0], np.empty(0, dtype=np.int32)
    known = _apply_map(train.values, np.arange(len(train.values), dtype=np.int32), valid)
    held_out = np.full(valid.num_documents, UNASSIGNED, dtype=np.int32)
    held_out[known != UNASSIGNED] = _draw(known[known != UNASSIGNED], shares, _generator(seed, 2))
    _give_everyone_one(held_out, num_clients)
    return assigned[0], held_out


def _draw(
    codes: NDArray[np.int32], shares: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int32]:
    """Draw a client for every document, by the proportions of the document's value."""
    limits = shares.cumsum(axis=1)
    draws = rng.random(len(codes))
    clients = np.empty(len(codes), dtype=np.int32)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(shares) + 1))
    for code in range(len(shares)):
        chosen = order[bounds[code] : bounds[code + 1]]
        points = draws[chosen] * limits[code, -1]
        clients[chosen] = np.searchsorted(limits[code], points, side="right")
    return np.minimum(clients, shares.shape[1] - 1).astype(np.int32)


def _give_everyone_one(clients: NDArray[np.int32], num_clients: int) -> None:
    """Move documents, in place, to clients without any, as long as there are enough documents."""
    counts = np.bincount(clients[clients != UNASSIGNED], minlength=num_clients)
    for client in np.flatnonzero(counts == 0):
        richest = int(counts.argmax())
        if counts[richest] < 2:
            return
        clients[np.flatnonzero(clients == richest)[0]] = client
        counts[richest] -= 1
        counts[client] += 1


def _apply_map(
    values: tuple[str, ...], mapped: NDArray[np.int32], documents: Documents | None
) -> NDArray[np.int32]:
    """Map the codes of other documents by the values that they share with the training text."""
    if documents is None:
        return np.empty(0, dtype=np.int32)
    known = {value: mapped[index] for index, value in enumerate(values)}
    table = np.array([known.get(value, UNASSIGNED) for value in documents.values], dtype=np.int32)
    return table[documents.codes] if len(table) else np.empty(0, dtype=np.int32)


def _require_documents(documents: Documents, num_clients: int) -> None:
    if documents.num_documents < num_clients:
        raise CorpusError(
            f"data.train: expected at least {num_clients} documents (federation.num_clients), "
            f"got {documents.num_documents}. Add text or lower federation.num_clients."
        )


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([_STREAM, seed % 2**64, stream]))
