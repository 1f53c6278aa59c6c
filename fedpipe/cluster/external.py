"""One rank under somebody else's launcher: torchrun, deepspeed, srun, submitit."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe import log
from fedpipe.cluster.attempts import note_attempt, position_of
from fedpipe.cluster.orphan import stopped_with_launcher
from fedpipe.cluster.worker import finish
from fedpipe.commands.plan.cut import choose_cut, measure_here
from fedpipe.commands.pretrain.command import run_console
from fedpipe.commands.pretrain.setup import set_up
from fedpipe.commands.throughput.command import conclude
from fedpipe.commands.throughput.report import Measurement, ThroughputSettings, single_replica
from fedpipe.config.paths import expanded
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.binding import bind
from fedpipe.distributed.env import ProcessEnv, detect, num_gpus, threads_per_process
from fedpipe.distributed.signals import (
    EXIT_INTERRUPTED,
    STOP_SIGNALS,
    Interrupted,
    Signals,
    StopSignals,
)
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Watch
from fedpipe.errors import FedPipeError, LaunchError
from fedpipe.files import system_errors_named
from fedpipe.report.console import RunConsole
from fedpipe.report.samples import samples_text
from fedpipe.report.writer import METRICS_FILE, finite
from fedpipe.run.run_dir import (
    RunSetup,
    check_writable,
    locked,
    resolve_config,
)
from fedpipe.terminal import prepare_output

if TYPE_CHECKING:
    from fedpipe.cluster.peers import Peers
    from fedpipe.config.schema import RunConfig
    from fedpipe.distributed.meeting import Meeting

_LAST_SIGNAL_S = 2.0
"""A signal to all ranks may reach the host of the store this much earlier than another one."""
_AT_ONCE_S = 10.0
"""A rank that is asked to stop before it trains, and waits inside torch, is ended after this."""
_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """What a user asks of a run."""

    task: str = "pretrain"
    """pretrain or throughput."""
    config_path: str | None = None
    overrides: Sequence[str] = ()
    run_dir: str | None = None
    preset: str | None = None
    settings: ThroughputSettings = field(default_factory=ThroughputSettings)
    """Of a measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How this rank's part of a run has ended."""

    code: int
    """0 done, 75 interrupted and saved."""
    signal: int = 0
    """The one that has interrupted the run, whichever rank it reached."""


def main(task: str = "pretrain", arguments: Sequence[str] | None = None) -> int:
    """Run this rank: the whole of ``launch/TASK.py``.

    Args:
        task: pretrain or throughput.
        arguments: Command line; None takes the process' own.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed, 2 for a user's error,
        1 for a failure, on every rank (one line on stderr, of the rank that has found it).
    """
    prepare_output()
    parser = argparse.ArgumentParser(description=f"one rank of `fedpipe {task}`")
    parser.add_argument("--preset")
    for name in ("--config", "--run-dir"):
        parser.add_argument(name, type=partial(expanded, key=name))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    rank = 0
    try:
        args = parser.parse_args(arguments)
        request = RunRequest(
            task=task, config_path=args.config, overrides=args.overrides, run_dir=args.run_dir,
            preset=args.preset,
        )  # fmt: skip
        with Signals(at_once_s=_AT_ONCE_S).caught(), stopped_with_launcher():
            env = detect()
            rank = env.rank
            return run_rank(request, env=env, signals=StopSignals(), on_set_up=_note_start).code
    except (FedPipeError, Interrupted) as ending:
        if arguments is None:  # a process of its own, which ends here
            _go_deaf()
        error = _error_under(ending)
        if error is None:
            if rank == 0:
                sys.stdout.write("interrupted; give the same command again\n")
            return EXIT_INTERRUPTED
        if not error.told:
            sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, LaunchError) else 2


def _error_under(ending: BaseException | None) -> FedPipeError | None:
    """Return the error that a rank ends with, also where it was asked to stop while it told others.

    srun ends a job's other ranks as soon as one of them has ended.
    """
    while ending is not None and not isinstance(ending, FedPipeError):
        ending = ending.__context__
    return ending


def _go_deaf() -> None:
    """Let no signal change how this rank ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note_start(setup: RunSetup) -> None:
    """Refuse to have a job of a script requeued for ever; what starts it by hand is not a requeue.

    Raises:
        LaunchError: It has got nowhere in its last starts.
    """
    if "SLURM_RESTART_COUNT" in os.environ:
        position = position_of(setup.checkpoint)
        note_attempt(setup.run_dir, position, job_id=os.environ["SLURM_JOB_ID"])


@system_errors_named()
def run_rank(
    request: RunRequest,
    *,
    env: ProcessEnv,
    signals: StopSignals,
    on_set_up: Callable[[RunSetup], None] = lambda setup: None,
) -> Ended:
    """Run one rank of a task from the configuration to the report.

    Args:
        request: What to run; rank 0's counts.
        env: This process' place in the run.
        signals: Caught while the ranks can agree where to stop, and given back after.
        on_set_up: Called on rank 0 before any rank goes on; may refuse.

    Returns:
        How it has ended.

    Raises:
        FedPipeError: On every rank, before any process group exists, what the user can mend.

    Collective: every process of the run.
    """
    if not num_gpus():  # DeepSpeed probes for accelerators otherwise
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bind(env)
    log.setup(rank=env.rank)
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0, interactive=False)
    measure = partial(measure_here, threads=threads_per_process(env.local_world_size))
    arguments = (request.config_path, request.overrides, request.run_dir)
    started_at = time.monotonic()
    with contextlib.ExitStack() as stack:

        def choose() -> Path:
            config, run_dir, _ = resolve_config(*arguments, preset=request.preset)
            _grid(request.task, config).check_world_size(env.world_size)
            stack.enter_context(_new(run_dir))
            return run_dir

        def prepare() -> dict[str, Any]:
            setup = set_up(
                *arguments, preset=request.preset, notify=console.text,
                choose_cut=partial(choose_cut, measure=measure, notify=console.text),
            )  # fmt: skip
            stack.enter_context(locked(setup.run_dir))
            on_set_up(setup)
            return setup.to_message()

        from fedpipe.cluster.peers import Peers
        from fedpipe.distributed.meeting import Meeting

        _use_cores(env)
        peers = Peers(env)
        watch = stack.enter_context(Watch(signals=signals, report=peers))
        stack.enter_context(_late_signal(signals))
        # Rank 0's hosts the store: it must live as long as the run.
        meeting = Meeting(env, notify=console.text)
        meeting.share_secret(choose)
        if meeting.board is not None:
            watch.activity = partial(Activity, doing="preparing the text")
            watch.meet(meeting.board)
        setup = RunSetup.from_message(meeting.from_rank_0(prepare), started_at=started_at)
        peers.know(_grid(request.task, setup.config), timeout_s=setup.hang_timeout_s)
        _check_shared(meeting, setup)
        if request.task == "throughput":
            return _throughput(setup, request.settings, env=env, console=console, watch=watch)
        return _pretrain(setup, env=env, signals=signals, peers=peers, watch=watch)


@contextlib.contextmanager
def _new(run_dir: Path) -> Iterator[None]:
    """Make a directory, and take it away again where nothing has come into it."""
    made = not run_dir.exists()
    check_writable(run_dir)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                run_dir.rmdir()


@contextlib.contextmanager
def _late_signal(signals: StopSignals) -> Iterator[None]:
    """Wait a little where another rank has gone: the signal that ended it may be on its way here.

    Once the ranks agree where to stop, ``signals`` catches it.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if not signals.catches:
            time.sleep(_LAST_SIGNAL_S)
        if isinstance(error, ConnectionError):
            raise LaunchError(
                f"{error}. See the log of rank 0, and start all ranks again."
            ) from None
        raise


def _grid(task: str, config: RunConfig) -> Grid:
    return Grid.from_config(single_replica(config) if task == "throughput" else config)


def _check_shared(meeting: Meeting, setup: RunSetup) -> None:
    """Refuse a folder of the text that not every rank sees.

    Raises:
        TopologyError: On every rank.
    """
    from fedpipe.distributed.meeting import SHARED_WITHIN_S, not_shared

    deadline = time.monotonic() + SHARED_WITHIN_S
    while not (there := Path(setup.data_dir).exists()) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    folder = str(Path(setup.data_dir).parent)
    for objection in meeting.agree("text", "" if there else folder):
        raise not_shared("data.cache_dir", folder, objection.rpartition(" ")[2])


def _use_cores(env: ProcessEnv) -> None:
    """Let torch use this rank's share of the cores: torchrun sets OMP_NUM_THREADS to 1."""
    import torch

    if "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(threads_per_process(env.local_world_size))


def _pretrain(
    setup: RunSetup, *, env: ProcessEnv, signals: StopSignals, peers: Peers, watch: Watch
) -> Ended:
    from fedpipe.commands.pretrain.run import pretrain

    console = run_console(setup, interactive=False)
    if env.rank == 0:
        peers.on_steps = ProgressRecorder(setup, show=console.step)
    shows: dict[str, Callable[[Any], None]] = {
        "step": peers.saw, "round": console.round, "eval": console.evaluation,
        "note": console.text,
    }  # fmt: skip

    def emit(kind: str, record: Any) -> None:
        if kind in shows:
            shows[kind](record)

    try:
        stopped_at = pretrain(setup, env=env, emit=emit, watch=watch)
    finally:
        signals.release()
    if stopped_at is None and env.rank == 0:
        finish(setup)
        console.text(samples_text(setup.run_dir))
        console.text(f"model   {setup.run_dir / 'export'}")
        console.text(f"report  {setup.run_dir / 'report.html'}")
    elif env.rank == 0:
        console.text(f"interrupted after {stopped_at}; give the same command again to resume")
    if stopped_at is None:
        return Ended(code=0)
    return Ended(code=EXIT_INTERRUPTED, signal=watch.stop_signal)


class ProgressRecorder:
    """Rank 0's view of all ranks' latest steps: on its console, and in the record of the run.

    Step records come together only where the ranks meet, at the end of a round; until then these
    ``{"kind": "system", "event": "progress"}`` lines tell whoever follows the file from elsewhere.
    """

    def __init__(self, setup: RunSetup, *, show: Callable[[dict[str, Any]], None]) -> None:
        """Remember where to write.

        Args:
            setup: The run.
            show: Takes every step record.
        """
        self._path = setup.run_dir / METRICS_FILE
        self._every = max(setup.config.log.every, 1)
        self._last = (-1, -1)
        self._show = show

    def __call__(self, records: list[dict[str, Any]]) -> None:
        """Take the latest step record of every stage of every replica."""
        for record in records:
            self._show(record)
        moment = max((r["round"], (r["step"] + 1) // self._every) for r in records)
        if moment <= self._last or moment[1] == 0:
            return
        self._last = moment
        line = {"kind": "system", "event": "progress", "steps": [finite(r) for r in records]}
        with open(self._path, "ab", buffering=0) as file:  # one call, so lines stay whole
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def _throughput(
    setup: RunSetup,
    settings: ThroughputSettings,
    *,
    env: ProcessEnv,
    console: RunConsole,
    watch: Watch,
) -> Ended:
    from fedpipe.commands.throughput.measure import measure
    from fedpipe.data.blocks import load_prepared

    def emit(kind: str, value: Any) -> None:
        if kind == "note" and env.rank == 0:
            console.text(value)

    data = load_prepared(setup.data_dir)
    config = single_replica(setup.config)
    watch.activity = partial(Activity, doing="measuring")
    measurement: Measurement | None = measure(
        config, data, env=env, settings=settings, emit=emit, board=watch.board
    )
    watch.leave_run()
    if measurement is not None:
        conclude(setup, measurement, settings, console=console)
    return Ended(code=0)
