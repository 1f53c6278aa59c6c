"""A rank is asked to stop when what started it has gone, and by nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.cli import REPOSITORY

RANK = """
import pathlib, signal, sys
from fedpipe.cluster.launched import stopped_with_launcher
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with stopped_with_launcher():
    print("ready", flush=True)
    early = signal.sigtimedwait([signal.SIGTERM], 1.2)
    print("trains" if early is None else "stopped too early", flush=True)
    signal.sigwait([signal.SIGTERM])
pathlib.Path(sys.argv[1]).touch()
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


def _start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "trains\n"]
    return process


def test_a_rank_is_asked_to_stop_when_its_launcher_is_killed(tmp_path: Path) -> None:
    launcher = _start(LAUNCHER, RANK, str(tmp_path / "stopped"))
    launcher.send_signal(signal.SIGKILL)
    assert launcher.stdout
    assert launcher.stdout.read() == ""  # until the rank has ended as well
    assert (tmp_path / "stopped").exists()
    launcher.wait()


def test_a_rank_is_asked_to_stop_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    rank = _start(RANK, str(tmp_path / "stopped"))
    assert rank.stdout
    rank.stdout.close()
    assert rank.wait(timeout=60) == 0
    assert (tmp_path / "stopped").exists()
