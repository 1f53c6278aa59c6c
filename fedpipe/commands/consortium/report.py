"""The report of a consortium: losses by site and outer round, who took part, what it took."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.commands.consortium.run import CONNECTED, Consortium, RoundRecord
from fedpipe.errors import CheckpointError
from fedpipe.files import write_text
from fedpipe.report.document import (
    Block,
    Facts,
    Figure,
    Heading,
    Paragraph,
    Table,
    aligned,
    to_html,
    to_markdown,
)
from fedpipe.report.drawing import PALETTE, Draw, label_ends, render, whole_rounds
from fedpipe.report.format import bytes_text, count, duration, integer, is_number, number
from fedpipe.run.run_dir import is_locked

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_MAX_NAMED_SITES = 7


def write_consortium_report(consortium: Consortium) -> Path:
    """Write ``report.html``, ``report.md`` and the figure; return the page."""
    records = consortium.records
    title = f"fedpipe consortium: {consortium.config.name}"
    blocks: list[Block] = [_headline(consortium), *_losses(consortium, records)]
    blocks += [Heading(text="Sites"), sites_table(records)]
    blocks.append(
        Paragraph(
            text="A site's answer takes its training and whatever it waited before: for its"
            " machines, for the transfer, for somebody to start it."
        )
    )
    if refused := [(r["round"], s, why) for r in records for s, why in r["refused"].items()]:
        rows = tuple((str(r + 1), site, why) for r, site, why in refused)
        table = Table(columns=("outer round", "site", "why"), rows=rows)
        blocks += [Heading(text="Updates that were left out"), table]
    write_text(consortium.path / "report.md", to_markdown(title, blocks))
    page = consortium.path / "report.html"
    write_text(page, to_html(title, blocks))
    return page


def _headline(consortium: Consortium) -> Facts:
    sites = [site for record in consortium.records for site in record["sites"].values()]
    tokens = sum(site["facts"]["tokens"] for site in sites)
    size = sum(site["bytes"] for site in sites)
    done = f"{consortium.num_done} of {consortium.num_rounds}"
    taken = sum(record["seconds"] for record in consortium.records)
    return Facts(
        items=(
            ("outer rounds", done, f"{count(len(consortium.config.federation.sites), 'site')}"),
            ("tokens trained", integer(tokens), "by all sites"),
            ("time", duration(taken), "from hand-out to the last update, all outer rounds"),
            ("updates", bytes_text(size), "that left the sites"),
        )
    )


def _losses(consortium: Consortium, records: list[RoundRecord]) -> list[Block]:
    """Draw, by site, the held-out loss of the weights that each outer round began with."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for site, of_site in record["sites"].items():
            losses = of_site["facts"]["base_valid_loss"]
            if losses and is_number(losses[-1]):
                xs, ys = curves.setdefault(site, ([], []))
                xs.append(float(record["round"]))
                ys.append(float(losses[-1]))
    if not curves:
        return []

    def draw(figure: Canvas) -> None:
        axes = figure.add_subplot(
            xlabel="outer rounds done", ylabel="held-out loss of the shared weights, nats"
        )
        labels = []
        for index, (site, (xs, ys)) in enumerate(curves.items()):
            color = PALETTE[index % len(PALETTE)]
            axes.plot(xs, ys, "o-", color=color, markersize=4)
            labels.append((ys[-1], site, color))
        if len(labels) <= _MAX_NAMED_SITES:
            label_ends(axes, labels)
        whole_rounds(axes)

    picture: Draw = draw
    return [
        Heading(text="Loss"),
        Figure(
            file="loss.png",
            svg=render(picture, consortium.path / "loss.png"),
            caption="Loss of the final head on each site's own held-out text, of the weights that"
            " the outer round began with: those that all sites made together. No site has measured"
            " the newest weights.",
        ),
    ]


def sites_table(records: list[RoundRecord]) -> Table:
    """Return a row per site and outer round."""
    rows = []
    for record in records:
        for site, of_site in sorted(record["sites"].items()):
            facts = of_site["facts"]
            before, after = (
                number(facts[key][-1] if facts[key] else None, 3)
                for key in ("base_valid_loss", "valid_loss")
            )
            rows.append(
                (
                    str(record["round"] + 1), site, integer(facts["tokens"]), before, after,
                    duration(facts["seconds"]) if facts["seconds"] else "-",
                    duration(of_site["answered_s"]),
                    bytes_text(of_site["bytes"]),
                )
            )  # fmt: skip
        rows += [
            (str(record["round"] + 1), site, what, "-", "-", "-", "-", "-")
            for what, sites in (("absent", record["absent"]), ("left out", record["refused"]))
            for site in sites
        ]
    columns = (
        "outer round", "site", "tokens", "loss before", "loss after", "training", "answer", "update"
    )  # fmt: skip
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, 8)))


def site_rows(consortium: Consortium) -> list[dict[str, Any]]:
    """Return what is known of every site in every outer round that is over.

    Raises:
        CheckpointError: None is over.
    """
    rows: list[dict[str, Any]] = []
    for record in consortium.records:
        index = record["round"]
        for site, of_site in record["sites"].items():
            took = {"bytes": of_site["bytes"], "answered_s": of_site["answered_s"]}
            facts = {**of_site["facts"], "round": index}
            rows.append({"round": index, "site": site, "state": "averaged"} | facts | took)
        for site, why in record["refused"].items():
            rows.append({"round": index, "site": site, "state": "left out", "why": why})
        rows += [{"round": index, "site": site, "state": "absent"} for site in record["absent"]]
    if not rows:
        raise CheckpointError(
            f"{consortium.path}: expected an outer round that is over, got none. Wait for the first"
            " one; fedpipe consortium status says whom it waits for."
        )
    return rows


def status_lines(consortium: Consortium) -> list[str]:
    """Say how far a consortium is, and whom the outer round under way waits for."""
    done = f"{consortium.num_done} of {consortium.num_rounds} outer rounds"
    lines = [f"{consortium.config.name}: {done}"]
    records = consortium.records
    lines += aligned(sites_table(records)) if records else []
    index = consortium.num_done
    if index == consortium.num_rounds:
        return lines
    runs = is_locked(consortium.path)
    again = shlex.join(["fedpipe", "consortium", "run", "--run-dir", str(consortium.path)])
    lines.append(f"coordinator: {'runs' if runs else f'does not run; go on with: {again}'}")
    if consortium.record(index) is not None:
        return lines
    connected = _connected(consortium) if runs else None
    for site in consortium.invited(index):
        state = consortium.site_state(site, index)
        if connected is not None:
            state = f"{'is' if site in connected else 'is not'} connected, {state}"
        lines.append(f"outer round {index + 1}: {site} {state}")
    if (handed_out := consortium.handed_out_at(index)) is not None:
        lines.append(f"outer round {index + 1}: {_deadline(consortium, handed_out)}")
    return lines


def _connected(consortium: Consortium) -> list[str] | None:
    """The sites that the running command has seen last; None where there are no connections."""
    file = consortium.path / CONNECTED
    if not (consortium.config.server.host and file.is_file()):
        return None
    sites: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return sites


def _deadline(consortium: Consortium, handed_out: float) -> str:
    federation = consortium.config.federation
    if not federation.deadline_s:
        return "has no deadline, and waits for all of them"
    ends = handed_out + federation.deadline_s
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ends))
    enough = count(federation.quorum, "update")
    if time.time() > ends:
        return f"has had its deadline, {moment}, and waits for {enough}"
    return f"has its deadline on {moment}, and needs {enough}"
