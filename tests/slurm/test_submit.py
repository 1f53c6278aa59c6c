"""``fedpipe submit`` on a real cluster: failures, and what the user reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.runs import (
    LONG,
    ONE_PROCESS,
    TINY,
    after_rounds,
    job_id,
    num_rounds,
    rank_process,
)
from tests.helpers.slurm import Cluster
from tests.slurm.conftest import PROFILE, Submit

# -- failures --------------------------------------------------------------------------------------


def test_a_cancelled_job_is_saved_and_a_killed_rank_is_named_with_its_log(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / 'it\'s "f\u00e4iling" $HOME'
    command = submit(run_dir, *TINY, *LONG, "--follow")
    after_rounds(command, run_dir, 1)
    again = submit(run_dir).finish()
    assert again.code == 2
    assert again.error == (
        f"CheckpointError: --run-dir: expected a run without a job in the queue, got {run_dir} of "
        f"job {job_id(run_dir)}. Add --follow to see it, or end it with: scancel "
        f"{job_id(run_dir)}"
    )
    cluster.run("scancel", job_id(run_dir))
    result = command.finish()
    log = run_dir / "logs" / f"{job_id(run_dir)}_0_log.err"
    assert (result.code, result.err) == (75, ""), result.out + result.err
    assert result.out.splitlines()[-1] == (
        f"job {job_id(run_dir)} was cancelled; what it saved is in {run_dir}. Full log: {log}. "
        "The same command goes on with it"
    )
    saved = [path.name for path in run_dir.glob("checkpoints/round_*")]
    assert any("_step_" in name or int(name[-6:]) > 1 for name in saved), saved

    command = submit(run_dir, "--follow")
    before = num_rounds(run_dir)
    after_rounds(command, run_dir, before + 1)
    os.kill(rank_process(run_dir, 1), signal.SIGKILL)
    result = command.finish()
    assert result.code == 1, result.out + result.err
    log = run_dir / "logs" / f"{job_id(run_dir)}_1_log.err"
    assert result.error == (
        f"LaunchError: job {job_id(run_dir)} failed on rank 1 (stage 1, replica 0): Killed on "
        f"{cluster.nodes[1]}. Full log: {log}. The same command resumes {run_dir}"
    )
    assert log.is_file()


def test_a_full_disk_is_the_reason_that_is_given(
    submit: Submit, cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path], check=True)
    try:
        run_dir = tmp_path / "run"
        command = submit(run_dir, *TINY, *ONE_PROCESS, *LONG, "--follow")
        after_rounds(command, run_dir, 1)
        with open(tmp_path / "filler", "wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        result = command.finish()
        assert result.code in (1, 2), result.out + result.err
        assert "No space left on device" in result.error or "is full (" in result.error
        assert f"Full log: {run_dir / 'logs'}/{job_id(run_dir)}_0_log.err" in result.error
        cluster.clear()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_folders_that_the_nodes_do_not_share_are_named(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    if not cluster.has_own_names:
        pytest.skip("without root the nodes share /dev/shm")
    apart = Path("/dev/shm") / folder.name
    try:
        result = submit(apart / "run", *TINY, "--follow").finish()
        assert result.code == 2, result.out + result.err
        assert result.error.startswith(
            f"TopologyError: --run-dir: expected a folder that all nodes share, got {apart / 'run'}"
        )
        result = submit("apart", *TINY, f"data.cache_dir={apart / 'cache'}", "--follow").finish()
        assert result.code == 2, result.out + result.err
        assert re.match(
            r"TopologyError: job \d+: data.cache_dir: expected a folder that all nodes share, got "
            rf"{apart}/cache.*, which is another one on {cluster.nodes[1]}\. Choose a folder of "
            r"the network file system\. Full log: ",
            result.error,
        ), result.error
    finally:
        subprocess.run(["rm", "-rf", apart], check=True)


def test_a_job_that_gets_nowhere_three_times_says_so_instead_of_requeueing(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "idle"
    (folder / "held.yaml").write_text(f"{PROFILE}1\nslurm_additional_parameters: {{hold: true}}\n")
    result = submit(run_dir, *TINY, *ONE_PROCESS, profile="held.yaml").finish()
    assert (result.code, result.err) == (0, ""), result.err
    job = job_id(run_dir)
    start = json.dumps({"job": job, "round": 0, "step": 0})
    (run_dir / "logs" / "attempts.jsonl").write_text(f"{start}\n" * 3)
    cluster.run("scontrol", "release", job)
    result = submit(run_dir, "--follow", profile="held.yaml").finish()
    assert result.code == 1, result.out + result.err
    assert f"job     {job} is in the queue already\n" in result.out
    assert result.error.startswith(
        f"LaunchError: job {job}: expected progress, got 3 starts in a row that were stopped "
        "before anything new was saved (all from the start). "
    ), result.error
    assert cluster.state(job) == "FAILED"


def test_a_job_whose_submission_was_killed_is_found_again(
    submit: Submit, cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = folder / "killed"
    for node in cluster.nodes:
        cluster.drain(node)
    (folder / "bin").mkdir()
    kills = folder / "bin/sbatch"
    kills.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" > /dev/null\nkill -9 $PPID\n')
    kills.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder / "bin"), prepend=":")
        result = submit(run_dir, *TINY, *ONE_PROCESS).finish()
    assert result.code == -signal.SIGKILL
    assert not (run_dir / "logs/job.json").exists()
    (job,) = cluster.run("squeue", "--noheader", "--format=%i").stdout.split()
    again = submit(run_dir, "--follow")
    again.wait_for(lambda: (run_dir / "logs/job.json").is_file(), "the job")
    assert job_id(run_dir) == job
    for node in cluster.nodes:
        cluster.resume(node)
    result = again.finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert f"job     {job} is in the queue already\n" in result.out


# -- what is known before a job is submitted -------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "arguments", "error"),
    [
        ("slurm_partition: gpu", (), "slurm_partition: expected one of main, preemptible, urgent"),
        ("gpus_per_node: 8", (), "gpus_per_node: expected at most the 2 that a node of partition"),
        ("cpus_per_task: 64", (), "cpus_per_task: expected tasks_per_node x cpus_per_task of at "),
        ("timeout_min: 600000", (), "timeout_min: expected at most the 60 minutes of partition"),
        ("nodes: 2", (), "nodes: expected a profile without it (it follows from the run)"),
        ("slurm_partitoin: x", (), "slurm_partitoin: unknown to submitit, in "),
        ("mem_gb: lots", (), "mem_gb: expected a number, got 'lots' in "),
        ("mem_gb: 100000", (), "--profile: expected a job that SLURM takes, got: sbatch: error: "),
        (
            "tasks_per_node: 2",
            ("federation.num_replicas=3", "pipeline.colocate=true"),
            "tasks_per_node: expected a divisor of the 3 processes of 3 replicas, got 2 in ",
        ),
        (
            "tasks_per_node: 1",
            ("federation.num_replicas=4",),
            "tasks_per_node: expected a job of at most the 2 fitting nodes of partition main",
        ),
    ],
)
def test_what_the_site_cannot_give_is_one_line_and_no_job(
    submit: Submit,
    cluster: Cluster,
    folder: Path,
    profile: str,
    arguments: tuple[str, ...],
    error: str,
) -> None:
    base = {"timeout_min": "30", "tasks_per_node": "2"}
    key, _, value = profile.partition(": ")
    text = "".join(f"{k}: {v}\n" for k, v in (base | {key: value}).items())
    (folder / "wrong.yaml").write_text(text)
    result = submit("wrong", *TINY, *arguments, profile="wrong.yaml").finish()
    assert result.code == 2, result.out + result.err
    assert re.match(r"(Config|Topology)Error: " + re.escape(error), result.error), result.error
    assert cluster.run("squeue", "--noheader").stdout == ""
