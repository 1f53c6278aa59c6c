"""Bind a process to cores of its host. No torch.

Binding helps only on hosts with several NUMA nodes: there a process that changes sockets, or whose
threads are on both, reads its weights from the memory of another socket. On one NUMA node the
kernel's scheduler does as well, and lets a busy stage use the cores of one that waits. Nothing is
bound in a SLURM job, whose cores SLURM assigns (``--cpus-per-task``, ``--cpu-bind``), nor under a
launcher that binds (``deepspeed --bind_cores_to_rank``, ``torchrun --numa-binding``, ``numactl``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from fedpipe.distributed.env import ProcessEnv, launcher_cores, threads_per_process

NUMA_NODES = Path("/sys/devices/system/node")


def bind(env: ProcessEnv, *, numa_nodes: Path = NUMA_NODES) -> None:
    """Bind this process to its share of the host's cores, and set its number of threads.

    Call this before numpy or torch start threads: only the calling thread and those that it starts
    afterwards are bound, and OMP_NUM_THREADS, which is kept if it is set, is read once.

    Args:
        env: Rank of this process on its host.
        numa_nodes: Folder in which Linux describes the NUMA nodes.
    """
    cores = os.sched_getaffinity(0)
    if "SLURM_JOB_ID" not in os.environ and cores == launcher_cores():
        nodes = read_nodes(numa_nodes)
        share = cores_of(env.local_rank, env.local_world_size, cores=cores, nodes=nodes)
        if share != cores:
            os.sched_setaffinity(0, share)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(env.local_world_size)))


def cores_of(
    local_rank: int,
    local_world_size: int,
    *,
    cores: AbstractSet[int],
    nodes: Sequence[AbstractSet[int]],
) -> set[int]:
    """Return the cores of one process: an equal share, in the order of the NUMA nodes.

    Local ranks fill the nodes in order, as GPUs do (0-3 on the first socket, 4-7 on the second).

    Args:
        local_rank: Index of the process on its host.
        local_world_size: Processes of the run on this host.
        cores: Cores that all of them may use.
        nodes: Cores of each NUMA node.

    Returns:
        The share; all cores if they belong to one node, or if there are fewer than processes.
    """
    used = [sorted(node & cores) for node in nodes if node & cores]
    ordered = [core for node in used for core in node]
    if len(used) < 2 or not 0 <= local_rank < local_world_size <= len(ordered):
        return set(cores)
    first, last = (len(ordered) * rank // local_world_size for rank in (local_rank, local_rank + 1))
    return set(ordered[first:last])


def read_nodes(folder: Path) -> list[set[int]]:
    """Return the cores of each NUMA node in order; empty if Linux does not list them."""
    try:
        files = sorted(folder.glob("node[0-9]*/cpulist"), key=lambda f: int(f.parent.name[4:]))
        return [_parse(file.read_text(encoding="ascii")) for file in files]
    except (OSError, ValueError):
        return []


def _parse(cores: str) -> set[int]:
    """Parse a list of cores such as ``0-2,8``; a node without cores has an empty list."""
    result: set[int] = set()
    for part in filter(None, cores.strip().split(",")):
        first, _, last = part.partition("-")
        result |= set(range(int(first), int(last or first) + 1))
    return result
