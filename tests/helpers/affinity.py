"""Run a line of Python in a process that a launcher starts, each with its own cores."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from typing import Any


def launched(code: str, result: str, *, launcher: set[int], own: set[int], **variables: str) -> Any:
    """Return what an expression is worth there.

    Args:
        code: Statements before it.
        result: The expression; its value must be made of numbers, texts and containers.
        launcher: Cores of the process that starts the other one.
        own: Cores of that one.
        **variables: Environment, without SLURM's and OpenMP's variables of this process.
    """
    child = f"import os; os.sched_setaffinity(0, {own}); {code}; print(repr({result}))"
    parent = (
        f"import os, subprocess; os.sched_setaffinity(0, {launcher});"
        f"subprocess.run([{sys.executable!r}, '-c', {child!r}], check=True)"
    )
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMP_"))}
    output = subprocess.run(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, check=True, text=True,
        env=environment | variables,
    )  # fmt: skip
    return ast.literal_eval(output.stdout)
