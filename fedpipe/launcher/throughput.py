"""``fedpipe throughput``: one replica's processes to measure schedules on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import EXIT_INTERRUPTED
from fedpipe.launcher.supervisor import Interrupted, Signals, set_up_here, supervise
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.run_dir import RunSetup, describe_environment, locked
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
    preset: str | None = None,
    repetitions: int = 6,
    num_steps: int = 6,
    emulate_ms: float = 0.0,
) -> int:
    """Measure every schedule on this machine; the whole of ``fedpipe throughput``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None; the report goes to ``throughput/`` in it.
        preset: What the YAML is laid over, or None.
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
    measurements: list[Measurement] = []
    signals = Signals()
    try:
        with signals.caught():
            setup = set_up_here(config_path, overrides, run_dir, preset=preset, console=console)
            config = single_replica(setup.config)
            with locked(setup.run_dir):
                supervise(
                    "throughput",
                    setup,
                    settings,
                    grid=Grid.from_config(config),
                    shows={"note": console.text, "measurement": measurements.append},
                    signals=signals,
                )
    except Interrupted:
        console.text("interrupted; nothing was written")
        return EXIT_INTERRUPTED
    finally:
        console.close()
    conclude(setup, measurements[0], settings, console=console)
    return 0


def conclude(
    setup: RunSetup, measurement: Measurement, settings: ThroughputSettings, *, console: RunConsole
) -> None:
    """Write the files of a measurement and show its table.

    Args:
        setup: The run.
        measurement: What rank 0 has collected.
        settings: How it was measured.
        console: Shows the table.
    """
    folder = setup.run_dir / "throughput"
    environment = describe_environment() | {
        "emulate_ms": settings.emulate_ms,
        "repetitions": settings.repetitions,
        "num_steps": settings.num_steps,
    }
    report = summarise(measurement, single_replica(setup.config), environment=environment)
    write_files(folder, report, measurement)
    console.text(render(report))
    console.text(f"report  {folder / 'report.md'}")
