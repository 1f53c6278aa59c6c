"""A disk that is full: one line with the cause and the file, and a run that can go on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpipe.run.checkpoint import find_latest
from tests.helpers.cli import fedpipe
from tests.helpers.runs import ONE_PROCESS, TINY


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_on_a_full_disk_ends_in_one_line_and_keeps_its_last_checkpoint(
    small_disk: Path, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    size = ("federation.num_local_steps=1", "federation.optimizer_state=reset", *ONE_PROCESS)
    own = {option.partition("=")[0] for option in size}
    tiny = [option for option in TINY if option.partition("=")[0] not in own]
    done = fedpipe(
        "pretrain", "--run-dir", str(run_dir), *tiny, *size, "federation.num_rounds=4",
        "data.valid=[]", f"data.cache_dir={tmp_path / 'cache'}", folder=tmp_path,
    )  # fmt: skip
    assert done.code == 1, done.out + done.err
    assert "checkpoint: could not be written (rank 0: [Errno 28] No space left" in done.error
    assert f"device: '{run_dir}/checkpoints/.round_" in done.error
    checkpoint, passed_over = find_latest(run_dir)
    assert checkpoint is not None and passed_over == []

    with open(small_disk / "fill", "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
    again = fedpipe("pretrain", "--run-dir", str(run_dir), folder=tmp_path)
    assert again.code in (1, 2), again.out + again.err
    assert "No space left on device" in again.error and str(run_dir) in again.error
    assert find_latest(run_dir) == (checkpoint, [])
