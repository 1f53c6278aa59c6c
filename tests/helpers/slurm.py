"""A throw-away SLURM cluster of real daemons: slurm/local_cluster.py, held by tests."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

PROGRAM = Path(__file__).parents[2] / "slurm" / "local_cluster.py"
TIMEOUT_S = 60.0
"""Generous: machines that run tests are often busy."""


class Cluster:
    """One cluster, in one directory.

    Attributes:
        folder: Its directory: at most 60 characters, absent while the cluster is down.
        environment: What a command needs to find it, once it is up; merge it into ``os.environ``.
    """

    def __init__(self, folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        """Describe it.

        Args:
            folder: It need not exist.
            options: Those of ``local_cluster.py up``.
            prefix: Runs a command where the cluster is, for example in a network namespace.
        """
        self.folder = folder
        self.environment: dict[str, str] = {}
        self._options = options
        self._prefix = tuple(prefix)
        self._namespaces: set[str] = set()
        self._name = "(not yet known)"

    def call(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of local_cluster.py."""
        options = self._options if command == "up" else ()
        return subprocess.run(
            [
                *self._prefix, sys.executable, str(PROGRAM), command, "--dir", str(self.folder),
                *options,
            ],
            capture_output=True, text=True, timeout=5 * TIMEOUT_S,
        )  # fmt: skip

    def up(self) -> None:
        """Bring it up; nothing happens if it is."""
        done = self.call("up")
        assert done.returncode == 0, done.stderr
        exports = shlex.split(done.stdout.replace("export ", ""))
        self.environment = dict(variable.split("=", 1) for variable in exports)
        ours = _namespaces(os.getpid())
        for pid in self.daemons().values():
            self._namespaces |= _namespaces(pid) - ours
        config = (self.folder / "slurm.conf").read_text().splitlines()
        self._name = next(x for x in config if x.startswith("ClusterName=")).partition("=")[2]

    def down(self) -> None:
        """Take it down; nothing happens if it is."""
        done = self.call("down")
        assert done.returncode == 0, done.stderr

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Stop slurmctld, and start it again at the end; nothing of the queue is lost."""
        file = self.folder / "run/slurmctld.daemon"
        controller = psutil.Process(int(file.read_text()))
        command, environment = controller.cmdline(), controller.environ()
        controller.terminate()
        wait_until(lambda: not _is_alive(controller), what=lambda: "slurmctld goes on")
        try:
            yield
        finally:
            with (self.folder / "log/slurmctld.log").open("ab") as log:
                again = subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            file.write_text(str(again.pid))
            wait_until(
                lambda: " UP" in self.run("scontrol", "ping", check=False).stdout,
                what=lambda: "slurmctld does not answer",
            )

    def daemons(self) -> dict[str, int]:
        """Process ids by daemon: munged, mariadbd, slurmdbd, slurmctld and every node."""
        return {file.stem: int(file.read_text()) for file in self.folder.glob("run/*.daemon")}

    def leftovers(self) -> list[str]:
        """What is still there of a cluster that is down."""
        found = [str(self.folder)] if self.folder.exists() else []
        found += [path.name for path in Path("/sys/class/net").glob(f"{self._name}*")]
        marks = str(self.folder).encode(), f"SLURM_CLUSTER_NAME={self._name}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "stat").read_text().rpartition(") ")[2][0] in "ZX":
                    continue
                command = (entry / "cmdline").read_bytes()
                text = command + (entry / "environ").read_bytes()
                if any(m in text for m in marks) or _namespaces(int(entry.name)) & self._namespaces:
                    found.append(f"{entry.name}: {command.decode(errors='replace')}")
            except OSError:  # it has just ended
                continue
        return found

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run srun, sbatch, scontrol, scancel, squeue, sacct..."""
        done = subprocess.run(
            [*self._prefix, *command], env={**os.environ, **self.environment},
            capture_output=True, text=True, timeout=2 * TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}: {done.stderr}"
        return done

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return sorted(self.run("sinfo", "-hNo%N", "--partition=main").stdout.split())

    @property
    def has_own_names(self) -> bool:
        """Whether nodes have host names and /dev/shm of their own: not without root."""
        return not self.nodes[0].startswith("127.")

    def state(self, job_id: str | int) -> str:
        """What ``scontrol show job`` says: PENDING, RUNNING, COMPLETED, FAILED..."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout.split()
        return next(x for x in words if x.startswith("JobState=")).partition("=")[2]

    def wait_for_state(
        self, job_id: str | int, states: str | tuple[str, ...], timeout_s: float = TIMEOUT_S
    ) -> str:
        """Return the state of a job once it is one of ``states``."""
        wanted = (states,) if isinstance(states, str) else states
        wait_until(
            lambda: self.state(job_id) in wanted,
            what=lambda: f"{wanted}\n" + self.run("scontrol", "show", "job", str(job_id)).stdout,
            timeout_s=timeout_s,
        )
        return self.state(job_id)

    def set_down(self, node: str) -> None:
        """Fail a node at once: its jobs are requeued as after a crash."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def drain(self, node: str) -> None:
        """Start no more jobs on a node."""
        self.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")

    def resume(self, node: str) -> None:
        """Bring a node back after ``set_down`` or ``drain``."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def clear(self) -> None:
        """Cancel all jobs, and wait until nothing runs and every node is free."""
        if jobs := self.run("squeue", "--noheader", "--format=%A").stdout.split():
            self.run("scancel", *jobs, check=False)
        for node in self.nodes:
            if self._node_state(node).rstrip("*") in ("down", "drained", "draining"):
                self.resume(node)
        wait_until(self._is_free, what=lambda: self.run("squeue").stdout)

    def _is_free(self) -> bool:
        idle = all(self._node_state(node) == "idle" for node in self.nodes)
        return idle and not self.run("squeue", "--noheader").stdout

    def _node_state(self, node: str) -> str:
        return self.run("sinfo", "-ho%T", f"--nodes={node}", "--partition=main").stdout.strip()


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _namespaces(pid: int) -> set[str]:
    kinds = ("uts", "mnt", "net")
    try:
        return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds}
    except OSError:  # it has ended
        return set()


def wait_until(
    condition: Callable[[], bool], *, what: Callable[[], str], timeout_s: float = TIMEOUT_S
) -> None:
    """Return once a condition holds; fail with ``what()`` if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what()}"
        time.sleep(0.1)


@contextlib.contextmanager
def held_until(processes: Sequence[int], number: signal.Signals) -> Iterator[None]:
    """Stop processes and their children; let them go on once each process has been sent a signal.

    What works on a run of seconds could otherwise end before the signal of SLURM is there.
    """
    held: list[psutil.Process] = []
    try:
        for process in map(psutil.Process, processes):
            process.suspend()  # so that it starts no further ones
            held.append(process)
            for child in process.children(recursive=True):
                child.suspend()
                held.append(child)
        yield
        wait_until(
            lambda: all(_has_pending(pid, number) for pid in processes),
            what=lambda: f"no {number.name} for {processes}",
        )
    finally:
        for process in held:
            with contextlib.suppress(psutil.NoSuchProcess):  # woken by SLURM, saved, ended
                process.resume()


def _has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has been sent a signal, or has been woken by it and has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)
