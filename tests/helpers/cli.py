"""The real command line in a subprocess: start it, watch it, kill it, find what it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import warm

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 480.0
"""Generous: machines that run tests are often busy."""
_MARK = "FEDPIPE_TEST_COMMAND"


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its error, which must be one line."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"expected one line of stderr:\n{self.err}"
        return lines[0]


class Command:
    """A running ``fedpipe`` command, in a process group of its own."""

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Start it, by the command ``prefix`` if given; its output goes to files in ``folder``."""
        mark = uuid.uuid4().hex
        self._mark, self._name = f"{_MARK}={mark}".encode(), mark[:15]
        self._files = [folder / f"{mark}.{name}" for name in ("out", "err")]
        variables = {
            **os.environ, _MARK: mark, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120",
            **(environment or {}),
        }  # fmt: skip
        start = ["-m", "fedpipe", *arguments]
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            if prefix or variables.get("DS_ACCELERATOR") == "cuda":  # which a fork cannot open
                self.process: warm.Process | subprocess.Popen[bytes] = subprocess.Popen(
                    [*prefix, sys.executable, *start], cwd=folder, env=variables,
                    stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                )  # fmt: skip
            else:
                self.process = warm.Process(
                    start, cwd=folder, env=variables, stdout=out, stderr=err, name=mark
                )

    def finish(self, timeout_s: float = TIMEOUT_S) -> Finished:
        """Wait for the end of the command itself."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()}") from None
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        return Finished(code, out, err)

    def output(self) -> str:
        """What it has said so far."""
        return "".join(file.read_text(encoding="utf-8") for file in self._files)

    def kill(self) -> None:
        """SIGKILL its whole process group, as a scheduler does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Return once a condition holds while the command runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} in {TIMEOUT_S} s:\n{self.output()}"
            time.sleep(0.01)

    def descendants(self) -> list[int]:
        """Live processes that the command has started, whoever their parent is now."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.process.pid:
                continue
            try:
                marked = (entry / "comm").read_text().strip() == self._name
                marked |= self._mark in (entry / "environ").read_bytes().split(b"\0")
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:  # it has just ended
                continue
            if marked and not dead:
                found.append(int(entry.name))
        return found

    def assert_nothing_left(self, within_s: float = 20.0) -> None:
        """Fail if a process of the command outlives it for longer than ``within_s``."""
        deadline = time.monotonic() + within_s
        while left := self.descendants():
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes {left} outlive the command by {within_s} s")
            time.sleep(0.05)


def fedpipe(
    *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end."""
    return Command(*arguments, folder=folder, environment=environment).finish()
