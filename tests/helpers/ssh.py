"""An sshd on every node of a local cluster, and commands as somebody logged in there types them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.helpers.cli import REPOSITORY
from tests.helpers.slurm import Cluster, wait_until

# A login may kill by name, as DeepSpeed's launcher does: it must see its own node's processes only.
_SSHD = """\
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
exec /usr/sbin/sshd -D -e -f "$1/sshd_config"
"""
_SSHD_CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""
_SSH_CONFIG = """\
IdentityFile {folder}/user
GlobalKnownHostsFile {folder}/known_hosts
UserKnownHostsFile /dev/null
BatchMode yes
"""


class SshNodes:
    """The nodes of a cluster, reachable by ssh from each other and from nowhere else.

    Keys are made for this and nobody's files are touched: what ssh reads of a user's or the
    machine's own settings is replaced, in the mount namespace of a node.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Start them.

        Args:
            cluster: It is up, its nodes have networks of their own.
            folder: For keys and settings.
        """
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("host", "user"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(key, check=True)
        host_key = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text(f"* {host_key}\n")
        (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
        (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        (folder / "hosts").write_text("".join(f"{node} slots=1\n" for node in cluster.nodes))
        # What DeepSpeed's launcher takes along; with other threads a sum rounds in another way.
        (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
        for node in cluster.nodes:
            with open(folder / f"{node}.log", "wb") as log:
                self._processes[node] = subprocess.Popen(
                    ["nsenter", f"--target={cluster.daemons()[node]}", "--mount", "--uts", "--net",
                     "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                     "sh", "-ec", _SSHD, "sh", str(folder)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
        for node in cluster.nodes:
            wait_until(lambda node=node: self._answers(node), what=lambda node=node: self.log(node))

    def _answers(self, node: str) -> bool:
        assert self._processes[node].poll() is None, self.log(node)
        return bool(self._sshd(node)) and self.run(node, "ssh", node, "true").returncode == 0

    def log(self, node: str) -> str:
        """What the sshd of a node has said."""
        return (self.folder / f"{node}.log").read_text()

    def _sshd(self, node: str) -> list[psutil.Process]:
        children = psutil.Process(self._processes[node].pid).children()
        return [child for child in children if child.name() == "sshd"]

    def stop(self) -> None:
        """End them, and all that was started there: their namespaces end with them."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _command(self, node: str, command: Sequence[str]) -> list[str]:
        target = f"--target={self._sshd(node)[0].pid}"
        spaces = ("--mount", "--uts", "--net", "--pid")
        return ["nsenter", target, *spaces, f"--wd={REPOSITORY}", *command]

    @property
    def _environment(self) -> Mapping[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {"PATH": path, "HOME": str(self.folder), "PYTHONPATH": str(REPOSITORY)}
        return os.environ | ours | {"OMP_NUM_THREADS": "1"}

    def run(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end."""
        return subprocess.run(
            self._command(node, command), env=self._environment, capture_output=True, text=True,
            timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, node: str, *command: str, log: Path) -> Launcher:
        """Start a command on a node, in a process group of its own; its output goes to a file."""
        with open(log, "ab") as file:
            process = subprocess.Popen(
                self._command(node, command), env=self._environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        return Launcher(process, log, self)

    def processes(self) -> list[psutil.Process]:
        """All that runs on the nodes, the listening sshd left out."""
        found = []
        for node in self._processes:
            space = os.readlink(f"/proc/{self._sshd(node)[0].pid}/ns/pid")
            for process in psutil.process_iter():
                with contextlib.suppress(OSError, psutil.Error):  # it has just ended
                    there = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                    if there and process not in self._sshd(node) and process.is_running():
                        if process.status() != psutil.STATUS_ZOMBIE:
                            found.append(process)
        return found

    def ranks(self) -> list[int]:
        """The processes of ranks, on all nodes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "launch/pretrain.py" in command[1:3] and "deepspeed" not in command[1]:
                    found.append(process.pid)
        return found


class Launcher:
    """A command that has been started on a node."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, nodes: SshNodes) -> None:
        """Wrap it."""
        self._process, self._log, self._nodes = process, log, nodes

    def output(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace")

    def send(self, number: signal.Signals, name: str) -> None:
        """Send a signal to its processes of a name, of those that it has started here."""
        sent = False
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith(name):
                    process.send_signal(number)
                    sent = True
        assert sent, f"no {name}: {self.output()}"

    def wait(self) -> int:
        """Return its exit code."""
        return self._process.wait(timeout=240)

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None
