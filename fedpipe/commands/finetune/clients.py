"""Assign labelled examples to clients, and describe how uneven the assignment is. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpipe.commands.finetune.prepared import ClientFacts
from fedpipe.config.finetune import TaskConfig
from fedpipe.data import partition
from fedpipe.data.partition import Documents
from fedpipe.errors import CorpusError

# E = examples of a split, K = clients, C = classes

_BINS = 4
"""Number of classes that numeric labels are grouped into: their quartiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Labels of the examples of a task, as an assignment to clients needs them."""

    classes: NDArray[np.int64]
    """(E,) int, the class by which an example is assigned."""
    counts: NDArray[np.int64]
    """(E, C) int, how often an example has each label: its class, or the tags of its words."""
    names: tuple[str, ...]
    """Names of the C labels."""


def class_labels(labels: NDArray[np.float64], names: Sequence[str]) -> Labels:
    """Describe examples that have one class each."""
    classes = labels.astype(np.int64)
    return Labels(
        classes=classes, counts=np.eye(len(names), dtype=np.int64)[classes], names=tuple(names)
    )


def number_labels(labels: NDArray[np.float64], *, like: NDArray[np.float64]) -> Labels:
    """Describe examples with a numeric label by the quartile of ``like`` that contains it."""
    limits = np.quantile(like, np.arange(1, _BINS) / _BINS)
    names = tuple(f"quartile {index + 1}" for index in range(_BINS))
    return class_labels(np.searchsorted(limits, labels, side="right").astype(np.float64), names)


def tag_labels(tags: Sequence[Sequence[int]], names: Sequence[str]) -> Labels:
    """Describe sentences of tagged words; the class of a sentence is the tag of its first entity.

    Args:
        tags: By sentence, a tag per word; 0 is a word outside of entities.
        names: Names of the tags.
    """
    counts = np.array([np.bincount(row, minlength=len(names)) for row in tags], dtype=np.int64)
    counts = counts.reshape(-1, len(names))
    first = [next((tag for tag in row if tag), 0) for row in tags]
    return Labels(classes=np.array(first, dtype=np.int64), counts=counts, names=tuple(names))


def no_labels(num_examples: int) -> Labels:
    """Describe texts that have no labels."""
    return class_labels(np.zeros(num_examples), ("text",))


def deal_out(
    task: TaskConfig,
    train: Labels,
    test: Labels,
    *,
    num_clients: int,
    seed: int,
    columns: tuple[Sequence[str], Sequence[str]] | None = None,
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Assign every example to a client.

    ``label_sorted`` sorts shuffled examples by class and cuts them into equal shards (Hilmkil et
    al. 2021, https://arxiv.org/abs/2102.00875, whose held-out examples are split the same way); for
    the others see ``fedpipe.data.partition``, with classes or the column's values as documents.

    Args:
        task: The task with ``split`` and its parameters.
        train: Labels of the training examples.
        test: Labels of the held-out examples; a client is scored on its own, and may have none.
        num_clients: Number of clients.
        seed: Seed of the run.
        columns: With ``split=column``, the values of the column for the training examples and for
            the held-out examples.

    Returns:
        By client, the indices of its training and of its held-out examples, ascending.

    Raises:
        CorpusError: There are fewer training examples, or values of the column, than clients.
    """
    if len(train.classes) < num_clients:
        raise CorpusError(
            f"federation.num_clients: expected at most {len(train.classes)} (the training"
            f" examples of {task.name}: no client may be empty), got {num_clients}. Lower it."
        )
    if task.split == "label_sorted":
        owners = [
            _sorted_shards(labels.classes, num_clients, seed=seed + index)
            for index, labels in enumerate((train, test))
        ]
    else:
        owners = list(_partition(task, train, test, num_clients, seed, columns))
    return _indices(owners[0], num_clients), _indices(owners[1], num_clients)


def _sorted_shards(classes: NDArray[np.int64], num_clients: int, *, seed: int) -> NDArray[np.int32]:
    shuffled = np.random.default_rng(np.random.SeedSequence([seed % 2**64, 7])).permutation(
        len(classes)
    )
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    owners = np.empty(len(classes), dtype=np.int32)
    for client_id, shard in enumerate(np.array_split(order, num_clients)):
        owners[shard] = client_id
    return owners


def _partition(
    task: TaskConfig,
    train: Labels,
    test: Labels,
    num_clients: int,
    seed: int,
    columns: tuple[Sequence[str], Sequence[str]] | None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    if task.split == "column":
        assert columns is not None, "the column was read"
        documents = [_by_value(values) for values in columns]
        if len(documents[0].values) < num_clients:
            raise CorpusError(
                f"task.column: expected at least {num_clients} values of {task.column!r}"
                f" (federation.num_clients), got {len(documents[0].values)}. Set"
                f" federation.num_clients={len(documents[0].values)} or task.split=iid."
            )
        return partition.by_column(
            documents[0], documents[1], num_clients=num_clients, column=task.column
        )
    of_train, of_test = _by_class(train), _by_class(test)
    if task.split == "iid":
        return partition.iid(of_train, of_test, num_clients=num_clients, seed=seed)
    return partition.dirichlet(
        of_train, of_test, num_clients=num_clients, alpha=task.dirichlet_alpha, seed=seed
    )


def _by_class(labels: Labels) -> Documents:
    sizes = np.bincount(labels.classes, minlength=len(labels.names))
    return Documents(
        codes=labels.classes.astype(np.int32),
        values=labels.names,
        sizes=tuple(int(size) for size in sizes),
    )


def _by_value(values: Sequence[str]) -> Documents:
    names, codes, sizes = np.unique(
        np.array(values, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    return Documents(
        codes=codes.astype(np.int32),
        values=tuple(map(str, names)),
        sizes=tuple(int(size) for size in sizes),
    )


def _indices(owners: NDArray[np.int32], num_clients: int) -> list[NDArray[np.int64]]:
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(num_clients + 1))
    return [order[bounds[k] : bounds[k + 1]] for k in range(num_clients)]


def describe(
    labels: Labels, train: Sequence[NDArray[np.int64]], test: Sequence[NDArray[np.int64]]
) -> list[ClientFacts]:
    """Return size, label entropy and missing labels of every client.

    The entropy is ``-sum_c p_c log2 p_c`` over the labels of its training examples.

    Args:
        labels: Labels of the training examples.
        train: By client, indices of its training examples from ``deal_out``.
        test: By client, indices of its held-out examples from ``deal_out``.
    """
    facts = []
    for client_id, (mine, held_out) in enumerate(zip(train, test, strict=True)):
        counts = labels.counts[mine].sum(axis=0)
        shares = counts[counts > 0] / counts.sum()
        facts.append(
            ClientFacts(
                client_id=client_id,
                num_examples=len(mine),
                num_test_examples=len(held_out),
                entropy_bits=float(-(shares * np.log2(shares)).sum()) + 0.0,
                missing=tuple(labels.names[c] for c in np.flatnonzero(counts == 0)),
            )
        )
    return facts
