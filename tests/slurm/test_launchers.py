"""The job scripts: srun, DeepSpeed's launcher and torchrun over two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import REPOSITORY
from tests.helpers.runs import (
    LONG,
    TINY,
    TWO_REPLICAS,
    job_id,
    lock_holder,
    num_rounds,
    outcome,
    run_locally,
)
from tests.helpers.slurm import Cluster, held_until, wait_until

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
SRUN = REPOSITORY / "slurm" / "pretrain.sbatch"
THEMSELVES = "-m fedpipe pretrain"
"""What stands in the place of launch/pretrain.py, and is the same."""
LATE = ("checkpoint.every_rounds=2",)
"""Only a stop saves before the run is done."""
SIZES = (
    "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return run_locally(folder / "undisturbed", *LATE)


class Job:
    """A job of one of the scripts, with the least that it can be given here."""

    def __init__(self, cluster: Cluster, script: Path, run_dir: Path, *arguments: str) -> None:
        self._cluster, self._run_dir = cluster, run_dir
        self._log = run_dir.with_suffix(".log")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.id = cluster.run(
            "sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={self._log}",
            f"--export=ALL,PATH={path},PYTHONPATH={REPOSITORY}", *SIZES,
            str(script), "--run-dir", str(run_dir), *TINY, *LATE,
            f"data.cache_dir={run_dir.parent / 'cache'}", *arguments,
        ).stdout.strip()  # fmt: skip

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def wait_for_round(self, number: int) -> None:
        def there() -> bool:
            assert self._cluster.state(self.id) in ("PENDING", "RUNNING"), self.log()
            return num_rounds(self._run_dir) >= number

        wait_until(there, what=self.log, timeout_s=240)

    def end(self) -> str:
        """Wait until the job has ended for good."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        return self._cluster.wait_for_state(self.id, states, timeout_s=240)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_takes_every_script(cluster: Cluster, script: Path) -> None:
    cluster.run("sbatch", "--test-only", *SIZES, str(script))


def test_a_warned_job_on_two_nodes_saves_runs_again_and_ends_as_one_machine_would(
    cluster: Cluster, folder: Path, undisturbed: Path
) -> None:
    run_dir, script = folder / "pretrain", folder / SRUN.name
    script.write_text(SRUN.read_text().replace("launch/pretrain.py", THEMSELVES))
    job = Job(cluster, script, run_dir)
    job.wait_for_round(1)
    with held_until([lock_holder(run_dir)], signal.SIGUSR2):
        # What SLURM does with --signal=B:USR2@300.
        cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    assert job.end() == "COMPLETED", job.log()
    assert len(re.findall(r"^interrupted after .*round \d", job.log(), re.M)) == 1, job.log()
    assert len(re.findall(rf"^resuming {run_dir} from round_", job.log(), re.M)) == 1, job.log()
    assert outcome(run_dir) == outcome(undisturbed)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("deepspeed.sbatch", "launch/pretrain.py"),
        ("torchrun.sbatch", THEMSELVES),
    ],
)
def test_a_launcher_trains_to_the_losses_of_one_machine_whatever_it_is_told_to_start(
    name: str, program: str, cluster: Cluster, folder: Path, undisturbed: Path
) -> None:
    run_dir, script = folder / f"of-{name.partition('.')[0]}", folder / name
    text = (REPOSITORY / "slurm" / name).read_text()
    script.write_text(text.replace("launch/pretrain.py", program))
    job = Job(cluster, script, run_dir)
    assert job.end() == "COMPLETED", job.log()
    assert outcome(run_dir) == outcome(undisturbed)
    assert not list(REPOSITORY.glob("*.hosts"))


def test_a_job_of_a_wrong_size_says_so_and_does_not_come_back(
    cluster: Cluster, folder: Path
) -> None:
    job = Job(cluster, SRUN, folder / "wrong", "federation.num_replicas=2")
    assert job.end() == "FAILED", job.log()
    assert (
        "TopologyError: num_replicas (2) x num_stages (2) x data_parallel_degree (1) = 4 processes,"
        " but WORLD_SIZE is 2. Start 4, or set federation.num_replicas=1." in job.log()
    )


def test_a_job_that_cannot_save_is_not_requeued_for_ever(cluster: Cluster, folder: Path) -> None:
    run_dir = folder / "unsaved"
    job = Job(cluster, SRUN, run_dir, *LONG)
    job.wait_for_round(1)
    (run_dir / "checkpoints").touch()  # a file, where a folder must be
    start = json.dumps({"job": job.id, "round": 0, "step": 0})
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "attempts.jsonl").write_text(f"{start}\n" * 3)
    cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    assert job.end() == "FAILED", job.log()
    assert (
        "LaunchError: expected progress, got 3 starts in a row that were stopped before anything "
        "new was saved (all from the start). Raise the job's time, " in job.log()
    )
    restarts = cluster.run("scontrol", "--oneliner", "show", "job", job.id).stdout
    assert " Restarts=1 " in restarts


def test_the_five_lines_of_the_readme_train_on_two_nodes_as_on_one_machine(
    cluster: Cluster, folder: Path
) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## SLURM in five lines\n")[1]
    block = re.search(r"```sh[^\n]*\n(.*?)```", section, re.DOTALL)
    assert block, "the section shows commands"
    lines = block.group(1).splitlines()
    assert len(lines) == 5
    ours = [line.split("  # ")[0].strip() for line in lines if "local_cluster.py" not in line]
    assert [line.split()[0] for line in ours] == ["cp", "fedpipe", "fedpipe"]
    # two replicas: the profile must need both nodes
    sizes = [*TINY, *TWO_REPLICAS, f"data.cache_dir={folder / 'cache'}"]
    ours[1] = " ".join([ours[1], *sizes])
    place = folder / "readme"
    place.mkdir()
    (place / "slurm").symlink_to(REPOSITORY / "slurm")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    done = subprocess.run(
        ["bash", "-ec", "\n".join(ours)], cwd=place, capture_output=True, text=True, timeout=300,
        env=os.environ | cluster.environment | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    job = job_id(run_dir := place / "runs" / "slurm")
    assert f"job     {job} on slurm: 2 nodes x 2 ranks x 1 core\n" in done.stdout
    assert f"logs    {run_dir / 'logs' / f'{job}_RANK_log.out'}, .err\n" in done.stdout
    assert f"job     {job} is in the queue already\n" in done.stdout
    assert re.search(r"round 2/2 validation  loss", done.stdout), done.stdout
    assert done.stdout.endswith("model   runs/slurm/export\nreport  runs/slurm/report.html\n")
    assert outcome(run_dir) == outcome(run_locally(folder / "local", *TWO_REPLICAS))
