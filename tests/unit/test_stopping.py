"""Where a run stops: one moment for all ranks, that nobody has passed and nobody waits for."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fedpipe.distributed.signals import STOP_SIGNALS, Interrupted, Signals, StopSignals
from fedpipe.distributed.watch import Moment, StopPoint


def test_a_rank_that_is_not_asked_to_stop_commits_as_far_as_it_wants() -> None:
    stop = StopPoint()
    assert stop.commit((0, 3)) == (0, 3)
    assert stop.commit((2, 0)) == (2, 0)
    assert stop.end is None


def test_a_frozen_rank_goes_on_to_its_commitment_and_waits_only_to_go_further() -> None:
    stop = StopPoint()
    stop.commit((0, 5))
    assert stop.freeze() == (0, 5)
    assert stop.commit((0, 4)) == (0, 4)
    assert stop.commit((0, 5)) == (0, 5)
    timer = threading.Timer(0.2, stop.settle, args=[(0, 7)])
    timer.start()
    assert stop.commit((0, 9)) == (0, 7), "waits for the agreement, and stops there"
    assert stop.commit((0, 6)) == (0, 6), "goes on to where the others are"
    assert stop.commit((1, 0)) == (0, 7)


def test_a_rank_does_not_wait_for_an_agreement_that_will_not_come() -> None:
    stop = StopPoint()
    stop.freeze()
    threading.Timer(0.2, stop.fail, args=[RuntimeError("Connection reset")]).start()
    with pytest.raises(ConnectionError, match="^the ranks could not agree where to stop$"):
        stop.commit((0, 1))


class Pipeline:
    """Stages as threads: a later one starts a step after, an earlier one at most 2 steps before."""

    def __init__(self, *, num_stages: int, draw: random.Random) -> None:
        self.points = [StopPoint() for _ in range(num_stages)]
        self.done = [0] * num_stages
        self._pauses = [[draw.choice((0, 0, 0.002)) for _ in range(97)] for _ in range(num_stages)]
        self._changed = threading.Condition()
        self.threads = [threading.Thread(target=self._run, args=(s,)) for s in range(num_stages)]

    def _run(self, stage: int) -> None:
        step = 0
        while self.points[stage].commit((0, step + 2)) > (0, step):
            with self._changed:  # the message of the stage before; room for one to the next
                self._changed.wait_for(partial(self._may_run, stage, step))
            time.sleep(self._pauses[stage][step % 97])
            with self._changed:
                self.done[stage] = step = step + 1
                self._changed.notify_all()

    def _may_run(self, stage: int, step: int) -> bool:
        before, after = self.done[:stage], self.done[stage + 1 :]
        return (not before or before[-1] > step) and (not after or after[0] >= step - 2)


@pytest.mark.parametrize("seed", range(4))
def test_stages_of_uncoupled_replicas_stop_at_the_same_step_and_none_is_left_behind(
    seed: int,
) -> None:
    draw = random.Random(seed)
    pipelines = [Pipeline(num_stages=n, draw=draw) for n in (3, 1, 2)]
    threads = [thread for pipeline in pipelines for thread in pipeline.threads]
    for thread in threads:
        thread.start()
    time.sleep(draw.uniform(0.0, 0.1))
    commitments: list[Moment] = []
    for point in (p for pipeline in pipelines for p in pipeline.points):
        commitments.append(point.freeze())  # one after the other, as the watches do
        time.sleep(draw.uniform(0.0, 0.01))
    for point in (p for pipeline in pipelines for p in pipeline.points):
        point.settle(max(commitments))
        time.sleep(draw.uniform(0.0, 0.01))
    for thread in threads:
        thread.join(timeout=30)
    done = {steps for pipeline in pipelines for steps in pipeline.done}
    assert done == {max(commitments)[1]}


# -- signals ---------------------------------------------------------------------------------------

PROGRAM = """
import signal, time
from fedpipe.distributed.signals import STOP_SIGNALS, StopSignals
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
signals = StopSignals()
print("blocked", flush=True)
time.sleep(0.3)
signals.catch()
while not signals.asked:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        yield process
        process.kill()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_counts_that_came_before_it_is_caught(
    program: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert program.stdout is not None
    assert program.stdout.readline() == "blocked\n"
    program.send_signal(number)
    assert program.stdout.readline() == "asked\n"


def test_a_second_signal_ends_the_process_with_75_unless_it_follows_at_once(
    program: subprocess.Popen[str],
) -> None:
    assert program.stdout is not None
    assert program.stdout.readline() == "blocked\n"
    program.send_signal(signal.SIGTERM)
    assert program.stdout.readline() == "asked\n"
    program.send_signal(signal.SIGINT)  # the launcher passes on what the terminal has sent
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.5)
    deadline = time.monotonic() + 30
    while program.poll() is None and time.monotonic() < deadline:
        program.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert program.wait(30) == 75


def test_nothing_is_asked_before_a_signal_comes() -> None:
    assert not StopSignals().asked


def test_a_closed_terminal_asks_to_stop_unless_nohup_has_it_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(Interrupted), Signals().caught():
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        asked = StopSignals()
        with Signals().caught():
            asked.catch()
            signal.raise_signal(signal.SIGHUP)
            asked.release()
        assert not asked.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_heard_in_a_thread_and_not_in_a_forked_child() -> None:
    """A pool of processes ends its children with SIGTERM: that is none to their parent."""
    asked = StopSignals()
    asked.catch()
    try:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        time.sleep(0.1)
        assert not asked.asked
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not asked.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked.number == signal.SIGTERM
    finally:
        asked.release()
