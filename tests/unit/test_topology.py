"""The grid: DeepSpeed's numbering, inverse mappings, groups that partition the ranks."""

from __future__ import annotations

import itertools

import pytest

from fedpipe.config.schema import FederationConfig, PipelineConfig, RunConfig
from fedpipe.distributed.topology import AXES, Grid
from fedpipe.errors import TopologyError

GRIDS = [Grid(s, r, d) for s, r, d in itertools.product((1, 2, 3), (1, 2, 4), (1, 2))]
COLOCATED = [Grid(g.num_stages, g.num_replicas, g.data_parallel_degree, True) for g in GRIDS]


def places(grid: Grid) -> list[tuple[int, int, int]]:
    return list(
        itertools.product(
            range(grid.num_stages), range(grid.num_replicas), range(grid.data_parallel_degree)
        )
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranks_are_numbered_as_deepspeed_does(grid: Grid) -> None:
    from deepspeed.runtime.pipe.topology import ProcessTopology

    theirs = ProcessTopology(axes=list(AXES), dims=list(grid.dims))
    assert grid.world_size == theirs.world_size()
    for stage, replica, data in places(grid):
        assert grid.rank(stage, replica, data) == theirs.get_rank(
            pipe=stage, client=replica, data=data
        )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_coordinates_undo_rank(grid: Grid) -> None:
    for stage, replica, data in places(grid):
        assert grid.coordinates(grid.rank(stage, replica, data)) == ((stage,), replica, data)


@pytest.mark.parametrize("grid", COLOCATED, ids=str)
def test_a_colocated_rank_holds_every_stage_of_its_replica(grid: Grid) -> None:
    assert grid.world_size == grid.num_replicas * grid.data_parallel_degree
    for stage, replica, data in places(grid):
        stages, *rest = grid.coordinates(grid.rank(stage, replica, data))
        assert stages == tuple(range(grid.num_stages))
        assert rest == [replica, data]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
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
    assert grid.replica_group(0, 1) == [1, 3]
    assert grid.replica_group(1, 0) == [4, 6]
    assert grid.data_group(1, 1) == [6, 7]


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


def test_a_world_that_no_number_of_replicas_fits_has_one_way_out() -> None:
    with pytest.raises(TopologyError, match=r"but WORLD_SIZE is 5\. Start 8\.$"):
        Grid(2, 4, 1).check_world_size(5)
    with pytest.raises(TopologyError, match=r"1 process \(colocated stages\).*= 4 processes"):
        Grid(2, 4, 1, colocate=True).check_world_size(0)
