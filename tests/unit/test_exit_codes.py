"""An error keeps its meaning, whichever process finds it: 2 is the user's, 1 a failure."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedpipe.cluster.local import Ranks
from fedpipe.commands.study.pool import check_all_done, redirect_output, run_cells
from fedpipe.commands.study.study import Cell, Slot, Study
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.signals import Signals
from fedpipe.distributed.topology import Grid
from fedpipe.errors import (
    CorpusError,
    LaunchError,
    OutputError,
    TrainingError,
    error_in,
    error_named,
    is_users,
)
from fedpipe.report.console import RunConsole
from fedpipe.run.run_dir import RunDir, resume_hint

GRID = Grid(num_stages=1, num_replicas=2, data_parallel_degree=1)


def _ranks(tmp_path: Path, error: str) -> Ranks:
    """Two ranks: the first has lost its peer, the second has said why it ends."""
    ranks = Ranks("pretrain", SimpleNamespace(run_dir=tmp_path, hang_timeout_s=9.0), grid=GRID)
    ranks.processes = [SimpleNamespace(exitcode=1), SimpleNamespace(exitcode=1)]  # type: ignore[list-item]
    ranks.hear(0, "error", "RuntimeError: Connection closed by peer [127.0.0.1]:1")
    ranks.hear(1, "activity", Activity(doing="starting"))
    ranks.hear(1, "error", error)
    return ranks


@pytest.mark.parametrize("kind", [CorpusError, TrainingError])
def test_what_the_same_command_would_find_again_is_said_as_it_is(
    kind: type[Exception], tmp_path: Path
) -> None:
    text = "data.train: expected text, got none. Name one."
    found = _ranks(tmp_path, f"{kind.__name__}: {text}").failure()
    assert type(found) is kind
    assert str(found) == text


@pytest.mark.parametrize("error", ["ValueError: 3", "OutputError: disk: expected room, got none"])
def test_a_failure_names_its_rank_and_the_command_that_goes_on(error: str, tmp_path: Path) -> None:
    found = _ranks(tmp_path, error).failure()
    assert type(found) is LaunchError
    assert str(found).startswith(f"rank 1 (stage 0, replica 1) failed: {error}. Full log: ")
    assert str(found).endswith(f"Run it again with: fedpipe pretrain --run-dir {tmp_path}")


def test_the_command_that_goes_on_can_be_pasted_whatever_the_directory_is_called(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "my run's $HOME"
    run = RunDir.at(run_dir, "pretrain").make()
    assert resume_hint("pretrain", run) == "nothing was started: give the same command again"
    run.write("name: mine\n")
    failure = str(_ranks(run_dir, "ValueError: 3").failure())
    ways = [failure, resume_hint("pretrain", run), resume_hint("finetune", run)]
    commands = [shlex.split(way[way.index("fedpipe ") :]) for way in ways]
    assert commands == [
        ["fedpipe", task, "--run-dir", str(run_dir)]
        for task in ("pretrain", "pretrain", "finetune")
    ]


def test_an_error_is_made_again_by_its_name() -> None:
    assert type(error_in("OutputError: a: b")) is OutputError
    assert error_in("ValueError: a: b") is None and error_named("", "a") is None
    assert is_users(CorpusError("a")) and not is_users(OutputError("a"))


class _Forked:
    """A cell that ends as its process would."""

    def __init__(self, error: Exception | None, log: Path) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            sys.stderr = sys.__stderr__  # pytest's own does not go to the descriptor
            try:
                with redirect_output(str(log)):
                    if error is not None:
                        raise error
                os._exit(0)
            except SystemExit as end:
                os._exit(int(str(end.code)))
        self._code: int | None = None

    @property
    def code(self) -> int | None:
        with suppress(ChildProcessError):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout_s: float | None) -> bool:
        return True


class _Forks(Study[Cell[None]]):
    """Cells that end with errors, or well."""

    task = "sweep"

    def __init__(self, directory: Path, errors: list[Exception | None]) -> None:
        self.directory, self._errors = directory, errors
        names = [str(index) for index in range(len(errors))]
        self.cells = tuple(Cell(name=n, run_dir=directory / n, config=None) for n in names)

    def pending(self) -> list[Cell[None]]:
        return [cell for cell in self.cells if self._errors[int(cell.name)]]

    def start(self, cell: Cell[None], slot: Slot, log: Path) -> _Forked:
        return _Forked(self._errors[int(cell.name)], log)

    @property
    def page(self) -> Path:
        return self.directory / "sweep.md"

    def write_tables(self) -> str:
        return ""

    def outcome(self, cell: Cell[None]) -> str:
        return ""


@pytest.mark.parametrize(
    ("errors", "kind", "match"),
    [
        ([CorpusError("data: a, got b."), None], CorpusError, r"^cell 0: data: a, got b\.$"),
        ([CorpusError("a."), CorpusError("b.")], CorpusError, r"^cell 0 and 1 more: a\.$"),
        (
            [CorpusError("a."), OutputError("b.")],
            LaunchError,
            r"^sweep: expected 2 .* 0, 1\. Again$",
        ),
    ],
)
def test_cells_that_the_user_can_mend_end_with_the_error_itself(
    errors: list[Any], kind: type, match: str, tmp_path: Path
) -> None:
    study = _Forks(tmp_path, errors)
    console = RunConsole(
        num_rounds=0, steps_per_round=0, num_stages=0, stream=sys.stderr, interactive=False
    )
    refused = run_cells(study, study.cells, parallel=1, console=console, signals=Signals())
    with pytest.raises(kind, match=match) as caught:
        check_all_done(study, way_out="Again", refused=refused)
    assert type(caught.value) is kind
