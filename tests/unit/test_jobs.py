"""What a job leaves behind, and what is read from it: attempts, results, logs, progress."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import submitit

from fedpipe.cluster.follow import STARTS, Progress, exit_code_of, find_failure
from fedpipe.cluster.launched import note_attempt
from fedpipe.cluster.rank import RunRequest, View
from fedpipe.cluster.slurm import JobState
from fedpipe.cluster.submit import CommandJob, Job, RankJob, own_gpu
from fedpipe.distributed.topology import Grid
from fedpipe.errors import CorpusError, LaunchError, TopologyError
from fedpipe.report.console import RunConsole
from fedpipe.run.checkpoint import Position

GRID = Grid(2, 1, 1)
FAILED = JobState(state="FAILED", nodes="node[1-2]")


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A job of two ranks that has written nothing yet, in ``tmp_path / "logs"``."""
    (tmp_path / "logs").mkdir()
    return submitit.SlurmJob(tmp_path / "logs", "4711", tasks=range(2))


def _returns(job: Any, rank: int, value: Any, outcome: str = "success") -> None:
    """What submitit writes for a rank."""
    job.task(rank).paths.result_pickle.write_bytes(pickle.dumps((outcome, value)))


def _raises(job: Any, rank: int, error: str) -> None:
    _returns(job, rank, f"Traceback (most recent call last):\n  File x, line 1\n{error}\n", "error")


def _conclude(job: Any, folder: Path, state: JobState = FAILED) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = exit_code_of(job, state, run_dir=folder, grid=GRID, show=lines.append, closing=list)
    return code, lines


# -- attempts --------------------------------------------------------------------------------------


def _at(round_id: int, step: int) -> Position:
    return Position(round_id=round_id, step=step)


def test_a_job_may_start_three_times_from_one_place_and_as_often_as_it_gets_on(
    tmp_path: Path,
) -> None:
    for step in range(8):
        note_attempt(tmp_path, _at(1, step), job_id="4711")
    for _ in range(3):
        note_attempt(tmp_path, _at(2, 0), job_id="4711")
    with pytest.raises(LaunchError, match=r"^expected progress, got 3 starts in a row .*round 2"):
        note_attempt(tmp_path, _at(2, 0), job_id="4711")
    note_attempt(tmp_path, _at(2, 0), job_id="4712")  # submitted again


def test_a_torn_line_of_an_attempt_stops_nobody(tmp_path: Path) -> None:
    for _ in range(2):
        note_attempt(tmp_path, Position(), job_id="4711")
    with open(tmp_path / "logs" / "attempts.jsonl", "a") as file:
        file.write('{"job": "47\n')
    note_attempt(tmp_path, Position(), job_id="4711")


def test_a_rank_takes_one_of_the_gpus_that_are_the_jobs_own() -> None:
    assert own_gpu({"CUDA_VISIBLE_DEVICES": "4,5,6"}, local_rank=1) == {"CUDA_VISIBLE_DEVICES": "5"}
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "3"}):
        assert own_gpu(visible, local_rank=1) == {}


@pytest.mark.parametrize(
    "job", [RankJob("module", RunRequest(run_dir="runs/x")), CommandJob("module:run", "runs/x")]
)
def test_a_job_is_requeued_as_it_was_submitted(job: Job) -> None:
    again = pickle.loads(pickle.dumps(job)).checkpoint()
    assert type(again.function) is type(job)
    assert vars(again.function) == vars(job) and again.args == () and again.kwargs == {}


# -- ends ------------------------------------------------------------------------------------------


def test_a_user_error_of_a_job_is_the_users_error_here(job: Any, tmp_path: Path) -> None:
    for rank in range(2):
        _raises(job, rank, "fedpipe.errors.CorpusError: data.train: expected a file, got none.")
    with pytest.raises(CorpusError, match=r"^job 4711: data.train: expected a file, got none. Ful"):
        _conclude(job, tmp_path)


def test_the_rank_that_failed_is_named_and_not_one_that_lost_its_connection(
    job: Any, tmp_path: Path
) -> None:
    _raises(job, 0, "RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:4242")
    _raises(job, 1, "ZeroDivisionError: division by zero")
    with pytest.raises(LaunchError, match=r"^job 4711 failed on rank 1 \(stage 1, replica 0\): Z"):
        _conclude(job, tmp_path)


def test_of_a_killed_rank_srun_tells_but_not_of_an_earlier_attempt(
    job: Any, tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "4711_0_log.err"
    early = "srun: error: node1: task 0: Exited with exit code 255\n"
    late = "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Terminated\n"
    _raises(job, 0, "RuntimeError: [gloo] Connection reset by peer")
    log.write_text(f"{STARTS} job 4711\n{early}{STARTS} job 4711\n{late}")
    failure = find_failure(job)
    assert failure is not None and (failure.rank, failure.what) == (1, "Killed on node2")


def test_what_a_rank_says_of_one_that_hangs_is_the_reason(job: Any, tmp_path: Path) -> None:
    verdict = "LaunchError: rank 1 (stage 1, replica 0) hangs: in forward for 120 s."
    log = tmp_path / "logs" / "4711_0_log.err"
    log.write_text(
        f"{STARTS} job 4711\n{verdict}\nsrun: error: node1: task 0: Exited with exit code 1\n"
    )
    _raises(job, 1, "RuntimeError: [gloo] Connection reset by peer")
    with pytest.raises(LaunchError, match=r"^job 4711: rank 1 \(stage 1, replica 0\) hangs: i"):
        _conclude(job, tmp_path)


def test_an_interrupted_job_is_no_failure(job: Any, tmp_path: Path) -> None:
    for state, what in (
        ("CANCELLED", "was cancelled; "),
        ("TIMEOUT", "reached its time limit before it could save and requeue; "),
        ("NODE_FAIL", "lost a node and was not requeued; "),
    ):
        code, lines = _conclude(job, tmp_path, JobState(state=state))
        assert code == 75 and lines[0].startswith(f"job 4711 {what}"), lines
    _returns(job, 0, 75)
    code, lines = _conclude(job, tmp_path, JobState(state="COMPLETED"))
    assert code == 75 and lines[0].startswith("job 4711 was asked to stop; "), lines


def test_where_no_rank_has_said_anything_the_last_line_of_the_log_is_shown(
    job: Any, tmp_path: Path
) -> None:
    with pytest.raises(TopologyError, match=r"^--run-dir: expected a folder that all nodes share"):
        _conclude(job, tmp_path)
    log = tmp_path / "logs" / "4711_0_log.err"
    log.write_text("first\nImportError: no module\n\n")
    with pytest.raises(LaunchError, match=r"^job 4711 failed: state FAILED, no reason given: I"):
        _conclude(job, tmp_path)
    with pytest.raises(LaunchError, match=r"^job 4711 failed: it needs more memory than it asked"):
        _conclude(job, tmp_path, JobState(state="OUT_OF_MEMORY"))


# -- progress --------------------------------------------------------------------------------------


def test_progress_shows_what_is_new_although_a_resumed_run_cuts_its_record(tmp_path: Path) -> None:
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    console = RunConsole(
        num_rounds=3, steps_per_round=2, num_stages=1, stream=out, interactive=False
    )

    def record(round_id: int) -> str:
        return json.dumps({"kind": "round", "round": round_id, "clients": [0]}) + "\n"

    def shown() -> list[str]:
        progress.read()
        lines = [line.split(" ", 1)[1][:9] for line in out.getvalue().splitlines()]
        out.truncate(out.seek(0))
        return lines

    path.write_text(record(0))
    progress = Progress(
        path,
        View(
            console=console,
            shows={"step": console.step, "round": console.round, "eval": console.evaluation},
        ),
    )
    assert shown() == []
    path.write_text(record(0) + record(1) + record(2)[:9])
    assert shown() == ["round 2/3"]
    path.write_text(record(0))
    assert shown() == []
    path.write_text(record(0) + record(1))
    assert shown() == ["round 2/3"]
    step = {"round": 2, "step": 19, "replica": 0, "stage": 0, "client": 0, "loss": 1.0}
    line = {"kind": "system", "event": "progress", "steps": [step]}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    assert shown() == ["round 3/3"]
