"""One cluster for the session, emptied after every test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import Command
from tests.helpers.slurm import Cluster

PROFILE = "timeout_min: 30\ncpus_per_task: 1\nmem_gb: 2\ntasks_per_node: "

# As if typed by hand in another job's allocation, in a rank of torchrun: none of it is the job's.
CALLER = {
    "SLURM_JOB_ID": "1", "SLURM_JOBID": "1", "SLURM_NTASKS": "7", "SLURM_NPROCS": "7",
    "SLURM_NNODES": "5", "SLURM_MEM_PER_CPU": "9999999", "SLURM_CPUS_PER_TASK": "9",
    "SLURM_CPU_BIND": "nonsense", "SLURM_EXPORT_ENV": "NONE", "SLURM_RESTART_COUNT": "3",
    "SLURM_DISTRIBUTION": "cyclic", "SBATCH_PARTITION": "none", "SBATCH_TIMELIMIT": "0:01",
    "SRUN_CPUS_PER_TASK": "9", "SQUEUE_STATES": "FAILED", "SINFO_PARTITION": "none",
    "CUDA_VISIBLE_DEVICES": "3", "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1",
    "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "4",
}  # fmt: skip

Submit = Callable[..., Command]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """2 nodes x 4 CPUs x 2 pretended GPUs; nothing of it may outlive the session."""
    # Not pytest's own folder: its name is too long for unix sockets.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder).resolve() / "cluster")
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
        assert cluster.leftovers() == []


@pytest.fixture(autouse=True)
def _cleared(cluster: Cluster) -> Iterator[None]:
    """The jobs of a test end with it, and failed nodes return, whether it has passed or not."""
    yield
    cluster.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the runs of a module, its profiles, and the prepared text that all of them share."""
    folder = tmp_path_factory.mktemp("runs")
    for tasks in (1, 2):
        (folder / f"{tasks}.yaml").write_text(f"{PROFILE}{tasks}\n")
    return folder


@pytest.fixture
def submit(cluster: Cluster, folder: Path) -> Iterator[Submit]:
    """Start ``fedpipe submit TASK``; end what still follows a job."""
    commands = []

    def start(
        run: str | Path, *arguments: str, profile: str = "1.yaml", task: str = "pretrain"
    ) -> Command:
        options = ["--profile", str(folder / profile), "--run-dir", str(folder / run)]
        if task != "finetune":  # which keeps its data in its run directory
            options.append(f"data.cache_dir={folder / 'cache'}")
        commands.append(
            Command(
                "submit",
                task,
                *options,
                *arguments,
                folder=folder,
                environment=cluster.environment | CALLER,
            )  # fmt: skip
        )
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.kill()
