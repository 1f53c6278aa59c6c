"""Markers by folder, reasons for skips, samples of matrices, and golden files."""

from __future__ import annotations

import difflib
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from fedpipe.distributed.env import num_gpus
from tests.helpers import matrix

HAS_GPU = num_gpus({**os.environ, "DS_ACCELERATOR": "cuda"}) > 0
if HAS_GPU:  # only tests/gpu is for it, and says so
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
MARKERS = {
    "unit": "pure or one process, fast",
    "distributed": "several processes over gloo",
    "e2e": "a command from start to end",
    "slurm": "jobs on a real SLURM, brought up here",
    "gpu": "needs an NVIDIA GPU",
}
SLOW = "slow: a unit test of some seconds, which `make check` leaves out"
ORDER = ("slurm", "e2e", "distributed", "gpu", "unit")
"""What takes long begins first, so that the workers end together."""
SPREAD = {"tests/distributed/test_options.py"}
"""Files whose cases take an hour together, and share little."""
NO_SLURM = "SLURM is not installed: run `make slurm-packages` as root"


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning} (tests/{name})")
    config.addinivalue_line("markers", matrix.MARKER)
    config.addinivalue_line("markers", SLOW)
    for number in (signal.SIGHUP, signal.SIGINT):
        # Under nohup, or behind a shell's `&`, what the tests start would ignore it too; a handler
        # is no longer there after exec.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def pytest_report_header() -> str:
    return matrix.describe(os.environ)


class ByFixtures(LoadScopeScheduling):
    """A file is one worker's if its tests share fixtures; others go to whoever is free."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(nodeid)


@cache
def _scope(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    text = (TESTS.parent / file).read_text(encoding="utf-8")
    shares = 'scope="module"' in text or file.startswith("tests/slurm/")
    return file if shares and file not in SPREAD else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    # The groups of pytest-xdist 3.8 have no effect with pytest 9.2.
    return ByFixtures(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        # As root they can be installed, so that there the cluster's own error shows.
        "slurm": "" if shutil.which("sbatch") or os.geteuid() == 0 else NO_SLURM,
        "gpu": "" if HAS_GPU else "there is no NVIDIA GPU that torch may use",
    }
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKERS:
            item.add_marker(folder)
        if missing.get(folder):
            item.add_marker(pytest.mark.skip(reason=missing[folder]))
    dropped = matrix.left_out(items, named=config.args, environment=os.environ)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    folders = [folder for folder in ORDER if item.path.is_relative_to(TESTS / folder)]
    return ORDER.index(folders[0]) if folders else len(ORDER)


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME; FEDPIPE_RECORD=1 writes it instead."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if os.environ.get("FEDPIPE_RECORD") == "1":
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        expected = file.read_text(encoding="utf-8") if file.is_file() else ""
        changed = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="", n=0
        )
        lines = "\n".join(changed)
        assert text == expected, f"{lines}\nIf this is wanted: FEDPIPE_RECORD=1 pytest {name}"

    return compare
