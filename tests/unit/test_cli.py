"""The command line: help as recorded, exit codes, one line per error, no heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpipe import __version__, errors
from fedpipe.cli import main
from fedpipe.commands.plan.text_facts import render_uncounted
from fedpipe.run.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]
COMMANDS = (
    "plan",
    "pretrain",
    "finetune",
    "export",
    "report",
    "throughput",
    "sweep",
    "evaluate",
    "reproduce",
)
HEAVY = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "matplotlib",
    "tensorboard",
)


def fedpipe(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "fedpipe", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_help_is_the_recorded_one(
    golden: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    tasks = ([], ["pretrain"], ["evaluate"])
    helps = ([], *([command] for command in COMMANDS), *(["submit", *task] for task in tasks))
    for arguments in helps:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0
    golden("cli_help.txt", capsys.readouterr().out)


def test_python_m_fedpipe_plans_the_quick_start(tmp_path: Path) -> None:
    done = fedpipe("plan", f"data.cache_dir={tmp_path}")
    assert done.returncode == 0
    golden = (REPOSITORY / "tests/golden/plan_quickstart.txt").read_text("utf-8")
    assert done.stdout == golden + render_uncounted() + "\n"
    assert done.stderr == ""


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fedpipe {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["--help"],
        ["plan", "seed=x"],
        ["pretrain", "federation.num_round=3"],
        ["sweep", "--grid", "seed=x"],
        ["submit", "--help"],
        ["submit", "finetune", "--help"],
        ["submit", "pretrain", "seed=x"],
    ],
)
def test_plan_help_and_configuration_errors_import_nothing_heavy(arguments: list[str]) -> None:
    # The forkserver of `pretrain` imports beside us, never in this process.
    script = (
        "import sys, json\nfrom fedpipe.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write('LOADED ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stderr.rpartition("LOADED")[2].split() == []


BAD_LINES = [
    ([], "command line: the following arguments are required: COMMAND. See fedpipe --help."),
    (["pln"], "invalid choice: 'pln' (choose from 'plan'"),
    (["plan", "--confg", "x"], "unknown argument '--confg'. See fedpipe plan --help."),
    (["--confg", "plan"], "unknown argument '--confg'. See fedpipe --help."),
    (["submit"], "arguments are required: TASK. See fedpipe submit --help."),
    (["submit", "plan"], "argument TASK: invalid choice: 'plan' (choose from 'pretrain'"),
    (["plan", "--conf", "x"], "command line: unknown argument '--conf'."),
    (["plan", "--config"], "argument --config: expected one argument. See fedpipe plan --help."),
    (["plan", "seed=1", "--config", "x", "word"], "command line: unknown argument 'word'."),
    (["plan", "word"], "word: expected section.key=value"),
    (["plan", "seed=x"], "ConfigError: seed: expected a whole number"),
    (["plan", "--config", "nowhere.yaml"], "ConfigError: --config: expected a readable YAML file"),
    (["plan", "data.tokenizer=nowhere"], "CorpusError: data.tokenizer: expected a folder"),
    (["plan", "--run-dir", "nowhere"], "CheckpointError: --run-dir: expected the directory of a"),
    (["export", "--run-dir", "nowhere"], "got 'nowhere' without a run.json."),
    (["report", "name=nothing"], "got 'runs/nothing' without a run.json."),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_LINES)
def test_a_users_error_is_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_overrides_may_stand_on_either_side_of_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: mine\n", encoding="utf-8")
    arguments = ["plan", "seed=1", "--config", str(file), "federation.num_replicas=3"]
    assert main(arguments) == 0
    assert "mine  6 processes = 3 replicas" in capsys.readouterr().out


def test_plan_of_a_run_is_its_own_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    RunDir.at(tmp_path, "pretrain").make().write("name: earlier\n")
    assert main(["plan", "--run-dir", str(tmp_path)]) == 0
    assert "earlier" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.LaunchError("rank 3 failed"), 1),
        (errors.TopologyError("two\nlines"), 2),
        (KeyboardInterrupt(), 75),
    ],
)
def test_every_kind_of_end_has_its_exit_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedpipe.commands.plan.command.build_plan", fail)
    assert main(["plan"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedpipe.commands.plan.command.build_plan", fail)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m fedpipe plan | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_an_option_that_is_a_path_may_begin_at_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert main(["report", "--run-dir=~/x"]) == 2
    assert "got '/home/me/x' without a run.json." in capsys.readouterr().err
    assert main(["evaluate", "--model=~nobody-here/x"]) == 2
    assert "--model: expected the home directory of a known user" in capsys.readouterr().err


def test_ranks_of_a_launcher_belong_to_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("throughput", "finetune"):
        assert main([command, "--grid", "seed=0,1"], launched=True) == 2
    error = "ConfigError: --grid: expected none where a launcher has started the ranks of one run, "
    assert [line[: len(error)] for line in capsys.readouterr().err.splitlines()] == [error] * 2


def test_a_path_that_cannot_be_written_down_is_refused_before_it_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads a name in Latin-1
    for launched in (False, True):
        assert main(["pretrain", f"--run-dir={name}"], launched=launched) == 2
    error = "ConfigError: --run-dir: expected a path that is UTF-8, got 'caf\\udce9'. Rename it, "
    assert [line[: len(error)] for line in capsys.readouterr().err.splitlines()] == [error] * 2
