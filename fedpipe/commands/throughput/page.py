"""A throughput report for people: the blocks of its page, and its text for a terminal. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from fedpipe.commands.throughput.report import Report
from fedpipe.report.document import (
    Block,
    Code,
    Facts,
    Figure,
    Heading,
    Paragraph,
    Strong,
    Table,
    aligned,
)
from fedpipe.report.format import MISSING, bytes_text, number, tokens_per_s
from fedpipe.report.sections import environment_rows

TITLES = {
    "streaming": "streaming (local losses)",
    "1f1b": "1F1B (fedpipe)",
    "sequential": "sequential (fedpipe)",
    "stock": "1F1B (DeepSpeed PipelineEngine)",
}
"""Schedules as people read them."""

_KINDS = {
    "forward": ("forward",),
    "backward": ("local_backward", "backward"),
    "optimizer": ("optimizer_step",),
    "waits: activations": ("recv_activation",),
    "gradients": ("recv_grad", "recv_home_grad"),
    "sending": ("send_activation", "send_grad", "send_home"),
    "text": ("load",),
    "other": ("other",),
}
"""Columns of the table of times: instructions by what they mean."""


def headline(report: Report) -> str:
    """Say what is fastest here, by how much, and how near it is to its ideal."""
    schedules = report["schedules"]
    first, *others = sorted(schedules, key=lambda name: -schedules[name]["tokens_per_s"])
    fastest = schedules[first]
    text = f"{_capital(TITLES[first])} is the fastest here: {tokens_per_s(fastest['tokens_per_s'])}"
    text += " tokens/s, "
    # Ratios are paired with streaming only.
    rival = others[0] if first == "streaming" else "streaming"
    ratio = report["ratios"][f"streaming_vs_{rival if first == 'streaming' else first}"]
    low, middle, high = ratio["p10"], ratio["median"], ratio["p90"]
    if first != "streaming":
        low, middle, high = 1 / high, 1 / middle, 1 / low
    text += f"{middle:.2f} x {TITLES[rival]} (p10 to p90: {low:.2f} to {high:.2f})"
    if low <= 1.0:
        text += ", which is within the spread"
    text += f". It reaches {number(report['ideal'][first]['reached_pct'], 1)} % of what the "
    text += "simulator gives its measured stages"
    if fastest["mfu_pct"] is not None:
        text += f", and {fastest['mfu_pct']:.0f} % of the FLOP/s of a bare matrix product on the "
        text += "same processes"
    return f"{text}."


def circumstances(report: Report) -> str:
    """Say what was measured, and on what."""
    environment = report["environment"]
    emulated = environment.get("emulate_ms")
    where = (
        f"emulated devices, {emulated:g} ms per layer and micro-batch forward"
        if emulated
        else f"{environment['device']}, {environment['threads_per_process']} thread(s) per process"
    )
    return (
        f"{environment['num_stages']} stages, {environment['num_micro_batches']} micro-batches and "
        f"{environment['tokens_per_step']:,} tokens per local step, one replica; {where}."
    )


def blocks(report: Report, figures: Sequence[Figure] = ()) -> list[Block]:
    """Make the report.

    Args:
        report: As in report.json.
        figures: The timelines.

    Returns:
        What ``to_html`` and ``to_markdown`` take.
    """
    return [
        Paragraph(text=headline(report)),
        Paragraph(text=circumstances(report)),
        *_facts(report),
        Heading(text="Schedules"),
        schedule_table(report),
        Paragraph(
            text="All schedules were measured in one call, in turns; the first and the last step "
            "of each window are not counted. MFU: FLOPs of the model, nothing recomputed, over "
            "those of a bare matrix product in the same repetition."
        ),
        _ratio_table(report),
        Paragraph(text="Ratios are taken within a repetition."),
        *_timelines(figures),
        Heading(text="Where the time goes"),
        _time_table(report),
        Paragraph(
            text="Shares of each process' time, in percent; three columns are waiting. A head is "
            "within backward (DeepSpeed's PipelineEngine: within forward)."
        ),
        Heading(text="Beside the simulator's ideal"),
        _ideal_table(report),
        Paragraph(
            text="The simulator runs the same instructions with the measured cost of every stage "
            "and free messages. Reached is the median over repetitions of ideal to measured step."
        ),
        *_flops(report),
        Heading(text="Peak memory by process"),
        _memory_table(report),
        Heading(text="What would help"),
        *(Paragraph(text=sentence) for sentence in report["advice"]),
        *_repeat(report),
    ]


def terminal_text(report: Report) -> str:
    """Return what a terminal shows: the table of schedules and the sentences."""
    table = schedule_table(report)
    advice = [sentence.replace("`", "") for sentence in report["advice"]]
    return "\n".join(["", *aligned(table), "", headline(report), circumstances(report), *advice])


def schedule_table(report: Report) -> Table:
    """One row per schedule."""
    columns = (
        "schedule",
        "tokens/s",
        "step, ms (p10 to p90)",
        "MFU, %",
        "waits, %",
        "of its ideal, %",
        "B/token forward",
        "backward",
    )
    rows = []
    best = max(schedule["tokens_per_s"] for schedule in report["schedules"].values())
    for name, schedule in report["schedules"].items():
        speed = tokens_per_s(schedule["tokens_per_s"])
        middle, low, high = (_ms(schedule["step_s"][key]) for key in ("median", "p10", "p90"))
        rows.append(
            (
                TITLES[name],
                Strong(speed) if schedule["tokens_per_s"] == best else speed,
                f"{middle} ({low} to {high})",
                number(schedule["mfu_pct"], 1),
                number(schedule["bubble_pct"], 1),
                number(report["ideal"][name]["reached_pct"], 1),
                number(schedule["bytes_forward_per_token"], 0),
                number(schedule["bytes_backward_per_token"], 0),
            )
        )
    return _table(columns, rows)


def _facts(report: Report) -> list[Block]:
    schedules = report["schedules"]
    speed = schedules["streaming"]["tokens_per_s"]
    items = [("streaming, tokens/s", tokens_per_s(speed), "one replica")]
    for name in schedules:
        if ratio := report["ratios"].get(f"streaming_vs_{name}"):
            spread = f"p10 to p90: {ratio['p10']:.2f} to {ratio['p90']:.2f}"
            items.append((f"streaming over {TITLES[name]}", f"{ratio['median']:.2f} x", spread))
    reached = report["ideal"]["streaming"]["reached_pct"]
    items.append(("streaming, of its ideal", f"{reached:.1f} %", "the simulator's"))
    if (mfu := schedules["streaming"]["mfu_pct"]) is not None:
        items.append(("streaming, MFU", f"{mfu:.0f} %", "of a bare matrix product, same processes"))
    return [Facts(items=tuple(items))]


def _ratio_table(report: Report) -> Table:
    rows = [
        (
            TITLES[name.removeprefix("streaming_vs_")],
            *(f"{ratio[key]:.3f} x" for key in ("median", "p10", "p90")),
        )
        for name, ratio in report["ratios"].items()
    ]
    return _table(("streaming is faster than", "median", "p10", "p90"), rows)


def _timelines(figures: Sequence[Figure]) -> list[Block]:
    if not figures:
        return []
    text = (
        "Two local steps of each schedule from the middle of a window, on its own scale; numbers "
        "are micro-batches. Pale is waiting. Each `timeline_NAME.json` has all steps: open it in "
        "Perfetto."
    )
    return [Heading(text="Timelines"), Paragraph(text=text), *figures]


def _time_table(report: Report) -> Table:
    rows = []
    for name, schedule in report["schedules"].items():
        for stage, shares in enumerate(schedule["stage_time_pct"]):
            kinds = (sum(shares.get(n, 0.0) for n in names) for names in _KINDS.values())
            title = TITLES[name] if stage == 0 else ""
            rows.append((title, str(stage), *(number(share, 1) for share in kinds)))
    return _table(("schedule", "stage", *_KINDS), rows)


def _ideal_table(report: Report) -> Table:
    columns = (
        "schedule",
        "step, ms",
        "ideal",
        "reached, %",
        "waits, %",
        "ideal",
        "busy by stage, %",
        "ideal",
    )
    rows = []
    for name, schedule in report["schedules"].items():
        ideal = report["ideal"][name]
        rows.append(
            (
                TITLES[name],
                _ms(schedule["step_s"]["median"]),
                _ms(ideal["step_s"]),
                number(ideal["reached_pct"], 1),
                number(schedule["bubble_pct"], 1),
                number(ideal["bubble_pct"], 1),
                _list(schedule["stage_busy_pct"]),
                _list(ideal["stage_busy_pct"]),
            )
        )
    return _table(columns, rows)


def _flops(report: Report) -> list[Block]:
    environment = report["environment"]
    ceiling = environment["matmul_flops_per_s"]
    if ceiling is None:
        return []
    rows = [
        (
            TITLES[name],
            number((schedule["flops_per_s"] or 0.0) / 1e9, 1),
            number(schedule["mfu_pct"], 1),
            _list(schedule["busy_mfu_pct"] or []),
        )
        for name, schedule in report["schedules"].items()
    ]
    text = (
        f"The ceiling: {environment['matmul']}, all processes at once, once per repetition: "
        f"{', '.join(number(value / 1e9, 1) for value in ceiling)} GFLOP/s by process."
    )
    columns = ("schedule", "GFLOP/s", "MFU, %", "MFU while the stage computes, %")
    return [Heading(text="FLOP/s"), _table(columns, rows), Paragraph(text=text)]


def _memory_table(report: Report) -> Table:
    num_processes = len(report["schedules"]["streaming"]["peak_memory_bytes"])
    rows = [
        (TITLES[name], *(bytes_text(value) for value in schedule["peak_memory_bytes"]))
        for name, schedule in report["schedules"].items()
    ]
    return _table(("schedule", *map(str, range(num_processes))), rows)


def _repeat(report: Report) -> list[Block]:
    environment = report["environment"]
    found: list[Block] = []
    if command := environment.get("repeat"):
        found += [Heading(text="Repeat this measurement"), Code(text=command)]
    rows = environment_rows(environment)
    return [*found, Heading(text="Environment"), Table(columns=("key", "value"), rows=rows)]


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(1, len(columns))))


def _list(values: Sequence[float]) -> str:
    return ", ".join(number(value, 1) for value in values) or MISSING


def _ms(seconds: float) -> str:
    return number(1000 * seconds, 1)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
