"""A job that SLURM disturbs in every way that it has, and that ends as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.helpers.runs import TINY, job_id, outcome, rank_process, run_locally
from tests.helpers.slurm import Cluster, held_until
from tests.slurm.conftest import PROFILE, Submit


def test_preempted_timed_out_and_after_a_lost_node_a_job_ends_as_if_nothing_had_been(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "disturbed"
    (folder / "preemptible.yaml").write_text(
        f"{PROFILE}1\nslurm_partition: preemptible\nslurm_signal_delay_s: 179\n"
    )
    size = ("federation.num_rounds=8",)
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
    cluster.run("scontrol", "update", f"jobid={job_id(run_dir)}", "timelimit=30")

    trains()
    node = cluster.nodes[1]
    cluster.set_down(node)
    starts(4)
    cluster.resume(node)
    result = command.finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert outcome(run_dir) == outcome(run_locally(folder / "alone", *size))


def _let_time_run_out(cluster: Cluster, run_dir: Path) -> None:
    """Shorten a job's limit, and hold its ranks until SLURM's warning is there: it looks rarely."""
    ranks = [rank_process(run_dir, rank) for rank in range(2)]
    with held_until(ranks, signal.SIGUSR2):
        cluster.run("scontrol", "update", f"jobid={job_id(run_dir)}", "timelimit=3")
