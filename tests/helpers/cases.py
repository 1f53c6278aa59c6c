"""A claim over many cases as one test, which names every case that breaks it.

Where a case is not worth a line of its own in the report of a run, ``@every`` takes the place of
``@pytest.mark.parametrize``, with the same arguments::

    @every(("stages", "micro_batches"), GRIDS)
    def test_streaming_never_moves_a_gradient(stages: int, micro_batches: int) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def every(
    names: str | tuple[str, ...], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test for every case and fail with all cases that failed, not with the first.

    ``tmp_path`` is a folder of its own for every case. May be given several times: the cases are
    then those of the product, as with parametrize.
    """
    parameters = (names,) if isinstance(names, str) else names
    rows = [(case,) if isinstance(names, str) else tuple(case) for case in cases]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def all_of_them(**fixtures: Any) -> None:
            errors: dict[str, BaseException] = {}
            for number, row in enumerate(rows):
                own = fixtures
                if folder := fixtures.get("tmp_path"):
                    own = fixtures | {"tmp_path": folder / str(number)}
                    own["tmp_path"].mkdir()
                values = dict(zip(parameters, row, strict=True))
                try:
                    test(**own, **values)
                except (Exception, pytest.fail.Exception) as error:
                    errors[", ".join(f"{name}={value!r}" for name, value in values.items())] = error
            if errors:
                lines = [f"{case}: {error}" for case, error in errors.items()]
                summary = f"{len(errors)} of {len(rows)} cases failed:\n" + "\n".join(lines)
                raise AssertionError(summary) from next(iter(errors.values()))

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in parameters]
        all_of_them.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return all_of_them

    return decorate
