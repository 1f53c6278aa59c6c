import numpy as np
import pytest

from fedpipe.data.partition import UNASSIGNED, Documents, by_column, dirichlet, iid
from fedpipe.errors import CorpusError


def documents(*values: str, size: int = 10) -> Documents:
    """One document per value given, in this order."""
    names = tuple(dict.fromkeys(values))
    return Documents(
        codes=np.array([names.index(value) for value in values], dtype=np.int32),
        values=names,
        sizes=tuple(size * values.count(name) for name in names),
    )


def many(counts: dict[str, int]) -> Documents:
    return documents(*(name for name, count in counts.items() for _ in range(count)))


def test_as_many_values_as_clients_are_given_one_each_in_order_of_size():
    train = documents("small", "large", "middle", "large", "large", "middle")
    clients, _ = by_column(train, None, num_clients=3, column="c")
    assert clients.tolist() == [2, 0, 1, 0, 0, 1]


def test_more_values_than_clients_go_largest_first_to_the_least_filled():
    train = many({"a": 5, "b": 4, "c": 3, "d": 2, "e": 1})
    clients, _ = by_column(train, None, num_clients=2, column="c")
    # a | b -> c joins b (4 < 5) -> d joins a (5 < 7) -> e by the lower id (7 = 7)
    assert [clients[list(train.codes).index(i)] for i in range(5)] == [0, 1, 1, 0, 0]


def test_a_column_partition_does_not_depend_on_the_order_of_documents():
    forward = documents("a", "b", "b", "c", "c", "c", "d")
    backward = documents(*reversed(["a", "b", "b", "c", "c", "c", "d"]))
    ours, _ = by_column(forward, None, num_clients=2, column="c")
    theirs, _ = by_column(backward, None, num_clients=2, column="c")
    assert ours.tolist() == theirs.tolist()[::-1]


def test_held_out_text_follows_the_training_text_and_unknown_values_are_ignored():
    train = documents("b", "b", "a")
    clients, held_out = by_column(train, documents("a", "new", "b"), num_clients=2, column="c")
    assert clients.tolist() == [0, 0, 1]
    assert held_out.tolist() == [1, UNASSIGNED, 0]


def test_fewer_values_than_clients_is_refused_with_a_way_out():
    message = (
        r"data.partition_column: expected at least 3 values of 'ward' \(federation.num_clients\), "
        r"got 2. Set federation.num_clients=2 or data.partition=iid."
    )
    with pytest.raises(CorpusError, match=message):
        by_column(documents("a", "b"), None, num_clients=3, column="ward")


def test_iid_deals_every_document_evenly_and_by_seed():
    train, valid = many({"": 101}), many({"": 9})
    clients, held_out = iid(train, valid, num_clients=4, seed=1)
    assert sorted(np.bincount(clients)) == [25, 25, 25, 26]
    assert sorted(np.bincount(held_out)) == [2, 2, 2, 3]
    assert clients.tolist() == iid(train, valid, num_clients=4, seed=1)[0].tolist()
    assert clients.tolist() != iid(train, valid, num_clients=4, seed=2)[0].tolist()


def test_iid_needs_a_document_per_client_to_train_on_but_none_to_hold_out():
    enough, few = many({"": 5}), many({"": 2})
    with pytest.raises(
        CorpusError, match=r"data.train: expected at least 3 documents .* got 2\. A"
    ):
        iid(few, None, num_clients=3, seed=0)
    _, held_out = iid(enough, few, num_clients=3, seed=0)
    assert sorted(held_out) == [0, 1]


def share_of_largest_value(alpha: float) -> float:
    train = many({"a": 1000, "b": 1000, "c": 1000, "d": 1000})
    clients, _ = dirichlet(train, None, num_clients=4, alpha=alpha, seed=0)
    shares = []
    for client in range(4):
        counts = np.bincount(train.codes[clients == client], minlength=4)
        shares.append(counts.max() / counts.sum())
    return float(np.mean(shares))


def test_a_small_alpha_gives_clients_few_values_and_a_large_one_a_mixture():
    assert share_of_largest_value(1000.0) == pytest.approx(0.25, abs=0.05)
    assert share_of_largest_value(0.05) > 0.7


def test_dirichlet_is_a_function_of_the_seed():
    train = many({"a": 50, "b": 50})
    drawn = (dirichlet(train, None, num_clients=3, alpha=1.0, seed=seed)[0] for seed in (1, 1, 2))
    draws = [clients.tolist() for clients in drawn]
    assert draws[0] == draws[1] != draws[2]


def test_dirichlet_scores_clients_on_the_mixture_that_they_train_on():
    train, valid = many({"a": 2000, "b": 2000}), many({"b": 2000, "new": 3, "a": 2000})
    clients, held_out = dirichlet(train, valid, num_clients=3, alpha=0.5, seed=4)
    assert (held_out[2000:2003] == UNASSIGNED).all()
    for name in ("a", "b"):
        ours = clients[train.codes == train.values.index(name)]
        theirs = held_out[valid.codes == valid.values.index(name)]
        difference = np.bincount(ours, minlength=3) - np.bincount(theirs, minlength=3)
        assert abs(difference).max() / 2000 < 0.05


def test_dirichlet_leaves_no_client_without_a_document():
    train, valid = many({"a": 8}), many({"a": 8})
    for seed in range(20):
        for clients in dirichlet(train, valid, num_clients=8, alpha=0.01, seed=seed):
            assert sorted(clients) == list(range(8))


def test_dirichlet_needs_a_document_per_client():
    with pytest.raises(CorpusError, match=r"data.train: expected at least 4 documents .* got 2\."):
        dirichlet(documents("a", "b"), None, num_clients=4, alpha=1.0, seed=0)
