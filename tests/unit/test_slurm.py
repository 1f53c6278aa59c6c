"""What a job and a question to SLURM take from the caller's environment."""

from __future__ import annotations

from fedpipe.cluster.profile import Profile
from fedpipe.cluster.slurm import login_environment, without_rank
from tests.slurm.conftest import CALLER

LOGIN = {
    "PATH": "/bin", "OMP_NUM_THREADS": "1", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token",
    "NCCL_DEBUG": "INFO",
}  # fmt: skip


def test_a_job_gets_the_environment_of_a_login_node_whatever_the_caller_is_part_of() -> None:
    assert login_environment(LOGIN | CALLER) == LOGIN


def test_a_job_of_this_machine_keeps_the_callers_cores_and_is_no_rank_of_the_callers() -> None:
    kept = without_rank(LOGIN | CALLER)
    assert kept["SLURM_CPUS_PER_TASK"] == "9"
    assert not {name for name in kept if name.startswith(("TORCHELASTIC", "MASTER", "RANK"))}


def test_gpus_that_a_user_has_chosen_outside_of_a_job_stay_chosen() -> None:
    chosen = LOGIN | {"CUDA_VISIBLE_DEVICES": "1"}
    assert login_environment(chosen) == chosen


def test_a_users_account_counts_where_the_profile_names_none() -> None:
    own = {"SBATCH_ACCOUNT": "mine", "SBATCH_QOS": "low", "SBATCH_TIMELIMIT": "1"}
    profile = Profile(source="x.yaml", parameters={"slurm_qos": "high"})
    assert login_environment(own, profile=profile) == {"SBATCH_ACCOUNT": "mine"}
