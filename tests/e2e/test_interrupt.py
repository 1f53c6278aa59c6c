"""Signals, frozen ranks and second starts, under fedpipe's own launcher and under another one."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpipe.report.writer import read_metrics
from tests.helpers import warm
from tests.helpers.cli import REPOSITORY, TIMEOUT_S, Command, fedpipe
from tests.helpers.runs import outcome

TINY = (
    "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "data.sequence_length=32", "pipeline.cut=[2]",
    "pipeline.micro_batch_size=8", "pipeline.num_micro_batches=2", "federation.num_clients=6",
    "federation.num_replicas=2", "federation.clients_per_round=4", "federation.num_rounds=3",
    "federation.num_local_steps=25", "checkpoint.every_rounds=3", "checkpoint.every_steps=0",
    "validation.every_rounds=1", "log.to=[]", "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1",
)  # fmt: skip
WORLD_SIZE = 2
"""Of the runs that another launcher starts: every process of them imports torch anew."""
LONG = ("federation.num_rounds=4000",)
ONE_REPLICA = ("federation.num_replicas=1",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds every run and the prepared text, which all of them share."""
    return tmp_path_factory.mktemp("interrupt")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> tuple[str, ...]:
    return (*TINY, f"data.cache_dir={folder / 'cache'}")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, arguments: tuple[str, ...]) -> Path:
    run_dir = folder / "undisturbed"
    result = fedpipe("pretrain", "--run-dir", str(run_dir), *arguments, folder=folder)
    assert (result.code, result.err) == (0, ""), result.err
    return run_dir


def _has(run_dir: Path, kind: str, round_id: int) -> bool:
    """Whether a record of a round was written."""
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    return any((r["kind"], r.get("round")) == (kind, round_id) for r in records)


def _worker(command: Command, rank: int) -> int:
    """Find the process of a rank, by the log that it writes."""
    name = f"rank_{rank:05d}.log"
    for pid in command.descendants():
        try:
            if Path(os.readlink(f"/proc/{pid}/fd/1")).name == name:
                return pid
        except OSError:  # it has just ended
            continue
    raise AssertionError(f"no process writes {name}")


# -- fedpipe pretrain ------------------------------------------------------------------------------


def test_interrupted_in_every_phase_a_run_ends_as_if_nothing_had_been(
    undisturbed: Path, folder: Path, arguments: tuple[str, ...]
) -> None:
    """Only a stop saves here: no checkpoint is due before the run is done."""
    run_dir = folder / "interrupted"

    def interrupt(what: str, number: signal.Signals, condition: Any, *, group: bool) -> str:
        command = Command("pretrain", "--run-dir", str(run_dir), *arguments, folder=folder)
        command.wait_for(lambda: bool(condition(command.output())), what)
        send = os.killpg if group else os.kill  # a terminal reaches the whole group
        send(command.process.pid, number)
        result = command.finish()
        assert (result.code, result.err) == (75, ""), what + result.out + result.err
        command.assert_nothing_left()
        return result.out.splitlines()[-1]

    def trains(output: str) -> bool:
        return " step " in output and "tok/s" in output

    plan = interrupt("plan", signal.SIGTERM, lambda output: "fedpipe 0" in output, group=False)
    assert plan.startswith("interrupted; ")
    steps = interrupt("training", signal.SIGUSR2, trains, group=False)
    assert re.fullmatch(
        rf"interrupted after (local step \d+ of )?round \d; resume with: fedpipe pretrain "
        rf"--run-dir {re.escape(str(run_dir))}",
        steps,
    ), steps
    interrupt("resumed", signal.SIGINT, lambda output: "resuming" in output, group=True)
    # A terminal that is closed.
    interrupt("validation", signal.SIGHUP, lambda output: _has(run_dir, "round", 1), group=True)
    saved = sorted(path.name for path in run_dir.glob("checkpoints/round_*"))
    assert saved and not any(path.name.endswith(".tmp") for path in run_dir.rglob("*"))
    interrupt("export", signal.SIGTERM, lambda output: "writing the model" in output, group=False)
    result = fedpipe("pretrain", "--run-dir", str(run_dir), folder=folder)
    assert (result.code, result.err) == (0, ""), result.err
    assert outcome(run_dir) == outcome(undisturbed)


@pytest.fixture
def running(folder: Path, arguments: tuple[str, ...], tmp_path: Path) -> Iterator[Command]:
    """A run that goes on for hours, in ``tmp_path / "run"``."""
    command = Command(
        "pretrain", "--run-dir", str(tmp_path / "run"), *arguments, *LONG,
        "pipeline.hang_timeout_s=8", folder=folder,
    )  # fmt: skip
    command.wait_for(lambda: _has(tmp_path / "run", "eval", 0), "first round")
    yield command
    if command.process.poll() is None:
        command.kill()
    command.assert_nothing_left()


def test_a_frozen_rank_is_named_with_its_client_and_a_resumed_run_may_be_more_patient(
    running: Command, folder: Path, tmp_path: Path
) -> None:
    os.kill(_worker(running, 3), signal.SIGSTOP)
    result = running.finish()
    assert result.code == 1, result.out + result.err
    assert re.match(
        r"LaunchError: rank 3 \(stage 1, replica 1(, client \d)?\) hangs: no sign of life for \d+"
        r" s, last seen in .*round \d+.*\. Full log: .*rank_00003\.log\. Run it again with: ",
        result.error,
    ), result.error
    running.assert_nothing_left()
    again = Command(
        "pretrain", "--run-dir", str(tmp_path / "run"), "pipeline.hang_timeout_s=300",
        folder=folder,
    )  # fmt: skip
    again.wait_for(lambda: "tok/s" in again.output(), "training")
    os.kill(again.process.pid, signal.SIGTERM)
    assert again.finish().code == 75


def test_a_second_signal_stops_at_once_although_a_rank_cannot(running: Command) -> None:
    os.kill(_worker(running, 2), signal.SIGSTOP)
    os.kill(running.process.pid, signal.SIGTERM)
    running.wait_for(lambda: "a second signal stops at once" in running.output(), "request")
    os.kill(running.process.pid, signal.SIGINT)
    result = running.finish()
    assert (result.code, result.err) == (75, ""), result.out + result.err
    assert "interrupted; resume with: fedpipe pretrain --run-dir" in result.out


def test_a_killed_rank_is_named_with_its_client(running: Command) -> None:
    os.kill(_worker(running, 2), signal.SIGKILL)
    result = running.finish()
    assert result.code == 1, result.out + result.err
    assert re.match(
        r"LaunchError: rank 2 \(stage 0, replica 1(, client \d)?\) failed: killed by SIGKILL\. ",
        result.error,
    ), result.error


# -- torchrun, srun --------------------------------------------------------------------------------


class Ranks:
    """The processes that srun would start, each in a session of its own, with its exit code."""

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        program: tuple[str, ...] = ("-m", "fedpipe", "pretrain"),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._files = [folder / f"{port}_{rank}.out" for rank in range(WORLD_SIZE)]
        self.processes = []
        for rank, path in enumerate(self._files):
            environment = os.environ | {
                "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(WORLD_SIZE),
                "SLURM_STEP_NUM_TASKS": str(WORLD_SIZE),
                "SLURM_LOCALID": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            with open(path, "wb") as output:
                self.processes.append(
                    warm.Process(
                        [*program, *arguments],
                        env=environment,
                        stdout=output,
                        stderr=output,
                        cwd=folder,
                    )
                )

    def output(self, rank: int) -> str:
        return self._files[rank].read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.output(0):
            assert self.processes[0].poll() is None, self.output(0)
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.output(0)}"
            time.sleep(0.05)

    def finish(self) -> list[int]:
        return [process.wait(TIMEOUT_S) for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def test_under_srun_a_second_start_is_refused_everywhere_and_one_signalled_rank_stops_all(
    folder: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ranks = Ranks("--run-dir", str(run_dir), *arguments, *LONG, *ONE_REPLICA, folder=folder)
    second = None
    try:
        ranks.wait_for("validation")
        second = Ranks("--run-dir", str(run_dir), folder=folder)
        assert second.finish() == [2] * WORLD_SIZE
        (line,) = second.output(0).splitlines()
        assert line.startswith("CheckpointError: --run-dir: expected a run that no other process")
        assert [second.output(rank) for rank in range(1, WORLD_SIZE)] == [""] * (WORLD_SIZE - 1)

        ranks.processes[1].send_signal(signal.SIGUSR2)
        assert ranks.finish() == [75] * WORLD_SIZE
        last = ranks.output(0).splitlines()[-1]
        assert re.fullmatch(
            r"interrupted after .*round \d+; give the same command again to resume", last
        ), last
        assert list(run_dir.glob("checkpoints/round_*"))
    finally:
        for started in (ranks, second):
            if started is not None:
                started.kill()


def test_under_srun_a_frozen_rank_is_named_and_a_signal_before_training_ends_with_75(
    folder: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = (
        "--run-dir", str(run_dir), *arguments, *LONG, *ONE_REPLICA, "pipeline.hang_timeout_s=8",
    )  # fmt: skip
    ranks = Ranks(*command, folder=folder)
    try:
        ranks.wait_for("fedpipe 0")
        for process in ranks.processes:
            process.send_signal(signal.SIGTERM)
        assert ranks.finish() == [75] * WORLD_SIZE, [ranks.output(r) for r in range(WORLD_SIZE)]
        assert not list(run_dir.glob("checkpoints/round_*"))
    finally:
        ranks.kill()
    ranks = Ranks(*command, folder=folder, program=(str(REPOSITORY / "launch/pretrain.py"),))
    try:
        ranks.wait_for("validation")
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.processes[0].wait(TIMEOUT_S) == 1
        error = ranks.output(0).splitlines()[-1]
        assert re.match(r"LaunchError: rank 1 \(stage 1, replica 0.*\) hangs: no sign of ", error)
    finally:
        ranks.kill()


@pytest.mark.parametrize(
    ("rank", "number", "message"),
    [
        (
            1, signal.SIGKILL,
            r"rank 1 \(stage 1, replica 0(, client \d)?\) has ended without a word, last seen in .*"
            r"round \d+.*: its peer, rank 0, lost the connection\. It was killed, ",
        ),
        (
            0, signal.SIGSTOP,
            r"rank 0 \(stage 0, replica 0(, client \d)?\) hangs: the store of the run at "
            r"127\.0\.0\.1:\d+, which it or its launcher hosts, has not answered "
            r"for \d+ s\. See its log; ",
        ),
    ],
    ids=["killed", "host of the store frozen"],
)  # fmt: skip
def test_under_srun_the_other_rank_ends_and_names_the_one_to_blame(
    rank: int, number: signal.Signals, message: str, folder: Path, arguments: tuple[str, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    """No launcher that would end it, no time-out of a collective, and rank 0 cannot say a thing."""
    ranks = Ranks(
        "--run-dir", str(tmp_path / "run"), *arguments, *LONG, *ONE_REPLICA,
        "pipeline.hang_timeout_s=5", folder=folder,
    )  # fmt: skip
    try:
        ranks.wait_for("validation")
        ranks.processes[rank].send_signal(number)
        assert ranks.processes[1 - rank].wait(60) == 1
        error = ranks.output(1 - rank).splitlines()[-1]
        assert re.match(f"LaunchError: {message}", error), error
    finally:
        ranks.kill()


def test_under_srun_what_a_rank_cannot_work_with_ends_every_rank_with_2(
    folder: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """The last rank finds it in training; it says so, and the others end as it does."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "from fedpipe.errors import CorpusError\n"
        "from fedpipe.cli import main\n"
        "if os.environ['SLURM_PROCID'] == '1':\n"
        "    from fedpipe.commands.pretrain.run import Pretraining\n"
        "    def refuse(self, round_id):\n"
        "        raise CorpusError('data.valid: expected text, got none. Name another file.')\n"
        "    Pretraining._validate = refuse\n"
        "sys.exit(main(['pretrain', *sys.argv[1:]], launched=True))\n"
    )
    run_dir = str(tmp_path / "run")
    command = ("--run-dir", run_dir, *arguments, *LONG, *ONE_REPLICA)
    ranks = Ranks(*command, folder=folder, program=(str(script),))
    try:
        assert ranks.finish() == [2] * WORLD_SIZE, [ranks.output(r) for r in range(WORLD_SIZE)]
        line = "CorpusError: data.valid: expected text, got none. Name another file."
        assert ranks.output(1).splitlines() == [line]
    finally:
        ranks.kill()
