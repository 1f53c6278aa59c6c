"""Which cases of a long enumeration a run of the tests takes.

A test that is parametrized over many cases says how many of them `make test` runs::

    @pytest.mark.matrix(sample=6)
    @pytest.mark.parametrize("case", CASES)

`make test-all` runs all of them. ``FEDPIPE_MATRIX`` is ``all``, or a number that takes the place of
every ``sample``; ``FEDPIPE_MATRIX_SEED`` draws another sample. A case that is named on the command
line of pytest is always run. Cases need distinct ids that do not depend on the process.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import pytest

MARKER = "matrix(sample): one of many enumerated cases; `make test` runs `sample` of them"


def describe(environment: Mapping[str, str]) -> str:
    """Say which cases are run, and how to run the same or others."""
    number, seed = _choice(environment)
    which = {None: "all", -1: "a sample"}.get(number, f"{number} of each")
    return f"matrices: {which}, FEDPIPE_MATRIX_SEED={seed} (FEDPIPE_MATRIX=all runs every case)"


def left_out(
    items: Sequence[pytest.Item], *, named: Iterable[str], environment: Mapping[str, str]
) -> list[pytest.Item]:
    """Return the items that a run of the tests does not take, in their order."""
    number, seed = _choice(environment)
    if number is None:
        return []
    wanted = set(named)
    cases: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("matrix")
        if marker is not None:
            cases[item.nodeid.partition("[")[0], marker.kwargs["sample"]].append(item)
    dropped: set[str] = set()
    for (function, sample), members in cases.items():
        size = min(len(members), sample if number < 0 else number)
        kept = set(random.Random(f"{seed} {function}").sample(range(len(members)), size))
        dropped |= {item.nodeid for i, item in enumerate(members) if i not in kept} - wanted
    return [item for item in items if item.nodeid in dropped]


def _choice(environment: Mapping[str, str]) -> tuple[int | None, int]:
    """Cases of each test (None for all, -1 for what the test says) and the seed."""
    text = environment.get("FEDPIPE_MATRIX", "")
    seed = int(environment.get("FEDPIPE_MATRIX_SEED", "0"))
    return None if text == "all" else int(text or -1), seed
