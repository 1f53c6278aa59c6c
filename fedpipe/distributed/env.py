"""Rank, rendezvous, cores and GPUs of this process, under every launcher.

Reads environment variables and the system's files; imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedpipe.errors import TopologyError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessEnv:
    """Rank and rendezvous of one process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Processes of the run on this host; they share its cores."""
    rendezvous: str
    """``file:///PATH`` (one host) or ``tcp://HOST:PORT``."""
    hosts_store: bool = False
    """This process hosts the store of a ``tcp`` rendezvous; no launcher does."""
    attempt: int = 0
    """Number of restarts; keys that an earlier attempt left in the store are never read."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of a ``tcp`` rendezvous."""
        host, _, port = self.rendezvous.partition("://")[2].rpartition(":")
        return host, int(port)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Put the environment of this process back afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def detect(environ: Mapping[str, str] = os.environ) -> ProcessEnv:
    """Read rank and rendezvous from the launcher's variables.

    Understands RANK/WORLD_SIZE/MASTER_ADDR/MASTER_PORT (torchrun, deepspeed, submitit's
    ``TorchDistributedEnvironment``) and SLURM_PROCID/SLURM_NTASKS (srun, with MASTER_ADDR and
    MASTER_PORT set by the job script). If the launcher does not give the number of processes on the
    host, all processes are assumed to be on one host.

    Args:
        environ: The environment.

    Returns:
        Rank and rendezvous of this process.

    Raises:
        TopologyError: A variable is missing or not a number.
    """
    if "RANK" in environ:
        rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local_rank = _number(environ, "LOCAL_RANK", default=rank)
        of_deepspeed = _number(environ, "LOCAL_SIZE", default=world_size)
        local_world_size = _number(environ, "LOCAL_WORLD_SIZE", default=of_deepspeed)
    else:
        rank, world_size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
        local_rank = _number(environ, "SLURM_LOCALID", default=rank)
        local_world_size = _tasks_on_node(environ, default=world_size)
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if world_size > 1 and not (host and port):
        raise TopologyError(
            "MASTER_ADDR and MASTER_PORT: expected the address of rank 0, got none. Start with "
            "`fedpipe pretrain`, torchrun or deepspeed, or export both in the job script."
        )
    return ProcessEnv(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        rendezvous=f"tcp://{host or '127.0.0.1'}:{port or 0}",
        hosts_store=rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=_number(
            environ,
            "TORCHELASTIC_RESTART_COUNT",
            default=_number(environ, "SLURM_RESTART_COUNT", default=0),
        ),
    )


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of several ranks that are to meet.

    It is one where the address of rank 0 is exported (MASTER_ADDR, MASTER_PORT) and the launcher
    has numbered several processes: RANK and WORLD_SIZE of torchrun or deepspeed, or SLURM_PROCID
    in a step of srun, whose size is SLURM_STEP_NUM_TASKS. salloc and sbatch number no processes:
    what is typed there, or in a step of one task such as ``srun --pty bash``, starts its own ranks.

    Args:
        environ: The environment.

    Raises:
        TopologyError: A variable is not a number.
    """
    if not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        return False
    if "RANK" in environ:
        return _number(environ, "WORLD_SIZE", default=1) > 1
    return "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1


def why_a_rank(environ: Mapping[str, str] = os.environ) -> str:
    """Say which variables make this process one of several ranks, and how to remove them.

    A shell may still have variables that an earlier launcher or script has exported.

    Args:
        environ: The environment.
    """
    numbers = ("RANK", "WORLD_SIZE") if "RANK" in environ else ("SLURM_PROCID", "SLURM_NTASKS")
    names = (*numbers, "MASTER_ADDR", "MASTER_PORT")
    return (
        f"{', '.join(names[:-1])} and {names[-1]} make this process a rank of a launcher; if no "
        f"launcher has started it: unset {' '.join(names)}"
    )


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise TopologyError(
            f"{name}: expected a number from the launcher, got {value!r}. Start with "
            "`fedpipe pretrain`, torchrun or deepspeed."
        ) from None


def _tasks_on_node(environ: Mapping[str, str], *, default: int) -> int:
    """Return the SLURM tasks on this node; a list ``2(x3),1`` means 2 on three nodes, then 1."""
    text = environ.get("SLURM_TASKS_PER_NODE")
    if text is None:
        return default
    node = _number(environ, "SLURM_NODEID", default=0)
    counts = [
        int(count)
        for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(nodes or 1))
    ]
    if node >= len(counts):
        raise TopologyError(
            f"SLURM_TASKS_PER_NODE: expected a number for node {node}, got {text!r}. Start with "
            "srun, or leave it unset."
        )
    return counts[node]


def threads_per_process(local_world_size: int, *, cores: int | None = None) -> int:
    """Return the intra-op threads for one process, so that all processes together fit the cores.

    Args:
        local_world_size: Processes of the run on this host.
        cores: Cores that they share. None takes SLURM's cores of the job on this node, or outside
            of SLURM the launcher's cores, and limits the threads to the cores of this process.

    Returns:
        At least 1.

    Raises:
        TopologyError: A variable of SLURM is not a number.
    """
    if cores is not None:
        return max(1, cores // max(1, local_world_size))
    shared = cores_from_slurm() or len(launcher_cores())
    return min(len(os.sched_getaffinity(0)), threads_per_process(local_world_size, cores=shared))


def num_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs that processes of this host may use, without importing torch.

    Returns:
        The number; 0 if ``DS_ACCELERATOR`` is "cpu" or torch is the build for CPUs.
    """
    if environ.get("DS_ACCELERATOR") == "cpu" or version("torch").endswith("+cpu"):
        return 0
    return count_visible(environ.get("CUDA_VISIBLE_DEVICES"), gpus_of_driver())


def gpus_of_driver(root: Path = Path("/")) -> list[str]:
    """Return the UUIDs of this host's GPUs in the driver's order, "" for an unknown one."""
    paths = [path for path in root.glob("dev/nvidia[0-9]*") if path.name[6:].isdigit()]
    uuids = {}
    for file in root.glob("proc/driver/nvidia/gpus/*/information"):
        fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", file.read_text("utf-8"), re.M))
        uuids[fields.get("Device Minor", "")] = fields.get("GPU UUID", "")
    minors = sorted((path.name[6:] for path in paths), key=int)
    return [uuids.get(minor, "") for minor in minors]


def count_visible(names: str | None, gpus: Sequence[str]) -> int:
    """Count the GPUs that ``CUDA_VISIBLE_DEVICES`` makes visible, as CUDA counts them.

    Args:
        names: Indices, UUIDs or their beginnings, and MIG devices, separated by commas; None if the
            variable is not set.
        gpus: UUIDs from ``gpus_of_driver``.

    Returns:
        The number of names before the first one that is unknown or repeated. A MIG device counts if
        there is any GPU, because the driver's files do not list MIG devices.
    """
    if names is None:
        return len(gpus)
    seen: set[str] = set()
    for name in (part.strip() for part in names.split(",")):
        if name.isdecimal():
            exists = int(name) < len(gpus)
            name = str(int(name))
        elif name.startswith("MIG-"):
            exists = bool(gpus)
        else:
            exists = name.startswith("GPU-") and any(uuid.startswith(name) for uuid in gpus)
        if not exists or name in seen:
            break
        seen.add(name)
    return len(seen)


def cores_from_slurm(environ: Mapping[str, str] = os.environ) -> int:
    """Return the cores of a SLURM job on this node; 0 outside of SLURM.

    SLURM counts cores per task, and torchrun is one task that starts several processes.
    """
    if "SLURM_CPUS_PER_TASK" in environ:
        return _number(environ, "SLURM_CPUS_PER_TASK") * _tasks_on_node(environ, default=1)
    return _number(environ, "SLURM_CPUS_ON_NODE", default=0)


def launcher_cores() -> set[int]:
    """Return the cores of the parent process: more than this one's if it has bound this process."""
    try:
        return os.sched_getaffinity(os.getppid())
    except OSError:  # the parent has ended
        return os.sched_getaffinity(0)
