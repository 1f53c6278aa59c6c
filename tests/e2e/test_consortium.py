"""A coordinator and its sites, as their guide says, with real runs and files between them."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM

from fedpipe.run.outer import GLOBAL, UPDATE, UPDATE_FACTS, digest_of
from fedpipe.run.tensor_file import TensorFile, write_tensors
from tests.helpers.cli import TIMEOUT_S, Command, fedpipe
from tests.helpers.corpora import write_rows
from tests.helpers.guide import blocks_of, commands

GUIDE = "docs/how-to/consortium-by-files.md"
SMALL = ("pipeline.colocate=true", "validation.max_blocks_per_client=2", "log.to=[]")


def _block(title: str) -> str:
    return next(block.text for block in blocks_of(GUIDE) if block.title == title)


def _arguments(title: str) -> list[str]:
    (command,) = commands(_block(title))
    return shlex.split(command)[1:]


def _write_config(folder: Path, *lines: str) -> None:
    text = _block("consortium.yaml")
    for line in lines:
        key = line.partition(":")[0]
        text = "\n".join(line if old.startswith(f"{key}:") else old for old in text.split("\n"))
    (folder / "consortium.yaml").write_text(text)


def _arrived(folder: Path, site: str, index: int) -> Path:
    """Wait until an outer round has arrived at a site."""
    inbox = folder / "exchange" / site / f"round_{index:06d}"
    deadline = time.monotonic() + TIMEOUT_S
    while not (inbox / "global.json").is_file():
        assert time.monotonic() < deadline, f"nothing has arrived in {inbox}"
        time.sleep(0.1)
    return inbox


def _train(folder: Path, site: str) -> None:
    arguments = [a.replace("alpha", site) for a in _arguments("at site alpha")]
    for name, seed in ((f"{site}.jsonl", len(site)), (f"{site}-held-out.jsonl", 99)):
        write_rows(folder / name, 40, seed=seed)
    finished = fedpipe(*arguments, *SMALL, folder=folder)
    assert finished.code == 0, finished.err


def _coordinate(folder: Path, *overrides: str) -> Command:
    return Command(*_arguments("at the coordinator"), *overrides, folder=folder)


@pytest.mark.slow
def test_the_guide_trains_the_mean_of_two_sites_however_often_its_coordinator_is_killed(
    tmp_path: Path,
) -> None:
    _write_config(tmp_path)
    coordinator = _coordinate(tmp_path)
    for index in range(2):
        for site in ("beta", "alpha"):
            _arrived(tmp_path, site, index)
            _train(tmp_path, site)
            coordinator.kill()
            coordinator = _coordinate(tmp_path)
    finished = coordinator.finish()
    assert finished.code == 0, finished.err
    assert (tmp_path / "runs/heart/report.html").is_file()
    rounds = tmp_path / "runs/heart/rounds"
    for index in range(2):
        base, after = (TensorFile(rounds / f"round_{i:06d}" / GLOBAL) for i in (index, index + 1))
        changes = [
            TensorFile(tmp_path / f"exchange/{site}/round_{index:06d}" / UPDATE)
            for site in ("alpha", "beta")
        ]
        for name in after.layouts:
            mean = np.float32(0.5) * changes[0].read(name) + np.float32(0.5) * changes[1].read(name)
            assert np.array_equal(after.read(name), base.read(name) + mean), name
    assert "# heart\n" in (tmp_path / "runs/heart/export/README.md").read_text()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "runs/heart/export")
    last = TensorFile(tmp_path / "runs/heart/rounds/round_000002" / GLOBAL)
    for name, parameter in model.named_parameters():
        if name in last.layouts:
            assert np.array_equal(parameter.detach().numpy(), last.read(name)), name
    status = fedpipe("consortium", "status", "--run-dir", "runs/heart", folder=tmp_path)
    assert status.code == 0
    assert "2 of 2 outer rounds" in status.out
    again = _coordinate(tmp_path).finish()
    assert again.code == 0


@pytest.mark.slow
def test_who_does_not_answer_or_sends_nan_is_left_out_and_named(tmp_path: Path) -> None:
    _write_config(tmp_path, "  sites: [alpha, beta, gamma]", "  min_sites: 1", "  num_rounds: 1")
    coordinator = _coordinate(tmp_path, "federation.deadline_s=1")
    inbox = _arrived(tmp_path, "beta", 0)
    coordinator.kill()
    _train(tmp_path, "alpha")
    _train(tmp_path, "beta")
    update = TensorFile(inbox / UPDATE)
    tensors = {name: update.read(name) for name in update.layouts}
    spoilt = next(iter(tensors))
    tensors[spoilt].flat[0] = np.nan
    write_tensors(inbox / UPDATE, update.layouts, tensors.values())
    facts = json.loads((inbox / UPDATE_FACTS).read_text()) | {"sha256": digest_of(inbox / UPDATE)}
    (inbox / UPDATE_FACTS).write_text(json.dumps(facts))
    finished = _coordinate(tmp_path, "federation.deadline_s=1").finish()
    assert finished.code == 0, finished.err
    assert f"the update of beta: expected finite numbers, got NaN or infinity in {spoilt}" in (
        finished.out
    )
    assert "gamma: no answer before the deadline" in finished.out
    record = json.loads((tmp_path / "runs/heart/rounds/round_000000/round.json").read_text())
    assert (list(record["sites"]), list(record["refused"]), record["absent"]) == (
        ["alpha"], ["beta"], ["gamma"],
    )  # fmt: skip
    base, change, after = (
        TensorFile(file)
        for file in (
            tmp_path / "runs/heart/rounds/round_000000" / GLOBAL,
            tmp_path / "exchange/alpha/round_000000" / UPDATE,
            tmp_path / "runs/heart/rounds/round_000001" / GLOBAL,
        )
    )
    for name in after.layouts:
        assert np.array_equal(after.read(name), base.read(name) + change.read(name)), name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  sites: []", "federation.sites: expected names of sites"),
        ("  sites: [alpha, ../beta]", "federation.sites: expected small letters"),
        ("  min_sites: 3", "federation.min_sites: expected 1..2"),
        ('exchange: ""', "exchange: expected either the folder"),
        ("  outer: {folder: x, num_inner_rounds: 0}", "outer.num_inner_rounds: expected 1"),
        ("  pipeline: {cut: auto}", "pipeline.cut: expected a list, got auto"),
        ("  federation: {num_rounds: 9}", "federation.num_rounds: expected 4"),
        ("name: [1]", "name: expected a text"),
    ],
)
def test_a_consortium_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, line: str, expected: str
) -> None:
    _write_config(tmp_path, line)
    finished = _coordinate(tmp_path).finish()
    assert finished.code == 2
    assert expected in finished.error
    assert not (tmp_path / "runs").exists()
