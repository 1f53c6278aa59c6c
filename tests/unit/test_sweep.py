"""Sweeps without their runs: grids, folders, checks, and tables of hand-written runs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fedpipe.cli import main
from fedpipe.commands.study.pool import divide
from fedpipe.commands.study.report import MAX_DRAWN, Row, RunResult, Spread, draw_sweep, table
from fedpipe.commands.study.study import Cell, parse_grid, prepare_texts
from fedpipe.commands.study.sweep import Sweep, set_up_sweep
from fedpipe.errors import CheckpointError, ConfigError, CorpusError, FedPipeError
from fedpipe.run.run_dir import RunDir

GRID = ("pipeline.cut=[2],[1,3]", "seed=0,1")


def set_up(folder: Path, *axes: str, overrides: tuple[str, ...] = ()) -> Sweep:
    return set_up_sweep(None, overrides, axes, str(folder), preset=None)


def finish(cell: Cell[Any], *, losses: tuple[float | None, ...], seconds: float) -> None:
    """Leave what a finished run of 1 round, 4 steps and 1,200 tokens leaves."""
    for name in ("checkpoints/round_000012", "export"):
        (cell.run_dir / name).mkdir(parents=True)
    (cell.run_dir / "report.html").touch()
    records: list[dict[str, Any]] = [
        *({"kind": "step", "stage": stage, "tokens": 300} for stage in (0, 1) for _ in range(4)),
        {"kind": "round", "tokens": 1000, "seconds": seconds / 2},
        {"kind": "round", "tokens": 200, "seconds": seconds / 2},
        {"kind": "traffic", "edges": [{"bytes_forward": 3000}, {"bytes_forward": 1000}]},
        {"kind": "eval", "stages": [{"stage": 0, "loss": 99.0}]},
        {"kind": "eval", "stages": [{"stage": s, "loss": x} for s, x in enumerate(losses)]},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (cell.run_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")


# -- the grid --------------------------------------------------------------------------------------


def test_a_grid_is_split_at_the_commas_outside_of_brackets_and_quotes() -> None:
    axes = ["pipeline.cut=[2],[1, 3], []", "name='a,b',it's", "seed=0"]
    assert parse_grid(axes) == (
        ("pipeline.cut", ("[2]", "[1, 3]", "[]")),
        ("name", ("'a,b'", "it's")),
        ("seed", ("0",)),
    )


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["seed"], "--grid: expected section.key=value,value, got 'seed'. Write"),
        (["=1,2"], "got '=1,2'"),
        (["pipeline.=1"], "got 'pipeline.=1'"),
        (["seed="], "got 'seed='"),
        (["seed=0,,1"], "got 'seed=0,,1'"),
        (["seed=0", "seed=1"], "--grid: expected every key once, got seed a second time."),
        (["pipeline.cut=[2,[4]"], "pipeline.cut: expected a YAML value, got '[2,[4]'"),
        (["federation.average={a: 1}"], "got a section in federation.average={a: 1}. Write"),
        ([f"seed={','.join(map(str, range(101)))}", "name=a,b,c,d,e,f,g,h,i,j"],
         "--grid: expected at most 1,000 cells, got 1,010. Split"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused(axes: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        parse_grid(axes)


def test_cells_are_the_product_with_readable_folders(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, *GRID)
    assert [(cell.name, cell.overrides) for cell in sweep.cells] == [
        ("cut=2_seed=0", ("pipeline.cut=[2]", "seed=0")),
        ("cut=2_seed=1", ("pipeline.cut=[2]", "seed=1")),
        ("cut=1-3_seed=0", ("pipeline.cut=[1,3]", "seed=0")),
        ("cut=1-3_seed=1", ("pipeline.cut=[1,3]", "seed=1")),
    ]
    assert sweep.cells[2].run_dir == tmp_path / "cells" / "cut=1-3_seed=0"
    assert (sweep.cells[3].config.pipeline.cut, sweep.cells[3].config.seed) == ((1, 3), 1)
    assert {cell.config.name for cell in sweep.cells} == {"quickstart"}
    assert sweep.pending() == list(sweep.cells)


def test_keys_with_the_same_last_word_keep_all_of_it_and_an_empty_list_has_a_name(
    tmp_path: Path,
) -> None:
    sweep = set_up(tmp_path, "pipeline.wire=[int8]", "federation.wire=bf16")
    assert sweep.cells[0].name == "pipeline.wire=int8_federation.wire=bf16"
    sweep = set_up(tmp_path / "b", "pipeline.cut=[]", "optimizer.end_lr=-0.0,1e-9")
    assert [cell.name for cell in sweep.cells] == ["cut=none_end_lr=-0.0", "cut=none_end_lr=1e-9"]


@pytest.mark.parametrize(
    ("axes", "overrides", "expected"),
    [
        ((), (), "--grid: expected section.key=value,value of a new sweep, got none."),
        (("sed=0,1",), (), "cell sed=0: sed: unknown key in an override. Did you mean seed?"),
        (("seed=0,x",), (), "cell seed=x: seed: expected a whole number, got 'x'"),
        (("seed=0,1", "pipeline.cut=[2],[9]"), (), "cell seed=0_cut=9: pipeline.cut: expected inc"),
        (("seed=0,1",), ("seed=3",), "--grid: expected keys that no override sets, got seed in bo"),
        (("pipeline.cut=[1, 3],[1,  3]",), (), "got cut=1-3 for both pipeline.cut=[1, 3] and"),
        (("optimizer.lr=1e-3,0.001",), (), "the same configuration for lr=1e-3 and lr=0.001."),
        ((f"name={'x' * 300}",), (), "expected a folder name of at most 200 characters, got 305."),
        (("data.train=[nowhere.txt]",), (), "cell train=nowhere.txt: data.train: expected"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_named_before_anything_is_written(
    axes: tuple[str, ...], overrides: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    arguments = ["sweep", "--run-dir", str(folder), *overrides]
    with pytest.raises(FedPipeError, match=re.escape(expected)):
        set_up(folder, *axes, overrides=overrides)
    assert main([*arguments, "--grid", *axes] if axes else arguments) == 2
    assert not folder.exists()


def test_the_number_of_cells_at_a_time_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--grid", "seed=0,1", "--parallel", "0"]) == 2
    assert "--parallel: expected 1 or more, got 0." in capsys.readouterr().err


def test_a_grid_may_be_given_in_two_parts_and_takes_no_override(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "--run-dir", str(tmp_path / "s"), "--grid", "seed=0", "--grid", "sed=1"]
    assert main(arguments) == 2
    assert "cell seed=0_sed=1: sed: unknown key" in capsys.readouterr().err


def test_text_that_cannot_be_used_names_its_cell(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one line\n", encoding="utf-8")
    overrides = (f"data.cache_dir={tmp_path}", "data.partition=iid", "data.valid=[]")
    sweep = set_up(tmp_path / "s", f"data.train=[{tmp_path}/short.txt]", overrides=overrides)
    with pytest.raises(
        CorpusError, match=r"^cell train=.*short\.txt: data\.train: expected at lea"
    ):
        prepare_texts(sweep.cells)


# -- the directory ---------------------------------------------------------------------------------


def test_a_sweep_is_read_back_from_its_directory(tmp_path: Path) -> None:
    first = set_up(tmp_path, *GRID, overrides=("optimizer.lr=5e-4",))
    assert set_up(tmp_path) == first
    assert set_up(tmp_path, *GRID) == first
    assert set_up(tmp_path, *GRID, overrides=("optimizer.lr=5e-4",)) == first
    for cell in first.cells:
        assert "lr: 0.0005" in (cell.run_dir / "config.yaml").read_text("utf-8")


def test_the_default_directory_has_the_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = set_up_sweep(None, ["name=mine"], ["seed=0,1"], None, preset=None)
    assert sweep.directory == Path("runs/mine")
    assert set_up_sweep(None, ["name=mine"], [], None, preset=None) == sweep


def test_another_sweep_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    set_up(tmp_path, *GRID)
    with pytest.raises(
        CheckpointError, match=r"grid of the sweep that is there, .*seed=0,1, got seed=0,1,2\. Con"
    ):
        set_up(tmp_path, "seed=0,1,2")
    with pytest.raises(
        CheckpointError, match=r"got other values of optimizer\.lr \(1\.0 instead of .*\. Res"
    ):
        set_up(tmp_path, overrides=("optimizer.lr=1",))
    patient = set_up(tmp_path, overrides=("pipeline.hang_timeout_s=7",))
    saved = (patient.cells[0].run_dir / "config.yaml").read_text("utf-8")
    assert "hang_timeout_s: 7.0" in saved


def test_a_directory_that_is_no_sweeps_is_refused(tmp_path: Path) -> None:
    RunDir.at(tmp_path / "run", "pretrain").make()
    with pytest.raises(CheckpointError, match=r"expected a new directory or that of a sweep, got"):
        set_up(tmp_path / "run", *GRID)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match=r"with other files\. Choose another directory\."):
        set_up(tmp_path, *GRID)
    RunDir.at(tmp_path / "damaged", "sweep").make().write("grid: []\n")
    with pytest.raises(CheckpointError, match=r"sweep\.yaml: expected the grid and the conf"):
        set_up(tmp_path / "damaged")


def test_a_cell_at_work_keeps_its_configuration_file(tmp_path: Path) -> None:
    file = set_up(tmp_path, *GRID).cells[0].run_dir / "config.yaml"
    os.utime(file, (1, 1))
    set_up(tmp_path)
    assert file.stat().st_mtime == 1


# -- tables ----------------------------------------------------------------------------------------


def test_mean_and_spread_are_those_of_the_runs(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, *GRID)
    finish(sweep.cells[0], losses=(6.0, 5.0), seconds=10.0)
    finish(sweep.cells[1], losses=(7.0, 5.5), seconds=12.0)
    finish(sweep.cells[2], losses=(8.0, 7.5, 7.0), seconds=20.0)
    text = sweep.write_tables()
    assert [cell.name for cell in sweep.pending()] == ["cut=1-3_seed=1"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    # std of (5, 5.5) = 0.5 / sqrt 2; 120 and 100 tokens/s: 110, 20 / sqrt 2; 4,000 B in 4 steps.
    assert rows[2:] == [
        ["[2]", "2", "5.250", "0.354", "5.000..5.500", "6.500, 5.250", "110", "14",
         "1,200", "11.0 s", "1,000 B"],
        ["[1,3]", "1 of 2", "7.000", "-", "-", "8.000, 7.500, 7.000", "60", "-",
         "1,200", "20.0 s", "1,000 B"],
    ]  # fmt: skip
    page = (tmp_path / "sweep.md").read_text("utf-8")
    assert text in page
    assert "Not done: `cut=1-3_seed=1`." in page
    assert "--grid 'pipeline.cut=[2],[1,3]' seed=0,1" in page
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_every_cell_every_row_and_the_environment(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, *GRID)
    finish(sweep.cells[0], losses=(6.0, 5.0), seconds=10.0)
    finish(sweep.cells[1], losses=(7.0, 5.5), seconds=12.0)
    sweep.write_tables()
    content = json.loads((tmp_path / "sweep.json").read_text("utf-8"))
    assert content["grid"] == list(GRID)
    assert [cell["done"] for cell in content["cells"]] == [True, True, False, False]
    assert content["cells"][1] == {
        "name": "cut=2_seed=1", "values": {"pipeline.cut": "[2]", "seed": "1"}, "done": True,
        "stage_losses": [7.0, 5.5], "loss": 5.5, "tokens": 1200.0, "seconds": 12.0,
        "tokens_per_s": 100.0, "bytes_forward_per_step": 1000.0, "host": "",
    }  # fmt: skip
    first, second = content["rows"]
    assert (first["cells"], first["done"], first["values"]) == (2, 2, {"pipeline.cut": "[2]"})
    assert first["loss"] == {
        "mean": 5.25, "std": pytest.approx(0.5 / 2**0.5), "min": 5.0, "max": 5.5, "n": 2,
    }  # fmt: skip
    assert (second["done"], second["loss"], second["stage_losses"]) == (0, None, [])
    assert {"command", "commit", "processor", "packages"} <= set(content["environment"])


def test_without_seeds_there_is_no_spread(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, "pipeline.cut=[2],[3]")
    for cell in sweep.cells:
        finish(cell, losses=(6.0, 5.0), seconds=10.0)
    for line in sweep.write_tables().splitlines()[2:]:
        assert re.search(r"\| +1 \| +5\.000 \| +- \| +- \|.*\| +120 \| +- \|", line), line
    row = json.loads((tmp_path / "sweep.json").read_text("utf-8"))["rows"][0]
    assert row["loss"] == {"mean": 5.0, "std": None, "min": None, "max": None, "n": 1}


def test_a_sweep_of_seeds_alone_has_one_row(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, "seed=0,1")
    finish(sweep.cells[0], losses=(6.0, 5.0), seconds=10.0)
    assert [line.split("|")[1].strip() for line in sweep.write_tables().splitlines()[2:]] == [
        "1 of 2"
    ]
    assert (tmp_path / "sweep.png").is_file()


def test_before_the_first_run_is_done_there_is_a_table_and_no_figure(tmp_path: Path) -> None:
    text = set_up(tmp_path, *GRID).write_tables()
    assert text.count("0 of 2") == 2
    assert not (tmp_path / "sweep.png").exists()


def test_a_cell_is_done_only_when_it_is_trained_exported_and_reported(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, "pipeline.cut=[2]")
    (cell,) = sweep.cells
    finish(cell, losses=(6.0, 5.0), seconds=1.0)
    assert sweep.pending() == []
    for name in ("checkpoints/round_000012", "export", "report.html"):
        (cell.run_dir / name).rename(tmp_path / "aside")
        assert sweep.pending() == [cell], name
        (tmp_path / "aside").rename(cell.run_dir / name)


def test_runs_that_were_not_validated_have_a_row_and_a_figure(tmp_path: Path) -> None:
    sweep = set_up(tmp_path, "pipeline.cut=[2]", "seed=0,1")
    finish(sweep.cells[0], losses=(), seconds=10.0)
    finish(sweep.cells[1], losses=(None,), seconds=10.0)
    assert "| [2] |    2 |               - |  - |        - |" in sweep.write_tables()
    assert (tmp_path / "sweep.png").is_file()


def _row(loss: float, **values: str) -> Row:
    run = RunResult(
        stage_losses=(loss,), tokens=1.0, seconds=1.0, bytes_forward_per_step=None, host=""
    )
    return Row(values=values, num_cells=2, runs=(run,))


def test_the_figure_of_many_rows_keeps_the_lowest_losses_in_the_order_of_the_grid() -> None:
    from matplotlib.figure import Figure

    rows = [_row(float(loss), lr=str(loss)) for loss in range(MAX_DRAWN + 3, 0, -1)]
    found = draw_sweep(rows)
    assert found is not None
    figure = Figure()
    found[0](figure)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"lr={loss} (1 of 2)" for loss in range(MAX_DRAWN, 0, -1)]
    assert "40 lowest losses of 43" in figure.axes[0].get_title(loc="left")


def test_labels_are_shortened_from_the_left_and_pipes_do_not_break_the_table() -> None:
    row = _row(1.0, train="/data/very/long/path/corpus.jsonl", name="a|b")
    assert row.label == "train=...ng/path/corpus.jsonl, name=a|b (1 of 2)"
    assert _row(1.0, train="/data/very/long/path/corpus.jsonl", sequence_length="128").label == (
        "...ng/path/corpus.jsonl, 128 (1 of 2)"
    )
    assert "| a\\|b |" in table([row])


def test_what_was_not_recorded_has_no_mean() -> None:
    assert Spread.of([None, float("nan")]) is None
    assert Spread.of([None, 2.0]) == Spread(values=(2.0,))


@pytest.mark.parametrize(
    ("cores", "slots", "expected"),
    [
        ([0, 1, 2, 3], 2, [{0, 2}, {1, 3}]),
        ([4, 5, 6], 2, [{4, 6}, {5}]),
        ([0, 1], 3, [{0}, {1}, {0}]),
        ([0, 1], 1, [{0, 1}]),
    ],
)
def test_cells_at_work_share_the_cores_without_overlap_where_that_is_possible(
    cores: list[int], slots: int, expected: list[set[int]]
) -> None:
    assert divide(cores, slots) == expected
