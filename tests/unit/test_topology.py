"""The grid: DeepSpeed's numbering, inverse mappings, groups that partition the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

from fedpipe.config.schema import FederationConfig, PipelineConfig, RunConfig
from fedpipe.distributed.topology import AXES, Grid, check_devices, check_gpus
from fedpipe.errors import TopologyError
from tests.helpers.cases import every

GRIDS = [Grid(s, r, d) for s, r, d in itertools.product((1, 2, 3), (1, 2, 4), (1, 2))]
COLOCATED = [Grid(g.num_stages, g.num_replicas, g.data_parallel_degree, True) for g in GRIDS]


def places(grid: Grid) -> list[tuple[int, int, int]]:
    return list(
        itertools.product(
            range(grid.num_stages), range(grid.num_replicas), range(grid.data_parallel_degree)
        )
    )


@every("grid", GRIDS)
def test_ranks_are_numbered_as_deepspeed_does(grid: Grid) -> None:
    from deepspeed.runtime.pipe.topology import ProcessTopology

    theirs = ProcessTopology(axes=["client", "data", "pipe"], dims=list(grid.dims))
    assert tuple(theirs.axes) == AXES
    assert grid.world_size == theirs.world_size()
    for stage, replica, data in places(grid):
        assert grid.rank(stage, replica, data) == theirs.get_rank(
            pipe=stage, client=replica, data=data
        )


@every("grid", GRIDS)
def test_coordinates_undo_rank(grid: Grid) -> None:
    for stage, replica, data in places(grid):
        assert grid.coordinates(grid.rank(stage, replica, data)) == ((stage,), replica, data)


@every("grid", COLOCATED)
def test_a_colocated_rank_holds_every_stage_of_its_replica(grid: Grid) -> None:
    assert grid.world_size == grid.num_replicas * grid.data_parallel_degree
    for stage, replica, data in places(grid):
        stages, *rest = grid.coordinates(grid.rank(stage, replica, data))
        assert stages == tuple(range(grid.num_stages))
        assert rest == [replica, data]


@every("grid", GRIDS)
def test_groups_of_either_axis_partition_the_ranks(grid: Grid) -> None:
    everyone = list(range(grid.world_size))
    replica_groups = [
        grid.replica_group(s, d)
        for s in range(grid.num_stages)
        for d in range(grid.data_parallel_degree)
    ]
    data_groups = [
        grid.data_group(s, r) for s in range(grid.num_stages) for r in range(grid.num_replicas)
    ]
    assert sorted(itertools.chain(*replica_groups)) == everyone
    assert sorted(itertools.chain(*data_groups)) == everyone
    for group in replica_groups:
        assert len({grid.coordinates(rank)[1] for rank in group}) == grid.num_replicas


def test_fedavg_never_joins_two_stages() -> None:
    grid = Grid(2, 2, 2)
    assert grid.replica_group(0, 1) == [2, 6]
    assert grid.replica_group(1, 0) == [1, 5]
    assert grid.data_group(1, 1) == [5, 7]


def crossing(chains: Sequence[Sequence[int]], node_of: Sequence[int]) -> int:
    """Neighbours in a chain of ranks that are on different nodes."""
    return sum(node_of[a] != node_of[b] for chain in chains for a, b in itertools.pairwise(chain))


def chains(grid: Grid) -> list[list[int]]:
    """The ranks of each pipeline, in the order of its stages."""
    return [
        [grid.rank(stage, replica, data) for stage in range(grid.num_stages)]
        for replica, data in itertools.product(*map(range, grid.dims[:2]))
    ]


@every("ranks_per_node", [1, 2, 3, 4, 6, 8])
@every("stages", [2, 3, 4, 8])
def test_pipelines_stay_inside_nodes_where_a_multiple_of_the_stages_fits(
    stages: int, ranks_per_node: int
) -> None:
    for replicas, data in ((1, 1), (3, 1), (4, 2), (16, 4)):
        grid = Grid(stages, replicas, data)
        edges = grid.edges_between_nodes(ranks_per_node)
        several = grid.world_size > ranks_per_node
        assert (not edges) == (ranks_per_node % stages == 0 or not several)
        node_of = [rank // ranks_per_node for rank in range(grid.world_size)]
        assert len(set(edges)) == len(edges) == crossing(chains(grid), node_of)
        assert not Grid(stages, replicas, data, colocate=True).edges_between_nodes(1)


@every("ranks_per_node", [2, 3, 4, 8])
@every(
    "grid",
    [Grid(*g) for g in ((2, 4, 1), (2, 3, 1), (2, 2, 2), (3, 2, 1), (4, 1, 2), (8, 1, 1))],
)
def test_no_other_order_of_the_ranks_has_fewer_edges_between_nodes(
    grid: Grid, ranks_per_node: int
) -> None:
    in_order = [rank // ranks_per_node for rank in range(grid.world_size)]
    pipelines = chains(grid)
    fewest = min(crossing(pipelines, order) for order in orders(in_order))
    assert len(grid.edges_between_nodes(ranks_per_node)) == fewest


def orders(nodes: list[int]) -> Iterator[list[int]]:
    """Every way to hand the places of some nodes to ranks."""
    if not nodes:
        yield []
    for node in sorted(set(nodes)):
        rest = list(nodes)
        rest.remove(node)
        yield from ([node, *others] for others in orders(rest))


def test_the_edges_between_nodes_are_named() -> None:
    assert Grid(3, 2, 1).edges_between_nodes(2) == [(1, 0, 0), (0, 1, 0)]
    assert Grid(2, 1, 2).edges_between_nodes(1) == [(0, 0, 0), (0, 0, 1)]


def test_a_gpu_that_two_ranks_share_is_refused_whatever_they_call_it() -> None:
    check_devices(["GPU-a", "GPU-b", "GPU-c"])
    with pytest.raises(
        TopologyError,
        match=r"^GPUs: expected one for each process, got ranks 1 and 3 on the same one\. Start ",
    ):
        check_devices(["GPU-a", "GPU-b", "GPU-c", "GPU-b"])


def test_heads_at_home_are_on_the_ranks_of_the_first_stage_and_need_none_of_their_own() -> None:
    grid = Grid(3, 2, 2, num_home_heads=2)
    assert grid.world_size == Grid(3, 2, 2).world_size
    for replica, data in itertools.product(range(2), range(2)):
        first = grid.rank(0, replica, data)
        assert grid.rank(3, replica, data) == grid.rank(4, replica, data) == first
        assert grid.coordinates(first) == ((0, 3, 4), replica, data)
    assert grid.coordinates(grid.rank(1, 1, 0)) == ((1,), 1, 0)
    assert Grid(2, 1, 1, colocate=True, num_home_heads=1).coordinates(0) == ((0, 1, 2), 0, 0)


def test_the_configuration_describes_the_grid() -> None:
    config = RunConfig(
        pipeline=PipelineConfig(cut=(1, 2)),
        federation=FederationConfig(num_replicas=3, data_parallel_degree=2),
    )
    grid = Grid.from_config(config)
    assert grid == Grid(3, 3, 2)
    assert grid.world_size == config.world_size == 18


def test_a_fitting_world_is_accepted() -> None:
    Grid(2, 4, 1).check_world_size(8)


def test_a_world_that_does_not_fit_names_the_arithmetic_and_two_ways_out() -> None:
    with pytest.raises(TopologyError) as caught:
        Grid(2, 4, 1).check_world_size(6)
    assert str(caught.value) == (
        "num_replicas (4) x num_stages (2) x data_parallel_degree (1) = 8 processes, but"
        " WORLD_SIZE is 6. Start 8, or set federation.num_replicas=3."
    )


def test_a_world_that_a_shell_has_exported_is_named_with_the_way_to_remove_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError) as caught:
        Grid(2, 2, 1).check_world_size(2)
    assert str(caught.value).endswith(
        "4 processes, but WORLD_SIZE is 2. Start 4, or set federation.num_replicas=1. RANK,"
        " WORLD_SIZE, MASTER_ADDR and MASTER_PORT make this process a rank of a launcher; if no"
        f" launcher has started it: unset {' '.join(left)}."
    )


def test_a_world_that_no_number_of_replicas_fits_has_one_way_out() -> None:
    with pytest.raises(TopologyError, match=r"but WORLD_SIZE is 5\. Start 8\.$"):
        Grid(2, 4, 1).check_world_size(5)
    with pytest.raises(TopologyError, match=r"1 process \(colocated stages\).*= 4 processes"):
        Grid(2, 4, 1, colocate=True).check_world_size(0)


def test_more_processes_than_gpus_are_refused_and_no_gpu_means_the_cpu() -> None:
    for num_processes, num_gpus in ((4, 0), (4, 4), (1, 8)):
        check_gpus(num_processes, num_gpus)
    with pytest.raises(TopologyError, match=r"found 1 for 4\..*DS_ACCELERATOR=cpu"):
        check_gpus(4, 1)
