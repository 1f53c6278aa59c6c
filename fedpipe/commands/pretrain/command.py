"""``fedpipe pretrain``: run all processes of the grid on this machine, with a live display."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.cluster.rank import JobRun, RunRequest
from fedpipe.commands import options
from fedpipe.commands.pretrain import ranks
from fedpipe.commands.pretrain.setup import done_line, reserve
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
    """Pre-train as the arguments say, or run one rank if a launcher started this process."""
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        return start_rank(ranks.PROGRAM, options.request_of(args))
    return pretrain(args.config, args.overrides, args.run_dir, preset=args.preset)


def to_submit(args: argparse.Namespace) -> JobRun:
    """Check the pre-training of the arguments, and return it as a job to submit."""
    return pipeline_run(ranks.PROGRAM, options.request_of(args))


def pipeline_run(program: ranks.PretrainingRanks, request: RunRequest) -> JobRun:
    """Check a run whose ranks are the tasks of one job: a pre-training or a measurement.

    Args:
        program: Program of the ranks.
        request: Arguments of the user.

    Returns:
        The run. If ``pipeline.cut`` is auto, the job measures the cut when it starts.

    Raises:
        FedPipeError: The user can correct the cause.
    """
    found = program.locate(request)
    run, config, run_dir = found.run, found.config, found.run.path
    run.check_content(deepspeed_config(config), partial(inputs_of, config))
    steps = config.federation.num_local_steps  # the text, which may have fewer, is not ready
    return JobRun(
        run_dir=run_dir,
        name=config.name,
        grid=found.grid,
        done=partial(done_line, run, config),
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
    """Pre-train on this machine, or resume a run. This is all that ``fedpipe pretrain`` does.

    Args:
        config_path: Path of a YAML file, or None.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory of the run, or None for the default one.
        preset: Name of a packaged configuration that the YAML file overrides, or None.

    Returns:
        0 when the run is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been started.
        LaunchError: A process failed.
    """
    console = RunConsole()
    signals = Signals()
    run: RunDir | None = None
    try:
        with signals.caught():
            run, config = resolve("pretrain", config_path, overrides, run_dir, preset=preset)
            if done := done_line(run, config):
                run.check_content(deepspeed_config(config), partial(inputs_of, config))
                console.text(done)
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
