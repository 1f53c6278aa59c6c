"""A run of the tests takes a seeded sample of a matrix, all of it, or the case that is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.matrix import describe, left_out


def _items(function: str, *, sample: int | None) -> list[Any]:
    marker = None if sample is None else pytest.mark.matrix(sample=sample).mark
    return [
        SimpleNamespace(nodeid=f"{function}[{i}]", get_closest_marker=lambda name: marker)
        for i in range(20)
    ]


def _taken(*, named: tuple[str, ...] = (), **environment: str) -> list[str]:
    items = [*_items("a", sample=4), *_items("b", sample=4), *_items("plain", sample=None)]
    dropped = [i.nodeid for i in left_out(items, named=named, environment=environment)]
    taken = [item.nodeid for item in items if item.nodeid not in dropped]
    assert taken[-20:] == [f"plain[{i}]" for i in range(20)]
    return taken[:-20]


def test_a_sample_is_the_same_until_another_seed_draws_another() -> None:
    first = _taken()
    assert len(first) == 8 and _taken() == first
    a, b = ({name[2:] for name in first if name[0] == function} for function in "ab")
    assert len(a) == len(b) == 4 and a != b
    assert _taken(FEDPIPE_MATRIX_SEED="1") != first
    assert len(_taken(FEDPIPE_MATRIX="1")) == 2 and len(_taken(FEDPIPE_MATRIX="all")) == 40
    assert "FEDPIPE_MATRIX_SEED=7" in describe({"FEDPIPE_MATRIX_SEED": "7"})


def test_a_case_that_is_named_is_run_whatever_the_sample() -> None:
    missing = next(f"a[{i}]" for i in range(20) if f"a[{i}]" not in _taken())
    assert missing in _taken(named=(missing,))
