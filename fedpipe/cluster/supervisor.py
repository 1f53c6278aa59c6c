"""Fork the ranks of a run on this machine, listen to them, stop all when one fails. No torch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from fedpipe.cluster.fork_server import fork_server, num_threads
from fedpipe.cluster.ranks import Ranks, Setup
from fedpipe.cluster.worker import run_rank
from fedpipe.commands.plan.cut import choose_cut, measure_in_a_process
from fedpipe.commands.pretrain.setup import set_up
from fedpipe.distributed.env import ProcessEnv, num_gpus, threads_per_process
from fedpipe.distributed.signals import Interrupted, Signals
from fedpipe.distributed.topology import Grid, check_gpus
from fedpipe.report.console import RunConsole
from fedpipe.run.run_dir import RunSetup

REPORT_S = 2.0
"""After a rank has failed, how long the others may say why before all are stopped."""
_LOOK_S = 1.0
"""How often the supervisor looks for signals and hung ranks at least."""

Shows = Mapping[str, Callable[[Any], None]]
"""What to do with a message of a rank, by its kind."""


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
        choose_cut=partial(choose_cut, measure=measure_in_a_process, notify=console.text),
    )


def supervise(
    task: str, setup: Setup, *args: Any, grid: Grid, shows: Shows, signals: Signals
) -> None:
    """Run a task on every rank of a grid until all are done.

    Args:
        task: Name of a function of ``fedpipe.cluster.worker``: "pretrain", "throughput" or
            "finetune".
        setup: The run.
        *args: For the task, after the setup.
        grid: Its processes.
        shows: Handlers of the ranks' messages; "note" takes the supervisor's own as well.
        signals: Caught by the caller.

    Raises:
        TopologyError: There are more processes than GPUs.
        LaunchError: A rank failed or hangs; all have been stopped.
        FedPipeError: What a rank found that the user can mend; all have been stopped.
        Interrupted: The ranks have stopped because a signal asked them to, or (from the handler) a
            signal stops all at once.
    """
    check_gpus(grid.world_size, num_gpus())
    context = fork_server()
    ranks = Ranks(task, setup, grid=grid)
    threads = num_threads(threads_per_process(grid.world_size))
    pipes: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch:
        try:
            for rank in range(grid.world_size):
                env = ProcessEnv(
                    rank=rank, world_size=grid.world_size, local_rank=rank,
                    local_world_size=grid.world_size, rendezvous=f"file://{scratch}/store",
                )  # fmt: skip
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=run_rank, args=(task, setup, env, writer, threads, *args), daemon=True
                )
                process.start()
                writer.close()
                ranks.processes.append(process)
                pipes[reader] = rank
            _listen(task, ranks, pipes, shows, signals)
        finally:
            signals.patient = False
            ranks.kill()
    if ranks.stopped_at:
        raise Interrupted(ranks.stopped_at)


def _listen(
    task: str, ranks: Ranks, pipes: dict[Connection, int], shows: Shows, signals: Signals
) -> None:
    open_pipes = dict(pipes)
    deadline: float | None = None  # after a failure, the time until which others may report
    forwarded = False
    while open_pipes and (deadline is None or time.monotonic() < deadline):
        for pipe in wait(list(open_pipes), timeout=_LOOK_S if deadline is None else 0.1):
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                del open_pipes[pipe]
                if ranks.has_failed(rank) and deadline is None:
                    deadline = time.monotonic() + REPORT_S
                continue
            if kind == "training":
                signals.patient = value
            elif kind in shows:
                if deadline is None:
                    shows[kind](value)
            else:
                ranks.hear(rank, kind, value)
        if signals.asked and not forwarded:
            forwarded = True
            when = "after this round" if task == "finetune" else "within a few local steps"
            shows["note"](f"it saves and stops {when}; a second signal stops at once")
            ranks.ask_to_stop()
        if deadline is None:
            ranks.check_alive(open_pipes.values())
    if deadline is not None:
        raise ranks.failure()
