"""Show a run on the console: a live display on a terminal, plain lines elsewhere.

Both show the records of ``metrics.jsonl``, and never raise if a value is missing.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, TextIO

from fedpipe.printable import printable
from fedpipe.report.format import integer, number, tokens_per_s
from fedpipe.report.progress import RunProgress
from fedpipe.report.records import (
    NOT_VALIDATED,
    EvalRecord,
    OuterRecord,
    RefusedUpdate,
    RoundRecord,
    StepRecord,
    TuningRoundRecord,
)

if TYPE_CHECKING:
    from fedpipe.report.live import LiveDisplay

_PREPARING_LINES = 4
"""Plain lines per preparation, enough to see progress."""


class RunConsole:
    """The console of a run, in the process that started it."""

    def __init__(
        self,
        *,
        num_rounds: int = 0,
        steps_per_round: int = 0,
        num_stages: int = 0,
        log_every: int = 10,
        stream: TextIO | None = None,
        interactive: bool | None = None,
    ) -> None:
        """Open the console; a live display appears with the first record.

        Args:
            num_rounds: Rounds of the whole run.
            steps_per_round: Local steps that one replica makes in a round, over all its clients.
            num_stages: Stages of the pipeline.
            log_every: Local steps between plain lines.
            stream: Where to write; ``None`` is the standard output.
            interactive: Use the live display or plain lines; ``None`` decides by the stream.
        """
        self._stream = sys.stdout if stream is None else stream
        self._progress = RunProgress(
            num_rounds=num_rounds,
            steps_per_round=steps_per_round,
            num_stages=num_stages,
            window=log_every,
        )
        self._log_every = max(log_every, 1)
        self._last_line = (-1, 0)
        self._prepared: dict[str, int] = {}
        self._live: LiveDisplay | None = None
        if self._stream.isatty() if interactive is None else interactive:
            from fedpipe.report.live import LiveDisplay

            self._live = LiveDisplay(self._progress, stream=self._stream)

    def text(self, text: str) -> None:
        """Print text, above a live display if there is one, with control characters escaped."""
        text = printable(text)
        if self._live is not None:
            self._live.print(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def preparing(self, label: str, done: int, total: int) -> None:
        """Show the progress of a preparation.

        Args:
            label: Name of the preparation.
            done: Units that are done.
            total: All units; 0 if unknown.
        """
        label = printable(label)
        if self._live is not None:
            self._live.preparing(label, done, total)
            return
        share = _PREPARING_LINES * min(done, total) // total if total > 0 else 0
        if self._prepared.get(label, -1) < share:
            self._prepared[label] = share
            self._line(f"{label} {integer(done)}{f'/{integer(total)}' if total > 0 else ''}")

    def step(self, record: StepRecord) -> None:
        """Show a step record of any replica and stage."""
        self._progress.step(record)
        if self._live is not None:
            self._live.refresh()
            return
        round_id, step = self._progress.round_id or 0, self._progress.step_in_round
        line = (round_id, step // self._log_every)
        if self._last_line[0] < 0 and step % self._log_every:
            self._last_line = line  # resumed between two lines: not every stage has sent a record
        if line > self._last_line and line[1] > 0 and record.get("stage") == self._last_stage:
            self._last_line = line
            self._line(self._step_text())

    def round(self, record: RoundRecord) -> None:
        """Show a round record."""
        self._progress.round(record)
        self._line(_round_text(record, self._progress.num_rounds))
        for line in refused_lines(record):
            self._line(line)

    def evaluation(self, record: EvalRecord | OuterRecord) -> None:
        """Show an eval record."""
        self._line(_evaluation_text(record, self._progress))

    def close(self) -> None:
        """Remove the live display from the screen; printed lines stay."""
        if self._live is not None:
            self._live.close()
            self._live = None

    @property
    def _last_stage(self) -> int:
        return self._progress.num_stages - 1

    def _line(self, text: str) -> None:
        self.text(f"{time.strftime('%H:%M:%S')} {text}".rstrip())

    def _step_text(self) -> str:
        p = self._progress
        width = len(str(p.steps_per_round))
        losses = " ".join(_measured(loss, 3, width=6) for loss in p.losses())
        norms = " ".join(_measured(norm, 2, width=5) for norm in p.grad_norms())
        hosted = " ".join(client for _, client in p.hosted())
        return (
            f"{round_label(p.round_id, p.num_rounds)} step {p.step_in_round:>{width}}/"
            f"{p.steps_per_round}  loss {losses}  gnorm {norms}  "
            f"tok/s {tokens_per_s(p.tokens_per_s()):>9}  clients {hosted or '-'}"
        )


def _measured(value: float | None, digits: int, *, width: int) -> str:
    """Write a number; a NaN that was measured is shown as such, not as missing."""
    if value is not None and math.isnan(value):
        return f"{'nan':>{width}}"
    return number(value, digits, width=width)


def refused_lines(record: RoundRecord | TuningRoundRecord) -> list[str]:
    """Write a line per update that a round leaves out, and one if too few updates are left."""
    refused = record.get("refused") or []
    lines = [
        f"warning: client {fault['client']}'s update is left out: {why(fault)}" for fault in refused
    ]
    if refused and not record.get("averaged", True):
        lines.append(
            "warning: federation.aggregation.rule needs more clients than are left: the weights"
            " stay as they were"
        )
    return lines


def why(fault: RefusedUpdate) -> str:
    """Write the reason why an update is left out; steps are counted from 1."""
    what = {"grad_norm": "gradient norm is", "weights": "weights are"}.get(fault["what"], "loss is")
    return f"its {what} not finite at local step {fault['step'] + 1}, stage {fault['stage']}"


def round_label(round_id: int | None, num_rounds: int) -> str:
    """Write a round, counted from 1, in a constant width."""
    shown = "-" if round_id is None else str(round_id + 1)
    return f"round {shown:>{len(str(num_rounds))}}/{num_rounds}"


def _round_text(record: RoundRecord, num_rounds: int) -> str:
    clients = record.get("clients") or []
    plural = "client " if len(clients) == 1 else "clients"
    losses = " ".join(number(loss, 3, width=6) for loss in record.get("loss") or [])
    return (
        f"{round_label(record.get('round'), num_rounds)} trained {len(clients)} {plural}, "
        f"{integer(record.get('tokens'))} tokens in {number(record.get('seconds'), 1)} s "
        f"(sync {number(record.get('sync_s'), 2)} s)  loss {losses or '-'}  "
        f"tok/s {tokens_per_s(record.get('tokens_per_s')):>9}"
    )


def _evaluation_text(record: EvalRecord | OuterRecord, progress: RunProgress) -> str:
    stages = {entry.get("stage"): entry for entry in record.get("stages") or []}
    rows = [stages.get(stage_id, NOT_VALIDATED) for stage_id in range(progress.num_stages)]
    losses = " ".join(number(row.get("loss"), 3, width=6) for row in rows)
    perplexities = " ".join(number(row.get("perplexity"), 1, width=8) for row in rows)
    last = rows[-1] if rows else NOT_VALIDATED
    worst = f"{number(last.get('worst_loss'), 3)} (client {integer(last.get('worst_client'))})"
    label = round_label(record.get("round"), progress.num_rounds)
    what = "validation" if record.get("kind") != "outer" else "begins with the weights of all sites"
    return f"{label} {what}  loss {losses}  ppl {perplexities}  worst {worst}"
