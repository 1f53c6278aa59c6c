"""Job profiles: what a site calls its nodes, and how many of them a grid needs. No torch.

A profile is a YAML file of submitit's own parameters (``AutoExecutor.update_parameters``), so all
that submitit and sbatch offer can be said in it. ``nodes`` is missing: it follows from the grid.
"""

from __future__ import annotations

import difflib
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpipe.config.tree import parse, read_text
from fedpipe.distributed.topology import Grid
from fedpipe.errors import ConfigError, TopologyError
from fedpipe.report.format import count

_OURS = ("nodes", "name", "slurm_array_parallelism")
"""Parameters of submitit that follow from the run."""
_WHOLE = ("timeout_min", "tasks_per_node", "gpus_per_node", "cpus_per_task")
SIGNAL_DELAY_S = 120
"""Seconds between the warning signal and the end of the time, where a profile says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobShape:
    """Nodes of a job and what each of them gives."""

    nodes: int
    tasks_per_node: int
    """Ranks per node."""
    gpus_per_node: int
    cpus_per_task: int

    def __str__(self) -> str:
        """Say it in words."""
        gpus = f" x {count(self.gpus_per_node, 'GPU')}" if self.gpus_per_node else ""
        cores = count(self.cpus_per_task, "core")
        tasks = count(self.tasks_per_node, "rank")
        return f"{count(self.nodes, 'node')} x {tasks} x {cores}{gpus}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A checked profile."""

    source: str
    """The file, for errors; empty for the defaults that need no scheduler."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """By submitit's names."""

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a parameter; one for SLURM only wins over the general one."""
        return self.parameters.get(f"slurm_{name}", self.parameters.get(name, default))

    def shape(self, grid: Grid, *, workers: int = 1) -> JobShape:
        """Return how many nodes a grid takes.

        Args:
            grid: The processes.
            workers: Processes that each of them starts itself, on its own node; each takes what the
                profile gives a rank.

        Returns:
            Full nodes, or a part of a single one.

        Raises:
            TopologyError: The grid does not divide into nodes.
        """
        world_size = grid.world_size
        per_node = self.get("tasks_per_node", world_size)
        tasks = min(per_node, world_size)
        if world_size % tasks:
            fitting = max(n for n in range(1, per_node + 1) if world_size % n == 0)
            raise TopologyError(
                f"tasks_per_node: expected a divisor of the {world_size} processes of "
                f"{grid.num_replicas} replicas, got {per_node} in {self.source}. Set "
                f"{self._replicas_that_fit(grid, per_node)}tasks_per_node: {fitting}."
            )
        gpus = self.get("gpus_per_node", 0)
        return JobShape(
            nodes=world_size // tasks,
            tasks_per_node=tasks,
            gpus_per_node=min(gpus, tasks * workers) if tasks < per_node or workers > 1 else gpus,
            cpus_per_task=self.get("cpus_per_task", 1) * workers,
        )

    @staticmethod
    def _replicas_that_fit(grid: Grid, per_node: int) -> str:
        per_replica = grid.world_size // grid.num_replicas
        replicas = next(
            (r for r in range(grid.num_replicas, 0, -1) if r * per_replica % per_node == 0), None
        )
        return f"federation.num_replicas={replicas}, or " if replicas else ""


def load_profile(path: str) -> Profile:
    """Read a profile and check every key and value that can be checked without a scheduler.

    Args:
        path: YAML file.

    Returns:
        The profile.

    Raises:
        ConfigError: A key that submitit does not know, a value of a wrong type, or a missing limit.
    """
    tree = parse(read_text(path, option="--profile"), source=path)
    for name, node in tree.value.items():
        where = f"{name}: "
        if name.removeprefix("slurm_") in _OURS:
            raise ConfigError(
                f"{where}expected a profile without it (it follows from the run), got it in "
                f"{node.where}. Remove it."
            )
        if name.removeprefix("slurm_") in _WHOLE:
            least = 0 if name.endswith("gpus_per_node") else 1
            if type(node.value) is not int or node.value < least:
                raise ConfigError(
                    f"{where}expected a whole number, {least} or more, got {node.plain()!r} in "
                    f"{node.where}. Write digits only."
                )
        _check_submitit_knows(name, node.plain(), where=node.where)
    profile = Profile(source=path, parameters=tree.plain())
    if profile.get("timeout_min") is None and profile.get("time") is None:
        raise ConfigError(
            f"timeout_min: expected the job's time limit in minutes, got none in {path}. Add "
            "timeout_min: 1440."
        )
    tasks, gpus = profile.get("tasks_per_node"), profile.get("gpus_per_node", 0)
    if gpus and (tasks is None or tasks > gpus):
        raise ConfigError(
            f"gpus_per_node: expected one GPU per rank ({tasks} ranks per node), got {gpus} in "
            f"{path}. Set tasks_per_node: {gpus}."
        )
    return profile


def _check_submitit_knows(name: str, value: Any, *, where: str) -> None:
    """Let submitit itself judge one parameter."""
    import submitit

    with tempfile.TemporaryDirectory() as folder:
        executor = submitit.AutoExecutor(folder, cluster="debug")
        try:
            with warnings.catch_warnings(action="error", category=UserWarning):
                executor.update_parameters(**{name: value})
        except AssertionError:
            kind = "a number" if name == "mem_gb" else "true or false"
            raise ConfigError(
                f"{name}: expected {kind}, got {value!r} in {where}. Mend the value."
            ) from None
        except (NameError, ValueError, UserWarning) as error:
            raise ConfigError(
                f"{name}: unknown to submitit, in {where}. {_suggestion(name, str(error))}"
            ) from None


def _suggestion(name: str, explanation: str) -> str:
    renamed = re.search(r"Use '(\w+)' instead", explanation)
    if renamed:
        return f"Did you mean {renamed[1]}?"
    listed = re.search(r"Valid arguments: (.*)", explanation)
    general = re.search(r"parameters are: \{(.*)\}", explanation)
    names = [f"slurm_{x}" for x in listed[1].split(", ")] if listed else []
    names += re.findall(r"'(\w+)':", general[1]) if general else []
    close = difflib.get_close_matches(name, [n for n in names if n not in _OURS], n=1)
    if close:
        return f"Did you mean {close[0]}?"
    prefixed = f"slurm_{name}"
    return (
        f"Options of sbatch start with slurm_, as in {prefixed}, or go into "
        "slurm_additional_parameters."
    )
