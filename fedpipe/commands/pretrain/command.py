"""``fedpipe pretrain``: all processes of the grid on this machine, with a live display."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedpipe.cluster.supervisor import set_up_here, supervise
from fedpipe.commands import options
from fedpipe.data.blocks import load_prepared
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.distributed.topology import Grid
from fedpipe.federation.cohort import steps_per_round
from fedpipe.report.console import RunConsole
from fedpipe.report.samples import samples_text
from fedpipe.run.run_dir import RunSetup, is_done, locked


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe pretrain``."""
    options.add_run(command)


def run(args: argparse.Namespace) -> int:
    """Pre-train what the arguments say."""
    options.checked_config(args)
    return pretrain(args.config, args.overrides, args.run_dir, preset=args.preset)


def pretrain(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
) -> int:
    """Pre-train on this machine, or resume; the whole of ``fedpipe pretrain``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None.
        preset: What the YAML is laid over, or None.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A process failed.
    """
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0)
    signals = Signals()
    try:
        with signals.caught():
            setup = set_up_here(config_path, overrides, run_dir, preset=preset, console=console)
            run_dir = str(setup.run_dir)
            console.close()
            if is_done(setup.run_dir, num_rounds=setup.config.federation.num_rounds):
                console.text(f"{setup.run_dir} is done: see {setup.run_dir / 'report.html'}")
                return 0
            with locked(setup.run_dir):
                train(setup, signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {_way_back(run_dir)}")
        return EXIT_INTERRUPTED
    console.text(samples_text(setup.run_dir))
    console.text(f"model   {setup.run_dir / 'export'}")
    console.text(f"report  {setup.run_dir / 'report.html'}")
    return 0


def _way_back(run_dir: str | None) -> str:
    if run_dir is None or not (Path(run_dir) / "config.yaml").is_file():
        return "nothing was started: give the same command again"
    return f"resume with: fedpipe pretrain --run-dir {shlex.quote(run_dir)}"


def run_console(setup: RunSetup, *, interactive: bool | None = None) -> RunConsole:
    """Return a console that knows how long a run is; see ``RunConsole`` for ``interactive``."""
    config = setup.config
    return RunConsole(
        num_rounds=config.federation.num_rounds,
        steps_per_round=_steps_per_round(setup),
        num_stages=config.pipeline.num_virtual_stages,
        log_every=config.log.every,
        interactive=interactive,
    )


def train(setup: RunSetup, signals: Signals) -> None:
    """Train a run that has been set up to its end, and show it.

    Args:
        setup: From ``set_up_here``; the caller holds its lock.
        signals: Caught by the caller.

    Raises:
        LaunchError: A process failed.
        Interrupted: The run was asked to stop, and is saved.
    """
    config = setup.config
    console = run_console(setup)
    shows: dict[str, Callable[[Any], None]] = {
        "step": console.step,
        "round": console.round,
        "eval": console.evaluation,
        "note": console.text,
    }
    try:
        supervise("pretrain", setup, grid=Grid.from_config(config), shows=shows, signals=signals)
    finally:
        console.close()


def _steps_per_round(setup: RunSetup) -> int:
    """Local steps that the busiest replica makes in a round."""
    config = setup.config
    blocks = [shard.num_blocks for shard in load_prepared(setup.data_dir).train]
    turns = math.ceil(config.federation.clients_per_round / config.federation.num_replicas)
    return turns * steps_per_round(config, blocks)
