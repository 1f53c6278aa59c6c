"""Count the parameters that every method trains and sends, on the base model of every family."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedpipe.config.finetune import MethodConfig
from fedpipe.errors import ConfigError
from fedpipe.models.peft import METHODS, Counts, attach
from fedpipe.models.tuned import TUNED_FAMILIES, base_config, build_model
from fedpipe.report.format import bytes_text

_BYTES = 4
_LABELS = 2

PUBLISHED = {
    "houlsby": (1.788, "1.438"),
    "pfeiffer": (0.894, "0.719"),
    "parallel": (7.103, "5.70"),
    "houlsby_inv": (1.936, "-"),
    "pfeiffer_inv": (1.042, "-"),
    "lora": (0.222, "0.237"),
    "ia3": (0.042, "0.044"),
    "compacter": (0.043, "-"),
    "full": (100.0, "100"),
}
"""GPT-2 small: per cent as in FATE-LLM 1.0's image, and as FATE's own notebook's counts give them.

Source: https://github.com/FederatedAI/FATE-LLM, README of version 1.0.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountRow:
    """The counts of one family and one method."""

    family: str
    method: str
    counts: Counts | None
    """Counts of parameters; None if the family does not support the method."""
    reason: str = ""
    """The library's message if the family does not support the method."""


def count_rows() -> Iterator[CountRow]:
    """Count every method on the base model of every family, with a head of two classes.

    The models are built without weights, so this takes seconds and no memory.
    """
    for family in TUNED_FAMILIES:
        base = build_model(base_config(family), "classification", num_labels=_LABELS, device="meta")
        for name in METHODS:
            model = copy.deepcopy(base)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of initialising weights that are not there
                try:
                    counts = attach(model, MethodConfig(name=name))  # type: ignore[arg-type]
                except ConfigError as error:
                    reason = str(error).partition("(")[2].rpartition(")")[0]
                    yield CountRow(family=family, method=name, counts=None, reason=reason)
                    continue
            yield CountRow(family=family, method=name, counts=counts)


def count_table(rows: Iterable[CountRow]) -> str:
    """Write the counts as a Markdown table."""
    lines = [
        "| model | method | adapter | of the model | with head: trained and sent | per client and "
        "round, each way | FATE's image | FATE, exact |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += map(_line, rows)
    return "\n".join(lines)


def _line(row: CountRow) -> str:
    model = TUNED_FAMILIES[row.family].name
    if row.counts is None:
        return f"| {model} | {row.method} | - | - | - | {row.reason} | | |"
    counts = row.counts
    image, exact = "", ""
    if row.family == "gpt2" and row.method in PUBLISHED:
        percent, exact = PUBLISHED[row.method]
        image, exact = f"{percent:g} %", f"{exact} %" if exact != "-" else "-"
    return (
        f"| {model} | {row.method} | {counts.adapter:,} | {counts.percent:.3f} % |"
        f" {counts.trainable:,} | {bytes_text(counts.trainable * _BYTES)} | {image} | {exact} |"
    )
