"""The simulator against the closed forms of the pipeline literature."""

from __future__ import annotations

import json

import pytest

from fedpipe.pipeline.schedule import SCHEDULES
from fedpipe.pipeline.timeline import COMPUTE, StageCost, Timeline, simulate, to_chrome_trace
from tests.helpers.cases import every
from tests.helpers.tiny import stage_chain

BALANCED = StageCost(1.0, 2.0)


def run(schedule: str, stages: int, micro_batches: int, **options: float) -> Timeline:
    costs = [BALANCED] * stages
    return simulated(schedule, costs, num_micro_batches=micro_batches, **options)


def simulated(schedule: str, costs: list[StageCost], **options: float) -> Timeline:
    return simulate(schedule, stage_chain(schedule, len(costs)), costs, **options)


@every("in_flight", [1, 2])
@every("stages", [1, 2, 4, 8])
@every("micro_batches", [1, 4, 8])
def test_1f1b_bubble_is_the_textbook_one(stages: int, micro_batches: int, in_flight: int) -> None:
    # (S - 1) / (M + S - 1), Narayanan et al. 2021, section 2.2.
    expected = 100.0 * (stages - 1) / (micro_batches + stages - 1)
    timeline = run("1f1b", stages, micro_batches, in_flight=in_flight)
    assert timeline.bubble_pct == pytest.approx(expected)
    assert timeline.step_s == pytest.approx(3.0 * (micro_batches + stages - 1))


@every("micro_batches", [1, 2, 4, 8, 16])
def test_two_stage_1f1b_idles_one_in_m_plus_one(micro_batches: int) -> None:
    timeline = run("1f1b", 2, micro_batches)
    assert timeline.bubble_pct == pytest.approx(100.0 / (micro_batches + 1))


def test_four_stages_and_eight_micro_batches_idle_three_elevenths() -> None:
    assert run("1f1b", 4, 8).bubble_pct == pytest.approx(300.0 / 11.0)


@every("stages", [2, 4])
def test_sequential_works_on_one_stage_at_a_time(stages: int) -> None:
    timeline = run("sequential", stages, 4)
    assert timeline.bubble_pct == pytest.approx(100.0 - 100.0 / stages)


@every("in_flight", [1, 2])
@every("stages", [1, 2, 4, 8])
def test_streaming_has_no_bubble_when_balanced(stages: int, in_flight: int) -> None:
    for micro_batches in (1, 4):
        timeline = run("streaming", stages, micro_batches, in_flight=in_flight)
        assert timeline.bubble_pct == pytest.approx(0.0)
        assert timeline.step_s == pytest.approx(3.0 * micro_batches)


def test_the_slowest_stage_sets_the_pace_of_streaming() -> None:
    costs = [StageCost(1, 1), StageCost(2, 4), StageCost(1, 1)]
    for order in (costs, costs[::-1], [costs[1], costs[0], costs[2]]):
        timeline = simulated("streaming", order, num_micro_batches=4)
        assert timeline.step_s == pytest.approx(24.0)
        assert max(timeline.stage_busy_pct) == pytest.approx(100.0)
        assert timeline.bubble_pct == pytest.approx(100.0 * (1 - 10 / 18))


def test_head_counts_with_every_backward_of_its_stage() -> None:
    costs = [StageCost(1, 2, head_s=3)] * 2
    assert simulated("streaming", costs, num_micro_batches=2).step_s == pytest.approx(12.0)
    costs[0] = StageCost(1, 2)
    assert simulated("sequential", costs, num_micro_batches=2).step_s == pytest.approx(18.0)


def test_optimizer_step_counts_once_per_batch() -> None:
    costs = [StageCost(1, 2, optimizer_s=0.5)] * 2
    assert simulated("streaming", costs, num_micro_batches=4).step_s == pytest.approx(12.5)


def test_transfers_hide_behind_compute_in_streaming_and_show_in_sequential() -> None:
    assert run("streaming", 2, 4, transfer_s=1.0).step_s == pytest.approx(12.0)
    assert run("sequential", 2, 4, transfer_s=1.0).step_s == pytest.approx(4 * (6 + 2))


def test_transfers_slower_than_compute_set_the_pace() -> None:
    assert run("streaming", 2, 4, transfer_s=5.0).step_s == pytest.approx(20.0)


def test_a_fast_sender_waits_for_the_window() -> None:
    costs = [StageCost(0.0, 0.001), StageCost(1, 1)]
    timeline = simulated("streaming", costs, num_micro_batches=2, in_flight=1)
    sends = [e for e in timeline.events if e.stage == 0 and e.name == "send_activation"]
    assert max(e.end_s - e.start_s for e in sends) > 1.0


def u_shape(
    schedule: str, costs: list[StageCost], *, num_micro_batches: int, in_flight: int = 2
) -> Timeline:
    """The last costs are those of the heads, which share a process with the first stage."""
    servers = (len(costs) - 1) // 2 if schedule == "streaming" else len(costs) - 2
    specs = stage_chain(schedule, 1 + servers, head_location="client")
    return simulate(
        schedule, specs, costs, num_micro_batches=num_micro_batches, in_flight=in_flight,
        num_batches=12, transfer_s=0.01,
    )  # fmt: skip


@every("micro_batches", [2, 4, 8])
@every("head_s", [0.2, 0.6])
def test_the_way_to_a_head_at_home_and_back_hides_behind_compute(
    micro_batches: int, head_s: float
) -> None:
    # The client's own work and the head's add up to the server's: nobody has slack.
    client = StageCost((3.0 - head_s) / 3, (3.0 - head_s) / 3 * 2)
    costs = [client, StageCost(1, 2), StageCost(0, 0, head_s=head_s)]
    timeline = u_shape("streaming", costs, num_micro_batches=micro_batches)
    assert timeline.bubble_pct < 0.5
    assert u_shape("sequential", costs, num_micro_batches=micro_batches).bubble_pct > 45.0


@every("micro_batches", [4, 8])
@every("servers", [2, 3])
def test_several_server_stages_with_heads_at_home_stream_as_one_does(
    servers: int, micro_batches: int
) -> None:
    head_s = 0.2
    own = 3.0 - servers * head_s
    costs = [StageCost(own / 3, own / 3 * 2), *[StageCost(1, 2)] * servers]
    costs += [StageCost(0, 0, head_s=head_s)] * servers
    assert u_shape("streaming", costs, num_micro_batches=micro_batches).bubble_pct < 3.0


def test_a_server_behind_a_fast_client_never_idles_while_it_has_a_forward_to_run() -> None:
    costs = [StageCost(0.5, 1.0), StageCost(1, 2), StageCost(0, 0, head_s=0.5)]
    timeline = u_shape("streaming", costs, num_micro_batches=4)
    assert timeline.stage_busy_pct[1] > 99.0


@every("schedule", SCHEDULES)
def test_events_of_a_stage_follow_one_another_and_messages_arrive_after_they_left(
    schedule: str,
) -> None:
    timeline = run(schedule, 3, 4, transfer_s=0.25, num_batches=3)
    sent = {}
    for stage in range(3):
        events = [e for e in timeline.events if e.stage == stage]
        assert all(a.end_s == b.start_s for a, b in zip(events, events[1:], strict=False))
        sent |= {(stage, e.name, e.batch, e.micro_batch): e.end_s for e in events}
    for (stage, name, batch, micro_batch), end_s in sent.items():
        if name == "recv_activation":
            assert end_s >= sent[stage - 1, "send_activation", batch, micro_batch] + 0.25


@every("schedule", SCHEDULES)
def test_chrome_trace_holds_every_event_in_microseconds(schedule: str) -> None:
    timeline = run(schedule, 2, 2, num_batches=2)
    trace = json.loads(json.dumps(to_chrome_trace(timeline)))["traceEvents"]
    assert len(trace) == len(timeline.events)
    forward = next(e for e in trace if e["name"] == "forward")
    assert forward["dur"] == pytest.approx(1e6)
    assert forward["args"] == {"micro_batch": 0, "step": 0}
    assert {e["cat"] for e in trace if e["name"] in COMPUTE} == {"compute"}
    assert {e["ph"] for e in trace} == {"X"}
