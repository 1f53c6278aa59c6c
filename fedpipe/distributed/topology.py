"""The process grid: which rank holds which stage of which replica. No torch.

Axes are ``client``, ``data``, ``pipe`` in this order, row-major: ranks are numbered exactly as by
``deepspeed.runtime.pipe.topology.ProcessTopology(["client", "data", "pipe"], [...])``. The
``client`` coordinate is a replica: a physical pipeline that hosts one client at a time. ``data``
counts the ranks *inside* a replica's stage that share one client's batch. Different clients are
never on the ``data`` axis, because DeepSpeed averages gradients there.

``pipe`` is the fastest axis because it has the most traffic: activations are sent for every
micro-batch, gradients over ``data`` once per local step, weights over ``client`` once per round.
Launchers number ranks node by node (srun does so without ``--distribution=cyclic``). So the stages
of a pipeline have neighbouring ranks, and share a node if its number of ranks is a multiple of the
number of stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpipe.distributed.env import is_rank, why_a_rank
from fedpipe.errors import TopologyError

if TYPE_CHECKING:
    from fedpipe.config.federation import FederationConfig
    from fedpipe.config.schema import PipelineConfig, RunConfig

AXES = ("client", "data", "pipe")
"""Axis names, slowest first."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Processes of a run, ``num_stages x num_replicas x data_parallel_degree``.

    With ``colocate`` all stages of a replica are threads of one process: the ``pipe`` axis has one
    coordinate, and every stage of a replica has the same rank. Heads at the client (U-shape) are
    virtual stages, numbered from ``num_stages`` on, on the ranks of stage 0.
    """

    num_stages: int
    """Stages with a part of the encoder."""
    num_replicas: int
    data_parallel_degree: int
    colocate: bool = False
    num_home_heads: int = 0

    @classmethod
    def from_config(cls, config: RunConfig) -> Grid:
        """Return the grid of a configuration."""
        return cls.of(config.pipeline, config.federation)

    @classmethod
    def of(cls, pipeline: PipelineConfig, federation: FederationConfig) -> Grid:
        """Return the grid of a pipeline and its replicas."""
        return cls(
            num_stages=pipeline.num_stages,
            num_replicas=federation.num_replicas,
            data_parallel_degree=federation.data_parallel_degree,
            colocate=pipeline.colocate,
            num_home_heads=pipeline.num_home_heads,
        )

    @property
    def num_virtual_stages(self) -> int:
        """Stages including heads at the client."""
        return self.num_stages + self.num_home_heads

    @property
    def dims(self) -> tuple[int, int, int]:
        """Processes along ``AXES``."""
        pipe = 1 if self.colocate else self.num_stages
        return self.num_replicas, self.data_parallel_degree, pipe

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return math.prod(self.dims)

    def rank(self, stage: int, replica: int, data: int) -> int:
        """Return the rank that holds a stage of a replica.

        Args:
            stage: Stage index, below ``num_virtual_stages``.
            replica: Replica index.
            data: Index among the ranks that share the replica's batch.

        Returns:
            The global rank.
        """
        assert 0 <= stage < self.num_virtual_stages, stage
        assert 0 <= replica < self.num_replicas, replica
        assert 0 <= data < self.data_parallel_degree, data
        pipe = 0 if self.colocate or stage >= self.num_stages else stage
        return (replica * self.data_parallel_degree + data) * self.dims[-1] + pipe

    def coordinates(self, rank: int) -> tuple[tuple[int, ...], int, int]:
        """Return ``(stages, replica, data)`` of a rank.

        Args:
            rank: Global rank.

        Returns:
            The stages that the rank holds, its replica and its data index. A rank holds one stage,
            that of stage 0 also the heads at the client, and with ``colocate`` all stages.
        """
        assert 0 <= rank < self.world_size, rank
        rest, pipe = divmod(rank, self.dims[-1])
        replica, data = divmod(rest, self.data_parallel_degree)
        stages = tuple(range(self.num_stages)) if self.colocate else (pipe,)
        if pipe == 0:
            stages += tuple(range(self.num_stages, self.num_virtual_stages))
        return stages, replica, data

    def replica_group(self, stage: int, data: int) -> list[int]:
        """Return the ranks that average a stage: the same stage and data index of every replica."""
        return [self.rank(stage, replica, data) for replica in range(self.num_replicas)]

    def replica_ranks(self, replica: int) -> list[int]:
        """Return the ranks of a replica: all of its stages and data indices."""
        size = math.prod(self.dims[1:])
        return list(range(replica * size, (replica + 1) * size))

    def data_group(self, stage: int, replica: int) -> list[int]:
        """Return the ranks that share a replica's batch on one stage."""
        return [self.rank(stage, replica, data) for data in range(self.data_parallel_degree)]

    def edges_between_nodes(self, ranks_per_node: int) -> list[tuple[int, int, int]]:
        """Return the pipeline edges between two nodes, if nodes hold consecutive ranks.

        Args:
            ranks_per_node: Processes on every node; the last node may have fewer.

        Returns:
            ``(stage, replica, data)`` of every process that sends activations to another node.
        """
        return [
            (stage, replica, data)
            for replica, data, stage in itertools.product(
                *map(range, self.dims[:-1]), range(self.num_stages - 1)
            )
            if self.rank(stage, replica, data) // ranks_per_node
            != self.rank(stage + 1, replica, data) // ranks_per_node
        ]

    def check_world_size(self, world_size: int) -> None:
        """Check that the number of processes fills the grid.

        Args:
            world_size: Processes that were started.

        Raises:
            TopologyError: The number differs from the grid's.
        """
        if world_size == self.world_size:
            return
        _, data, pipe = self.dims
        stages = "1 process (colocated stages)" if self.colocate else f"num_stages ({pipe})"
        way_out = f"Start {self.world_size}"
        if world_size > 0 and world_size % (pipe * data) == 0:
            way_out += f", or set federation.num_replicas={world_size // (pipe * data)}"
        if is_rank():
            way_out += f". {why_a_rank()}"
        raise TopologyError(
            f"num_replicas ({self.num_replicas}) x {stages} x data_parallel_degree ({data})"
            f" = {self.world_size} processes, but WORLD_SIZE is {world_size}. {way_out}."
        )


_ONE_GPU_EACH = (
    "Start at most as many processes on a host as it has GPUs (federation.num_replicas), put all"
    " stages of a replica into one with pipeline.colocate=true, or set DS_ACCELERATOR=cpu."
)


def check_gpus(num_processes: int, num_gpus: int) -> None:
    """Check that a host has a GPU for each of its processes, before any of them starts.

    Args:
        num_processes: Processes of the run on this host.
        num_gpus: GPUs that they may use; 0 means that they use the CPU.

    Raises:
        TopologyError: There are more processes than GPUs.
    """
    if 0 < num_gpus < num_processes:
        raise TopologyError(
            f"GPUs: expected one for each process, found {num_gpus} for {num_processes}."
            f" {_ONE_GPU_EACH}"
        )


def check_devices(devices: Sequence[str]) -> None:
    """Check that no two processes share a GPU, which NCCL does not support.

    UUIDs are compared, because it depends on the launcher whether a process sees all GPUs of its
    host or only one, which it then numbers 0.

    Args:
        devices: UUID of every rank's GPU.

    Raises:
        TopologyError: Two ranks have the same GPU.
    """
    for rank, device in enumerate(devices):
        first = devices.index(device)
        if first != rank:
            raise TopologyError(
                f"GPUs: expected one for each process, got ranks {first} and {rank} on the same"
                f" one. {_ONE_GPU_EACH}"
            )
