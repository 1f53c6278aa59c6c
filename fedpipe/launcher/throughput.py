"""Start one replica's processes on this machine to measure the schedules. No torch here."""

from __future__ import annotations

import random
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedpipe import log
from fedpipe.distributed.env import ProcessEnv, threads_per_process
from fedpipe.distributed.topology import Grid
from fedpipe.errors import FedPipeError, LaunchError
from fedpipe.launcher.local import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    Interrupted,
    _fork_server,
    _locked,
    _signals_interrupt,
    _stop,
)
from fedpipe.launcher.worker import _redirect_output
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.run_dir import RunSetup, describe_environment, set_up
from fedpipe.workflows.throughput_files import render, write_files
from fedpipe.workflows.throughput_report import (
    Measurement,
    ThroughputSettings,
    single_replica,
    summarise,
)


def throughput(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    repetitions: int = 6,
    num_steps: int = 6,
    emulate_ms: float = 0.0,
) -> int:
    """Measure every schedule on this machine; the whole of ``fedpipe throughput``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None; the report goes to ``throughput/`` in it.
        repetitions: Windows of every schedule.
        num_steps: Local steps per window.
        emulate_ms: Milliseconds that a layer's forward sleeps instead of computing; 0 computes.

    Returns:
        0 when the report is written, 75 when the measurement was interrupted.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A process failed.
    """
    settings = ThroughputSettings(
        repetitions=repetitions, num_steps=num_steps, emulate_ms=emulate_ms
    )
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0)
    context = _fork_server()
    setup = set_up(config_path, overrides, run_dir, notify=console.text, progress=console.preparing)
    config = single_replica(setup.config)
    folder = setup.run_dir / "throughput"
    with _locked(setup.run_dir):
        try:
            measurement = _supervise(setup, settings, context=context, console=console)
        except Interrupted:
            console.text("interrupted; nothing was written")
            return EXIT_INTERRUPTED
        finally:
            console.close()
        environment = describe_environment() | {
            "emulate_ms": emulate_ms, "repetitions": repetitions, "num_steps": num_steps,
        }  # fmt: skip
        report = summarise(measurement, config, environment=environment)
        write_files(folder, report, measurement)
    console.text(render(report))
    console.text(f"report  {folder / 'report.md'}")
    return EXIT_DONE


def _supervise(
    setup: RunSetup, settings: ThroughputSettings, *, context: Any, console: RunConsole
) -> Measurement:
    """Start every stage and wait for what rank 0 has measured; stop all when one fails."""
    grid = Grid.from_config(single_replica(setup.config))
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch, _signals_interrupt():
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
                    target=run_worker, args=(setup, env, settings, writer), daemon=True
                )
                process.start()
                writer.close()
                processes.append(process)
                pipes[reader] = rank
            return _watch(processes, pipes, console, run_dir=setup.run_dir)
        finally:
            _stop(processes)


def _watch(
    processes: list[BaseProcess],
    pipes: dict[Connection, int],
    console: RunConsole,
    *,
    run_dir: Path,
) -> Measurement:
    reasons: dict[int, str] = {}
    measurement: Measurement | None = None
    while pipes:
        for pipe in wait(list(pipes)):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except EOFError:
                rank = pipes.pop(pipe)
                processes[rank].join()
                if processes[rank].exitcode != 0:
                    reason = reasons.get(rank, f"exit code {processes[rank].exitcode}")
                    raise LaunchError(
                        f"rank {rank} failed: {reason}. "
                        f"Full log: {run_dir / 'logs' / f'rank_{rank:05d}.log'}"
                    ) from None
                continue
            if kind == "note":
                console.text(value)
            elif kind == "error":
                reasons[pipes[pipe]] = value
            elif kind == "measurement":
                measurement = value
    assert measurement is not None, "rank 0 ended without a measurement"
    return measurement


def run_worker(
    setup: RunSetup, env: ProcessEnv, settings: ThroughputSettings, pipe: Connection
) -> None:
    """Measure on one rank; rank 0 sends the result to the parent.

    Args:
        setup: The run.
        env: This process' place.
        settings: How long, and on what.
        pipe: To the parent: ("note" | "measurement" | "error", value).
    """
    import torch

    from fedpipe.data.blocks import load_prepared
    from fedpipe.workflows.throughput import measure

    _redirect_output(setup, env)
    random.seed(env.rank)
    torch.manual_seed(env.rank)
    torch.set_num_threads(threads_per_process(env.local_world_size))
    log.setup(rank=env.rank)

    def emit(kind: str, value: Any) -> None:
        pipe.send((kind, value))

    try:
        data = load_prepared(setup.data_dir)
        measurement = measure(setup.config, data, env=env, settings=settings, emit=emit)
        if measurement is not None:
            emit("measurement", measurement)
    except BaseException as error:
        if not isinstance(error, FedPipeError):
            traceback.print_exc()
        emit("error", f"{type(error).__name__}: {error}")
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
