"""One rank under somebody else's launcher: torchrun, deepspeed, srun."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fedpipe import log
from fedpipe.checkpoint import Position
from fedpipe.distributed.env import ProcessEnv, detect, threads_per_process
from fedpipe.distributed.watch import EXIT_INTERRUPTED, StopSignals, Watch
from fedpipe.errors import FedPipeError
from fedpipe.launcher.supervisor import Interrupted, Signals
from fedpipe.launcher.worker import finish
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.run_dir import RunSetup, locked, resolve_config, set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank.

    Args:
        arguments: Command line; None takes the process' own.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed, 2 for a user's error
        (one line on stderr, rank 0's).
    """
    parser = argparse.ArgumentParser(description="one rank of `fedpipe pretrain`")
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--run-dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(arguments)
    rank = 0
    try:
        with Signals().caught(), contextlib.ExitStack() as stack:
            env = detect()
            rank = env.rank
            return _run(args, env, stack)
    except FedPipeError as error:
        if rank == 0:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except Interrupted:
        if rank == 0:
            sys.stdout.write("interrupted; give the same command again\n")
        return EXIT_INTERRUPTED


def _run(args: argparse.Namespace, env: ProcessEnv, stack: contextlib.ExitStack) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(env.local_world_size)))
    log.setup(rank=env.rank)
    config, directory, _ = resolve_config(
        args.config, args.overrides, args.run_dir, preset=args.preset
    )
    console = RunConsole(
        num_rounds=config.federation.num_rounds,
        steps_per_round=config.federation.num_local_steps,
        num_stages=config.pipeline.num_virtual_stages,
        interactive=False,
    )

    def prepare() -> RunSetup:
        setup = set_up(
            args.config, args.overrides, str(directory), preset=args.preset, notify=console.text
        )
        stack.enter_context(locked(setup.run_dir))
        return setup

    from fedpipe.distributed.meeting import Meeting

    meeting = Meeting(env)
    setup = meeting.from_rank_0(prepare)
    stopped_at = _train(setup, env=env, console=console)
    if env.rank == 0 and stopped_at is not None:
        console.text(f"interrupted after {stopped_at}; give the same command again to resume")
    elif env.rank == 0:
        finish(setup)
        console.text(f"model   {setup.run_dir / 'export'}")
        console.text(f"report  {setup.run_dir / 'report.html'}")
    return 0 if stopped_at is None else EXIT_INTERRUPTED


def _train(setup: RunSetup, *, env: ProcessEnv, console: RunConsole) -> Position | None:
    from fedpipe.launcher.peers import Peers
    from fedpipe.workflows.pretrain import pretrain

    def emit(kind: str, record: Any) -> None:
        shows: dict[str, Callable[[Any], None]] = {
            "round": console.round, "eval": console.evaluation, "note": console.text,
        }  # fmt: skip
        if kind in shows:
            shows[kind](record)

    peers = Peers(timeout_s=setup.config.pipeline.hang_timeout_s)
    with Watch(signals=StopSignals(), report=peers) as watch:
        return pretrain(setup, env=env, emit=emit, watch=watch)
