"""A sweep as a job array."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from tests.helpers.cli import Command, fedpipe
from tests.helpers.runs import ONE_PROCESS, TINY, lock_holder, num_rounds
from tests.helpers.slurm import Cluster


def test_a_sweep_is_a_job_array_that_ends_after_a_killed_cell_was_submitted_again(
    cluster: Cluster, folder: Path
) -> None:
    directory = folder / "sweep"
    arguments = ("submit", "sweep", "--profile", str(folder / "1.yaml"), "--run-dir")
    grid = ("--grid", "seed=0,1")
    command = Command(
        *arguments, str(directory), "--follow", *TINY, *ONE_PROCESS, "federation.num_rounds=4",
        f"data.cache_dir={folder / 'cache'}", *grid, folder=folder,
        environment=cluster.environment,
    )  # fmt: skip
    victim = directory / "cells" / "seed=1"
    command.wait_for(lambda: num_rounds(victim) >= 1, "a round of the second cell")
    jobs = json.loads((directory / "logs" / "jobs.json").read_text())
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1 and len(jobs) == 2
    os.kill(lock_holder(victim), signal.SIGKILL)
    result = command.finish()
    assert result.code == 1, result.out + result.err
    assert result.error == (
        "LaunchError: sweep: expected 2 finished cells, got 1: not done are seed=1. The "
        "same command submits them again"
    )
    log = directory / "logs" / f"{jobs['seed=1']}_0_log.err"
    assert re.search(
        rf"cell seed=1: job {jobs['seed=1']} failed on rank 0 "
        rf"\(stage 0, 1, replica 0\): Killed on node\d\. Full log: {re.escape(str(log))}\.",
        result.out,
    ), result.out

    result = fedpipe(
        *arguments, str(directory), "--follow", folder=folder, environment=cluster.environment
    )
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "on slurm: 1 cell, each 1 node x 1 rank x 1 core\n" in result.out
    again = json.loads((directory / "logs" / "jobs.json").read_text())
    assert {name for name in jobs if jobs[name] != again[name]} == {"seed=1"}
    rows = json.loads((directory / "sweep.json").read_text())["rows"]
    assert [row["done"] for row in rows] == [2] and (directory / "sweep.png").is_file(), rows
    assert (
        "job "
        not in fedpipe(
            *arguments, str(directory), folder=folder, environment=cluster.environment
        ).out
    )
