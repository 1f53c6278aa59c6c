"""The examples run as they stand and reach what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    """Run an example in a folder; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_train_loop_shows_the_method_in_80_lines_without_fedpipe(tmp_path: Path) -> None:
    text = (EXAMPLES / "train_loop.py").read_text("utf-8")
    assert len(text.splitlines()) <= 80
    assert not re.search(r"^(import|from) fedpipe", text, re.MULTILINE)
    printed = run("train_loop.py", tmp_path)
    losses = [[float(n) for n in re.findall(r"\d\.\d{3}", line)] for line in printed.splitlines()]
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first - 0.5, printed
