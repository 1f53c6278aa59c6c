"""What a run says about its clients' text: below the plan, in text.json and in the report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fedpipe.cli import main
from fedpipe.commands.plan.plan import build_plan, render
from fedpipe.commands.plan.text_facts import render_text, text_facts
from fedpipe.commands.pretrain.report import write_report
from fedpipe.config.load import load_config
from fedpipe.data.blocks import PreparedData
from fedpipe.data.corpus import prepare
from tests.helpers.corpora import run_maker
from tests.helpers.records import make_run_dir
from tests.helpers.tiny import tiny_config, tiny_data


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    """Three clients: client 1 lost blocks, client 2 has no held-out text."""
    data = tiny_data(tmp_path / "data")
    train, valid = list(data.train), list(data.valid)
    train[1] = dataclasses.replace(train[1], num_left_out=1_234, values=("w1", "w2", "w3", "w4"))
    valid[2] = dataclasses.replace(valid[2], num_blocks=0, num_left_out=1)
    return dataclasses.replace(
        data, train=tuple(train), valid=tuple(valid), num_masked=2, num_held_out=40,
        num_overlapping=3, num_ignored_documents=5,
    )  # fmt: skip


def test_the_plan_counts_what_was_left_out_and_what_is_in_both_splits(data: PreparedData) -> None:
    lines = render_text(text_facts(data), tiny_config()).splitlines()
    assert [re.split("  +", line)[1:] for line in lines] == [
        ["text", "3 documents, 123 blocks to train on", "40 to 42 blocks per client"],
        ["1,234 blocks left out, with fewer than 2 ordinary tokens", "client 1: 1,234"],
        ["held out 40 documents", "3 of them (7.5 %) in the training text too"],
        ["5 not used", "their owner is no client's"],
        ["1 client without held-out text", "client 2"],
        ["1 block left out, with fewer than 2 ordinary tokens", "client 2: 1"],
    ]
    alone = render_text(text_facts(dataclasses.replace(data, valid=())), tiny_config())
    assert "held out" not in alone


def test_replicas_that_wait_for_a_client_of_much_text_are_warned_of(data: PreparedData) -> None:
    uneven = [
        dataclasses.replace(s, num_blocks=n) for s, n in zip(data.train, (80, 8, 8), strict=1)
    ]
    facts = text_facts(dataclasses.replace(data, train=tuple(uneven)))
    federation = {"num_clients": 3, "clients_per_round": 2, "num_replicas": 2, "num_rounds": 9}
    epochs = tiny_config(federation=federation | {"num_local_epochs": 1.0})
    # Of three rounds two have the client of 20 steps beside one of 2, the others two of 2.
    warning = render_text(facts, epochs).splitlines()[-1]
    assert re.match(
        r"  warning  replicas idle [34]\d % of their time +num_local_epochs makes", warning
    )
    assert "idle" not in render_text(facts, tiny_config(federation=federation))


def test_the_report_shows_the_text_of_every_client(data: PreparedData, tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path / "run")
    (run_dir / "text.json").write_text(json.dumps(text_facts(data)), encoding="utf-8")
    write_report(run_dir)
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "3 of 40 held-out documents (7.5 %) stand in the training text too" in report
    assert "| 1 | w1, w2, w3, 1 more | 1 | 656 | 41 | 1,234 | 1 | 6 | 0 |" in report
    assert "| 2 | - | 1 | 672 | 42 | 0 | 1 | 0 | 1 |" in report


def test_the_plan_knows_text_that_was_prepared_before_and_text_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedpipe.data.digests._SETTLED_S", -1.0)  # the files are new
    config = run_maker(tmp_path)()
    arguments = [
        "plan", "data.partition=column", "data.partition_column=ward", "data.sequence_length=32",
        f"data.cache_dir={config.data.cache_dir}", f"data.train=[{config.data.train[0]}]",
        f"data.valid=[{config.data.valid[0]}]", "federation.num_clients=3",
        "federation.clients_per_round=2",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert not Path(config.data.cache_dir).exists()
    assert "to train on" not in capsys.readouterr().out
    prepared = prepare(known := load_config(None, arguments[1:]))
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(render_text(text_facts(prepared), known) + "\n")
    with open(config.data.train[0], "a", encoding="utf-8") as file:
        file.write("\n")
    assert main(arguments) == 0
    assert "to train on" not in capsys.readouterr().out
    Path(config.data.train[0]).unlink()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == render(build_plan(known)) + "\n"
    assert "data.train: expected a file or folder, got " in said.err
