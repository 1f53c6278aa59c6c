"""Rank and rendezvous, as torchrun, deepspeed and srun announce them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedpipe.distributed import env
from fedpipe.distributed.env import (
    ProcessEnv,
    cores_from_slurm,
    detect,
    is_rank,
    threads_per_process,
)
from fedpipe.errors import TopologyError
from tests.helpers.affinity import launched

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "node-7", "MASTER_PORT": "40000",
}  # fmt: skip


def test_torchrun_is_understood() -> None:
    assert detect(TORCHRUN) == ProcessEnv(
        rank=5, world_size=8, local_rank=1, local_world_size=4, rendezvous="tcp://node-1:29500",
        attempt=2,
    )  # fmt: skip


def test_deepspeed_is_understood() -> None:
    """Its launcher sets LOCAL_SIZE, neither LOCAL_WORLD_SIZE nor a restart count."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    base = {name: TORCHRUN[name] for name in names}
    env = detect(base | {"LOCAL_SIZE": "3", "CROSS_RANK": "1", "CROSS_SIZE": "2"})
    assert (env.rank, env.world_size, env.local_rank, env.attempt) == (5, 8, 1, 0)
    assert env.local_world_size == 3
    assert detect(base).local_world_size == 8, "without it one host is assumed"


def test_srun_is_understood() -> None:
    assert detect(SRUN) == ProcessEnv(
        rank=3, world_size=4, local_rank=1, local_world_size=2, rendezvous="tcp://node-7:40000"
    )


SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
ADDRESS = {"MASTER_ADDR": "node-7", "MASTER_PORT": "40000"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        (TORCHRUN, True),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, False),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4"}, True),
        (SALLOC | ADDRESS, False),
        (SALLOC | ADDRESS | {"SLURM_PROCID": "0"}, False),  # a job script
        (SALLOC | ADDRESS | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        (SALLOC | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, False),
    ],
    ids=[
        "terminal", "torchrun", "torchrun, one process", "srun", "salloc", "sbatch",
        "srun --pty bash", "srun of four runs",
    ],
)  # fmt: skip
def test_a_process_is_a_rank_where_a_launcher_has_started_several_that_are_to_meet(
    environ: dict[str, str], expected: bool
) -> None:
    assert is_rank(environ) == expected


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [
        ("4", 0, 4), ("2(x2),1", 0, 2), ("2(x2),1", 1, 2), ("2(x2),1", 2, 1),
        ("1,3,1(x10)", 1, 3), ("1,3,1(x10)", 11, 1), ("16(x128)", 127, 16),
    ],
)  # fmt: skip
def test_srun_says_how_many_tasks_each_node_has(tasks: str, node: int, expected: int) -> None:
    env = detect(SRUN | {"SLURM_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)})
    assert env.local_world_size == expected


def test_without_a_list_of_tasks_one_host_is_assumed() -> None:
    without = {name: value for name, value in SRUN.items() if name != "SLURM_TASKS_PER_NODE"}
    assert detect(without).local_world_size == 4


@pytest.mark.parametrize("tasks", ["2", "", "many"])
def test_a_list_of_tasks_without_this_node_is_refused(tasks: str) -> None:
    with pytest.raises(
        TopologyError, match=rf"^SLURM_TASKS_PER_NODE: expected a number for node 1, got '{tasks}'"
    ):
        detect(SRUN | {"SLURM_TASKS_PER_NODE": tasks})


def test_a_requeued_slurm_job_is_another_attempt_and_torchruns_own_count_goes_first() -> None:
    assert detect(SRUN | {"SLURM_RESTART_COUNT": "3"}).attempt == 3
    assert detect(TORCHRUN | {"SLURM_RESTART_COUNT": "3"}).attempt == 2


def test_a_launcher_inside_a_slurm_job_wins_over_slurm() -> None:
    batch = {
        "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
        "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "0",
    }  # fmt: skip
    assert detect(batch | TORCHRUN) == detect(TORCHRUN)


def test_one_process_needs_no_address() -> None:
    env = detect({"RANK": "0", "WORLD_SIZE": "1"})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (0, 1, 0, 1)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("base", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_several_processes_need_an_address(base: dict[str, str], missing: str) -> None:
    with pytest.raises(
        TopologyError, match=r"^MASTER_ADDR and MASTER_PORT: expected the address of rank 0, got "
    ):  # fmt: skip
        detect({name: value for name, value in base.items() if name != missing})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"RANK": "first"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "?"}, "LOCAL_RANK"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_a_variable_that_is_no_number_is_named(change: dict[str, str], name: str) -> None:
    with pytest.raises(TopologyError, match=rf"^{name}: expected a number from the launcher, got "):
        detect(TORCHRUN | change)


def test_without_a_launcher_the_error_says_how_to_start() -> None:
    with pytest.raises(
        TopologyError, match=r"^SLURM_PROCID: .* got None\. Start with `fedpipe pre"
    ):
        detect({})


def test_the_processes_of_a_host_share_its_cores() -> None:
    assert threads_per_process(4, cores=32) == 8
    assert threads_per_process(3, cores=8) == 2
    assert threads_per_process(16, cores=2) == 1
    assert threads_per_process(0, cores=2) == 2


def test_slurm_says_how_many_cores_the_processes_of_a_node_share() -> None:
    tasks = {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1", "SLURM_CPUS_ON_NODE": "128"}
    cores = cores_from_slurm(tasks | {"SLURM_CPUS_PER_TASK": "8"})
    assert threads_per_process(4, cores=cores) == 8, "a process is a task"
    torchrun = {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": "32"}
    assert threads_per_process(4, cores=cores_from_slurm(torchrun)) == 8, "a task starts four"
    assert cores_from_slurm(tasks) == 128
    assert cores_from_slurm({}) == 0
    with pytest.raises(TopologyError, match="^SLURM_CPUS_PER_TASK: expected a number from the "):
        cores_from_slurm({"SLURM_CPUS_PER_TASK": "all"})


THREADS = "from fedpipe.distributed.env import threads_per_process"


def test_a_process_that_its_launcher_has_bound_uses_all_cores_it_was_given() -> None:
    """They are its share already: they are not divided once more."""
    cores = os.sched_getaffinity(0)
    one, count = {min(cores)}, len(cores)
    for launcher, own, local_world_size, expected in (
        (cores, one, count, 1),
        (cores, cores, 1, count),
        (cores, cores, count, 1),
        (one, one, 2, 1),
        (one, cores, 1, 1),  # the launcher's cores are what is divided
    ):
        call = f"threads_per_process({local_world_size})"
        assert launched(THREADS, call, launcher=launcher, own=own) == expected


def test_slurms_cores_count_before_the_launchers_and_never_more_than_a_process_may_use() -> None:
    cores = os.sched_getaffinity(0)
    for per_task, expected in ((1, 1), (999, len(cores))):
        job = {"SLURM_CPUS_PER_TASK": str(per_task)}
        call = "threads_per_process(1)"
        assert launched(THREADS, call, launcher=cores, own=cores, **job) == expected


@pytest.mark.parametrize(
    ("build", "variables"),
    [("2.13.0", {"DS_ACCELERATOR": "cpu"}), ("2.13.0+cpu", {}), ("2.13.0", {})],
)
def test_no_gpu_is_counted_where_torch_or_the_user_or_the_driver_has_none(
    build: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "version", lambda name: build)
    if not variables and build == "2.13.0" and env.gpus_of_driver():
        pytest.skip("this machine has GPUs")
    assert env.num_gpus({"CUDA_VISIBLE_DEVICES": "0,1"} | variables) == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("none", 0),
        ("0,1", 2),
        (" 2 , 0 ", 2),
        ("0,3,1", 1),  # CUDA stops at the first that is not there
        ("1,1", 1),
        ("0,NoDevFiles", 1),
        ("GPU-aa", 1),
        ("GPU-aa01,GPU-bb02", 2),
        ("GPU-ff", 0),
        ("MIG-1234,MIG-5678", 2),
    ],
)
def test_a_name_counts_as_a_gpu_only_where_there_is_one(names: str | None, expected: int) -> None:
    assert env.count_visible(names, ["GPU-aa01", "GPU-bb02", ""]) == expected
    assert env.count_visible(names, []) == 0


def test_gpus_are_those_of_the_drivers_files(tmp_path: Path) -> None:
    for minor in (0, 1, 10, 2):
        folder = tmp_path / "proc/driver/nvidia/gpus" / f"0000:{minor:02}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(
            f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n"
        )
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm"):  # of a container
        (tmp_path / "dev" / name).touch()
    assert env.gpus_of_driver(tmp_path) == ["GPU-0", "GPU-2", "GPU-10"]
    assert env.gpus_of_driver(tmp_path / "elsewhere") == []


def test_the_launcher_is_the_parent() -> None:
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    code = "from fedpipe.distributed.env import launcher_cores"
    assert launched(code, "launcher_cores()", launcher=one, own=cores) == one


def test_rank_0_hosts_the_store_unless_torchrun_does() -> None:
    first = TORCHRUN | {"RANK": "0"}
    assert detect(first).hosts_store and not detect(TORCHRUN).hosts_store
    assert not detect(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store
