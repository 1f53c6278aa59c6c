"""Where ranks of another launcher meet: whom they believe, and what they say when nobody comes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedpipe.distributed.env import ProcessEnv, detect
from fedpipe.errors import FedPipeError, LaunchError
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data


def _at(env: ProcessEnv, port: int, host: str = "127.0.0.1") -> ProcessEnv:
    return replace(env, rendezvous=f"tcp://{host}:{port}", hosts_store=env.rank == 0)


def _error(run: Callable[[], Any]) -> tuple[str, str, float]:
    """Class and text of the error of a call, and how long that took."""
    started = time.monotonic()
    with pytest.raises(FedPipeError) as caught:
        run()
    return type(caught.value).__name__, str(caught.value), time.monotonic() - started


@contextmanager
def _taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- nobody is there -------------------------------------------------------------------------------


def _cannot_meet(env: ProcessEnv, port: int, host: str) -> tuple[tuple[str, str, float], list[str]]:
    from fedpipe.distributed import meeting

    meeting._ANSWER_S, meeting._KNOWN_S, meeting.JOIN_S, meeting._TELL_S = 2.0, 0.5, 2.0, 0.5
    told: list[str] = []
    found = _error(lambda: meeting.Meeting(_at(env, port, host), notify=told.append))
    return found, told


def test_a_port_that_another_program_has_is_named_on_every_rank() -> None:
    with _taken_port() as port:
        (host, _), (other, _) = run_distributed(_cannot_meet, 2, port, "127.0.0.1")
    assert (host[0], other[0]) == ("TopologyError", "TopologyError")
    assert re.match(
        rf"MASTER_PORT: expected a free port of \S+, got {port} \(Address already in use\)\. "
        "Choose another one", host[1],
    )  # fmt: skip
    assert other[1].startswith(
        f"MASTER_PORT: expected the store of rank 0 at 127.0.0.1:{port}, got another program, "
    )
    assert max(host[2], other[2]) < 15


def test_a_host_that_does_not_resolve_is_named_on_every_rank() -> None:
    results = run_distributed(_cannot_meet, 2, free_port(), "no.such.host.invalid")
    for (kind, text, _), _ in results:
        assert kind == "TopologyError"
        assert re.match(
            r"MASTER_ADDR: expected a host that \S+ can reach, got no\.such\.host\.invalid "
            r"\(.+\)\. Name the host of rank 0", text,
        )  # fmt: skip


LEFT_OVER = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def _alone(_: ProcessEnv, rank: int, port: int, folder: Path) -> tuple[list[str], str, str]:
    """A process by itself, in a shell with the variables of an earlier launcher."""
    from fedpipe.distributed import meeting

    meeting.JOIN_S, meeting._TELL_S = 2.0, 0.5
    os.environ.update(LEFT_OVER, RANK=str(rank), MASTER_PORT=str(port))
    told: list[str] = []
    kind, text, _ = _error(
        lambda: meeting.Meeting(detect(), notify=told.append).share_secret(lambda: folder)
    )
    return told, kind, text


@pytest.mark.parametrize(
    ("rank", "waits", "ends"),
    [
        (0, "waiting for rank 1, ", "rank 1: expected to meet within 2 s, got no sign of life. "),
        (
            1,
            "rank 1 waits for rank 0 at 127.0.0.1:PORT (Connection refused), ",
            "rank 0: expected it at 127.0.0.1:PORT within 2 s, got none (Connection refused). ",
        ),
    ],
    ids=["rank 0", "rank 1"],
)
def test_a_wait_has_a_stated_end_and_says_which_variables_make_a_process_wait(
    tmp_path: Path, rank: int, waits: str, ends: str
) -> None:
    port = free_port()
    (((told, *_), kind, text),) = run_distributed(_alone, 1, rank, port, tmp_path)
    assert kind == "LaunchError"
    assert text.startswith(ends.replace("PORT", str(port)))
    why = (
        "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT make this process a rank of a launcher; "
        "if no launcher has started it: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
    )
    assert re.fullmatch(f"{re.escape(waits.replace('PORT', str(port)))}\\d s more. {why}", told), (
        told
    )
    assert text.endswith(f" {why}.")


# -- whom a rank believes --------------------------------------------------------------------------


def _meet(env: ProcessEnv, port: int, folder: Path, forge: bool) -> Any:
    """Rank 0 prepares for a while; meanwhile somebody who knows no secret writes to the store."""
    import torch.distributed as dist

    from fedpipe.distributed import meeting as module

    module._FAREWELL_S = 2.0
    meeting = module.Meeting(_at(env, port), notify=lambda line: None)
    meeting.share_secret(lambda: folder)

    def prepare() -> str:
        if forge:
            stranger = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=9))
            stranger.set("board/0/value", '- "of a stranger"')
            time.sleep(1.0)
            raise LaunchError("rank 0 goes")
        return Path("/proc/net/tcp").read_text(encoding="ascii")

    try:
        value = meeting.from_rank_0(prepare)
        meeting.agree("end", "")  # the host of the store leaves last
        return value
    except FedPipeError as error:
        return str(error)


def test_ranks_share_a_secret_and_listen_at_the_address_of_the_run_alone(tmp_path: Path) -> None:
    port = free_port()
    first, second = run_distributed(_meet, 2, port, tmp_path, False)
    assert first == second
    listening = [line.split()[1] for line in first.splitlines() if line.split()[3] == "0A"]
    assert [a for a in listening if a.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    assert not list(tmp_path.iterdir()), "the secret is gone when all know it"


def test_a_value_of_somebody_who_does_not_know_the_secret_is_refused(tmp_path: Path) -> None:
    _, other = run_distributed(_meet, 2, free_port(), tmp_path, True)
    assert other.startswith(
        "MASTER_ADDR, MASTER_PORT: expected values signed by this run's ranks, got another one "
        "under 'value'. Another program writes there: start the run again with another MASTER_PORT."
    )


def _led_astray(env: ProcessEnv, port: int, path: str) -> str:
    """Somebody else's rank 0 names a file of its own as the secret."""
    from fedpipe.distributed.meeting import Meeting

    meeting = Meeting(_at(env, port), notify=lambda line: None)
    assert meeting.board is not None
    if env.rank == 0:
        meeting.board.post("hello", path)
        while meeting.board.peek(["end"]) is None:
            time.sleep(0.05)
        return ""
    _, text, _ = _error(lambda: meeting.share_secret(lambda: Path()))
    meeting.board.post("end", True)
    return text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_a_secret_that_somebody_else_could_have_written_is_refused(tmp_path: Path) -> None:
    token = tmp_path / f".meeting-{'0' * 32}.part"
    token.write_text("known")
    os.chown(token, 12345, 12345)
    for path in (str(token), "/etc/hostname"):
        _, text = run_distributed(_led_astray, 2, free_port(), path)
        assert text.startswith(
            "--run-dir: expected a folder whose files belong to the user of this rank, got " + path
        )


# -- how long a healthy rank may take --------------------------------------------------------------


def _waits(env: ProcessEnv, folder: Path, data: Any, slow_s: float) -> tuple[Any, set[timedelta]]:
    """One client on two replicas, so one idles; torch's own time-out is far shorter than that."""
    import torch
    import torch.distributed as dist

    from fedpipe.commands.pretrain import run as pretrain
    from fedpipe.distributed.comm import Comm
    from fedpipe.federation.loop import run_rounds
    from fedpipe.run.run_dir import RunSetup

    c10d = dist.distributed_c10d
    short = timedelta(seconds=slow_s / 3)
    c10d._get_default_timeout = lambda backend: short
    pretrain.load_prepared = lambda directory: data  # type: ignore[attr-defined]
    train, close = pretrain.Pretraining._train, Comm.close
    limits: set[timedelta] = set()

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(slow_s)
        train(*args, **kwargs)

    def look_and_close(comm: Comm) -> None:
        cpu = torch.device("cpu")
        limits.update(group._get_backend(cpu).options._timeout for group in c10d._world.pg_map)
        close(comm)

    pretrain.Pretraining._train = slowly  # type: ignore[method-assign]
    Comm.close = look_and_close  # type: ignore[method-assign]
    config = tiny_config(
        pipeline={"cut": []}, validation={"every_rounds": 1},
        federation={"clients_per_round": 1, "num_rounds": 1, "num_replicas": 2},
    )  # fmt: skip
    setup = RunSetup(config=config, run_dir=folder, data_dir="", checkpoint=None, started_at=0.0)
    return run_rounds(pretrain.Pretraining, setup, env=env, emit=lambda kind, record: None), limits


def test_a_replica_waits_for_a_healthy_one_however_long_that_takes(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    for stopped_at, limits in run_distributed(_waits, 2, tmp_path / "run", data, 6.0):
        assert stopped_at is None
        assert limits == {timedelta(days=365)}, "no group has a time-out of torch's"


# -- signals ---------------------------------------------------------------------------------------

STUCK = """
import ctypes, sys
from fedpipe.distributed.signals import Signals
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with Signals(at_once_s=0.3).caught():
    libc.pthread_mutex_lock(mutex)
    print("stuck", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever, and no signal ends it
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_whose_main_thread_waits_in_c_ends_when_asked_to(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"stuck\n"
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(20) == 75
