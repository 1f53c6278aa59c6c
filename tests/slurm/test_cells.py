"""Evaluations and fine-tunings as jobs: warned, killed, submitted again, and in one table."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from fedpipe.report.writer import read_metrics
from tests.helpers.encoders import bert, easy_ner
from tests.helpers.runs import job_id, lock_holder, num_rounds
from tests.helpers.slurm import Cluster, held_until
from tests.helpers.tuned import small_folder, small_task
from tests.slurm.conftest import Submit


def _attempts(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "logs" / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_an_evaluation_is_a_job_array_whose_warned_cell_runs_again_and_whose_killed_one_is_named(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "scores"
    arguments = (
        "--model", str(bert(folder / "small", hidden=16)), "--seeds", "0,1", "--parallel", "2",
        "--data", str(easy_ner(folder / "data")), "evaluation.num_epochs=40",
        "evaluation.batch_size=4",
    )  # fmt: skip
    names = [f"small_ncbi-disease_seed={seed}" for seed in (0, 1)]
    warned, killed = (run_dir / "cells" / name for name in names)
    command = submit("scores", *arguments, "--follow", task="evaluate")
    begun = [cell / "metrics.jsonl" for cell in (warned, killed)]
    command.wait_for(lambda: begun[0].is_file() and begun[0].stat().st_size > 0, "steps")
    jobs = json.loads((run_dir / "logs" / "jobs.json").read_text())
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1 and len(jobs) == 2
    with held_until([lock_holder(warned)], signal.SIGUSR2):
        cluster.run("scancel", "--signal=USR2", jobs[names[0]])
    command.wait_for(lambda: begun[1].is_file() and begun[1].stat().st_size > 0, "steps")
    os.kill(lock_holder(killed), signal.SIGKILL)
    result = command.finish()
    assert result.code == 1, result.out + result.err
    assert result.error == (
        f"LaunchError: evaluate: expected 2 finished cells, got 1: not done are {names[1]}. The "
        "same command submits them again"
    )
    assert re.search(
        rf"cell {names[1]}: job {jobs[names[1]]} failed on rank 0 .*: Killed on node\d", result.out
    ), result.out
    assert re.search(rf"cell {names[0]}: done, F1 [\d.]+", result.out), result.out
    assert [start["job"] for start in _attempts(warned)] == [jobs[names[0]]] * 2
    kept = (warned / "result.json").stat().st_mtime_ns

    result = submit("scores", "--follow", task="evaluate").finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "on slurm: 1 cell, each 1 node x 1 rank x 1 core\n" in result.out
    assert result.out.splitlines()[-1] == f"report  {run_dir / 'evaluation.html'}"
    cells = json.loads((run_dir / "evaluation.json").read_text())["cells"]
    assert [(cell["name"], cell["done"]) for cell in cells] == [(name, True) for name in names]
    assert (warned / "result.json").stat().st_mtime_ns == kept


def test_a_warned_fine_tuning_saves_its_round_and_goes_on_in_the_same_job_with_its_workers(
    submit: Submit, cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "tuned"
    tiny = (
        f"model.path={small_folder(folder / 'model')}", "task.name=imdb", "task.max_length=12",
        f"task.data={small_task(folder / 'task')}", "federation.num_replicas=2", "batch_size=8",
        "federation.num_rounds=20", "scoring.every_rounds=20", "method.name=lora",
    )  # fmt: skip
    command = submit("tuned", *tiny, "--follow", task="finetune")
    command.wait_for(lambda: num_rounds(run_dir) >= 2, "round 2")
    with held_until([lock_holder(run_dir)], signal.SIGUSR2):
        cluster.run("scancel", "--signal=USR2", job_id(run_dir))
    result = command.finish()
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "on slurm: 1 node x 1 rank x 2 cores\n" in result.out
    first, second = _attempts(run_dir)
    assert first["job"] == second["job"] == job_id(run_dir)
    assert first["round"] == 0 and second["round"] >= 2
    rounds = [r["round"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "round"]
    assert rounds == list(range(20))
    assert re.search(r"round 20/20 trained \d+ clients", result.out), result.out
    assert result.out.splitlines()[-1] == f"report  {run_dir / 'report.html'}"
