"""Who this process is: the same answer under fedpipe's own launcher, torchrun, deepspeed and srun.

Pure: reads environment variables, imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

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
    """A ``tcp`` rendezvous is at this process, and no launcher answers there already."""
    attempt: int = 0
    """Restart count: keys of an earlier attempt's store are never read."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of a ``tcp`` rendezvous."""
        host, _, port = self.rendezvous.partition("://")[2].rpartition(":")
        return host, int(port)


def detect(environ: Mapping[str, str] = os.environ) -> ProcessEnv:
    """Read rank and rendezvous from the launcher's variables.

    Understands RANK/WORLD_SIZE/MASTER_ADDR/MASTER_PORT (torchrun, deepspeed, submitit's
    ``TorchDistributedEnvironment``) and SLURM_PROCID/SLURM_NTASKS (srun, with MASTER_ADDR and
    MASTER_PORT set by the job script).

    Args:
        environ: The environment.

    Returns:
        This process' place in the run.

    Raises:
        TopologyError: A variable is missing or not a number.
    """
    names = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "RANK" in environ
        else ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    )
    rank, world_size = (_number(environ, name) for name in names[:2])
    local_rank = _number(environ, names[2], default=rank)
    local_world_size = _number(environ, names[3], default=world_size)
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
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", default=0),
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


def threads_per_process(local_world_size: int, *, cores: int | None = None) -> int:
    """Intra-op threads for one process, so that a host's processes do not fight for its cores."""
    cores = cores or len(os.sched_getaffinity(0))
    return max(1, cores // max(1, local_world_size))
