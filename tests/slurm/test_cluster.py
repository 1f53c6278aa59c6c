"""The local cluster does what a site's does, and goes without a trace."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm import Cluster, wait_until


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        yield Path(name).resolve()


def _submit(cluster: Cluster, script: str, folder: Path, *options: str) -> str:
    output = f"--output={folder}/%j.out"
    return cluster.run("sbatch", "--parsable", output, *options, f"--wrap={script}").stdout.strip()


def _read(output: Path) -> str:
    return output.read_text() if output.exists() else ""


def test_every_node_answers_under_its_own_name(cluster: Cluster) -> None:
    name = "hostname" if cluster.has_own_names else "echo $SLURMD_NODENAME"
    answers = cluster.run("srun", "--nodes=2", "sh", "-c", name).stdout.split()
    assert sorted(answers) == cluster.nodes
    assert len(set(answers)) == 2


def test_nodes_share_files_but_not_their_memory(cluster: Cluster, folder: Path) -> None:
    if not cluster.has_own_names:
        pytest.skip("nodes have no /dev/shm of their own without root and namespaces")
    script = f"hostname >>/dev/shm/who; cat /dev/shm/who; touch {folder}/$(hostname)"
    answers = cluster.run("srun", "--nodes=2", "sh", "-c", script).stdout.split()
    assert sorted(answers) == cluster.nodes
    assert sorted(path.name for path in folder.iterdir()) == cluster.nodes
    assert not Path("/dev/shm/who").exists()


def test_processes_of_two_nodes_reach_each_other_by_name(cluster: Cluster) -> None:
    listen = "import socket; s = socket.create_server(('', 29511)); s.accept()[0].sendall(b'hello')"
    call = f"""if True:
        import socket, time
        while True:
            try:
                print(socket.create_connection(("{cluster.nodes[0]}", 29511), 5).recv(5).decode())
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    """
    script = f"if [ $SLURM_NODEID = 0 ]; then python3 -c \"{listen}\"; else python3 -c '{call}'; fi"
    assert cluster.run("srun", "--nodes=2", "sh", "-c", script).stdout.strip() == "hello"


def test_accounting_knows_how_a_job_has_ended(cluster: Cluster, folder: Path) -> None:
    job = _submit(cluster, "exit 3", folder)
    assert cluster.wait_for_state(job, ("FAILED", "COMPLETED")) == "FAILED"
    query = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}")

    def answer() -> str:
        return cluster.run(*query, "--format=State,ExitCode").stdout.strip()

    wait_until(lambda: answer() == "FAILED|3:0", what=answer)  # it lags behind the scheduler


def test_gpus_are_counted_and_more_than_a_node_has_are_refused(cluster: Cluster) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES"
    step = ("srun", "--ntasks=2", "--nodes=1", "--gpus-per-task=1", "sh", "-c", script)
    assert sorted(cluster.run(*step).stdout.split()) == ["0", "1"]
    refused = cluster.run("srun", "--gpus-per-node=3", "true", check=False)
    assert refused.returncode != 0
    assert "Requested node configuration is not available" in refused.stderr


def test_an_urgent_job_signals_a_preemptible_one_which_then_runs_again(
    cluster: Cluster, folder: Path
) -> None:
    script = (
        "trap 'echo signalled; scontrol requeue $SLURM_JOB_ID' USR2; "
        "echo run ${SLURM_RESTART_COUNT:-0}; sleep 300 & wait; wait"
    )
    job = _submit(
        cluster, script, folder,
        "--partition=preemptible", "--nodes=2", "--exclusive", "--signal=B:USR2@30",
        "--open-mode=append",
    )  # fmt: skip
    output = folder / f"{job}.out"
    cluster.wait_for_state(job, "RUNNING")
    wait_until(lambda: "run 0" in _read(output), what=lambda: _read(output))
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    assert cluster.state(job) == "PENDING"
    cluster.wait_for_state(job, "RUNNING")
    wait_until(lambda: "run 1" in _read(output), what=lambda: _read(output))
    lines = [line for line in output.read_text().splitlines() if "slurmstepd" not in line]
    assert lines[:2] == ["run 0", "signalled"]


def test_a_failed_node_requeues_its_job(cluster: Cluster, folder: Path) -> None:
    job = _submit(cluster, "sleep 300", folder, f"--nodelist={cluster.nodes[1]}")
    cluster.wait_for_state(job, "RUNNING")
    cluster.set_down(cluster.nodes[1])
    cluster.wait_for_state(job, "PENDING")
    cluster.resume(cluster.nodes[1])
    cluster.wait_for_state(job, "RUNNING")


def test_up_leaves_a_running_cluster_alone(cluster: Cluster) -> None:
    before = cluster.daemons()
    cluster.up()
    assert cluster.daemons() == before
    assert len(before) == 4 + 2


def test_down_leaves_nothing_of_a_cluster_with_dead_daemons_and_a_running_job(
    folder: Path,
) -> None:
    cluster = Cluster(folder / "other", "--nodes=1", "--gpus=0")
    cluster.up()
    job = _submit(cluster, "trap '' TERM; srun env --ignore-environment sleep 300", folder)
    cluster.wait_for_state(job, "RUNNING")
    for name in ("slurmctld", cluster.nodes[0]):
        os.kill(cluster.daemons()[name], signal.SIGKILL)
    assert cluster.leftovers() != []
    assert cluster.call("status").returncode == 1
    cluster.down()
    assert cluster.leftovers() == []
    cluster.down()


def test_a_daemon_that_does_not_start_is_named_with_the_end_of_its_log(folder: Path) -> None:
    broken = Cluster(folder / "a space")  # the files of SLURM have no quotes
    done = broken.call("up")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "slurmdbd: expected it to start, it ended with 1. Its log ends: " in done.stderr
    assert broken.leftovers() == []


@pytest.mark.parametrize("command", ["up", "down"])
def test_files_of_others_are_never_removed(folder: Path, command: str) -> None:
    (folder / "thesis.txt").touch()
    done = Cluster(folder).call(command)
    assert done.returncode == 1
    assert "expected a cluster's directory, got other files. " in done.stderr
    assert (folder / "thesis.txt").exists()
