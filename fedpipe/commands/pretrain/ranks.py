"""The program of the ranks of a pre-training, for every launcher. Importing it imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.cluster.rank import LocatedRun, Notify, RankProgram, View
from fedpipe.commands.plan.cut import choose_cut, measure_here, measure_in_a_process
from fedpipe.commands.pretrain.setup import set_up
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import load_prepared
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Watch
from fedpipe.federation.cohort import steps_per_round
from fedpipe.report.console import RunConsole
from fedpipe.report.records import Emit
from fedpipe.report.sections import samples_text
from fedpipe.run.checkpoint import Position
from fedpipe.run.outer import UPDATE, newest_round
from fedpipe.run.run_dir import RunDir, RunSetup


class PretrainingRanks(RankProgram):
    """The program of a pre-training."""

    command = "pretrain"
    kind = "pretrain"
    preload = (
        "fedpipe.commands.pretrain.run",
        "fedpipe.run.export",
        "fedpipe.commands.pretrain.report",
    )

    def set_up(
        self,
        found: LocatedRun,
        *,
        notify: Notify,
        progress: Callable[[str, int, int], None] | None = None,
        on_checked: Callable[[], object] = lambda: None,
        threads: int | None = None,
    ) -> RunSetup:
        """See ``RankProgram``; if ``pipeline.cut`` is auto, the cut is measured and chosen."""
        measure = partial(measure_here, threads=threads) if threads else measure_in_a_process
        return set_up(
            found.run,
            found.config,
            notify=notify,
            progress=progress,
            on_checked=on_checked,
            choose_cut=partial(choose_cut, measure=measure, notify=notify),
        )

    def from_message(self, message: Mapping[str, Any], *, started_at: float) -> RunSetup:
        """See ``RankProgram``."""
        return RunSetup.from_message(message, started_at=started_at)

    def folders(self, setup: RunSetup) -> Mapping[str, Path]:
        """See ``RankProgram``."""
        outer = {"outer.folder": setup.outer.path} if setup.outer else {}
        return {"data.cache_dir": Path(setup.data_dir)} | outer

    def grid_of(self, config: RunConfig) -> Grid:
        """See ``RankProgram``."""
        return Grid.from_config(config)

    def run(
        self, setup: RunSetup, options: Any, *, env: ProcessEnv, emit: Emit, watch: Watch
    ) -> Position | None:
        """See ``RankProgram``."""
        from fedpipe.commands.pretrain.run import Pretraining
        from fedpipe.federation.loop import run_rounds

        return run_rounds(Pretraining, setup, env=env, emit=emit, watch=watch)

    def write_results(self, setup: RunSetup, *, notify: Notify) -> None:
        """Write the report, and the model with samples, or what the site has learnt."""
        from fedpipe.commands.pretrain.report import write_report
        from fedpipe.run import export

        if setup.outer:  # the model is the consortium's; this site has an update of it
            from fedpipe.run.update import write_update

            notify("writing the report and the update")
            write_report(setup.run_dir)
            write_update(setup.outer, setup.run_dir, setup.config)
            return
        notify("writing the model folder and the report")
        export.export_run(setup.run_dir)
        data = load_prepared(setup.data_dir)
        if data.valid:
            export.write_samples(setup.run_dir, setup.config, data)
        write_report(setup.run_dir)

    def view(self, setup: RunSetup, *, interactive: bool | None = None) -> View:
        """See ``RankProgram``."""
        blocks = [shard.num_blocks for shard in load_prepared(setup.data_dir).train]
        steps = steps_per_round(setup.config, blocks)
        return view(setup.config, num_local_steps=steps, interactive=interactive)

    def closing(self, run_dir: Path) -> list[str]:
        """See ``RankProgram``."""
        config = load_config(RunDir.open(run_dir, "pretrain").saved, [])
        if config.outer.folder:
            update = newest_round(config).path / UPDATE
            return [f"update  {update}", f"report  {run_dir / 'report.html'}"]
        samples = [text] if (text := samples_text(run_dir)) else []
        return [*samples, f"model   {run_dir / 'export'}", f"report  {run_dir / 'report.html'}"]


def view(config: RunConfig, *, num_local_steps: int, interactive: bool | None = None) -> View:
    """Return the console that shows a pre-training.

    Args:
        config: The run.
        num_local_steps: Local steps of a client in a round.
        interactive: See ``RunConsole``.
    """
    federation = config.federation
    turns = math.ceil(federation.clients_per_round / federation.num_replicas)
    console = RunConsole(
        num_rounds=federation.num_rounds,
        steps_per_round=turns * num_local_steps,
        num_stages=config.pipeline.num_virtual_stages,
        log_every=config.log.every,
        interactive=interactive,
    )
    shows: dict[str, Callable[[Any], None]] = {
        "step": console.step,
        "round": console.round,
        "eval": console.evaluation,
        "outer": console.evaluation,
    }
    return View(console=console, shows=shows, log_every=max(config.log.every, 1))


PROGRAM = PretrainingRanks()
