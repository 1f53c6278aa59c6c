"""Output that nobody reads, or that a terminal cannot show, ends no command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.cli import REPOSITORY

PROGRAM = """
import sys
from fedpipe.terminal import reader_has_gone, prepare_output
prepare_output()
prepare_output()
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    stream.write("d\\xe9j\\xe0 \\u2581vu\\n")
    stream.flush()
sys.exit(3 + reader_has_gone())
"""


def _start(*options: str, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *options, "-c", PROGRAM], cwd=REPOSITORY, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | variables,
    )  # fmt: skip


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_what_a_terminal_cannot_show_is_written_as_its_escape(options: tuple[str, ...]) -> None:
    process = _start(*options, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    out, err = process.communicate(b"\n")
    assert out == err == b"d\\xe9j\\xe0 \\u2581vu\n"
    assert process.returncode == 3


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_what_nobody_reads_is_dropped_and_noticed(closed: str) -> None:
    process = _start()
    getattr(process, closed).close()
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 4


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_a_process_that_is_started_without_output_drops_it(closed: tuple[int, ...]) -> None:
    # and the files that it opens do not take the place of its output
    program = PROGRAM.replace("sys.exit(", "assert open('/dev/null').fileno() > 2; sys.exit(")
    redirected = " ".join(f"{number}>&-" for number in closed)
    shell = f'exec "$0" -c "$1" {redirected}'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, program], cwd=REPOSITORY, input=b"\n", timeout=60
    )
    assert done.returncode == 3
