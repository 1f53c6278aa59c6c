"""Records that sum up what several processes did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedpipe.commands.pretrain.records import (
    evaluation_record,
    round_record,
    write_timeline,
)
from fedpipe.config.federation import AggregationConfig
from fedpipe.federation.cohort import Turn
from fedpipe.federation.refusal import Refused, weigh_updates
from fedpipe.federation.traffic import traffic_record
from tests.helpers.tiny import tiny_config


def _turns() -> list[Turn]:
    return [
        Turn(client_id=4, replica_id=0, num_steps=2, num_examples=0, num_tokens=300, weight=0.75),
        Turn(client_id=1, replica_id=1, num_steps=1, num_examples=0, num_tokens=100, weight=0.25),
    ]


def _round(steps: list[dict[str, Any]], *refused: Refused) -> dict[str, Any]:
    outcome = weigh_updates(_turns(), refused, aggregation=AggregationConfig(), round_id=3)
    return round_record(
        3, turns=_turns(), outcome=outcome, steps=[{"client": 4} | step for step in steps],
        num_stages=2, seconds=2.0, sync=[(0.1, 10), (0.3, 20)],
    )  # fmt: skip


def test_a_round_names_its_clients_their_weights_and_its_cost() -> None:
    record = _round(
        [{"stage": 0, "loss": 4.0}, {"stage": 0, "loss": 2.0}, {"stage": 1, "loss": 1.0}]
    )
    assert record == {
        "kind": "round", "round": 3, "clients": [4, 1], "weights": [0.75, 0.25], "tokens": 400,
        "loss": [3.0, 1.0], "seconds": 2.0, "tokens_per_s": 200.0, "sync_s": 0.3, "sync_bytes": 30,
        "refused": [], "averaged": True,
    }  # fmt: skip


def test_a_refused_client_is_listed_with_weight_0_and_without_its_losses() -> None:
    fault = Refused(client=1, stage=0, step=0, what="loss")
    record = _round([{"stage": 0, "loss": 4.0}, {"stage": 0, "loss": math.nan, "client": 1}], fault)
    assert (record["clients"], record["weights"]) == ([4, 1], [1.0, 0.0])
    assert record["loss"] == [4.0, None]
    assert record["refused"] == [{"client": 1, "stage": 0, "step": 0, "what": "loss"}]


def test_a_stage_without_a_head_has_no_loss() -> None:
    assert _round([{"stage": 0, "loss": None}, {"stage": 1, "loss": 5.0}])["loss"] == [None, 5.0]


def test_validation_weighs_clients_by_their_masked_tokens() -> None:
    scores = {0: {2: (60.0, 20), 0: (10.0, 10)}, 1: {2: (20.0, 20), 0: (20.0, 10)}}
    record = evaluation_record(7, scores)
    first, second = record["stages"]
    assert record["kind"] == "eval" and record["round"] == 7 and record["tokens"] == 30
    assert first["loss"] == pytest.approx(70 / 30)
    assert first["perplexity"] == pytest.approx(math.exp(70 / 30))
    assert first["clients"] == {"0": 1.0, "2": 3.0}
    assert (first["worst_client"], first["worst_loss"]) == (2, 3.0)
    assert (second["worst_client"], second["worst_loss"]) == (0, 2.0)


def test_a_diverged_validation_is_a_record_and_no_overflow() -> None:
    record = evaluation_record(0, {0: {0: (1e6, 10)}})
    assert math.isfinite(record["stages"][0]["perplexity"])


def test_stages_without_a_score_are_absent() -> None:
    record = evaluation_record(0, {0: {}, 1: {0: (1.0, 1)}})
    assert [s["stage"] for s in record["stages"]] == [1]
    assert evaluation_record(0, {0: {}})["stages"] == []


def test_traffic_sums_all_processes_by_edge_and_collective() -> None:
    config = tiny_config(pipeline={"cut": [1, 3]})
    sent = [
        {"forward/bytes/0": 100, "forward/messages/0": 2, "fedavg": 7},
        {"forward/bytes/0": 50, "forward/messages/0": 1, "forward/bytes/1": 9,
         "forward/messages/1": 3, "gradients": 5, "fedavg": 1},
    ]  # fmt: skip
    record = traffic_record(4, sent, pipeline=config.pipeline)
    assert record["edges"] == [
        {"from": 0, "to": 1, "bytes_forward": 150, "bytes_backward": 0, "messages_forward": 3,
         "messages_backward": 0},
        {"from": 1, "to": 2, "bytes_forward": 9, "bytes_backward": 0, "messages_forward": 3,
         "messages_backward": 0},
    ]  # fmt: skip
    collectives = {"fedavg": 8, "shared_gradients": 0, "gradients": 5, "embedding": 0}
    assert record["collectives"] == collectives


def test_the_timeline_is_a_chrome_trace_from_zero_in_microseconds(tmp_path: Path) -> None:
    events = [
        (1, 0, ("forward", 2, 3, 10.5, 10.75)),
        (0, 1, ("recv_activation", 0, 3, 10.0, 10.25)),
    ]
    write_timeline(tmp_path, events)
    forward, received = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert forward == {
        "name": "forward", "cat": "compute", "ph": "X", "ts": 5e5, "dur": 2.5e5, "pid": 1,
        "tid": 0, "args": {"micro_batch": 2, "step": 3},
    }  # fmt: skip
    assert (received["cat"], received["ts"]) == ("message", 0.0)


def test_a_run_without_traced_steps_has_no_timeline(tmp_path: Path) -> None:
    write_timeline(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
