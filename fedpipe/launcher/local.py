"""Run all processes of the grid on this machine, under one supervisor that needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import math
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from fedpipe.data.blocks import load_prepared
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.errors import CheckpointError, LaunchError
from fedpipe.federation.cohort import steps_per_round
from fedpipe.launcher.worker import PRELOAD, run_worker
from fedpipe.metrics.console import RunConsole
from fedpipe.metrics.samples import samples_text
from fedpipe.workflows.run_dir import RunSetup, set_up

EXIT_DONE, EXIT_INTERRUPTED = 0, 75
REPORT_S = 2.0
"""After a rank has failed, how long the others may say why before all are stopped."""
_LOST_PEER = re.compile(r"Connection (closed|reset)|BrokenPipe|Broken pipe|peer")


class Interrupted(Exception):
    """The user or the system asked the run to stop."""


def pretrain(config_path: str | None, overrides: Sequence[str], run_dir: str | None) -> int:
    """Pre-train on this machine, or resume; the whole of ``fedpipe pretrain``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A process failed.
    """
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0)
    setup = set_up(
        config_path,
        overrides,
        run_dir,
        notify=console.text,
        progress=console.preparing,
        on_checked=_fork_server,
    )
    console.close()
    if is_done(setup):
        console.text(f"{setup.run_dir} is done: see {setup.run_dir / 'report.html'}")
        return EXIT_DONE
    with _locked(setup.run_dir):
        try:
            _supervise(setup, _fork_server())
        except Interrupted:
            console.text(f"interrupted; resume with: fedpipe pretrain --run-dir {setup.run_dir}")
            return EXIT_INTERRUPTED
    console.text(samples_text(setup.run_dir))
    console.text(f"model   {setup.run_dir / 'export'}")
    console.text(f"report  {setup.run_dir / 'report.html'}")
    return EXIT_DONE


def is_done(setup: RunSetup) -> bool:
    """All rounds are trained, exported and reported."""
    position = setup.checkpoint.position if setup.checkpoint else None
    rounds = setup.config.federation.num_rounds
    written = (setup.run_dir / "export").is_dir() and (setup.run_dir / "report.html").is_file()
    return position is not None and position.round_id >= rounds and written


def _fork_server() -> Any:
    """Start importing torch, DeepSpeed and transformers, once, beside the supervisor's own work.

    Returns:
        The context that forks ranks from the server; called again, the same one.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not os.path.exists("/dev/nvidiactl"):  # DeepSpeed probes for accelerators otherwise
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()
    return context


def _supervise(setup: RunSetup, context: Any) -> None:
    """Start every rank, show what they report, and stop all when one fails."""
    grid = Grid.from_config(setup.config)
    federation = setup.config.federation
    console = RunConsole(
        num_rounds=federation.num_rounds,
        steps_per_round=_steps_per_round(setup),
        num_stages=setup.config.pipeline.num_stages,
        log_every=setup.config.log.every,
    )
    shows: dict[str, Callable[[Any], None]] = {
        "step": console.step,
        "round": console.round,
        "eval": console.evaluation,
        "note": console.text,
    }
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch, _signals_interrupt():
        processes: list[BaseProcess] = []
        pipes: dict[Connection, int] = {}
        try:
            for rank in range(grid.world_size):
                env = ProcessEnv(
                    rank=rank, world_size=grid.world_size, local_rank=rank,
                    local_world_size=grid.world_size, rendezvous=f"file://{scratch}/store",
                )  # fmt: skip
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=run_worker, args=(setup, env, writer), daemon=True)
                process.start()
                writer.close()
                processes.append(process)
                pipes[reader] = rank
            _watch(processes, pipes, shows, grid=grid, setup=setup)
        finally:
            _stop(processes)
            console.close()


def _steps_per_round(setup: RunSetup) -> int:
    """Local steps that the busiest replica makes in a round."""
    config = setup.config
    blocks = [shard.num_blocks for shard in load_prepared(setup.data_dir).train]
    turns = math.ceil(config.federation.clients_per_round / config.federation.num_replicas)
    return turns * steps_per_round(config, blocks)


def _watch(
    processes: list[BaseProcess],
    pipes: dict[Connection, int],
    shows: dict[str, Callable[[Any], None]],
    *,
    grid: Grid,
    setup: RunSetup,
) -> None:
    errors: dict[int, str] = {}
    open_pipes = dict(pipes)
    deadline: float | None = None  # after a failure, the time until which others may report
    while open_pipes and (deadline is None or time.monotonic() < deadline):
        for pipe in wait(list(open_pipes), timeout=None if deadline is None else 0.1):
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                kind, record = pipe.recv()
            except EOFError:
                del open_pipes[pipe]
                processes[rank].join()
                if processes[rank].exitcode != 0 and deadline is None:
                    deadline = time.monotonic() + REPORT_S
                continue
            if kind == "error":
                errors[rank] = record
            elif kind in shows and deadline is None:
                shows[kind](record)
    if deadline is not None:
        raise _failure(errors, processes, grid=grid, setup=setup)


def _failure(
    errors: dict[int, str], processes: list[BaseProcess], *, grid: Grid, setup: RunSetup
) -> LaunchError:
    """Name the rank that failed first by cause: its neighbours only lost their connection."""
    failed = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0)]
    killed = [r for r in failed if r not in errors]
    original = [r for r in failed if not _LOST_PEER.search(errors.get(r, ""))]
    rank = next(iter(killed or original or failed))
    stages, replica, _ = grid.coordinates(rank)
    code = processes[rank].exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    stage = ", ".join(map(str, stages))
    return LaunchError(
        f"rank {rank} (stage {stage}, replica {replica}) failed: {errors.get(rank, how)}. "
        f"Full log: {setup.run_dir / 'logs' / f'rank_{rank:05d}.log'}. "
        f"Resume with: fedpipe pretrain --run-dir {setup.run_dir}"
    )


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into ``Interrupted`` in the supervisor."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keep a second command out of the run directory."""
    with open(run_dir / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"--run-dir: expected a run that no other process works on, got {run_dir} in use. "
                "Wait for it, stop it, or choose another directory."
            ) from None
        yield
