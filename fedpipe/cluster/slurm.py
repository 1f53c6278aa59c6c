"""What SLURM says: the partitions of a site, and the state of a job. No torch, no submitit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpipe.cluster.profile import JobShape, Profile
from fedpipe.errors import ConfigError, FedPipeError, LaunchError, SchedulerError

_TIMEOUT_S = 60.0
_SINFO = "%P|%D|%c|%G|%l|%a"
_OF_JOB = (
    "SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SINFO_", "SQUEUE_", "SACCT_", "SCONTROL_", "SUBMITIT_",
)  # fmt: skip
"""Beginnings of variables that say what job or step the caller is, or that change answers."""
_OF_RANK = ("PMI", "OMPI_", "TORCHELASTIC_")
"""Beginnings of variables that say what rank the caller is; the others of them follow."""
_RANK = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK",
    "CROSS_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Say how to reach SLURM."""
_USER = ("ACCOUNT", "QOS", "RESERVATION", "WCKEY")
"""What a user's own settings may say to sbatch where a profile says nothing."""
_OF_ALLOCATION = (
    "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL",
)  # fmt: skip
"""SLURM sets them for a job with GPUs, and a job without would inherit them."""
_UNREACHED = re.compile(
    r"contact slurm|standby mode|timed out|Zero Bytes|Connection (?:refused|reset)"
    r"|temporarily|Protocol authentication|Transport endpoint"
)
"""In what sbatch says where it has not reached slurmctld, or where that has no time for it."""
_REFUSAL = re.compile(r"Batch job submission failed: (.+?)\. Mend ")
_AGAINST_SINFO = re.compile(r"^ConfigError: (\w+): expected .*\(sinfo\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeKind:
    """Equal nodes of a partition."""

    partition: str
    is_default: bool
    num_nodes: int
    cores: int
    gpus: int
    max_minutes: float
    is_up: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """A job as the controller, or the accounting, knows it."""

    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, ..."""
    reason: str = ""
    """Why it waits or has ended, in SLURM's word; empty for none."""
    nodes: str = ""
    restarts: int = 0

    @property
    def waits(self) -> bool:
        """It is in the queue: new, requeued, or held."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def runs(self) -> bool:
        """Its processes are there."""
        return self.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED")

    @property
    def has_ended(self) -> bool:
        """It will not run again by itself."""
        return not (self.waits or self.runs)


def check_site(profile: Profile, shape: JobShape) -> None:
    """Compare a job with what the site has, before it is submitted.

    Args:
        profile: Names a partition, or leaves it to the site.
        shape: What the job needs.

    Raises:
        ConfigError: SLURM is not there, there is no such partition, or it cannot hold the job.
    """
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        raise ConfigError(
            "--cluster: expected SLURM's sbatch and sinfo on PATH, got none. Run this on a login "
            "node, or set --cluster local."
        )
    kinds = _node_kinds()
    partition = profile.get("partition")
    names = sorted({kind.partition for kind in kinds})
    if partition is not None and partition not in names:
        raise ConfigError(
            f"slurm_partition: expected one of {', '.join(names)} (sinfo), got {partition!r} in "
            f"{profile.source}. Choose one."
        )
    if partition is None:
        partition = next((kind.partition for kind in kinds if kind.is_default), "")
        if not partition:
            raise ConfigError(
                f"slurm_partition: expected one of {', '.join(names)} (the site has no default), "
                f"got none in {profile.source}. Add it."
            )
    _check_fits(profile, shape, partition, [k for k in kinds if k.partition == partition])


def _check_fits(profile: Profile, shape: JobShape, partition: str, kinds: list[NodeKind]) -> None:
    where = f"of partition {partition} (sinfo)"
    cores = shape.tasks_per_node * shape.cpus_per_task
    most_gpus, most_cores = max(k.gpus for k in kinds), max(k.cores for k in kinds)
    if shape.gpus_per_node > most_gpus:
        raise ConfigError(
            f"gpus_per_node: expected at most the {most_gpus} that a node {where} has, got "
            f"{shape.gpus_per_node} in {profile.source}. Lower it and tasks_per_node, or choose "
            "another slurm_partition."
        )
    if cores > most_cores:
        raise ConfigError(
            f"cpus_per_task: expected tasks_per_node x cpus_per_task of at most the {most_cores} "
            f"cores that a node {where} has, got {shape.tasks_per_node} x {shape.cpus_per_task} in "
            f"{profile.source}. Lower one of them, or federation.num_replicas."
        )
    fitting = [k for k in kinds if k.gpus >= shape.gpus_per_node and k.cores >= cores]
    num_nodes = sum(kind.num_nodes for kind in fitting)
    if shape.nodes > num_nodes:
        raise ConfigError(
            f"tasks_per_node: expected a job of at most the {num_nodes} fitting nodes {where}, got "
            f"{shape} in {profile.source}. Raise tasks_per_node, or lower federation.num_replicas."
        )
    minutes, limit = profile.get("time", profile.get("timeout_min")), kinds[0].max_minutes
    if isinstance(minutes, int) and minutes > limit:
        raise ConfigError(
            f"timeout_min: expected at most the {limit:.0f} minutes {where}, got {minutes} in "
            f"{profile.source}. Lower it: the job requeues itself and goes on."
        )
    if not any(kind.is_up for kind in kinds):
        raise ConfigError(
            f"slurm_partition: expected one that takes jobs, got {partition!r} in "
            f"{profile.source}, which is not up (sinfo). Choose another, or wait."
        )


def _node_kinds() -> list[NodeKind]:
    kinds = []
    for line in _ask("sinfo", "--noheader", "-o", _SINFO).splitlines():
        partition, nodes, cores, gres, limit, available = line.strip().split("|")
        kinds.append(
            NodeKind(
                partition=partition.rstrip("*"),
                is_default=partition.endswith("*"),
                num_nodes=int(nodes),
                cores=int(cores.rstrip("+")),
                gpus=_gpus(gres),
                max_minutes=_minutes(limit),
                is_up=available == "up",
            )
        )
    return kinds


def _gpus(gres: str) -> int:
    """Count in ``gpu:a100:4(S:0-1),nvme:1``."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres)
    return sum(map(int, counts))


def _minutes(limit: str) -> float:
    """Minutes of SLURM's ``[days-]hours:minutes:seconds``; infinite where there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment that does not make a new process a rank of the caller's run.

    Args:
        environ: The caller's, which a torchrun, an mpirun or a job may have started.
    """
    return {
        name: value
        for name, value in environ.items()
        if name not in _RANK and not name.startswith(_OF_RANK)
    }


def login_environment(
    environ: Mapping[str, str], *, profile: Profile | None = None
) -> dict[str, str]:
    """Return what the caller's environment would be on a login node, outside of any job or rank.

    sbatch takes its variables before what a job's script says, and a job inherits what the caller
    has: an interactive allocation's memory per core would be the job's.

    Args:
        environ: The caller's.
        profile: Of the job; ``SBATCH_ACCOUNT`` and the like stay where it does not name one.
    """
    kept = set(_SITE)
    if profile is not None:
        kept |= {f"SBATCH_{name}" for name in _USER if profile.get(name.lower()) is None}
    dropped = _OF_ALLOCATION if "SLURM_JOB_ID" in environ else ()
    return {
        name: value
        for name, value in without_rank(environ).items()
        if name in kept or not (name in dropped or name.startswith(_OF_JOB))
    }


def job_state(job_id: str) -> JobState | None:
    """Ask the controller about a job, and the accounting once the controller has forgotten it.

    Args:
        job_id: ``4711``, or ``4711_3`` for a cell of an array.

    Returns:
        Its state; None if SLURM did not answer: the caller asks again.
    """
    try:
        fields = dict(
            re.findall(r"(\w+)=(\S*)", _ask("scontrol", "--oneliner", "show", "job", job_id))
        )
        if "JobState" in fields:
            reason = fields.get("Reason", "None")
            nodes = fields.get("NodeList", "(null)")
            return JobState(
                state=fields["JobState"],
                reason="" if reason == "None" else reason,
                nodes="" if nodes == "(null)" else nodes,
                restarts=int(fields.get("Restarts", 0)),
            )
    except LaunchError:
        pass
    try:
        answer = _ask(
            "sacct",
            "--noheader",
            "--allocations",
            "--parsable2",
            "-j",
            job_id,
            "-o",
            "State,NodeList",
        )
    except LaunchError:
        return None
    for line in answer.splitlines():
        state, nodes = line.split("|")[:2]
        return JobState(state=state.split()[0], nodes=nodes)  # "CANCELLED by 0"
    return None


def cells_in_queue(job_ids: Sequence[str]) -> set[str]:
    """Return which of some jobs, or cells of arrays, wait or run."""
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    if not arrays or shutil.which("squeue") is None:
        return set()
    try:
        answer = _ask("squeue", "--noheader", "--array", "-j", ",".join(arrays), "-o", "%i")
    except LaunchError:  # squeue forgets jobs that have ended
        return set()
    return set(answer.split()) & set(job_ids)


def job_from(folder: Path) -> str | None:
    """Return the user's job in the queue whose script was written into a folder; None for none.

    Args:
        folder: Holds the scripts of one run.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    for line in _ask("squeue", "--noheader", "--me", "-o", "%i %o").splitlines():
        job_id, _, script = line.partition(" ")
        if Path(script).parent.resolve() == folder.resolve():
            return job_id
    return None


def not_submitted(said: str, *, source: str) -> FedPipeError:
    """Return the error of a job that sbatch has not submitted.

    Args:
        said: Its messages.
        source: File of the profile.
    """
    text = " ".join(said.split())
    if _UNREACHED.search(text):
        return SchedulerError(f"sbatch: expected an answer, got: {text}. Ask the site.")
    return ConfigError(f"--profile: expected a job that SLURM takes, got: {text}. Mend {source}.")


def refusal_in(line: str) -> str:
    """Return why SLURM does not take a job, without a path or a host of the site.

    Args:
        line: What ``fedpipe submit`` has said last.

    Returns:
        SLURM's words, which are of a fixed list, or the key of the profile that does not fit what
        sinfo says; empty if the line is no refusal.
    """
    if found := _REFUSAL.search(line):
        return found[1]
    found = _AGAINST_SINFO.search(line)
    return f"{found[1]} of its profile does not fit" if found else ""


def _ask(*command: str) -> str:
    """Run a command of SLURM.

    Raises:
        SchedulerError: It failed or did not answer.
    """
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
            env=login_environment(os.environ),
        )
    except subprocess.CalledProcessError as error:
        what = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise SchedulerError(
            f"{command[0]}: expected an answer, got: {what}. Ask the site."
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(
            f"{command[0]}: expected an answer within {_TIMEOUT_S:.0f} s, got none. Try again."
        ) from None
    return result.stdout
