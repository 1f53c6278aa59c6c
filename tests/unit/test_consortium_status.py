"""What ``fedpipe consortium status`` says of an outer round under way, and the Python face."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import fedpipe
from fedpipe.commands.consortium.network import Network
from fedpipe.commands.consortium.report import status_lines
from fedpipe.commands.consortium.run import HANDED_OUT, ROUND_FILE, Consortium, locate
from fedpipe.config.tree import dump
from fedpipe.errors import CheckpointError
from fedpipe.run.run_dir import locked
from tests.helpers.network import PRETRAIN

FILE = "consortium.yaml"


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """One that has handed its first outer round out to two sites over the network."""
    tree = {
        "name": "heart", "server": {"host": "localhost", "kits": str(tmp_path / "kits")},
        "federation": {"sites": ["alpha", "beta"], "num_rounds": 2, "deadline_s": 3600},
        "pretrain": PRETRAIN, "seed": 7,
    }  # fmt: skip
    (tmp_path / FILE).write_text(dump(tree))
    found = locate(str(tmp_path / FILE), [], str(tmp_path / "run"))
    found.begin()
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


def test_the_python_face_has_a_row_for_each_site_in_each_outer_round(
    consortium: Consortium,
) -> None:
    run = fedpipe.Run(consortium.path)
    with pytest.raises(CheckpointError, match=r"expected an outer round that is over, got none\."):
        run.metrics()
    facts = {"round": 0, "tokens": 64, "base_valid_loss": [9.0, 8.0], "seconds": 3.0}
    record = {
        "round": 0, "refused": {"beta": "beta declines: dry run."}, "absent": ["gamma"],
        "sites": {"alpha": {"facts": facts, "bytes": 1024, "answered_s": 4.0}}, "seconds": 5.0,
    }  # fmt: skip
    (consortium.round_dir(0) / ROUND_FILE).write_text(json.dumps(record))
    table = run.metrics().set_index("site")
    assert list(table["round"]) == [0, 0, 0]
    assert list(table["state"]) == ["averaged", "left out", "absent"]
    assert (table.tokens["alpha"], table.bytes["alpha"]) == (64, 1024)
    assert table.why["beta"] == "beta declines: dry run."
    assert run.report == consortium.path / "report.html"


def test_what_a_training_is_cannot_be_changed_on_the_way(consortium: Consortium) -> None:
    directory = str(consortium.path)
    for file in (None, str(consortium.path.parent / FILE)):
        found = locate(file, ["federation.deadline_s=9"], directory)
        assert found.config.federation.deadline_s == 9
        assert found.pretrain == consortium.pretrain
        with pytest.raises(CheckpointError) as refusal:
            locate(file, ["federation.num_rounds=4"], directory)
        assert str(refusal.value) == (
            f"{directory}: expected the consortium that is there, got other values of"
            " federation.num_rounds (4 instead of 2). The learning rate follows from the number of"
            " outer rounds, so that more of them are another training: choose a new --run-dir, and"
            f" let it begin with the weights that are there,"
            f" pretrain.model.path={directory}/export."
        )
        with pytest.raises(CheckpointError, match=r"optimizer\.lr \(0\.5 instead of .* Go on with"):
            locate(file, ["pretrain.optimizer.lr=0.5"], directory)
