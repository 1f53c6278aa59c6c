"""Asked to stop, all ranks save at one local step, wherever they are; resumed, nothing differs."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData, save_manifest
from fedpipe.distributed.activity import Activity, Heartbeats
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.signals import StopSignals
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import PassiveObserver, Watch
from fedpipe.errors import CheckpointError
from fedpipe.report.writer import read_metrics
from fedpipe.run.checkpoint import CheckpointWriter, Position, find_latest
from fedpipe.run.run_dir import RunSetup
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import outcome
from tests.helpers.tiny import tiny_config, tiny_data

STEP_S = 0.02
"""A local step takes at least this long in a run that is to stop: it must not end before its
watches have looked."""
AGREED_S = 60.0
"""After so long a rank that waits for the agreement gives up."""


@dataclass(frozen=True)
class Moment:
    """When a rank gets the signal."""

    rank: int
    kind: str
    """Of a message to the watcher, or "evaluate" or "save": as that begins."""
    number: int = 0
    """How many of them come before."""
    behind: int | None = None
    """A rank that waits after its first step until all have agreed where to stop."""


def _pretrain(env: ProcessEnv, setup: RunSetup, moment: Moment | None) -> Position | None:
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.federation.loop import run_rounds

    watch = Watch(signals=StopSignals())
    left = [moment.number if moment else 0]
    _, replica, _ = Grid.from_config(setup.config).coordinates(env.rank)

    def passes(kind: str) -> None:
        if moment is not None and (env.rank, kind) == (moment.rank, moment.kind):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGUSR2)

    def emit(kind: str, record: Any) -> None:
        passes(kind)
        if moment is None or kind != "step":
            return
        if moment.behind is None:  # replicas have different speeds
            time.sleep(STEP_S * (1 + replica))
        elif moment.behind == env.rank:
            deadline = time.monotonic() + AGREED_S
            while watch.stop.end is None and time.monotonic() < deadline:
                time.sleep(0.01)

    def announced(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            passes(kind)
            return method(*args, **kwargs)

        return call

    PretrainingReplica.evaluate = announced("evaluate", PretrainingReplica.evaluate)  # type: ignore[method-assign]
    CheckpointWriter.save = announced("save", CheckpointWriter.save)  # type: ignore[method-assign]
    with watch:
        return run_rounds(Pretraining, setup, env=env, emit=emit, watch=watch)


def _pretrain_over_tcp(
    env: ProcessEnv, setup: RunSetup, moment: Moment | None, port: int
) -> Position | None:
    from fedpipe.distributed.meeting import Meeting

    env = replace(env, rendezvous=f"tcp://127.0.0.1:{port}", hosts_store=env.rank == 0)
    meeting = Meeting(env, notify=lambda line: None)
    message = meeting.from_rank_0(setup.to_message)
    return _pretrain(env, RunSetup.from_message(message, started_at=setup.started_at), moment)


def _run(
    config: RunConfig,
    data: PreparedData,
    run_dir: Path,
    moment: Moment | None = None,
    *,
    tcp: bool = False,
) -> Position | None:
    save_manifest(data, Path(data.directory))
    run_dir.mkdir(exist_ok=True)
    checkpoint, passed_over = find_latest(run_dir)
    assert passed_over == []
    setup = RunSetup(
        config=config,
        run_dir=run_dir,
        data_dir=data.directory,
        checkpoint=checkpoint,
        started_at=time.monotonic(),
    )
    fn, more = (_pretrain_over_tcp, (_free_port(),)) if tcp else (_pretrain, ())
    (stopped_at,) = set(run_distributed(fn, config.world_size, setup, moment, *more))
    return stopped_at


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "federation": {"clients_per_round": 3, "num_rounds": 3, "num_local_steps": 15},
    }
    return tiny_config(**{n: base.get(n, {}) | sections.get(n, {}) for n in {*base, *sections}})


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_never_was(tmp_path: Path) -> None:
    """One replica hosts two of the three clients, the other is slower and hosts one."""
    data = tiny_data(tmp_path / "data")
    config = _config(
        federation={"optimizer_state": "keep", "average": {"embeddings": False}},
        checkpoint={"every_steps": 12, "every_rounds": 2},
    )
    assert _run(config, data, tmp_path / "undisturbed") is None
    run_dir = tmp_path / "stopped"
    moments = (
        Moment(1, "training"),  # everything is built, no step is made
        Moment(3, "step", 4),
        Moment(2, "save"),
        Moment(0, "step", 6),
        Moment(2, "evaluate"),
        Moment(0, "round"),
        Moment(1, "step", 1),
    )
    stops = []
    for moment in moments:
        stopped_at = _run(config, data, run_dir, moment)
        if stopped_at is None:
            break
        stops.append(stopped_at)
        checkpoint, _ = find_latest(run_dir)
        assert stopped_at == (checkpoint.position if checkpoint else Position())
    assert stops == sorted(stops, key=lambda p: (p.round_id, p.step))
    assert len(set(stops)) >= 4 and any(p.step for p in stops), stops
    if stopped_at is not None:
        assert _run(config, data, run_dir) is None
    assert outcome(run_dir) == outcome(tmp_path / "undisturbed")


MODES = {
    "head at home": {
        "pipeline": {"cut": [1, 3], "head_location": "client", "num_micro_batches": 1},
        "federation": {"num_replicas": 1, "clients_per_round": 1, "num_local_steps": 40},
    },
    "data-parallel": {
        "federation": {
            "data_parallel_degree": 2, "num_replicas": 1, "clients_per_round": 1,
            "num_local_steps": 40,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_one_of_them_tells_stop_in_the_middle_of_a_round_and_resume_bit_for_bit(
    mode: str, tmp_path: Path
) -> None:
    """The one process that gets the signal tells the others, over TCP as on a cluster.

    What every option does to a stop is ``test_options.py``'s.
    """
    data = tiny_data(tmp_path / "data")
    config = _config(**MODES[mode], **{"validation": {"every_rounds": 2}})
    config = replace(config, federation=replace(config.federation, num_rounds=2))
    assert _run(config, data, tmp_path / "undisturbed") is None
    num_stages, num_replicas = config.pipeline.num_stages, config.federation.num_replicas
    last = Grid.from_config(config).rank(num_stages - 1, num_replicas - 1, 0)  # it tells of steps
    moment = Moment(last, "step", 3)
    stopped_at = _run(config, data, tmp_path / "stopped", moment, tcp=True)
    assert stopped_at is not None and stopped_at.step > 0
    assert _run(config, data, tmp_path / "stopped") is None
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


AVERAGING = {
    "server optimizer over int8": {
        "server_optimizer": {"name": "fedadam", "lr": 0.01}, "wire": "int8",
    },
    "server optimizer over sparse changes": {
        "server_optimizer": {"name": "fedavgm", "nesterov": True, "lr": 0.7}, "wire": "sparse",
    },
    "median under attack": {
        "aggregation": {"rule": "median", "weighting": "uniform"},
        "attack": {"kind": "noise", "num_attackers": 1, "scale": 0.1},
    },
}  # fmt: skip


@pytest.mark.parametrize("averaging", AVERAGING)
def test_a_run_that_stops_when_only_the_averaging_is_left_averages_the_same(
    averaging: str, tmp_path: Path
) -> None:
    """One replica has made all its steps when the signal comes, the other one, and catches up."""
    data = tiny_data(tmp_path / "data")
    federation = {"clients_per_round": 2, "num_rounds": 2, "num_local_steps": 8}
    config = _config(federation=federation | AVERAGING[averaging])
    assert _run(config, data, tmp_path / "undisturbed") is None
    last_step = Moment(0, "step", 7, behind=config.pipeline.num_stages)
    stopped_at = _run(config, data, tmp_path / "stopped", last_step)
    assert stopped_at == Position(round_id=0, step=8)
    saved, _ = find_latest(tmp_path / "stopped")
    assert saved is not None and saved.seconds > 0
    assert _run(config, data, tmp_path / "stopped") is None
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")
    records = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    first = next(r for r in records if r["kind"] == "round")
    assert first["seconds"] > saved.seconds, "the time before the stop counts"


# -- who hangs -------------------------------------------------------------------------------------


def _get_stuck(env: ProcessEnv, setup: RunSetup) -> list[tuple[float, Activity]]:
    """Stage 1 sleeps in a forward; what both ranks report meanwhile."""
    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.federation.loop import run_rounds
    from fedpipe.models.stage import Stage

    reports: list[tuple[float, Activity]] = []
    forward, calls = Stage.forward, [0]

    def sleeping(stage: Stage, *args: Any) -> Any:
        calls[0] += 1
        if stage.spec.stage_id == 1 and calls[0] == 8:
            time.sleep(4.0)
        return forward(stage, *args)

    Stage.forward = sleeping  # type: ignore[method-assign]
    report = PassiveObserver(lambda activity: reports.append((time.monotonic(), activity)))
    with Watch(observer=report) as watch:
        run_rounds(Pretraining, setup, env=env, emit=lambda kind, record: None, watch=watch)
    return reports


def test_a_rank_that_is_stuck_is_named_with_its_client_and_not_the_one_that_waits(
    tmp_path: Path,
) -> None:
    config = tiny_config(federation={"num_replicas": 1, "clients_per_round": 1, "num_rounds": 1})
    data = tiny_data(tmp_path / "data")
    save_manifest(data, Path(data.directory))
    setup = RunSetup(
        config=config, run_dir=tmp_path, data_dir=data.directory, checkpoint=None, started_at=0.0
    )
    reports = run_distributed(_get_stuck, 2, setup)
    events = sorted((t, rank, a) for rank in range(2) for t, a in reports[rank])
    heartbeats, found = Heartbeats(timeout_s=2.0), None
    for clock_s, rank, activity in events:
        heartbeats.hear(rank, activity)
        found = found or heartbeats.find_hung([0, 1], clock_s=clock_s)
        if found:
            break
    assert found is not None and found[0] == 1
    assert found[1].startswith("in round 1, local step 3, forward of micro-batch 1 for 2")
    assert " client " in heartbeats.name(1, Grid.from_config(config))


# -- a start that is refused -----------------------------------------------------------------------


def _refused(env: ProcessEnv, port: int) -> str:
    from fedpipe.distributed.meeting import Meeting

    def prepare() -> None:
        time.sleep(0.5)  # text is prepared
        raise CheckpointError("--run-dir: in use.")

    env = replace(env, rendezvous=f"tcp://127.0.0.1:{port}", hosts_store=env.rank == 0)
    meeting = Meeting(env, notify=lambda line: None)
    with pytest.raises(CheckpointError, match=r"^--run-dir: in use\.$") as caught:
        meeting.from_rank_0(prepare)
    return str(caught.value)


def test_what_rank_0_is_refused_is_raised_on_every_rank() -> None:
    assert run_distributed(_refused, 3, _free_port()) == ["--run-dir: in use."] * 3
