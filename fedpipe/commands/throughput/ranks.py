"""The program of the ranks of a measurement, for every launcher. Importing it imports no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.cluster.rank import Notify, View
from fedpipe.commands.pretrain.ranks import PretrainingRanks
from fedpipe.commands.throughput.files import write_files
from fedpipe.commands.throughput.page import terminal_text
from fedpipe.commands.throughput.report import (
    Measurement,
    MeasuringEnvironment,
    Report,
    ThroughputSettings,
    single_replica,
    summarise,
)
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import load_prepared
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Watch
from fedpipe.report.console import RunConsole
from fedpipe.report.records import Emit
from fedpipe.run.run_dir import RunSetup, describe_environment

FOLDER = "throughput"
"""Folder of the reports in the run directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """Settings of a measurement, and the folder of its report."""

    settings: ThroughputSettings = field(default_factory=ThroughputSettings)
    folder: str = FOLDER
    """Folder of the report, below the run directory."""
    overrides: tuple[str, ...] = ()
    """Overrides of a point of a grid."""


class MeasuringRanks(PretrainingRanks):
    """The program of a measurement on one replica of a pre-training."""

    command = "throughput"
    stops = "at once"

    def grid_of(self, config: RunConfig) -> Grid:
        """Return the processes that a configuration asks for."""
        return Grid.from_config(single_replica(config))

    def run(
        self, setup: RunSetup, options: Any, *, env: ProcessEnv, emit: Emit, watch: Watch
    ) -> None:
        """Measure all schedules; rank 0 writes the report."""
        from fedpipe.commands.throughput.measure import measure

        how: Measuring = options or Measuring()
        watch.activity = partial(Activity, doing="measuring")
        measurement = measure(
            setup.config,
            load_prepared(setup.data_dir),
            env=env,
            settings=how.settings,
            emit=emit,
            board=watch.board,
        )
        watch.leave_run()
        if measurement is not None:
            _write(setup, measurement, how)

    def write_results(self, setup: RunSetup, *, notify: Notify) -> None:
        """Do nothing, because ``run`` has written the report."""

    def view(self, setup: RunSetup, *, interactive: bool | None = None) -> View:
        """Return a console of plain lines."""
        return View(console=RunConsole(interactive=False))

    def closing(self, run_dir: Path) -> list[str]:
        """See ``RankProgram``."""
        folder = run_dir / FOLDER
        return [terminal_text(read_report(folder)), f"report  {folder / 'report.html'}"]


def read_report(folder: Path) -> Report:
    """Read the report of a measurement."""
    report: Report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def _write(setup: RunSetup, measurement: Measurement, how: Measuring) -> None:
    config = single_replica(setup.config)
    environment: MeasuringEnvironment = {
        **describe_environment(),
        "emulate_ms": how.settings.emulate_ms,
        "repetitions": how.settings.repetitions,
        "num_steps": how.settings.num_steps,
        "repeat": repeating_command(setup, how.settings, end=how.overrides),
    }
    report = summarise(measurement, config, environment=environment)
    write_files(setup.run_dir / how.folder, report, measurement, config=config)


def repeating_command(setup: RunSetup, settings: ThroughputSettings, *, end: Sequence[str]) -> str:
    """Return the command that repeats a measurement with its own configuration."""
    words = [
        "fedpipe",
        "throughput",
        "--config",
        str(setup.run_dir / "config.yaml"),
        "--run-dir",
        f"{setup.run_dir}-again",
        "--repetitions",
        str(settings.repetitions),
        "--steps",
        str(settings.num_steps),
    ]
    if settings.emulate_ms:
        words += ["--emulate-ms", f"{settings.emulate_ms:g}"]
    return shlex.join([*words, *end])


PROGRAM = MeasuringRanks()
