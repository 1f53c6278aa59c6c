"""Fork the ranks of a run on this machine, listen to them, stop all when one fails. No torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.errors import LaunchError
from fedpipe.launcher.worker import PRELOAD, run_rank
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.run_dir import RunSetup, set_up

EXIT_DONE, EXIT_INTERRUPTED = 0, 75
REPORT_S = 2.0
"""After a rank has failed, how long the others may say why before all are stopped."""
_LOST_PEER = re.compile(r"Connection (closed|reset)|BrokenPipe|Broken pipe|peer")

Shows = Mapping[str, Callable[[Any], None]]
"""What to do with a message of a rank, by its kind."""


class Interrupted(Exception):
    """The user or the system asked the run to stop."""


def fork_server() -> Any:
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


def set_up_here(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
    console: RunConsole,
) -> RunSetup:
    """Set a run up (see ``set_up``), while the fork server makes the slow imports.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None.
        preset: What the YAML is laid over, or None.
        console: Shows the plan and the preparation of the text.

    Returns:
        The setup.
    """
    return set_up(
        config_path,
        overrides,
        run_dir,
        preset=preset,
        notify=console.text,
        progress=console.preparing,
        on_checked=fork_server,
    )


def supervise(task: str, setup: RunSetup, *args: Any, grid: Grid, shows: Shows) -> None:
    """Run a task on every rank of a grid until all are done.

    Args:
        task: Name of a function of ``fedpipe.launcher.worker``: "pretrain" or "throughput".
        setup: The run.
        *args: For the task, after the setup.
        grid: Its processes.
        shows: Handlers of the ranks' messages.

    Raises:
        LaunchError: A rank failed; all have been stopped.
        Interrupted: A signal came (see ``signals_interrupt``); all have been stopped.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch:
        processes: list[BaseProcess] = []
        pipes: dict[Connection, int] = {}
        try:
            for rank in range(grid.world_size):
                env = ProcessEnv(
                    rank=rank, world_size=grid.world_size, local_rank=rank,
                    local_world_size=grid.world_size, rendezvous=f"file://{scratch}/store",
                )  # fmt: skip
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=run_rank, args=(task, setup, env, writer, *args), daemon=True
                )
                process.start()
                writer.close()
                processes.append(process)
                pipes[reader] = rank
            _watch(task, processes, pipes, shows, grid=grid, setup=setup)
        finally:
            _stop(processes)


def _watch(
    task: str,
    processes: list[BaseProcess],
    pipes: dict[Connection, int],
    shows: Shows,
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
        raise _failure(task, errors, processes, grid=grid, setup=setup)


def _failure(
    task: str,
    errors: dict[int, str],
    processes: list[BaseProcess],
    *,
    grid: Grid,
    setup: RunSetup,
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
        f"Run it again with: fedpipe {task} --run-dir {setup.run_dir}"
    )


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into ``Interrupted`` in the supervisor."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
