"""Count the prepared text of every client, for rows below the plan and for text.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedpipe.commands.plan.plan import Row, aligned_rows
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.federation.cohort import idle_pct
from fedpipe.report.format import count
from fedpipe.report.summary import ClientText, TextFacts

_LISTED = 5
"""Clients that a row lists; text.json and the report list all."""
_IDLE_PCT = 10.0
"""Smallest idle share that is shown."""
_NAMED = 3
"""Owners that are listed for a client."""


def text_facts(data: PreparedData) -> TextFacts:
    """Count documents, tokens and blocks of prepared text.

    Args:
        data: The prepared text.

    Returns:
        The content of text.json: counts of the whole text, and a row per client.
    """
    clients: list[ClientText] = []
    for train, valid in zip(data.train, data.valid or [None] * len(data.train), strict=True):
        row: ClientText = {
            "client": train.client_id,
            "owners": list(train.values[:_NAMED]),
            "num_owners": len(train.values),
            "documents": train.num_documents,
            "tokens": train.num_tokens,
            "blocks": train.num_blocks,
            "left_out": train.num_left_out,
        }
        if valid is not None:
            row["held_out_documents"] = valid.num_documents
            row["held_out_blocks"] = valid.num_blocks
            row["held_out_left_out"] = valid.num_left_out
        clients.append(row)
    return {
        "prepared": Path(data.directory).name,
        "sequence_length": data.sequence_length,
        "num_masked": data.num_masked,
        "held_out_documents": data.num_held_out,
        "held_out_ignored": data.num_ignored_documents,
        "held_out_in_training": data.num_overlapping,
        "clients": clients,
    }


def render_text(facts: TextFacts, config: RunConfig) -> str:
    """Write the counts as lines below those of the plan.

    Args:
        facts: Counts from ``text_facts``.
        config: The run.

    Returns:
        One or more indented lines, without a newline at the end.
    """
    clients = facts["clients"]
    blocks = [row["blocks"] for row in clients]
    documents = sum(row["documents"] for row in clients)
    rows: list[Row] = [
        (
            "text",
            f"{count(documents, 'document')}, {count(sum(blocks), 'block')} to train on",
            f"{min(blocks):,} to {max(blocks):,} blocks per client",
        ),
        *_left_out("left_out", facts),
    ]
    if any("held_out_blocks" in row for row in clients):
        rows += _held_out(facts)
    rows += _idle(config, blocks)
    return "\n".join(aligned_rows(rows))


def render_uncounted() -> str:
    """Write the line for text that is not prepared yet."""
    row: Row = ("text", "not prepared yet", "counted when a run starts")
    return "\n".join(aligned_rows([row]))


def _idle(config: RunConfig, blocks: Sequence[int]) -> list[Row]:
    """Warn if replicas wait because turns differ in length; the plan counts empty turns."""
    idle = idle_pct(config, blocks) if config.federation.num_local_epochs else 0.0
    if idle < _IDLE_PCT:
        return []
    why = "num_local_epochs makes the longest turns last; num_local_steps makes them equal"
    return [("warning", f"replicas idle {idle:.0f} % of their time", why)]


def _held_out(facts: TextFacts) -> list[Row]:
    clients, number = facts["clients"], facts["held_out_documents"]
    same = facts["held_out_in_training"]
    share = f"{100 * same / number:.1f} %" if number else "0.0 %"
    known = f"{same:,} of them ({share}) in the training text too"
    if not same:
        known = "none of them in the training text"
    rows: list[Row] = [("held out", count(number, "document"), known)]
    if facts["held_out_ignored"]:
        rows.append(("", f"{facts['held_out_ignored']:,} not used", "their owner is no client's"))
    without = [row for row in clients if not row["held_out_blocks"]]
    if without:
        rows.append(("", f"{count(len(without), 'client')} without held-out text", _list(without)))
    return [*rows, *_left_out("held_out_left_out", facts)]


def _left_out(key: Literal["left_out", "held_out_left_out"], facts: TextFacts) -> list[Row]:
    found = [(-left_out, row) for row in facts["clients"] if (left_out := row.get(key))]
    if not found:
        return []
    found.sort(key=lambda each: (each[0], each[1]["client"]))
    numbers = [-left_out for left_out, _ in found]
    blocks = count(sum(numbers), "block")
    what = f"{blocks} left out, with fewer than {facts['num_masked']} ordinary tokens"
    return [("", what, _list([row for _, row in found], numbers))]


def _list(rows: Sequence[ClientText], numbers: Sequence[int] = ()) -> str:
    shown = [f"client {row['client']}" for row in rows[:_LISTED]]
    if numbers:
        shown = [f"{name}: {n:,}" for name, n in zip(shown, numbers, strict=False)]
    more = [f"{len(rows) - _LISTED} more"] if len(rows) > _LISTED else []
    return ", ".join([*shown, *more])
