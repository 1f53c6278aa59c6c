"""``fedpipe submit`` without a scheduler: the same job on this machine, or in this process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe.cli import main
from fedpipe.config.load import load_config
from tests.helpers.cases import every
from tests.helpers.cli import REPOSITORY, Command, fedpipe
from tests.helpers.encoders import bert, easy_ner
from tests.helpers.runs import TINY, num_rounds
from tests.helpers.tuned import describe_task, small_folder, small_task


def test_a_local_job_that_is_warned_saves_requeues_itself_and_is_followed_to_its_end(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    command = Command(
        "submit", "pretrain", "--cluster", "local", "--run-dir", str(run_dir), "--follow", *TINY,
        "federation.num_rounds=4", f"data.cache_dir={tmp_path / 'cache'}", folder=tmp_path,
    )  # fmt: skip
    command.wait_for(lambda: num_rounds(run_dir) >= 1, "a round")
    for pid in command.descendants():
        if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGUSR2)
    attempts = run_dir / "logs" / "attempts.jsonl"
    command.wait_for(lambda: len(attempts.read_text().splitlines()) == 2, "a second attempt")
    first, second = map(json.loads, attempts.read_text().splitlines())
    assert (first["round"], first["step"]) == (0, 0) and second["job"] == first["job"]
    assert second["round"] >= 1
    result = command.finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert f"job     {first['job']} on local: 1 node x 2 ranks x 1 core\n" in result.out
    assert result.out.splitlines()[-1] == f"report  {run_dir / 'report.html'}"
    command.assert_nothing_left()


def test_a_debug_job_runs_in_this_process_and_several_processes_are_refused(
    tmp_path: Path,
) -> None:
    common = ("submit", "pretrain", "--cluster", "debug", "--run-dir", str(tmp_path / "run"))
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    refused = fedpipe(*common, *TINY, cache, folder=tmp_path)
    assert refused.code == 2
    assert refused.error.startswith(
        "TopologyError: --cluster: expected local or slurm for a grid of 2 processes, got debug, "
        "which has one. Set pipeline.colocate=true"
    )
    assert not (tmp_path / "run").exists()
    colocated = (*TINY, cache, "pipeline.colocate=true")
    done = fedpipe(*common, *colocated, "pipeline.cut=auto", folder=tmp_path)
    assert done.code == 0, done.err
    # Measured where the job runs, written down, and kept by whoever comes again.
    assert re.search(r"measured layer [\d.,]+ ms per micro-batch", done.out)
    assert len(load_config(str(tmp_path / "run" / "config.yaml"), []).pipeline.cut) == 1
    again = fedpipe(*common, *colocated, "pipeline.cut=auto", folder=tmp_path)
    assert (again.code, again.out) == (
        0,
        f"{tmp_path / 'run'} is done: see {tmp_path / 'run'}/report.html\n",
    )
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_the_launch_script_with_cluster_submits_and_says_what_is_wrong_before_it_does(
    tmp_path: Path,
) -> None:
    def submit(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), *arguments],
            capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert result.returncode == 2 and result.stdout == "", result
        return result.stderr

    assert submit("--cluster", "slurm") == (
        "ConfigError: --profile: expected a file that says what a node of the site is, got none. "
        "Start from slurm/profiles/cpu.yaml or gpu.yaml, or set --cluster local.\n"
    )
    assert re.match(r"ConfigError: command line: argument --cluster", submit("--cluster", "k8s"))
    assert not list(tmp_path.iterdir())


@every(
    ("arguments", "error"),
    [
        (
            ("pretrain", "--run-dir", "50%j"),
            "--run-dir: expected a path without % and \\ and",
        ),
        (
            ("pretrain", "--run-dir", "a\nb"),
            "--run-dir: expected a path without % and \\ and",
        ),
        (("sweep", "--run-dir", "a\\b", "--grid", "seed=0"), "--run-dir: expected a path without"),
        *(
            (
                (task, option, "x"),
                f"command line: unknown argument '{option}'. See fedpipe submit {task} --help.",
            )
            for task, option in (
                ("pretrain", "--grid"),
                ("throughput", "--grid"),
                ("pretrain", "--steps"),
                ("sweep", "--seeds"),
                ("sweep", "--task-file"),
                ("evaluate", "--scale"),
                ("evaluate", "--preset"),
                ("reproduce", "--model"),
                ("reproduce", "--preset"),
            )
        ),
        (("evaluate", "--tasks", "rtee"), "evaluation.tasks: expected one of bc2gm"),
        (("evaluate", "--model", "nowhere"), "--model: "),
        (("evaluate", "--task-file", "none"), "--task-file: expected a readable YAML file, got"),
        (("finetune", "--task-file", "a", "--task-file", "b"), "--task-file: expected one file"),
        (("finetune", "method.name=lorra"), "method.name: expected one of full"),
        (
            ("finetune", "--grid", "method.name=lora,lorra"),
            "cell lorra: method.name: expected one of full",
        ),
    ],
)
def test_what_cannot_be_submitted_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *arguments, "--cluster", "local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"\w+Error: " + re.escape(error), line), line
    assert not list(tmp_path.iterdir())


def test_cells_without_a_scheduler_are_jobs_of_this_machine_and_end_in_one_table(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "scores"
    arguments = (
        "submit", "evaluate", "--cluster", "local", "--run-dir", str(run_dir), "--parallel", "2",
        "--model", str(bert(tmp_path / "small", hidden=16)), "--seeds", "0,1",
        "--task-file", str(easy_ner(tmp_path / "diseases", name="diseases")),
        "evaluation.num_epochs=1", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    text = "kind: ner\nlabels: [Disease]\n"
    (tmp_path / "diseases/task.yaml").write_text(text, encoding="utf-8")
    cells = [f"small_diseases_seed={seed}" for seed in (0, 1)]
    done = fedpipe(*arguments, folder=tmp_path)
    assert (done.code, done.err) == (0, ""), done.out + done.err
    for name in cells:
        assert re.search(rf"cell {name}: done, F1 [\d.]+", done.out), done.out
    assert done.out.splitlines()[-1] == f"report  {run_dir / 'evaluation.html'}"
    content = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    assert [cell["done"] for cell in content["cells"]] == [True, True]

    # a cell that fails is named, and the other one kept
    result = run_dir / "cells" / cells[1] / "result.json"
    before = result.stat().st_mtime_ns
    cell = run_dir / "cells" / cells[0]
    (cell / "result.json").unlink()
    (cell / "predictions.jsonl.gz").unlink()
    (cell / "predictions.jsonl.gz").mkdir()
    failed = fedpipe(*arguments, folder=tmp_path)
    assert failed.code == 1, failed.out + failed.err
    assert failed.error == (
        f"LaunchError: evaluate: expected 2 finished cells, got 1: not done are {cells[0]}. The "
        "same command submits them again"
    )
    assert re.search(rf"cell {cells[0]}: job \d+ failed on rank 0 .*: .*Full log: ", failed.out)
    assert result.stat().st_mtime_ns == before


def test_a_fine_tuning_and_a_grid_of_them_run_in_this_process_as_jobs(tmp_path: Path) -> None:
    tiny = (
        f"model.path={small_folder(tmp_path / 'model')}", "task.name=imdb", "task.max_length=12",
        f"task.data={small_task(tmp_path / 'task')}", "federation.num_rounds=1",
        "federation.num_replicas=2",
    )  # fmt: skip
    common = ("submit", "finetune", "--cluster", "debug", "--run-dir")
    one = fedpipe(*common, str(tmp_path / "one"), *tiny, "method.name=full", folder=tmp_path)
    assert one.code == 0, one.out + one.err
    assert "on debug: 1 node x 1 rank x 2 cores\n" in one.out
    assert (tmp_path / "one" / "export" / "config.json").is_file()
    again = fedpipe(*common, str(tmp_path / "one"), folder=tmp_path)
    assert (again.code, again.out) == (
        0,
        f"{tmp_path / 'one'} is done: see {tmp_path / 'one'}/report.html\n",
    )
    describe_task(tmp_path / "task")
    own = ("--task-file", str(tmp_path / "task"), "--grid", "method.name=lora")
    known = [override for override in tiny if not override.startswith("task.name")]
    several = fedpipe(*common, str(tmp_path / "grid"), *known, *own, folder=tmp_path)
    assert several.code == 0, several.out + several.err
    assert re.search(r"cell lora: done, [\d.]+ accuracy", several.out), several.out
    table = several.out.splitlines()[-3:]
    assert [row.split()[0] for row in table] == ["run", "lora", "report"], several.out
    assert (tmp_path / "grid" / "lora" / "adapter").is_dir()


def test_a_measurement_is_a_job_as_well(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = fedpipe(
        "submit", "throughput", "--cluster", "local", "--run-dir", str(run_dir), "--follow",
        "--repetitions", "1", "--steps", "3", *TINY, f"data.cache_dir={tmp_path / 'cache'}",
        folder=tmp_path,
    )  # fmt: skip
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "on local: 1 node x 2 ranks x 1 core\n" in result.out
    report = json.loads((run_dir / "throughput" / "report.json").read_text())
    assert "streaming" in report["schedules"]
    assert result.out.splitlines()[-1] == f"report  {run_dir / 'throughput' / 'report.html'}"
