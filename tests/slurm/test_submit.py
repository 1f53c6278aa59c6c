"""``fedpipe submit`` on a real cluster: 2 nodes, warnings, failures, and what the user reads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpipe.metrics.writer import read_metrics
from tests.helpers.cli import Command, fedpipe
from tests.helpers.slurm import Cluster, wait_until

TINY = (
    "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "model.hidden_dropout_prob=0.1", "data.sequence_length=32",
    "pipeline.cut=[2]", "pipeline.micro_batch_size=8", "pipeline.num_micro_batches=2",
    "federation.num_clients=6", "federation.num_replicas=2", "federation.clients_per_round=4",
    "federation.num_rounds=4", "federation.num_local_steps=25", "checkpoint.every_rounds=1",
    "log.tensorboard=false",
)  # fmt: skip
ONE_REPLICA = ("federation.num_replicas=1", "federation.clients_per_round=2")
ONE_PROCESS = (*ONE_REPLICA, "pipeline.colocate=true")
LONG = ("federation.num_rounds=4000",)
TIMES = ("seconds", "tokens_per_s", "sync_s")
PROFILE = "timeout_min: 30\ncpus_per_task: 1\nmem_gb: 2\ntasks_per_node: "

Submit = Callable[..., Command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds every run, the profiles, and the prepared text, which all of them share."""
    folder = tmp_path_factory.mktemp("submit")
    for tasks in (1, 2):
        (folder / f"{tasks}.yaml").write_text(f"{PROFILE}{tasks}\n")
    return folder


@pytest.fixture
def submit(cluster: Cluster, folder: Path) -> Iterator[Submit]:
    """Start ``fedpipe submit pretrain`` with the tiny model; end what still follows a job."""
    commands = []

    def start(run: str | Path, *arguments: str, profile: str = "1.yaml") -> Command:
        commands.append(
            Command(
                "submit",
                "pretrain",
                "--profile",
                str(folder / profile),
                "--run-dir",
                str(folder / run),
                f"data.cache_dir={folder / 'cache'}",
                *arguments,
                folder=folder,
                environment=cluster.environment,
            )  # fmt: skip
        )
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.kill()


def _job_id(run_dir: Path) -> str:
    return str(json.loads((run_dir / "logs" / "job.json").read_text())["job_id"])


def _rounds(run_dir: Path) -> int:
    """Rounds that the record of a run holds."""
    path = run_dir / "metrics.jsonl"
    return sum(r["kind"] == "round" for r in read_metrics(path)) if path.is_file() else 0


def _after_rounds(command: Command, run_dir: Path, number: int) -> None:
    command.wait_for(lambda: _rounds(run_dir) >= number, f"round {number}")


def _outcome(run_dir: Path) -> tuple[list[str], dict[str, bytes]]:
    """Every record without wall times, and the final weights."""
    lines = [
        str(sorted((k, v) for k, v in record.items() if k not in TIMES))
        for record in read_metrics(run_dir / "metrics.jsonl")
        if record["kind"] != "system"
    ]
    last = max((run_dir / "checkpoints").glob("round_*"))
    return sorted(lines), {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


def _rank(run_dir: Path, rank: int) -> int:
    """Find the process of a rank."""
    marks = (f"SLURM_PROCID={rank}", f"SLURM_JOB_ID={_job_id(run_dir)}")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_text(errors="replace").split("\0")
            command = (entry / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if "submitit.core._submit" in command and command[0] != "srun":
            if all(mark in variables for mark in marks):
                return int(entry.name)
    raise AssertionError(f"no process is rank {rank}")


def _local(run_dir: Path, *arguments: str) -> Path:
    """The same run without any scheduler."""
    cache = f"data.cache_dir={run_dir.parent / 'cache'}"
    result = fedpipe(
        "pretrain", "--run-dir", str(run_dir), *TINY, *arguments, cache, folder=run_dir.parent
    )
    assert (result.code, result.err) == (0, ""), result.err
    return run_dir


# -- training --------------------------------------------------------------------------------------


def test_two_nodes_of_two_ranks_train_to_the_losses_of_one_machine(
    submit: Submit, folder: Path
) -> None:
    result = submit("nodes", *TINY, "--follow", profile="2.yaml").finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    run_dir = folder / "nodes"
    job_id = _job_id(run_dir)
    assert f"job     {job_id} on slurm: 2 nodes x 2 ranks x 1 core\n" in result.out
    assert f"logs    {run_dir / 'logs' / f'{job_id}_RANK_log.out'}, .err\n" in result.out
    assert re.search(r"round 4/4 validation  loss", result.out), result.out
    assert result.out.splitlines()[-2:] == [
        f"model   {run_dir / 'export'}", f"report  {run_dir / 'report.html'}"
    ]  # fmt: skip
    assert _outcome(run_dir) == _outcome(_local(folder / "local"))


def test_preempted_timed_out_and_after_a_lost_node_a_job_ends_as_if_nothing_had_been(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "disturbed"
    (folder / "preemptible.yaml").write_text(
        f"{PROFILE}1\nslurm_partition: preemptible\nslurm_signal_delay_s: 179\n"
    )
    size = (*ONE_REPLICA, "federation.num_rounds=10")
    command = submit(run_dir, *TINY, *size, "--follow", profile="preemptible.yaml")

    def starts(number: int) -> None:
        command.wait_for(lambda: f"requeued (start {number})" in command.output(), "a requeue")

    def trains() -> None:
        def has_trained() -> bool:
            since_start = command.output().rpartition(" was requeued ")[2]
            return " trained " in since_start.partition(" runs on ")[2]

        command.wait_for(has_trained, "a round")

    trains()
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "--mem=0", "true")
    starts(2)
    assert list(run_dir.glob("checkpoints/round_*")), "pre-emption gave no time to save"

    trains()
    _let_time_run_out(cluster, run_dir)
    starts(3)
    cluster.run("scontrol", "update", f"jobid={_job_id(run_dir)}", "timelimit=30")

    trains()
    node = cluster.nodes[1]
    cluster.set_down(node)
    starts(4)
    cluster.resume(node)
    result = command.finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert _outcome(run_dir) == _outcome(_local(folder / "alone", *size))


def _let_time_run_out(cluster: Cluster, run_dir: Path) -> None:
    """Shorten a job's limit, and hold its ranks until SLURM's warning is there: it looks rarely."""
    ranks = [_rank(run_dir, rank) for rank in range(2)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        cluster.run("scontrol", "update", f"jobid={_job_id(run_dir)}", "timelimit=3")
        wait_until(
            lambda: all(_has_pending(pid, signal.SIGUSR2) for pid in ranks),
            what=lambda: "no warning of the time limit",
        )
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):  # woken by SLURM, saved, ended
                os.kill(pid, signal.SIGCONT)


def _has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has been sent a signal, or has been woken by it and has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


# -- failures --------------------------------------------------------------------------------------


def test_a_cancelled_job_is_saved_and_a_killed_rank_is_named_with_its_log(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "failing"
    command = submit(run_dir, *TINY, *ONE_REPLICA, *LONG, "--follow")
    _after_rounds(command, run_dir, 1)
    again = submit(run_dir).finish()
    assert again.code == 2
    assert again.error == (
        f"CheckpointError: --run-dir: expected a run without a job in the queue, got {run_dir} of "
        f"job {_job_id(run_dir)}. Add --follow to see it, or end it with: scancel "
        f"{_job_id(run_dir)}"
    )
    cluster.run("scancel", _job_id(run_dir))
    result = command.finish()
    log = run_dir / "logs" / f"{_job_id(run_dir)}_0_log.err"
    assert (result.code, result.err) == (75, ""), result.out + result.err
    assert result.out.splitlines()[-1] == (
        f"job {_job_id(run_dir)} was cancelled; what it saved is in {run_dir}. Full log: {log}. "
        "The same command goes on with it"
    )
    saved = [path.name for path in run_dir.glob("checkpoints/round_*")]
    assert any("_step_" in name or int(name[-6:]) > 1 for name in saved), saved

    command = submit(run_dir, "--follow")
    before = _rounds(run_dir)
    _after_rounds(command, run_dir, before + 1)
    os.kill(_rank(run_dir, 1), signal.SIGKILL)
    result = command.finish()
    assert result.code == 1, result.out + result.err
    log = run_dir / "logs" / f"{_job_id(run_dir)}_1_log.err"
    assert result.error == (
        f"LaunchError: job {_job_id(run_dir)} failed on rank 1 (stage 1, replica 0): Killed on "
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
        _after_rounds(command, run_dir, 1)
        with open(tmp_path / "filler", "wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        result = command.finish()
        assert result.code in (1, 2), result.out + result.err
        assert "No space left on device" in result.error or "is full (" in result.error
        assert f"Full log: {run_dir / 'logs'}/{_job_id(run_dir)}_0_log.err" in result.error
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
        result = submit(apart / "run", *TINY, *ONE_REPLICA, "--follow").finish()
        assert result.code == 2, result.out + result.err
        assert result.error.startswith(
            f"TopologyError: --run-dir: expected a folder that all nodes share, got {apart / 'run'}"
        )
        result = submit(
            "apart", *TINY, *ONE_REPLICA, f"data.cache_dir={apart / 'cache'}", "--follow"
        ).finish()
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
    job_id = _job_id(run_dir)
    start = json.dumps({"job": job_id, "round": 0, "step": 0})
    (run_dir / "logs" / "attempts.jsonl").write_text(f"{start}\n" * 3)
    cluster.run("scontrol", "release", job_id)
    result = submit(run_dir, "--follow", profile="held.yaml").finish()
    assert result.code == 1, result.out + result.err
    assert f"job     {job_id} is in the queue already\n" in result.out
    assert result.error.startswith(
        f"LaunchError: job {job_id}: expected progress, got 3 starts in a row that were stopped "
        "before anything new was saved (all from the start). "
    ), result.error
    assert cluster.state(job_id) == "FAILED"


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


# -- sweeps ----------------------------------------------------------------------------------------


def test_a_sweep_is_a_job_array_that_ends_after_a_killed_cell_was_submitted_again(
    cluster: Cluster, folder: Path
) -> None:
    directory = folder / "sweep"
    arguments = ("submit", "sweep", "--profile", str(folder / "1.yaml"), "--run-dir")
    grid = ("--grid", "optimizer.lr=1e-3,2e-3", "seed=0,1,2")
    command = Command(
        *arguments, str(directory), "--follow", *TINY, *ONE_PROCESS, "federation.num_rounds=6",
        f"data.cache_dir={folder / 'cache'}", *grid, folder=folder,
        environment=cluster.environment,
    )  # fmt: skip
    victim = directory / "cells" / "lr=2e-3_seed=0"
    command.wait_for(lambda: _rounds(victim) >= 1, "a round of the fourth cell")
    jobs = json.loads((directory / "logs" / "jobs.json").read_text())
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1 and len(jobs) == 6
    os.kill(_cell(victim), signal.SIGKILL)
    result = command.finish()
    assert result.code == 1, result.out + result.err
    assert result.error == (
        "LaunchError: sweep: expected 6 finished cells, got 5: failed are lr=2e-3_seed=0. The same "
        "command submits them again"
    )
    log = directory / "logs" / f"{jobs['lr=2e-3_seed=0']}_0_log.err"
    assert re.search(
        rf"cell lr=2e-3_seed=0: job {jobs['lr=2e-3_seed=0']} failed on rank 0 "
        rf"\(stage 0, 1, replica 0\): Killed on node\d\. Full log: {re.escape(str(log))}\.",
        result.out,
    ), result.out

    result = fedpipe(
        *arguments, str(directory), "--follow", folder=folder, environment=cluster.environment
    )
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "on slurm: 1 cell, each 1 node x 1 rank x 1 core\n" in result.out
    again = json.loads((directory / "logs" / "jobs.json").read_text())
    assert {name for name in jobs if jobs[name] != again[name]} == {"lr=2e-3_seed=0"}
    rows = json.loads((directory / "sweep.json").read_text())["rows"]
    assert [row["done"] for row in rows] == [3, 3] and (directory / "sweep.png").is_file(), rows
    assert (
        "job "
        not in fedpipe(
            *arguments, str(directory), folder=folder, environment=cluster.environment
        ).out
    )


def _cell(run_dir: Path) -> int:
    """Find the process of a cell with one rank: it holds the run's lock."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:  # it has just ended
            continue
        if str(run_dir / ".lock") in files:
            return int(entry.name)
    raise AssertionError(f"no process works on {run_dir}")
