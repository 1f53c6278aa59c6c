"""What a start imports, because every start pays for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedpipe.commands.finetune import ranks as finetune_ranks
from fedpipe.commands.pretrain import ranks as pretrain_ranks

OTHERS = {"sklearn", "scipy", "seqeval", "pandas", "datasets", "adapters", "nvflare"}
"""Packages that only other commands need."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (pretrain_ranks.PROGRAM.preload, OTHERS),
        (finetune_ranks.PROGRAM.preload, OTHERS - {"adapters"}),
        (("fedpipe.run.export",), OTHERS | {"deepspeed"}),
        (("fedpipe.commands.consortium.run", "fedpipe.commands.site.command"), OTHERS | {"torch"}),
        (("fedpipe.commands.site.executor",), OTHERS - {"nvflare"} | {"torch"}),
        (("fedpipe.cli",), OTHERS | {"numpy", "torch", "multiprocessing"}),
    ],
    ids=["pretrain", "finetune", "export", "consortium", "agent", "help"],
)
def test_a_command_imports_no_package_that_only_other_commands_need(
    modules: tuple[str, ...], unwanted: set[str]
) -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "print()\n"
        f"print(*found & {unwanted!r})\n"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "", "imported"
