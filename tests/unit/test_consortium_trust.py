"""Coordinator and site do not trust each other, nor what others have left in their folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpipe.commands.site.agent import PID_FILE, agent_pid, stop_agent
from fedpipe.commands.site.site import Site
from fedpipe.run.run_dir import locked


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_an_agent_is_a_process_that_holds_the_sites_lock(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    site = Site(tmp_path)
    for stale in (str(stranger.pid), "0", "-1", "1", "", "four", str(10**30)):
        (tmp_path / PID_FILE).write_text(stale)
        assert stop_agent(site) is False
    assert stranger.poll() is None
    with locked(tmp_path):
        (tmp_path / PID_FILE).write_text(str(os.getpid()))
        assert agent_pid(site) == os.getpid()
        (tmp_path / PID_FILE).write_text("-1")
        assert agent_pid(site) is None
    assert agent_pid(site) is None
