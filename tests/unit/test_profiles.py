"""The profiles that users copy are ones that fedpipe submit takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpipe.distributed.topology import Grid
from fedpipe.launcher.profile import load_profile

PROFILES = sorted((Path(__file__).parents[2] / "slurm" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.name)
def test_a_profile_is_valid_and_keeps_two_stages_on_a_node(path: Path) -> None:
    profile = load_profile(str(path))
    grid = Grid(num_stages=2, num_replicas=8, data_parallel_degree=1)
    shape = profile.shape(grid)
    assert shape.nodes * shape.tasks_per_node == 16
    assert grid.edges_between_nodes(shape.tasks_per_node) == []
