"""Which rank hangs: the one that is silent or stuck, never one that waits for it."""

from __future__ import annotations

from fedpipe.distributed.activity import Activity, Heartbeats
from fedpipe.distributed.topology import Grid

FORWARD = Activity(doing="forward", waiting=False, client_id=4)
RECEIVE = Activity(doing="receive", waiting=True)


def _hung(
    heartbeats: Heartbeats, activities: dict[int, Activity | None], *, seconds: int, start: int = 0
) -> tuple[int, str] | None:
    """Let every rank report its activity each second; None is silence."""
    found = None
    for clock_s in range(start, start + seconds):
        found = found or heartbeats.find_hung(activities, clock_s=clock_s)
        for rank, activity in activities.items():
            if activity is not None:
                heartbeats.hear(rank, activity)
    return found


def test_a_silent_rank_is_named_although_all_wait_for_it() -> None:
    heartbeats = Heartbeats(timeout_s=5)
    assert _hung(heartbeats, {0: RECEIVE, 1: FORWARD, 2: RECEIVE}, seconds=2) is None
    found = _hung(heartbeats, {0: RECEIVE, 1: None, 2: RECEIVE}, seconds=9, start=2)
    assert found == (1, "no sign of life for 4 s, last seen in forward")


def test_a_silent_rank_is_named_although_it_waited_itself() -> None:
    heartbeats = Heartbeats(timeout_s=5)
    _hung(heartbeats, {0: RECEIVE, 1: RECEIVE}, seconds=3)
    found = _hung(heartbeats, {0: RECEIVE, 1: None}, seconds=9, start=3)
    assert found == (1, "no sign of life for 5 s, last seen in receive")


def test_a_rank_stuck_in_an_instruction_is_named_and_one_that_waits_is_not() -> None:
    heartbeats = Heartbeats(timeout_s=5)
    assert _hung(heartbeats, {0: RECEIVE, 1: FORWARD}, seconds=9) == (1, "in forward for 5 s")
    assert _hung(Heartbeats(timeout_s=5), {0: RECEIVE, 1: RECEIVE}, seconds=99) is None


def test_a_rank_that_comes_forward_is_not_named_however_long_it_takes() -> None:
    heartbeats = Heartbeats(timeout_s=3)
    for step in range(20):
        forward = Activity(doing=f"forward {step}", waiting=False)
        assert _hung(heartbeats, {0: forward, 1: RECEIVE}, seconds=2, start=2 * step) is None


def test_of_several_stuck_ranks_the_first_is_to_blame() -> None:
    """An all-reduce inside an instruction looks like work."""
    heartbeats = Heartbeats(timeout_s=9)
    _hung(heartbeats, {0: RECEIVE, 1: FORWARD}, seconds=3)
    found = _hung(heartbeats, {0: FORWARD, 1: FORWARD}, seconds=99, start=3)
    assert found is not None and found[0] == 1


def test_a_watcher_that_was_stopped_itself_blames_nobody() -> None:
    """Ctrl-Z stops supervisor and ranks for an hour."""
    heartbeats = Heartbeats(timeout_s=60)
    _hung(heartbeats, {0: FORWARD}, seconds=3)
    assert heartbeats.find_hung([0], clock_s=3600) is None


def test_nobody_hangs_that_has_said_nothing_or_has_ended_nor_without_a_time_out() -> None:
    heartbeats = Heartbeats(timeout_s=2)
    assert _hung(heartbeats, {0: None}, seconds=9) is None
    _hung(heartbeats, {0: FORWARD}, seconds=1, start=9)
    assert heartbeats.find_hung([], clock_s=99) is None
    assert _hung(Heartbeats(timeout_s=0), {0: FORWARD, 1: FORWARD}, seconds=999) is None


def test_a_rank_is_named_by_all_that_it_holds() -> None:
    heartbeats = Heartbeats(timeout_s=1)
    heartbeats.hear(3, FORWARD)
    grid = Grid(num_stages=2, num_replicas=2, data_parallel_degree=1)
    assert heartbeats.name(3, grid) == "rank 3 (stage 1, replica 1, client 4)"
    assert heartbeats.name(1, grid) == "rank 1 (stage 1, replica 0)"
