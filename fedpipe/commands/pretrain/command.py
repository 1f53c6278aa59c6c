"""``fedpipe pretrain``: all processes of the grid on this machine, with a live display."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.cluster.rank import RunRequest
from fedpipe.commands import options
from fedpipe.commands.pretrain import ranks
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.report.console import RunConsole
from fedpipe.run.run_dir import is_done, locked


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe pretrain``."""
    options.add_run(command)
    options.add_launcher(command)


def run(args: argparse.Namespace) -> int:
    """Pre-train what the arguments say, or be one rank of that."""
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        return start_rank(ranks.PROGRAM, options.request_of(args))
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
            request = RunRequest(
                config_path=config_path, overrides=overrides, run_dir=run_dir, preset=preset
            )
            setup = set_up_here(ranks.PROGRAM, request, console=console)
            run_dir = str(setup.run_dir)
            console.close()
            if is_done(setup.run_dir, num_rounds=setup.config.federation.num_rounds):
                console.text(f"{setup.run_dir} is done: see {setup.run_dir / 'report.html'}")
                return 0
            with locked(setup.run_dir):
                supervise(ranks.PROGRAM, setup, signals=signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {_way_back(run_dir)}")
        return EXIT_INTERRUPTED
    for line in ranks.PROGRAM.closing(setup.run_dir):
        console.text(line)
    return 0


def _way_back(run_dir: str | None) -> str:
    if run_dir is None or not (Path(run_dir) / "config.yaml").is_file():
        return "nothing was started: give the same command again"
    return f"resume with: fedpipe pretrain --run-dir {shlex.quote(run_dir)}"
