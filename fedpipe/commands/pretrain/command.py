"""``fedpipe pretrain``: all processes of the grid on this machine, with a live display."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.cluster.rank import JobRun, RunRequest
from fedpipe.commands import options
from fedpipe.commands.pretrain import ranks
from fedpipe.commands.pretrain.setup import reserve
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.tree import Node
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.report.console import RunConsole
from fedpipe.run.run_dir import RunDir, inputs_of, locked, resolve, resume_hint


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe pretrain``."""
    add_job_arguments(command)
    options.add_launcher(command)


def add_job_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit pretrain``."""
    options.add_run(command)


def run(args: argparse.Namespace) -> int:
    """Pre-train what the arguments say, or be one rank of that."""
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        return start_rank(ranks.PROGRAM, options.request_of(args))
    return pretrain(args.config, args.overrides, args.run_dir, preset=args.preset)


def to_submit(args: argparse.Namespace) -> JobRun:
    """Check the pre-training that the arguments say, for a job."""
    return pipeline_run(ranks.PROGRAM, options.request_of(args))


def pipeline_run(program: ranks.PretrainingRanks, request: RunRequest) -> JobRun:
    """Check a pre-training, or what else its ranks can do, for a job with a rank per task.

    Args:
        program: What the ranks do.
        request: As the user says it.

    Returns:
        The run; where the cut is to be measured, the job does that.

    Raises:
        FedPipeError: What the user can mend.
    """
    found = program.locate(request)
    run, config, run_dir = found.run, found.config, found.run.path
    run.check_content(deepspeed_config(config), partial(inputs_of, config))
    steps = config.federation.num_local_steps  # the text, which may have fewer, is not ready
    return JobRun(
        run_dir=run_dir,
        name=config.name,
        grid=found.grid,
        is_done=partial(run.is_done, num_rounds=config.federation.num_rounds),
        job=program.name,
        options=request.options,
        reserve=partial(reserve, run, config),
        view=partial(ranks.view, config, num_local_steps=steps),
        closing=partial(program.closing, run_dir),
    )


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
    console = RunConsole()
    signals = Signals()
    run: RunDir | None = None
    try:
        with signals.caught():
            run, config = resolve("pretrain", config_path, overrides, run_dir, preset=preset)
            if run.is_done(num_rounds=config.federation.num_rounds):
                run.check_content(deepspeed_config(config), partial(inputs_of, config))
                console.text(f"{run.path} is done: see {run.path / 'report.html'}")
                return 0
            found = ranks.PROGRAM.located_run(run, config)
            setup = set_up_here(ranks.PROGRAM, found, console=console)
            console.close()
            with locked(setup.run_dir):
                supervise(ranks.PROGRAM, setup, signals=signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {resume_hint('pretrain', run)}")
        return EXIT_INTERRUPTED
    for line in ranks.PROGRAM.closing(setup.run_dir):
        console.text(line)
    return 0
