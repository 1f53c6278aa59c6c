"""The files of a throughput report: JSON, Markdown, Chrome traces and timelines. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe.metrics.format import bytes_text, number, tokens_per_s
from fedpipe.metrics.timeline_plot import write_timeline_plot
from fedpipe.pipeline.timeline import COMPUTE
from fedpipe.workflows.throughput_report import Measurement, StageWindow

TITLES = {
    "streaming": "streaming (local losses)",
    "1f1b": "1F1B (fedpipe)",
    "sequential": "sequential (fedpipe)",
    "stock": "1F1B (DeepSpeed PipelineEngine)",
}
_COLUMNS = (
    "schedule", "tokens/s", "step, ms (p10 to p90)", "waits, %", "busy by stage, %",
    "of its ideal, %", "B/token forward", "B/token backward", "peak memory by stage",
)  # fmt: skip


def write_files(folder: Path, report: dict[str, Any], measurement: Measurement) -> None:
    """Write report.json, report.md, timeline_NAME.json and timeline_NAME.png.

    Args:
        folder: ``RUN_DIR/throughput``; made where absent.
        report: From ``summarise``.
        measurement: Its traces are drawn: the last repetition's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, traces in measurement.traces.items():
        events = chrome_events(traces[-1])
        _write(folder / f"timeline_{name}.json", json.dumps({"traceEvents": events}))
        write_timeline_plot(events, folder / f"timeline_{name}.png")
    _write(folder / "report.md", render(report))
    _write(folder / "report.json", json.dumps(report, indent=2) + "\n")


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    environment = report["environment"]
    emulated = environment.get("emulate_ms")
    where = (
        f"emulated devices, {emulated:g} ms per layer and micro-batch forward"
        if emulated
        else f"{environment['device']}, {environment['threads_per_process']} thread(s) per process"
    )
    lines = [
        "# Throughput",
        "",
        f"{environment['num_stages']} stages, {environment['tokens_per_step']} tokens per local "
        f"step, one replica; {where}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *(_row(name, report) for name in report["schedules"]),
        "",
        "| streaming is faster than | median | p10 | p90 |",
        "|---|---|---|---|",
        *(
            f"| {TITLES[name.removeprefix('streaming_vs_')]} | {r['median']:.3f} x | "
            f"{r['p10']:.3f} x | {r['p90']:.3f} x |"
            for name, r in report["ratios"].items()
        ),
        "",
        "All schedules were measured in one call, in turns; ratios are taken within a turn. The "
        "first and the last step of each window are not counted.",
        "",
        *(f"![{TITLES[n]}](timeline_{n}.png)" for n in report["schedules"]),
        "",
    ]
    return "\n".join(lines)


def chrome_events(stages: Sequence[StageWindow]) -> list[dict[str, Any]]:
    """Return a traced window as Chrome trace events: microseconds, a thread per stage."""
    if not all(window.events for window in stages):
        return []
    origin = min(event[3] for window in stages for event in window.events)
    return [
        {
            "name": name,
            "cat": "compute" if name in COMPUTE else "message",
            "ph": "X",
            "ts": (start - origin) * 1e6,
            "dur": (end - start) * 1e6,
            "pid": 0,
            "tid": window.stage,
            "args": {"micro_batch": micro_batch, "step": step},
        }
        for window in stages
        for name, micro_batch, step, start, end in window.events
    ]


def _row(name: str, report: dict[str, Any]) -> str:
    schedule = report["schedules"][name]
    step = schedule["step_s"]
    milliseconds = [number(1000 * step[key], 1) for key in ("median", "p10", "p90")]
    cells = (
        TITLES[name],
        tokens_per_s(schedule["tokens_per_s"]),
        f"{milliseconds[0]} ({milliseconds[1]} to {milliseconds[2]})",
        number(schedule["bubble_pct"], 1),
        ", ".join(number(share, 1) for share in schedule["stage_busy_pct"]),
        number(report["ideal"][name]["reached_pct"], 1),
        number(schedule["bytes_forward_per_token"], 0),
        number(schedule["bytes_backward_per_token"], 0),
        ", ".join(bytes_text(value) for value in schedule["peak_memory_bytes"]),
    )
    return f"| {' | '.join(cells)} |"


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
