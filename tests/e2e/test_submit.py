"""``fedpipe submit`` without a scheduler: the same job on this machine, or in this process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from fedpipe.config.load import load_config
from tests.helpers.cli import REPOSITORY, Command, fedpipe
from tests.helpers.runs import TINY, num_rounds


def test_a_local_job_that_is_warned_saves_requeues_itself_and_is_followed_to_its_end(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    command = Command(
        "submit", "pretrain", "--cluster", "local", "--run-dir", str(run_dir), "--follow", *TINY,
        "federation.num_rounds=10", f"data.cache_dir={tmp_path / 'cache'}", folder=tmp_path,
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


def test_a_sweep_on_this_machine_is_pointed_to_its_own_command_and_a_grid_to_the_sweep(
    tmp_path: Path,
) -> None:
    result = fedpipe("submit", "sweep", "--cluster", "local", "--grid", "seed=0,1", folder=tmp_path)
    assert result.code == 2
    assert result.error == (
        "ConfigError: --cluster: expected slurm for a sweep, got local. On this machine use: "
        "fedpipe sweep --parallel N"
    )
    result = fedpipe(
        "submit", "pretrain", "--cluster", "local", "--grid", "seed=0,1", folder=tmp_path
    )
    assert result.code == 2
    assert result.error == (
        "ConfigError: --grid: expected submit sweep, got submit pretrain. Change the task."
    )


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
