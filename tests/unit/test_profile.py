"""Job profiles: what submitit may be told, and how a grid divides into nodes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedpipe.cluster.profile import JobShape, Profile, load_profile
from fedpipe.cluster.slurm import (
    JobState,
    NodeKind,
    _check_fits,
    _gpus,
    _minutes,
    cells_in_queue,
    check_site,
    job_state,
    not_submitted,
    refusal_in,
)
from fedpipe.distributed.topology import Grid
from fedpipe.errors import (
    ConfigError,
    FedPipeError,
    LaunchError,
    SchedulerError,
    TopologyError,
)

PROFILES = sorted((Path(__file__).parents[2] / "slurm" / "profiles").glob("*.yaml"))


def _load(folder: Path, text: str) -> Profile:
    path = folder / "profile.yaml"
    path.write_text(text)
    return load_profile(str(path))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_packaged_profile_is_one_that_submitit_takes(path: Path) -> None:
    assert load_profile(str(path)).shape(Grid(2, 8, 1)).nodes >= 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "timeout_min: 30\ntask_per_node: 2\n",
            "task_per_node: unknown to submitit, in .*:2",
        ),
        (
            "timeout_min: 30\npartition: x\n",
            "partition: unknown to submitit, .*Did you mean slurm_p",
        ),
        ("timeout_min: 30\nzzz: x\n", "zzz: unknown to submitit, .* Options of sbatch start"),
        ("timeout_min: 30\nslurm_zzz: 1\n", "slurm_zzz: unknown to submitit"),
        ("tasks_per_node: 2\n", "timeout_min: expected the job's time limit in minutes, got none"),
        ("timeout_min: soon\n", "timeout_min: expected a whole number, 1 or more, got 'soon' in "),
        ("timeout_min: 0\n", "timeout_min: expected a whole number, 1 or more, got 0 in .*:1"),
        ("timeout_min: 9\nnodes: 2\n", r"nodes: expected a profile without it \(it follows from"),
        ("timeout_min: 9\nmem_gb: x\n", "mem_gb: expected a number, got 'x' in .*:2"),
        (
            "timeout_min: 9\nstderr_to_stdout: 1\n",
            "stderr_to_stdout: expected true or false, got",
        ),
        (
            "timeout_min: 9\ntasks_per_node: 8\ngpus_per_node: 4\n",
            r"gpus_per_node: expected one GPU per rank \(8 ranks per node\), got 4 in .*Set tasks_",
        ),
        ("timeout_min: 9\ngpus_per_node: 4\n", "gpus_per_node: expected one GPU per rank"),
    ],
)
def test_a_wrong_profile_is_one_line_that_names_the_key(
    tmp_path: Path, text: str, error: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{error}") as raised:
        _load(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_missing_profile_is_named_by_its_option() -> None:
    with pytest.raises(ConfigError, match=r"^--profile: expected a readable YAML file, got 'no'"):
        load_profile("no")


@pytest.mark.parametrize(
    ("grid", "per_node", "gpus", "shape"),
    [
        (Grid(2, 4, 1), 4, 0, (2, 4, 0)),
        (Grid(2, 4, 1), 8, 8, (1, 8, 8)),
        (Grid(2, 16, 4), 8, 8, (16, 8, 8)),
        (Grid(2, 1, 1), 8, 8, (1, 2, 2)),  # a part of a node
        (Grid(2, 4, 1), 4, 8, (2, 4, 8)),  # whole nodes, whatever it uses of them
    ],
)
def test_a_grid_takes_full_nodes_or_a_part_of_one(
    tmp_path: Path, grid: Grid, per_node: int, gpus: int, shape: tuple[int, int, int]
) -> None:
    text = f"timeout_min: 60\ntasks_per_node: {per_node}\ncpus_per_task: 3\n"
    profile = _load(tmp_path, text + (f"gpus_per_node: {gpus}\n" if gpus else ""))
    nodes, tasks, gpus_per_node = shape
    assert profile.shape(grid) == JobShape(
        nodes=nodes, tasks_per_node=tasks, gpus_per_node=gpus_per_node, cpus_per_task=3
    )


@pytest.mark.parametrize(("gpus", "given"), [(0, 0), (8, 5), (4, 4)])
def test_workers_of_one_task_get_what_as_many_ranks_would_get_on_one_node(
    tmp_path: Path, gpus: int, given: int
) -> None:
    text = "timeout_min: 60\ntasks_per_node: 4\ncpus_per_task: 3\n"
    profile = _load(tmp_path, text + (f"gpus_per_node: {gpus}\n" if gpus else ""))
    assert profile.shape(Grid(1, 1, 1), workers=5) == JobShape(
        nodes=1, tasks_per_node=1, gpus_per_node=given, cpus_per_task=15
    )


@pytest.mark.parametrize(
    ("grid", "way_out"),
    [
        (Grid(2, 6, 1), r"Set federation.num_replicas=4, or tasks_per_node: 6\."),
        (Grid(3, 3, 1), r"Set tasks_per_node: 3\."),
    ],
)
def test_a_grid_that_does_not_divide_into_nodes_is_refused_with_a_way_out(
    tmp_path: Path, grid: Grid, way_out: str
) -> None:
    profile = _load(tmp_path, "timeout_min: 60\ntasks_per_node: 8\n")
    with pytest.raises(TopologyError, match=r"^tasks_per_node: expected a divisor of the .*") as e:
        profile.shape(grid)
    assert re.search(way_out, str(e.value)), e.value


def test_what_sinfo_prints_is_understood() -> None:
    resources = ("gpu:a100:4(S:0-1),nvme:1", "gpu:2", "(null)", "gpu:a:2,gpu:b:1")
    assert [_gpus(text) for text in resources] == [4, 2, 0, 3]
    assert _minutes("1-02:03:30") == 24 * 60 + 123.5
    assert (_minutes("30:00"), _minutes("2:00:00")) == (30, 120)
    assert _minutes("infinite") == float("inf")


@pytest.mark.parametrize(
    ("kinds", "needs", "error"),
    [
        ({"gpus": 4}, {"gpus_per_node": 8}, "gpus_per_node: expected at most the 4 that a node of"),
        (
            {"cores": 8},
            {"cpus_per_task": 3},
            "cpus_per_task: expected tasks_per_node x cpus",
        ),
        ({"num_nodes": 1}, {}, "tasks_per_node: expected a job of at most the 1 fitting nodes of"),
        ({"max_minutes": 9.0}, {}, "timeout_min: expected at most the 9 minutes of partition gpu"),
        (
            {"is_up": False},
            {},
            "slurm_partition: expected one that takes jobs, got 'gpu' in",
        ),
    ],
)
def test_what_a_partition_cannot_hold_is_refused_before_the_job_waits_for_ever(
    kinds: dict[str, object], needs: dict[str, int], error: str
) -> None:
    kind = NodeKind(
        **{
            "partition": "gpu", "is_default": True, "num_nodes": 2, "cores": 64, "gpus": 8,
            "max_minutes": 1e9, "is_up": True,
        }
        | kinds  # type: ignore[arg-type]
    )  # fmt: skip
    shape = JobShape(
        **{"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 0, "cpus_per_task": 1} | needs
    )
    profile = Profile(source="p.yaml", parameters={"timeout_min": 60})
    with pytest.raises(FedPipeError, match=f"^{re.escape(error)}"):
        _check_fits(profile, shape, "gpu", [kind])


# -- what SLURM's commands say ---------------------------------------------------------------------


def _answer(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put commands on PATH that answer as SLURM's do."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin" if scripts else str(folder))


SHAPE = JobShape(nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=1)


def test_a_machine_without_slurm_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"^--cluster: expected SLURM's sbatch and sinfo on PATH"):
        check_site(Profile(source="p.yaml"), SHAPE)


def test_a_controller_that_does_not_answer_is_quoted_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(tmp_path, monkeypatch, sbatch="", sinfo="echo 'slurm_load: down\nsorry' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"^sinfo: expected an answer, got: slurm_load: down s"):
        check_site(Profile(source="p.yaml"), SHAPE)
    monkeypatch.setattr("fedpipe.cluster.slurm._TIMEOUT_S", 0.2)
    _answer(tmp_path, monkeypatch, sinfo="exec sleep 9")
    with pytest.raises(LaunchError, match=r"^sinfo: expected an answer within 0 s, got none\. Try"):
        check_site(Profile(source="p.yaml"), SHAPE)


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            "sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission"
            " failed: Invalid partition name specified",
            ConfigError,
            "Invalid partition name specified",
        ),
        (
            "sbatch: error: see https://hpc.site.example/help on login7\nsbatch: error: Batch job"
            " submission failed: Invalid account or account/partition combination specified",
            ConfigError,
            "Invalid account or account/partition combination specified",
        ),
        ("sbatch: error: login7 says no to /home/me/run", ConfigError, ""),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller"
            " (connect failure)",
            SchedulerError,
            "",
        ),
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            SchedulerError,
            "",
        ),
    ],
)
def test_a_scheduler_that_refuses_a_job_is_told_from_one_that_does_not_answer(
    said: str, kind: type, told: str
) -> None:
    error = not_submitted(said, source="/home/me/slurm.yaml")
    assert type(error) is kind
    assert refusal_in(f"{kind.__name__}: {error}") == told


def test_a_partition_must_be_one_of_the_site_or_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "echo 'cpu|4|64|(null)|1-00:00:00|up'; echo 'gpu{}|2|64|gpu:8|infinite|up'"
    _answer(tmp_path, monkeypatch, sbatch="", sinfo=line.format(""))
    with pytest.raises(ConfigError, match=r"^slurm_partition: .* cpu, gpu \(the site has no defau"):
        check_site(Profile(source="p.yaml"), SHAPE)
    refused = r"^slurm_partition: expected one of cpu, gpu \(sinfo\)"
    with pytest.raises(ConfigError, match=refused) as caught:
        check_site(Profile(source="p.yaml", parameters={"slurm_partition": "x"}), SHAPE)
    told = "slurm_partition of its profile does not fit"
    assert refusal_in(f"ConfigError: {caught.value}") == told
    _answer(tmp_path, monkeypatch, sinfo=line.format("*"))
    check_site(Profile(source="p.yaml", parameters={"timeout_min": 10**6}), SHAPE)


def test_a_job_that_the_controller_has_forgotten_is_looked_up_in_the_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = "JobId=7 JobName=x JobState=PENDING Reason=BeginTime Restarts=2 NodeList=(null) X=1"
    _answer(tmp_path, monkeypatch, scontrol=f"echo '{shows}'", sacct="exit 1")
    state = job_state("7")
    assert state == JobState(state="PENDING", reason="BeginTime", restarts=2) and state.waits
    _answer(tmp_path, monkeypatch, scontrol="exit 1", sacct="echo 'CANCELLED by 0|node[1-2]'")
    state = job_state("7")
    assert state == JobState(state="CANCELLED", nodes="node[1-2]") and state.has_ended
    _answer(tmp_path, monkeypatch, scontrol="exit 1", sacct="exit 1")
    assert job_state("7") is None


def test_only_cells_that_wait_or_run_are_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(tmp_path, monkeypatch, squeue="echo 7_0; echo 7_2; echo 9")
    assert cells_in_queue(["7_0", "7_1", "8"]) == {"7_0"}
    _answer(tmp_path, monkeypatch, squeue="echo 'Invalid job id specified' >&2; exit 1")
    assert cells_in_queue(["7_0"]) == set()
