"""The program of the ranks of a fine-tuning, for every launcher. Importing it imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.cluster.rank import LocatedRun, Notify, RankProgram, View
from fedpipe.config.finetune import FinetuneConfig, load_finetune
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Watch
from fedpipe.report.console import RunConsole, refused_lines
from fedpipe.report.records import Emit, TuningEvalRecord, TuningRoundRecord
from fedpipe.report.sinks import check_sinks
from fedpipe.run.checkpoint import Checkpoint, Position
from fedpipe.run.run_dir import RunDir

if TYPE_CHECKING:
    from fedpipe.commands.finetune.prepared import FinetuneSetup


class FinetuningRanks(RankProgram):
    """The program of a fine-tuning."""

    command = "finetune"
    kind = "finetune"
    preload = (
        "fedpipe.models.weights",  # first: see there
        "fedpipe.commands.finetune.run",
        "fedpipe.commands.finetune.export",
    )

    def set_up(
        self,
        found: LocatedRun,
        *,
        notify: Notify,
        progress: Callable[[str, int, int], None] | None = None,
        on_checked: Callable[[], object] = lambda: None,
        threads: int | None = None,
    ) -> FinetuneSetup:
        """See ``RankProgram``. This imports torch, because it inspects the model."""
        check_sinks(found.config.log.to)
        on_checked()
        from fedpipe.commands.finetune.setup import set_up_finetune

        return set_up_finetune(found.run, found.config, notify=notify)

    def from_message(self, message: Mapping[str, Any], *, started_at: float) -> FinetuneSetup:
        """See ``RankProgram``."""
        from fedpipe.commands.finetune.prepared import FinetuneSetup

        run_dir, saved = Path(message["run_dir"]), message["checkpoint"]
        return FinetuneSetup(
            config=load_finetune(RunDir.open(run_dir, "finetune").saved, []),
            run_dir=run_dir,
            checkpoint=Checkpoint.from_message(saved) if saved else None,
            started_at=started_at,
        )

    def folders(self, setup: FinetuneSetup) -> Mapping[str, Path]:
        """Return no folder: all files of the ranks are in the run directory."""
        return {}

    def grid_of(self, config: FinetuneConfig) -> Grid:
        """See ``RankProgram``."""
        return Grid.of(config.stages, config.federation)

    def run(
        self, setup: FinetuneSetup, options: Any, *, env: ProcessEnv, emit: Emit, watch: Watch
    ) -> Position | None:
        """See ``RankProgram``."""
        from fedpipe.commands.finetune.run import Finetuning
        from fedpipe.federation.loop import run_rounds

        return run_rounds(Finetuning, setup, env=env, emit=emit, watch=watch)

    def write_results(self, setup: FinetuneSetup, *, notify: Notify) -> None:
        """Export the adapter and the model, and write the report."""
        from fedpipe.commands.finetune.export import export_finetuned
        from fedpipe.commands.finetune.report import write_finetune_report

        export_finetuned(setup.run_dir)
        write_finetune_report(setup.run_dir)

    def view(self, setup: FinetuneSetup, *, interactive: bool | None = None) -> View:
        """Return a console of plain lines."""
        return view(num_rounds=setup.config.federation.num_rounds)

    def closing(self, run_dir: Path) -> list[str]:
        """See ``RankProgram``."""
        from fedpipe.commands.finetune.report import result_table

        folders = [name for name in ("adapter", "base", "export") if (run_dir / name).is_dir()]
        return [
            result_table([run_dir]),
            *(f"{name:<8}{run_dir / name}" for name in folders),
            f"report  {run_dir / 'report.html'}",
        ]


def view(*, num_rounds: int) -> View:
    """Return a console of plain lines for the rounds and scores of a fine-tuning."""
    console = RunConsole(interactive=False)

    def show_round(record: TuningRoundRecord) -> None:
        for line in [_round_line(record, num_rounds), *refused_lines(record)]:
            console.text(line)

    def show_score(record: TuningEvalRecord) -> None:
        console.text(_score_line(record, num_rounds))

    return View(console=console, shows={"round": show_round, "eval": show_score})


def _round_line(record: TuningRoundRecord, num_rounds: int) -> str:
    lost = f", {len(record['dropped'])} lost" if record["dropped"] else ""
    slow = f", {len(record['stragglers'])} slow" if record["stragglers"] else ""
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"{time.strftime('%H:%M:%S')} round {record['round'] + 1:>{len(str(num_rounds))}}"
        f"/{num_rounds} trained {len(record['clients'])} clients{slow}{lost},"
        f" {record['examples']:,} examples in {record['seconds']:.1f} s"
        f" (sync {record['sync_s']:.2f} s)  loss {loss}"
    )


def _score_line(record: TuningEvalRecord, num_rounds: int) -> str:
    worst = "-" if record["worst"] is None else f"{record['worst']:.4f}"
    return (
        f"{time.strftime('%H:%M:%S')} round {record['round'] + 1:>{len(str(num_rounds))}}"
        f"/{num_rounds} {record['metric']} {record['score']:.4f}  worst client {worst}"
        f" (client {record['worst_client']})"
    )


PROGRAM = FinetuningRanks()
