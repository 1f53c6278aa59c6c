"""What a start imports, because every start pays for it."""

from __future__ import annotations

import subprocess
import sys

from fedpipe.launcher.worker import PRELOAD


def test_pretraining_imports_no_package_that_only_other_commands_need() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {PRELOAD!r}: importlib.import_module(name)\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "print()\n"
        "print(*found & {'sklearn', 'scipy', 'seqeval', 'pandas', 'datasets', 'adapters'})\n"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "", "imported"
