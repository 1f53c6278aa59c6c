"""The files of a throughput report: JSON, page, Markdown, Chrome traces and timelines. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe.commands.plan.ideal import scheduled
from fedpipe.commands.throughput.page import TITLES, blocks
from fedpipe.commands.throughput.report import Comparison, Measurement, Report, StageWindow
from fedpipe.config.schema import RunConfig
from fedpipe.files import write_text
from fedpipe.models.split import StageSpec, stage_specs
from fedpipe.pipeline.timeline import COMPUTE
from fedpipe.report.document import Block, Figure, write_page
from fedpipe.report.timeline_plot import write_timeline_plot


def write_files(
    folder: Path, report: Report, measurement: Measurement, *, config: RunConfig
) -> None:
    """Write report.json, report.html, report.md, timeline_NAME.json and timeline_NAME.png.

    Args:
        folder: ``RUN_DIR/throughput`` or a folder in it; made where absent.
        report: From ``summarise``.
        measurement: Its traces are drawn: the last repetition's.
        config: Of the single replica that was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, traces in measurement.traces.items():
        events = chrome_events(traces[-1], name=name, config=config)
        write_text(folder / f"timeline_{name}.json", json.dumps({"traceEvents": events}))
        file = f"timeline_{name}.png"
        svg = write_timeline_plot(events, folder / file)
        if svg is not None:
            figures.append(Figure(file=file, svg=svg, caption=f"Two steps of {TITLES[name]}."))
    title = f"fedpipe throughput: {config.name}"
    write_documents(folder, title, blocks(report, figures), content=report)


def write_documents(
    folder: Path, title: str, page: list[Block], *, content: Report | Comparison
) -> None:
    """Write report.html and report.md of the same blocks, and report.json.

    Args:
        folder: Exists.
        title: Of the page.
        page: Its blocks.
        content: Of the JSON.
    """
    write_page(folder / "report.html", title, page)
    write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")


def chrome_events(
    stages: Sequence[StageWindow], *, name: str, config: RunConfig
) -> list[dict[str, Any]]:
    """Return a traced window as Chrome trace events: microseconds, a named thread per stage.

    Args:
        stages: One window per stage.
        name: The schedule.
        config: What was measured.

    Returns:
        Metadata, then complete events; nothing where nothing was traced.
    """
    if not all(window.events for window in stages):
        return []
    specs = stage_specs(
        scheduled(config, name).pipeline, num_hidden_layers=config.pipeline.cut[-1] + 1
    )
    origin = min(event[3] for window in stages for event in window.events)
    return [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": TITLES[name]}},
        *(
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": spec.stage_id}
            | {"args": {"name": _thread_name(spec)}}
            for spec in specs
        ),
        *(
            {
                "name": event,
                "cat": "compute" if event in COMPUTE else "message",
                "ph": "X",
                "ts": (start - origin) * 1e6,
                "dur": (end - start) * 1e6,
                "pid": 0,
                "tid": window.stage,
                "args": {"micro_batch": micro_batch, "step": step},
            }
            for window in stages
            for event, micro_batch, step, start, end in window.events
        ),
    ]


def _thread_name(spec: StageSpec) -> str:
    if spec.is_home_head:
        return f"head of stage {spec.scores} (client)"
    return f"stage {spec.stage_id} ({spec.role.value})"
