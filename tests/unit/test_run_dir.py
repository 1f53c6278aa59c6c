"""Run directories: what each says of itself, what is refused, and how often one is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest

from fedpipe.cli import main
from fedpipe.commands.evaluate.setup import read_evaluation, set_up_evaluation
from fedpipe.commands.finetune.command import find_grid
from fedpipe.commands.pretrain.setup import reserve, set_up
from fedpipe.commands.reproduce.setup import plan_reproduction
from fedpipe.commands.study.sweep import set_up_sweep
from fedpipe.config.finetune import load_finetune
from fedpipe.config.load import load_config, to_yaml
from fedpipe.errors import CheckpointError, ConfigError, FedPipeError
from fedpipe.run.run_dir import VERSION, Kind, RunDir, resolve
from tests.helpers.encoders import bert, easy_ner

KINDS: tuple[Kind, ...] = get_args(Kind)
MINE = ("name=mine", "pipeline.cut=[1]")


def kind_of(path: Path) -> Kind:
    return RunDir.open(path).kind


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how often the text of every file is read, by its name."""
    reads: Counter[str] = Counter()
    read_text = Path.read_text

    def counted(self: Path, *args: Any, **keywords: Any) -> str:
        text = read_text(self, *args, **keywords)
        reads[self.name] += 1
        return text

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", counted)
        yield reads


# -- what a directory is ---------------------------------------------------------------------------


def test_every_command_says_what_its_directories_are(tmp_path: Path) -> None:
    reserve(*resolve("pretrain", None, MINE, str(tmp_path / "run")))
    assert kind_of(tmp_path / "run") == "pretrain"
    set_up_sweep(None, [], ["seed=0,1"], str(tmp_path / "sweep"), preset=None)
    assert kind_of(tmp_path / "sweep") == "sweep"
    assert kind_of(tmp_path / "sweep/cells/seed=0") == "pretrain"
    find_grid(None, [], ["seed=0,1"], str(tmp_path / "grid"), preset=None)
    assert kind_of(tmp_path / "grid") == "finetune grid"
    assert kind_of(tmp_path / "grid/seed=1") == "finetune"
    plan_reproduction(
        "fedbiobert", None, [], str(tmp_path / "reproduction"), data=None, seeds=None
    ).write()
    assert kind_of(tmp_path / "reproduction") == "reproduction"
    assert {kind_of(path) for path in (tmp_path / "reproduction/cells").iterdir()} == {"pretrain"}


def test_an_evaluation_and_its_cells_say_what_they_are(tmp_path: Path) -> None:
    chosen = {"models": (str(bert(tmp_path / "small")),), "data": str(easy_ner(tmp_path / "data"))}
    config, directory = read_evaluation(
        None, [f"data.cache_dir={tmp_path}/cache"], str(tmp_path / "scores"), chosen=chosen
    )
    plan = set_up_evaluation(config, directory, notify=lambda line: None)
    assert kind_of(directory) == "evaluation"
    assert kind_of(plan.cells[0].run_dir) == "evaluation cell"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_directory_is_is_read_back(tmp_path: Path, kind: Kind) -> None:
    run = RunDir.at(tmp_path / "run", kind)
    assert run.is_new and not run.path.exists()
    run.make()
    assert not run.is_new and kind_of(run.path) == kind
    assert json.loads((run.path / "run.json").read_text()) == {"kind": kind, "version": VERSION}
    assert RunDir.at(run.path, kind).make().kind == kind


COMMANDS: dict[Kind, Callable[[str], Any]] = {
    "pretrain": lambda path: resolve("pretrain", None, MINE, path),
    "finetune": lambda path: resolve("finetune", None, [], path),
    "finetune grid": lambda path: find_grid(None, [], ["seed=0,1"], path, preset=None),
    "sweep": lambda path: set_up_sweep(None, [], ["seed=0,1"], path, preset=None),
    "evaluation": lambda path: read_evaluation(None, [], path),
    "reproduction": lambda path: plan_reproduction(
        "fedbiobert", None, [], path, data=None, seeds=None
    ),
}


@pytest.mark.parametrize(
    ("kind", "other"), [(kind, other) for kind in COMMANDS for other in KINDS if other != kind]
)
def test_a_command_refuses_the_directory_of_another(
    tmp_path: Path, kind: Kind, other: Kind
) -> None:
    RunDir.at(tmp_path, other).make()
    with pytest.raises(CheckpointError, match=r"--run-dir: expected a new directory or that of a"):
        COMMANDS[kind](str(tmp_path))
    assert files(tmp_path) == {"run.json"}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_directory_without_run_json_is_refused_and_left_alone(tmp_path: Path, kind: Kind) -> None:
    (tmp_path / "config.yaml").write_text("name: of an earlier version\n")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        CheckpointError,
        match=r"with other files\. Choose another directory\. A run without run\.json is",
    ):
        COMMANDS[kind](str(tmp_path))
    assert files(tmp_path) == {"config.yaml", "metrics.jsonl"}


@pytest.mark.parametrize("command", ["export", "report", "plan"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "without a run.json. Name one that fedpipe pretrain wrote."),
        (
            '{"kind": "pretrain", "version": 2}',
            "a directory of version 1, got pretrain of version 2",
        ),
        ('{"kind": "pretrain", "version": 0}', "got pretrain of version 0 in"),
        ('{"kind": "dream", "version": 1}', "got dream of version 1 in"),
        ("{}", "run.json: expected the kind and the version of a directory, got '{}'. Restore"),
        ("", "run.json: expected the kind and the version of a directory, got ''. Restore"),
        ('{"kind": "sweep", "version": 1}', "got that of a sweep, "),
        ('{"kind": ["pretrain"], "version": 1}', "got ['pretrain'] of version 1 in"),
        ('{"kind": "pretrain", "version": 1e999}', "run.json: expected the kind and the version"),
        ("\udcff\udcfe", "run.json: expected the kind and the version of a directory"),
    ],
)
def test_what_is_no_run_of_this_version_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: str | None,
    expected: str,
) -> None:  # fmt: skip
    (tmp_path / "config.yaml").touch()
    if content is not None:
        (tmp_path / "run.json").write_text(content, errors="surrogateescape")
    assert main([command, "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["export", "report"])
@pytest.mark.parametrize(
    ("kind", "title", "home"),
    [("sweep", "a sweep", "cells/seed=0"), ("finetune grid", "a grid of fine-tunings", "lora")],
)
def test_who_asks_of_a_study_what_a_run_has_is_told_what_it_is_and_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: Any, title: str,
    home: str,
) -> None:  # fmt: skip
    RunDir.at(tmp_path, kind).make()
    run = RunDir.at(tmp_path / home, "finetune").make()
    assert main([command, "--run-dir", str(tmp_path)]) == 2
    assert (
        f"expected the directory of a pre-training or a fine-tuning, got that of {title},"
        f" {tmp_path}. Name one of its runs, for example {run.path}.\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_json_that_cannot_be_read_is_named_with_what_the_system_says(
    tmp_path: Path, kind: Kind
) -> None:
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("folder", "Is a directory"), ("loop", "Too many levels of symbolic li")):
        with pytest.raises(CheckpointError, match=rf"--run-dir: .* can be read, got .*{reason}"):
            COMMANDS[kind](str(tmp_path / name))


def test_a_start_that_was_killed_before_run_json_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in (".lock", ".writable", ".run.json.part"):
        (tmp_path / name).touch()
    assert RunDir.at(tmp_path, "sweep").make().kind == "sweep"


def test_a_configuration_that_is_a_folder_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    RunDir.at(tmp_path, "pretrain").make()
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.yaml' \(Is a directory\)"):
        resolve("pretrain", None, MINE, str(tmp_path))
    assert files(tmp_path) == {"run.json", "config.yaml"}


def test_a_run_that_has_lost_its_configuration_does_not_start_afresh(tmp_path: Path) -> None:
    RunDir.at(tmp_path, "pretrain").make()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match=r"config\.yaml: expected the configuration of the r"):
        resolve("pretrain", None, MINE, str(tmp_path))


def test_a_run_is_done_when_all_that_is_made_of_it_is_there(tmp_path: Path) -> None:
    for kind, made in (("pretrain", ("export", "report.html")), ("finetune", ("report.html",))):
        run = RunDir.at(tmp_path / kind, kind).make()  # type: ignore[arg-type]
        for name in ("checkpoints/round_000002", *made):
            assert not run.is_done(num_rounds=2)
            (run.path / name).mkdir(parents=True)
        assert run.is_done(num_rounds=2) and not run.is_done(num_rounds=3)


# -- how often a configuration is read -------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file of the user's."""
    file = tmp_path / "own.yaml"
    cache = f"data: {{cache_dir: {tmp_path}/cache}}\n"
    file.write_text(f"name: mine\npipeline: {{cut: [1]}}\n{cache}")
    return file


def test_a_new_run_reads_its_configuration_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_reads(monkeypatch) as reads:
        run, config = resolve("pretrain", str(own), ["seed=1"], str(tmp_path / "run"))
        set_up(run, config, notify=lambda line: None)
    assert (reads["own.yaml"], reads["config.yaml"]) == (1, 0)


def test_a_run_without_a_directory_reads_its_configuration_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with counted_reads(monkeypatch) as reads:
        run, config = resolve("pretrain", str(own), [], None)
        reserve(run, config)
    assert run.path == Path("runs/mine")
    assert (reads["own.yaml"], reads["config.yaml"]) == (1, 0)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_run_that_is_gone_on_with_reads_its_own_configuration_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    text = to_yaml(load_config(None, MINE) if kind == "pretrain" else load_finetune(None, []))
    RunDir.at(tmp_path, kind).make().write(text)
    (tmp_path / "metrics.jsonl").touch()
    with counted_reads(monkeypatch) as reads:
        run, config = resolve(kind, None, [], str(tmp_path))
        if kind == "pretrain":
            reserve(run, config)
    assert (reads["config.yaml"], reads["run.json"]) == (1, 1)


def test_a_sweep_reads_its_configuration_once_for_all_cells(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ([], ["seed=0,1,2"], str(tmp_path / "sweep"))
    with counted_reads(monkeypatch) as reads:
        set_up_sweep(str(own), *arguments, preset=None)
    assert reads["own.yaml"] == 1
    (tmp_path / "sweep" / "cells" / "seed=1" / "metrics.jsonl").touch()  # this one has begun
    with counted_reads(monkeypatch) as reads:
        set_up_sweep(None, [], [], str(tmp_path / "sweep"), preset=None)
    assert (reads["sweep.yaml"], reads["config.yaml"]) == (1, 3)


def test_a_grid_of_fine_tunings_reads_its_configuration_once_for_all_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("name: mine\n")
    arguments = ([], ["method.name=lora,full", "seed=0,1"], str(tmp_path / "grid"))
    with counted_reads(monkeypatch) as reads:
        find_grid(str(own), *arguments, preset=None)
    assert reads["own.yaml"] == 1
    with counted_reads(monkeypatch) as reads:
        find_grid(None, [], [], str(tmp_path / "grid"), preset=None)
    assert (reads["grid.yaml"], reads["config.yaml"]) == (1, 4)


def test_a_wrong_configuration_writes_nothing(own: Path, tmp_path: Path) -> None:
    own.write_text("name: mine\nsed: 1\n")
    for kind in ("pretrain", "finetune"):
        with pytest.raises(ConfigError, match=r"sed: unknown key"):
            resolve(kind, str(own), [], str(tmp_path / "run"))  # type: ignore[call-overload]
    with pytest.raises(FedPipeError):
        set_up_sweep(str(own), [], ["seed=0,1"], str(tmp_path / "run"), preset=None)
    assert not (tmp_path / "run").exists()
