"""One test of many cases names every case that fails, and gives each a folder of its own."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests.helpers.cases import every


@every(("word", "length"), [("a", 1), ("be", 3), ("see", 3), ("", 1)])
def lengths(word: str, length: int, tmp_path: Path) -> None:
    assert not any(tmp_path.iterdir()), "another case's folder"
    (tmp_path / "mark").touch()
    if not word:
        pytest.fail("no word")
    assert len(word) == length


def test_every_case_that_fails_is_named(tmp_path: Path) -> None:
    assert list(inspect.signature(lengths).parameters) == ["tmp_path"]
    with pytest.raises(AssertionError) as caught:
        lengths(tmp_path=tmp_path)
    heading, *failed = str(caught.value).splitlines()
    assert heading == "2 of 4 cases failed:"
    named = [line for line in failed if line.startswith("word=")]
    assert [line.split(":")[0] for line in named] == ["word='be', length=3", "word='', length=1"]
    assert isinstance(caught.value.__cause__, AssertionError), "the traceback of the first"


@every("stage", [0, 1])
@every("window", [2, 3])
def sums(stage: int, window: int) -> None:
    assert stage + window == 3


def test_several_lists_of_cases_are_multiplied() -> None:
    with pytest.raises(AssertionError, match=r"stage=0: 1 of 2 cases failed:\nwindow=2: "):
        sums()
