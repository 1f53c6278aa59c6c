"""Updates that are not finite: which are named, what remains of a round, what people are told."""

from __future__ import annotations

import pytest

from fedpipe.config.federation import AggregationConfig
from fedpipe.errors import TrainingError
from fedpipe.federation.cohort import Turn
from fedpipe.federation.refusal import (
    NO_FAULT,
    Refused,
    bad_average_error,
    stop_error,
    weigh_updates,
)
from fedpipe.report.console import refused_lines


def _turn(client_id: int, weight: float) -> Turn:
    return Turn(
        client_id=client_id, replica_id=0, num_steps=1, num_examples=1, num_tokens=1, weight=weight
    )


TURNS = [_turn(4, 0.2), _turn(7, 0.3), _turn(2, 0.5)]
BAD = Refused(client=7, stage=1, step=4, what="loss")


def test_the_first_fault_of_a_client_has_the_least_code_and_is_read_back() -> None:
    faults = [
        Refused(client=3, stage=stage, step=step, what=what)
        for step in (0, 7, 10**9)
        for what in ("loss", "grad_norm", "weights")
        for stage in (0, 1, 300)
    ]
    codes = [fault.code for fault in faults]
    assert codes == sorted(set(codes)) and codes[-1] < NO_FAULT < 2**63
    assert [Refused.from_code(3, code) for code in codes] == faults


def test_the_weights_of_the_others_are_renormalised() -> None:
    outcome = weigh_updates(TURNS, [BAD, BAD], aggregation=AggregationConfig(), round_id=0)
    assert outcome.refused == (BAD,) and outcome.left_out == {1}
    assert outcome.share == pytest.approx(0.7)
    assert outcome.weights == pytest.approx((0.2 / 0.7, 0.0, 0.5 / 0.7))
    everyone = weigh_updates(TURNS, [], aggregation=AggregationConfig(), round_id=0)
    assert (everyone.share, everyone.weights) == (1.0, (0.2, 0.3, 0.5)), "bit for bit"


@pytest.mark.parametrize(
    ("rule", "num_byzantine", "num_clients", "num_refused", "is_averaged"),
    [
        ("krum", 1, 5, 1, True),  # the refused one was the one that it withstands
        ("krum", 1, 5, 2, True),
        ("krum", 1, 5, 3, False),
        ("trimmed_mean", 1, 3, 2, True),
        ("median", 1, 3, 2, True),
        ("mean", 0, 2, 1, True),
    ],
)
def test_a_refused_client_is_one_of_those_that_a_robust_rule_withstands(
    rule: str, num_byzantine: int, num_clients: int, num_refused: int, is_averaged: bool
) -> None:
    aggregation = AggregationConfig(
        rule=rule, num_byzantine=num_byzantine, weighting="uniform"  # type: ignore[arg-type]
    )  # fmt: skip
    turns = [_turn(client_id, 1 / num_clients) for client_id in range(num_clients)]
    refused = [Refused(client=c, stage=0, step=0, what="loss") for c in range(num_refused)]
    outcome = weigh_updates(turns, refused, aggregation=aggregation, round_id=0)
    assert outcome.is_averaged == is_averaged
    assert sum(outcome.weights) == pytest.approx(float(is_averaged))


def test_errors_name_client_stage_and_step_and_a_way_out() -> None:
    where = "loss of client 7 at local step 5, stage 1"
    others = [Refused(client=c, stage=0, step=0, what="grad_norm") for c in (4, 2)]
    with pytest.raises(
        TrainingError,
        match=rf"^round 3: expected a finite update of one client at least, got none \(not finite:"
        rf" gradient norm of client 4 at local step 1, stage 0; {where}; gradient norm of client 2"
        r" at local step 1, stage 0\)\. Lower optimizer\.lr or set optimizer\.max_grad_norm in a",
    ):
        weigh_updates(TURNS, [BAD, *others], aggregation=AggregationConfig(), round_id=2)
    assert f"federation.on_bad_update=stop, got others (not finite: {where})" in str(
        stop_error(BAD, round_id=2)
    )
    assert "after the average of finite updates, got others (stage 0, stage 1)" in str(
        bad_average_error(["stage 1", "stage 0", "stage 1"], round_id=2)
    )


def test_people_are_told_in_one_line_each() -> None:
    record = {"refused": [BAD.record()], "averaged": False}
    assert refused_lines(record) == [
        "warning: client 7's update is left out: its loss is not finite at local step 5, stage 1",
        "warning: federation.aggregation.rule needs more clients than are left: the weights stay as"
        " they were",
    ]
    assert refused_lines({"refused": [], "averaged": True}) == refused_lines({}) == []
