"""The same models in two versions of transformers, each in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import REPOSITORY, fedpipe

OTHER = os.environ.get("FEDPIPE_OTHER_PYTHON", "")
"""Python of an environment with another version of transformers."""


def _work(python: str, what: str, folder: Path) -> Any:
    run = subprocess.run(
        [python, "-m", "tests.helpers.versions", what, str(folder)],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1]) if run.stdout else {}


@pytest.mark.skipif(not OTHER, reason="only one version of transformers: make test-transformers5")
def test_a_folder_of_either_version_has_the_same_logits_in_the_other(tmp_path: Path) -> None:
    """For every family: its export in transformers, and any folder in the stages."""
    versions = set()
    for writer, reader in ((sys.executable, OTHER), (OTHER, sys.executable)):
        folder = tmp_path / Path(writer).parts[-3]
        _work(writer, "write", folder)
        found = _work(reader, "read", folder)
        assert found["difference"] < 1e-4, found
        versions.add(found["transformers"].partition(".")[0])
    assert versions == {"4", "5"}


@pytest.mark.skipif(not OTHER, reason="only one version of transformers: make test-transformers5")
def test_fine_tuning_says_in_one_line_that_it_needs_the_other_version(tmp_path: Path) -> None:
    run = fedpipe("finetune", "--run-dir", "run", folder=tmp_path)
    assert run.code == 2
    assert "finetune: expected transformers ~=4.57" in run.error
