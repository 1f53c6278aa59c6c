"""A process' share of its host's cores: by NUMA node, and only where nobody else has decided."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedpipe.distributed.binding import NUMA_NODES, cores_of, read_nodes
from tests.helpers.affinity import launched

TWO_SOCKETS = [set(range(64)), set(range(64, 128))]
ENV = "rank={0}, world_size=2, local_rank={0}, local_world_size=2, rendezvous='tcp://127.0.0.1:1'"


def shares(count: int, *, cores: set[int], nodes: list[set[int]]) -> list[set[int]]:
    return [cores_of(rank, count, cores=cores, nodes=nodes) for rank in range(count)]


@pytest.mark.parametrize("count", [2, 4, 8, 16, 128])
def test_local_ranks_fill_the_sockets_in_order_and_none_spans_two(count: int) -> None:
    cores = set(range(128))
    result = shares(count, cores=cores, nodes=TWO_SOCKETS)
    assert result[0] == set(range(128 // count))
    for rank, share in enumerate(result):
        assert len(share) == 128 // count
        assert share <= TWO_SOCKETS[rank // (count // 2)]
    assert set().union(*result) == cores


@pytest.mark.parametrize("count", [3, 5, 7])
def test_cores_that_cannot_be_divided_are_all_used_and_none_twice(count: int) -> None:
    result = shares(count, cores=set(range(128)), nodes=TWO_SOCKETS)
    assert sorted(core for share in result for core in share) == list(range(128))
    assert max(map(len, result)) - min(map(len, result)) <= 1


def test_the_two_threads_of_a_core_go_to_the_socket_that_they_are_on() -> None:
    """Linux numbers the second thread of every core after all first ones."""
    nodes = [{*range(4), *range(8, 12)}, {*range(4, 8), *range(12, 16)}]
    assert shares(4, cores=set(range(16)), nodes=nodes) == [
        {0, 1, 2, 3}, {8, 9, 10, 11}, {4, 5, 6, 7}, {12, 13, 14, 15}
    ]  # fmt: skip


def test_a_mask_with_holes_is_shared_and_never_left() -> None:
    cores = {1, 5, 6, 63, 64, 90, 91, 127, 200}
    for mask in (cores, cores - {200}):  # no node has core 200
        assert shares(4, cores=mask, nodes=TWO_SOCKETS) == [
            {1, 5}, {6, 63}, {64, 90}, {91, 127}
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "cores", "nodes"),
    [
        (8, set(range(64)), TWO_SOCKETS),  # the mask is on one socket
        (8, set(range(64)), [set(range(64))]),
        (3, {0, 64}, TWO_SOCKETS),  # fewer cores than processes
        (2, set(range(128)), []),  # no /sys
        (1, set(range(128)), TWO_SOCKETS),
    ],
)
def test_where_it_does_not_pay_every_process_keeps_all_cores(
    count: int, cores: set[int], nodes: list[set[int]]
) -> None:
    assert shares(count, cores=cores, nodes=nodes) == [cores] * count


def test_a_local_rank_beyond_the_host_keeps_all_cores() -> None:
    """A launcher that says nothing about hosts: the global rank stands for the local one."""
    cores = set(range(128))
    assert cores_of(9, 4, cores=cores, nodes=TWO_SOCKETS) == cores


def layout(folder: Path, *nodes: str) -> Path:
    for number, cores in enumerate(nodes):
        (folder / f"node{number}").mkdir(parents=True)
        (folder / f"node{number}" / "cpulist").write_text(f"{cores}\n")
    (folder / "has_cpu").write_text("0-1")
    return folder


def test_linux_description_of_the_nodes_is_read_in_the_order_of_their_numbers(
    tmp_path: Path,
) -> None:
    nodes = [f"{n},{100 + n}-{101 + n}" for n in range(11)]
    assert read_nodes(layout(tmp_path, *nodes, "")) == [
        *({n, 100 + n, 101 + n} for n in range(11)), set()
    ]  # fmt: skip


def test_a_description_that_is_missing_or_damaged_counts_as_none(tmp_path: Path) -> None:
    assert read_nodes(tmp_path / "nothing") == []
    assert read_nodes(layout(tmp_path, "0-1", "?")) == []


def test_this_machine_describes_the_cores_that_it_has() -> None:
    if NUMA_NODES.is_dir():
        assert set().union(*read_nodes(NUMA_NODES)) >= os.sched_getaffinity(0)


def bound(
    numa_nodes: Path, *, launcher: set[int] | None = None, job: dict[str, str] | None = None
) -> list[tuple[set[int], str]]:
    """Affinity and OMP_NUM_THREADS of two processes after ``bind``."""
    cores = os.sched_getaffinity(0)
    imports = (
        "from pathlib import Path; from fedpipe.distributed.binding import bind;"
        "from fedpipe.distributed.env import ProcessEnv;"
    )
    return [
        launched(
            f"{imports} bind(ProcessEnv({ENV.format(rank)}), numa_nodes=Path({str(numa_nodes)!r}))",
            "(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])",
            launcher=launcher or cores,
            own=cores,
            **(job or {}),
        )
        for rank in range(2)
    ]


@pytest.fixture
def cores() -> list[int]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core: there is nothing to share")
    return cores


@pytest.fixture
def two_nodes(cores: list[int], tmp_path: Path) -> Path:
    half = len(cores) // 2
    return layout(
        tmp_path / "two", *(",".join(map(str, part)) for part in (cores[:half], cores[half:]))
    )


def test_a_process_is_bound_to_its_node_and_starts_as_many_threads(
    two_nodes: Path, cores: list[int]
) -> None:
    result = bound(two_nodes)
    shares = [share for share, _ in result]
    assert shares[0] | shares[1] == set(cores) and not shares[0] & shares[1]
    assert max(shares[0]) < min(shares[1])
    assert [threads for _, threads in result] == [str(len(cores) // 2)] * 2


def test_slurm_owns_the_cores_of_its_jobs(two_nodes: Path, cores: list[int]) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "2"}
    assert bound(two_nodes, job=job) == [(set(cores), "1")] * 2


def test_a_process_with_other_cores_than_its_launcher_was_bound_and_stays_so(
    two_nodes: Path, cores: list[int]
) -> None:
    result = bound(two_nodes, launcher={cores[0]})
    assert [share for share, _ in result] == [set(cores)] * 2


def test_on_one_node_and_without_a_description_nothing_is_bound(
    cores: list[int], tmp_path: Path
) -> None:
    one = layout(tmp_path / "one", ",".join(map(str, cores)))
    for folder in (one, tmp_path / "nothing"):
        assert [share for share, _ in bound(folder)] == [set(cores)] * 2


def test_threads_that_the_user_has_chosen_stay(two_nodes: Path) -> None:
    assert [threads for _, threads in bound(two_nodes, job={"OMP_NUM_THREADS": "7"})] == ["7", "7"]
