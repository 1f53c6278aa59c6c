"""One rank under somebody else's launcher: torchrun, deepspeed, srun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fedpipe import log
from fedpipe.distributed.env import detect, threads_per_process
from fedpipe.errors import FedPipeError
from fedpipe.launcher.worker import finish
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.run_dir import RunSetup, resolve_config, set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank.

    Args:
        arguments: Command line; None takes the process' own.

    Returns:
        0 when the run is done, 2 for a user's error (one line on stderr).
    """
    parser = argparse.ArgumentParser(description="one rank of `fedpipe pretrain`")
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--run-dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(arguments)
    try:
        _run(args.config, args.overrides, args.run_dir, args.preset)
    except FedPipeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


def _run(
    config_path: str | None, overrides: Sequence[str], run_dir: str | None, preset: str | None
) -> None:
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
    setup: RunSetup | None = None
    if env.rank == 0:  # before any process group exists; the others wait for it in the rendezvous
        setup = set_up(config_path, overrides, str(directory), preset=preset, notify=console.text)

    def emit(kind: str, record: Any) -> None:
        shows: dict[str, Callable[[Any], None]] = {
            "round": console.round, "eval": console.evaluation, "note": console.text,
        }  # fmt: skip
        if kind in shows:
            shows[kind](record)

    from fedpipe.workflows.pretrain import pretrain

    setup = pretrain(setup, config=config, env=env, emit=emit)
    if env.rank == 0:
        finish(setup)
        console.text(f"model   {setup.run_dir / 'export'}")
        console.text(f"report  {setup.run_dir / 'report.html'}")
