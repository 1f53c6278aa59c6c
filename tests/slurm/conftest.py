"""One cluster for the session, emptied after every test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """2 nodes x 4 CPUs x 2 pretended GPUs; nothing of it may outlive the session."""
    # Not pytest's own folder: its name is too long for unix sockets.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder).resolve() / "cluster")
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
        assert cluster.leftovers() == []


@pytest.fixture(autouse=True)
def _cleared(cluster: Cluster) -> Iterator[None]:
    """The jobs of a test end with it, and failed nodes return, whether it has passed or not."""
    yield
    cluster.clear()
