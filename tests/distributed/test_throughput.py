"""The throughput measurement, with real processes; what it says of this machine is not tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedpipe.commands.throughput.files import write_files
from fedpipe.commands.throughput.page import terminal_text
from fedpipe.commands.throughput.report import (
    Measurement,
    StageWindow,
    ThroughputSettings,
    single_replica,
    summarise,
)
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from fedpipe.errors import ConfigError
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

SCHEDULES = ["streaming", "1f1b", "sequential", "stock"]
NUMBERS = ("tokens_per_s", "bytes_forward_per_token")


def _measure(
    env: ProcessEnv, config: RunConfig, data: PreparedData, settings: ThroughputSettings
) -> Measurement | None:
    from fedpipe.commands.throughput.measure import measure

    return measure(config, data, env=env, settings=settings, emit=lambda kind, value: None)


def _report(config: RunConfig, data: PreparedData, settings: ThroughputSettings) -> Any:
    ranks = 1 if config.pipeline.colocate else config.pipeline.num_stages
    measurement = run_distributed(_measure, ranks, config, data, settings)[0]
    environment = {"emulate_ms": settings.emulate_ms}
    return summarise(measurement, single_replica(config), environment=environment), measurement


def test_report_has_every_schedule_with_finite_positive_numbers(tmp_path: Path) -> None:
    settings = ThroughputSettings(repetitions=2, num_steps=3)
    # two replicas are configured: one is measured
    report, measurement = _report(tiny_config(), tiny_data(tmp_path / "data"), settings)
    assert list(report["schedules"]) == list(report["ideal"]) == SCHEDULES
    assert sorted(report["ratios"]) == sorted(f"streaming_vs_{n}" for n in SCHEDULES[1:])
    for name, schedule in report["schedules"].items():
        spreads = [schedule["step_s"]]
        numbers = [schedule[key] for key in NUMBERS] + schedule["stage_busy_pct"]
        numbers += schedule["peak_memory_bytes"] + list(report["ideal"][name]["stage_busy_pct"])
        numbers += [v for spread in spreads for v in spread.values()]
        assert all(math.isfinite(v) and v > 0 for v in numbers), (name, schedule)
        assert 0 <= schedule["bubble_pct"] < 100
        assert len(schedule["stage_busy_pct"]) == len(schedule["peak_memory_bytes"]) == 2
        for shares in schedule["stage_time_pct"]:
            assert sum(shares.values()) == pytest.approx(100)
    for ratio in report["ratios"].values():
        assert 0 < ratio["p10"] <= ratio["median"] <= ratio["p90"]
    folder = tmp_path / "throughput"
    write_files(folder, report, measurement, config=single_replica(tiny_config()))
    assert json.loads((folder / "report.json").read_text()) == report
    for name in SCHEDULES:
        assert (folder / f"timeline_{name}.png").stat().st_size > 1000
        assert f"(timeline_{name}.png)" in (folder / "report.md").read_text()
        trace = json.loads((folder / f"timeline_{name}.json").read_text())["traceEvents"]
        named = [event["args"]["name"] for event in trace if event["name"] == "thread_name"]
        assert named == ["stage 0 (client)", "stage 1 (server)"]
    assert (folder / "report.html").read_text().count("<svg") == len(SCHEDULES)


def test_every_process_measures_its_ceiling_in_every_repetition(tmp_path: Path) -> None:
    settings = ThroughputSettings(repetitions=2, num_steps=3)
    report, measurement = _report(tiny_config(), tiny_data(tmp_path), settings)
    assert [len(process) for process in measurement.matmul_flops_per_s] == [2, 2]
    assert all(speed > 1e6 for process in measurement.matmul_flops_per_s for speed in process)
    for schedule in report["schedules"].values():
        assert 0 < schedule["mfu_pct"] < 100
        assert all(0 < share < 100 for share in schedule["busy_mfu_pct"])
        assert len(schedule["busy_mfu_pct"]) == 2
    assert report["advice"]


def test_a_stage_whose_head_is_at_home_computes_nothing_while_it_sends(tmp_path: Path) -> None:
    config = tiny_config(pipeline={"head_location": "client"})
    settings = ThroughputSettings(repetitions=1, num_steps=3, emulate_ms=20.0)
    _, measurement = _report(config, tiny_data(tmp_path), settings)
    events = measurement.traces["streaming"][0][1].steady_events()
    forward = [end - start for name, _, _, start, end in events if name == "forward"]
    assert min(forward) > 0.025, "a whole layer and the last one's share of 20 ms each"


def test_only_streaming_sends_no_byte_backwards(tmp_path: Path) -> None:
    settings = ThroughputSettings(repetitions=1, num_steps=3)
    report, _ = _report(tiny_config(), tiny_data(tmp_path), settings)
    backward = {n: s["bytes_backward_per_token"] for n, s in report["schedules"].items()}
    hidden = 32 * 4
    assert backward == {"streaming": 0, "1f1b": hidden, "sequential": hidden, "stock": hidden}


def test_emulated_devices_are_said_to_be_emulated(tmp_path: Path) -> None:
    config = tiny_config(pipeline={"cut": [1, 2, 3], "num_micro_batches": 4})
    settings = ThroughputSettings(repetitions=1, num_steps=3, emulate_ms=2.0)
    report, _ = _report(config, tiny_data(tmp_path), settings)
    layer_s = report["ideal"]["streaming"]["costs"][1]["forward_s"]
    assert layer_s >= 0.002, "a layer sleeps at least its device time"
    assert "emulated devices, 2 ms per layer" in terminal_text(report)


def test_stages_of_one_process_are_measured_without_deepspeeds_pipeline(tmp_path: Path) -> None:
    config = tiny_config(pipeline={"colocate": True})
    settings = ThroughputSettings(repetitions=1, num_steps=3)
    report, _ = _report(config, tiny_data(tmp_path), settings)
    assert list(report["schedules"]) == SCHEDULES[:3]
    assert "PipelineEngine" not in terminal_text(report)


def _window(stage: int, step_s: float, busy_s: float) -> StageWindow:
    """Five steps: the last one is slow, the others take ``step_s``, ``busy_s`` of it at work."""
    ends = (10.0, 10.0 + step_s, 10.0 + 2 * step_s, 10.0 + 3 * step_s, 99.0)
    events = []
    for step in range(1, 4):
        start = ends[step - 1]
        events += [
            ("forward", 0, step, start, start + busy_s / 2),
            ("local_backward", 0, step, start + busy_s / 2, start + busy_s),
            ("optimizer_step", 0, step, start + busy_s, start + busy_s),
            ("recv_activation", 0, step, start + busy_s, start + step_s),
        ]
    return StageWindow(
        stage=stage, ends=ends, events=tuple(events), forward_bytes=500, backward_bytes=0
    )


def test_fill_and_tail_are_not_counted_and_ratios_are_paired() -> None:
    fast, slow = (1.0, 2.0), (3.0, 8.0)  # the machine slows down by the second repetition
    windows = {
        "streaming": [[_window(0, s, 0.8 * s), _window(1, s, 0.6 * s)] for s in fast],
        "1f1b": [[_window(0, s, 0.5 * s), _window(1, s, 0.5 * s)] for s in slow],
    }
    measurement = Measurement(
        windows=windows, traces=windows, peak_memory_bytes={"streaming": [1, 2], "1f1b": [3, 4]},
        matmul_flops_per_s=[], vocab_size=97, device="cpu", threads_per_process=1,
    )  # fmt: skip
    config = single_replica(tiny_config())
    report = summarise(measurement, config, environment={"host": "h"})
    tokens = 2 * 3 * 16
    streaming = report["schedules"]["streaming"]
    assert streaming["tokens_per_s"] == pytest.approx(tokens / 1.5)
    assert streaming["stage_busy_pct"] == pytest.approx([80.0, 60.0])
    assert streaming["bubble_pct"] == pytest.approx(30.0)
    assert streaming["bytes_forward_per_token"] == pytest.approx(4 * 500 / (2 * 5 * tokens))
    assert report["ratios"]["streaming_vs_1f1b"]["median"] == pytest.approx(3.5)
    assert report["environment"]["host"] == "h"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetitions": 0}, r"--repetitions: expected 1 or more, got 0"),
        ({"num_steps": 2}, r"--steps: expected 3 or more, got 2"),
        ({"emulate_ms": -1.0}, r"--emulate-ms: expected milliseconds per layer, got -1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThroughputSettings(**values)


def test_a_single_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline.cut: expected one cut or more.*got \[\]"):
        single_replica(tiny_config(pipeline={"cut": []}))
