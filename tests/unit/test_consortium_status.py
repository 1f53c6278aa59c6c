"""What ``fedpipe consortium status`` says of an outer round under way, and the Python face."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedpipe.commands.consortium.network import Network
from fedpipe.commands.consortium.report import status_lines
from fedpipe.commands.consortium.run import HANDED_OUT, Consortium, locate
from fedpipe.config.tree import dump
from fedpipe.run.outer import GLOBAL_FACTS
from fedpipe.run.run_dir import locked
from tests.helpers.network import PRETRAIN


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """One that has handed its first outer round out to two sites over the network."""
    tree = {
        "name": "heart", "server": {"host": "localhost", "kits": str(tmp_path / "kits")},
        "federation": {"sites": ["alpha", "beta"], "num_rounds": 2, "deadline_s": 3600},
        "pretrain": PRETRAIN,
    }  # fmt: skip
    (tmp_path / "consortium.yaml").write_text(dump(tree))
    found = locate(str(tmp_path / "consortium.yaml"), [], str(tmp_path / "run"))
    found.round_dir(0).mkdir(parents=True)
    (found.round_dir(0) / GLOBAL_FACTS).write_text("{}")
    (found.round_dir(0) / HANDED_OUT).write_text(f"{time.time()}")
    return found


def test_status_says_whether_the_command_runs_who_is_connected_and_when_it_ends(
    consortium: Consortium,
) -> None:
    handed_out = consortium.handed_out_at(0)
    assert handed_out is not None
    ends = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(handed_out + 3600))
    deadline = f"outer round 1: has its deadline on {ends}, and needs 1 update"
    assert status_lines(consortium) == [
        "heart: 0 of 2 outer rounds",
        "coordinator: does not run; go on with: fedpipe consortium run --run-dir"
        f" {consortium.path}",
        "outer round 1: alpha has not answered",
        "outer round 1: beta has not answered",
        deadline,
    ]
    network = Network(
        consortium.config.server, consortium.path, consortium="heart-1", num_rounds=2, show=print
    )
    network._announce({"alpha", "beta"})
    network._announce({"beta"})
    with locked(consortium.path):
        assert status_lines(consortium)[1:] == [
            "coordinator: runs",
            "outer round 1: alpha is not connected, has not answered",
            "outer round 1: beta is connected, has not answered",
            deadline,
        ]
    (consortium.round_dir(0) / HANDED_OUT).write_text(f"{time.time() - 7200}")
    *_, last = status_lines(consortium)
    assert last.startswith("outer round 1: has had its deadline, 20")
    assert last.endswith(", and waits for 1 update")
