"""``fedpipe throughput`` on the real command line: one point, and a grid of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.helpers.cli import fedpipe
from tests.helpers.runs import TINY

SHORT = ("--repetitions", "1", "--steps", "3")
WITHOUT_CUT = tuple(override for override in TINY if not override.startswith("pipeline.cut"))


def test_a_grid_leaves_a_report_per_point_and_one_over_all_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    run_dir, cache = tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}"
    result = fedpipe(
        "throughput", *WITHOUT_CUT, cache, "--run-dir", str(run_dir), *SHORT,
        "--grid", "pipeline.cut=[1],[2,3]", folder=tmp_path,
    )  # fmt: skip
    assert (result.code, result.err) == (0, ""), result.out + result.err
    folder = run_dir / "throughput"
    assert result.out.splitlines()[-1] == f"report  {folder / 'report.html'}"
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == {"points", "environment"}
    assert [p["overrides"] for p in report["points"]] == [
        ["pipeline.cut=[1]"], ["pipeline.cut=[2,3]"]
    ]  # fmt: skip
    for point, num_stages in zip(report["points"], (2, 3), strict=True):
        own = folder / point["name"]
        assert json.loads((own / "report.json").read_text()) == point["report"]
        assert point["report"]["environment"]["num_stages"] == num_stages
        assert (own / "report.html").is_file() and (own / "timeline_streaming.png").is_file()
        command = shlex.split(point["report"]["environment"]["repeat"])
        assert command[:2] == ["fedpipe", "throughput"]
        assert command[-1:] == point["overrides"]
    assert "[2,3]" in (folder / "report.md").read_text()
    # The same directory again, now with one point: the first one's configuration was left there.
    again = fedpipe("throughput", "--run-dir", str(run_dir), *SHORT, folder=tmp_path,
                    environment={"OMP_NUM_THREADS": "3"})  # fmt: skip
    assert (again.code, again.err) == (0, "")
    report = json.loads((folder / "report.json").read_text())
    assert set(report) >= {"schedules", "ratios"}
    assert report["environment"]["threads_per_process"] == 3, "what the user asks for"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["pipeline.cut=[1],[9]"], "ConfigError: cell cut=9: pipeline.cut: expected increasing"),
        (["pipeline.cut=[1],[]"], "ConfigError: cell cut=none: pipeline.cut: expected one cut"),
        (["pipeline.cut"], "ConfigError: --grid: expected section.key=value,value, got"),
        (["seed=1,1"], "ConfigError: --grid: expected cells with folders of their own"),
    ],
)
def test_a_point_that_cannot_be_measured_is_refused_by_name_before_anything_starts(
    tmp_path: Path, axes: list[str], message: str
) -> None:
    result = fedpipe(
        "throughput", *WITHOUT_CUT, "--run-dir", str(tmp_path / "run"), "--grid", *axes,
        folder=tmp_path,
    )  # fmt: skip
    assert result.code == 2
    assert result.error.startswith(message)
    assert not (tmp_path / "run").exists()
