"""``fedpipe pretrain``: all processes of the grid on this machine, with a live display."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.commands import options
from fedpipe.commands.pretrain import ranks
from fedpipe.config.tree import Node
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.report.console import RunConsole
from fedpipe.run.run_dir import RunDir, locked, resolve, way_back


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe pretrain``."""
    options.add_run(command)
    options.add_launcher(command)


def run(args: argparse.Namespace) -> int:
    """Pre-train what the arguments say, or be one rank of that."""
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        return start_rank(ranks.PROGRAM, options.request_of(args))
    return pretrain(args.config, args.overrides, args.run_dir, preset=args.preset)


def pretrain(
    config_path: str | Node | None,
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
    run: RunDir | None = None
    try:
        with signals.caught():
            run, config = resolve("pretrain", config_path, overrides, run_dir, preset=preset)
            found = ranks.PROGRAM.located(run, config)
            setup = set_up_here(ranks.PROGRAM, found, console=console)
            console.close()
            if run.is_done(num_rounds=config.federation.num_rounds):
                console.text(f"{setup.run_dir} is done: see {setup.run_dir / 'report.html'}")
                return 0
            with locked(setup.run_dir):
                supervise(ranks.PROGRAM, setup, signals=signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {way_back('pretrain', run)}")
        return EXIT_INTERRUPTED
    for line in ranks.PROGRAM.closing(setup.run_dir):
        console.text(line)
    return 0
