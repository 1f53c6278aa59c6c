"""``fedpipe reproduce``, by its guide's commands: killed, stopped, ended as a job; it adds up."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from fedpipe.report.writer import read_metrics
from tests.helpers.cli import Command, fedpipe
from tests.helpers.guide import commands_of

TOY = (
    "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "data.sequence_length=32", "pipeline.micro_batch_size=2",
    "pipeline.num_micro_batches=2", "federation.num_clients=4", "federation.clients_per_round=2",
    "federation.num_rounds=2", "federation.num_local_steps=2", "validation.max_blocks_per_client=2",
    "reproduce.cuts=[1]", "reproduce.published_length=40", "reproduce.timed_rounds=1",
    "evaluation.num_epochs=1", "evaluation.max_train_examples=16", "evaluation.max_length=32",
    "evaluation.max_test_examples=16", "evaluation.batch_size=8",
)  # fmt: skip
SYSTEMS = [
    "fedbert-0-2-published", "fedbert-1-1-published", "fedbert-0-2", "fedbert-1-1", "fedpipe-1-1",
    "fedpipe-1-1-server",
]  # fmt: skip

TWINS = {
    "fedbert-0-2-published": "fedbert-0-2", "fedbert-1-1-published": "fedbert-0-2",
    "fedbert-1-1": "fedbert-0-2", "fedpipe-1-1-server": "fedpipe-1-1",
}  # fmt: skip


def test_a_reproduction_survives_a_kill_and_a_signal_and_trains_nothing_twice(
    tmp_path: Path,
) -> None:
    guide = [shlex.split(command)[1:] for command in commands_of("docs/how-to/reproduce.md")]
    again = guide[1]
    run_dir = tmp_path / "runs/reproduce"
    arguments = (*guide[0], f"data.cache_dir={tmp_path / 'cache'}", *TOY)
    records = [run_dir / "cells" / f"{name}_seed=0" / "metrics.jsonl" for name in SYSTEMS]

    command = Command(*arguments, folder=tmp_path)
    command.wait_for(lambda: records[1].is_file(), "the second run")
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    command.assert_nothing_left()
    first = records[0].read_bytes()

    command = Command(*again, folder=tmp_path)
    command.wait_for(lambda: "ncbi-disease_seed=0 started" in command.output(), "an evaluation")
    os.kill(command.process.pid, signal.SIGTERM)
    stopped = command.finish()
    assert (stopped.code, stopped.err) == (75, ""), stopped.out + stopped.err
    assert stopped.out.splitlines()[-1] == (
        f"interrupted after 6 of 6 pre-training runs; resume with: fedpipe {' '.join(again)}"
    )
    command.assert_nothing_left()
    assert records[0].read_bytes() == first

    trained = [record.read_bytes() for record in records]
    job = ("submit", *again[:1], *again[2:], "--cluster", "local", "--follow")
    done = fedpipe(*job, folder=tmp_path)
    assert (done.code, done.err) == (0, ""), done.out + done.err
    assert "fedbiobert-tiny  6 pre-training runs, scored on ncbi-disease\n" in done.out
    assert done.out.splitlines()[-1] == "report  runs/reproduce/reproduce.html"
    assert [record.read_bytes() for record in records] == trained
    nothing = fedpipe(*job, folder=tmp_path)
    assert (nothing.code, "is done" in nothing.out) == (0, True)
    content = json.loads((run_dir / "reproduce.json").read_text("utf-8"))
    _check_numbers(content, records)
    assert (run_dir / "reproduce.html").is_file()
    for name in ("scores.png", "loss.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    assert "base_performance.png" in (run_dir / "reproduce.md").read_text("utf-8")

    other = fedpipe(*again, "optimizer.lr=1e-5", folder=tmp_path)
    assert (other.code, "optimizer.lr" in other.error) == (2, True)


def _check_numbers(content: dict, records: list[Path]) -> None:
    systems = {system["name"]: system for system in content["variants"]}
    assert list(systems) == SYSTEMS
    for name, path in zip(SYSTEMS, records, strict=True):
        seconds = [r["seconds"] for r in read_metrics(path) if r["kind"] == "round"]
        assert systems[name]["measured_rounds"] == len(seconds) == (1 if name in TWINS else 2)
        rest = [sum(seconds) / len(seconds)] * (2 - len(seconds))
        assert systems[name]["clock"][-1] == pytest.approx(sum(seconds + rest))
        twin = TWINS.get(name, name)
        assert systems[name]["scored_as"] == twin
        far = systems[name]["loss_difference"]
        assert far is None if twin == name else far < 1e-5
    (task,) = content["tasks"]
    assert {name: len(scores) for name, scores in task["scores"].items()} == {
        "fedbert-0-2": 2, "fedpipe-1-1": 2
    }  # fmt: skip
    assert len(content["speed_ups"]) == 2 * 4
    assert len(content["differences"]) == 1
