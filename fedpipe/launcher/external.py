"""One rank under somebody else's launcher: torchrun, deepspeed, srun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fedpipe import log
from fedpipe.checkpoint import Position
from fedpipe.config.schema import RunConfig
from fedpipe.distributed.env import ProcessEnv, detect, threads_per_process
from fedpipe.distributed.watch import EXIT_INTERRUPTED, StopSignals, Watch
from fedpipe.errors import FedPipeError
from fedpipe.launcher.worker import finish
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.run_dir import RunSetup, locked, resolve_config, set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank.

    Args:
        arguments: Command line; None takes the process' own.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed, 2 for a user's error
        (one line on stderr).
    """
    parser = argparse.ArgumentParser(description="one rank of `fedpipe pretrain`")
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--run-dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(arguments)
    try:
        return _run(args.config, args.overrides, args.run_dir, args.preset)
    except FedPipeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


def _run(
    config_path: str | None, overrides: Sequence[str], run_dir: str | None, preset: str | None
) -> int:
    env = detect()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(env.local_world_size)))
    log.setup(rank=env.rank)
    config, directory, _ = resolve_config(config_path, overrides, run_dir, preset=preset)
    console = RunConsole(
        num_rounds=config.federation.num_rounds,
        steps_per_round=config.federation.num_local_steps,
        num_stages=config.pipeline.num_virtual_stages,
        interactive=False,
    )
    if env.rank > 0:
        stopped_at = _train(None, config=config, env=env, console=console)
        return 0 if stopped_at is None else EXIT_INTERRUPTED
    # Before any process group exists; the others wait for it in the rendezvous.
    setup = set_up(config_path, overrides, str(directory), preset=preset, notify=console.text)
    with locked(setup.run_dir):
        stopped_at = _train(setup, config=config, env=env, console=console)
        if stopped_at is not None:
            console.text(f"interrupted after {stopped_at}; give the same command again to resume")
            return EXIT_INTERRUPTED
        finish(setup)
    console.text(f"model   {setup.run_dir / 'export'}")
    console.text(f"report  {setup.run_dir / 'report.html'}")
    return 0


def _train(
    setup: RunSetup | None, *, config: RunConfig, env: ProcessEnv, console: RunConsole
) -> Position | None:
    from fedpipe.workflows.pretrain import pretrain

    def emit(kind: str, record: Any) -> None:
        shows: dict[str, Callable[[Any], None]] = {
            "round": console.round, "eval": console.evaluation, "note": console.text,
        }  # fmt: skip
        if kind in shows:
            shows[kind](record)

    with Watch(signals=StopSignals()) as watch:
        return pretrain(setup, config=config, env=env, emit=emit, watch=watch)
