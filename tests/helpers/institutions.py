"""Institutions on one machine: networks of their own, between which one port is open.

    with Institutions(num_sites=2) as institutions:
        institutions.start_clusters()
        coordinator, (site, _) = institutions.coordinator, institutions.sites
        server = coordinator.start("python3", "-m", "http.server", str(institutions.port))
        site.run("curl", f"http://{coordinator.address}:{institutions.port}")
        Command("submit", ..., environment=site.cluster.environment, prefix=site.prefix)
        site.cut()

Every institution is a network namespace with one link to a router, which is a network namespace,
too. The router forwards connections that a site opens to the coordinator's port. It drops
everything else without a word, as firewalls do. Only networks are apart: files are common to all.

Names carry the id of the process that holds the institutions. What a killed process has left is
removed when the next one begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.helpers.slurm import TIMEOUT_S, Cluster

_NAMESPACES = Path("/run/netns")
_CLOCK = str(Path(__file__).with_name("clock.c"))
_NAME = "fedpipe-institutions"
_FIREWALL = """\
table inet firewall {{
    set cut {{ type ifname; }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        iifname @cut drop
        oifname @cut drop
        ct state established,related accept
        iifname "site-*" oifname "coordinator" tcp dport {port} accept
    }}
    chain input {{ type filter hook input priority 0; policy drop; }}
}}
"""
_ROUTER = """\
set -e
ip netns add $router
nsenter --net=/run/netns/$router sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward && nft -f -'
"""
_INSTITUTION = """\
set -e
ip netns add $space
ip link add uplink netns $space type veth peer name $name netns $router
ip -n $router address add $subnet.1/24 dev $name
ip -n $router link set $name up
ip -n $space address add $subnet.2/24 dev uplink
ip -n $space link set lo up
ip -n $space link set uplink up
ip -n $space route add default via $subnet.1
"""
# In a namespace that ends with the probe.
_PROBE = """\
set -e
ip link add inside type veth peer name outside
tc qdisc add dev inside root tbf rate 10mbit burst 16kb latency 100ms
nft add table inet firewall
"""


def obstacle() -> str:
    """Say why this machine cannot have institutions; empty if it can."""
    programs = ("ip", "tc", "nft", "nsenter", "unshare", "cc")
    if missing := [name for name in programs if not shutil.which(name)]:
        return f"no {' '.join(missing)}: run `make slurm-packages` as root"
    probe = subprocess.run(["unshare", "--net", "sh", "-c", _PROBE], capture_output=True, text=True)
    return probe.stderr.strip() and f"no network namespaces here: {probe.stderr.splitlines()[0]}"


class Institution:
    """A site or the coordinator.

    Attributes:
        name: ``coordinator``, ``site-0``, ``site-1``...
        folder: Its own, gone with it. Paths in it are short enough for unix sockets.
        address: Its address in the network of all.
        prefix: A command that runs another one here, with the clock of the institution.
        cluster: Its SLURM, once ``Institutions.start_clusters`` has brought it up.
    """

    def __init__(self, folder: Path, *, subnet: str, clock_shift_s: int) -> None:
        self.folder = folder
        self.name = folder.name
        self.address = f"{subnet}.2"
        self._space = f"{folder.parent.name}-{self.name}"
        self._router = f"{folder.parent.name}-router"
        folder.mkdir()
        self.prefix = ("nsenter", f"--net={_NAMESPACES / self._space}")
        if clock_shift_s:
            clock = folder / "clock.so"
            _run("cc", "-shared", "-fPIC", f"-DSHIFT_S={clock_shift_s}", "-o", str(clock), _CLOCK)
            self.prefix += ("env", f"LD_PRELOAD={clock}")
        self.cluster = Cluster(folder / "cluster", "--nodes=1", prefix=self.prefix)
        _script(_INSTITUTION, space=self._space, router=self._router, name=self.name, subnet=subnet)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that says little; it ends with the institution at the latest."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self.prefix, *command], cwd=self.folder, stdin=pipe, stdout=pipe, stderr=pipe,
            text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        """Run a command, which must succeed, and return what it prints."""
        process = self.start(*command)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, f"{command}: {process.returncode}: {err}"
        return out

    def cut(self) -> None:
        """Drop everything that comes from here or goes here, without a word."""
        self._firewall("add")

    def restore(self) -> None:
        """Undo ``cut``."""
        self._firewall("delete")

    def limit(self, rate_mbit: float) -> None:
        """Limit the link in each direction."""
        shape = ("root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "16kb", "latency", "100ms")
        _run("tc", "-n", self._space, "qdisc", "replace", "dev", "uplink", *shape)
        _run("tc", "-n", self._router, "qdisc", "replace", "dev", self.name, *shape)

    def unlimit(self) -> None:
        """Undo ``limit``."""
        _run("tc", "-n", self._space, "qdisc", "delete", "dev", "uplink", "root")
        _run("tc", "-n", self._router, "qdisc", "delete", "dev", self.name, "root")

    def _firewall(self, verb: str) -> None:
        nft = ("nft", verb, "element", "inet", "firewall", "cut", f"{{ {self.name} }}")
        _run("nsenter", f"--net={_NAMESPACES / self._router}", *nft)


class Institutions:
    """A coordinator and sites, from ``with`` to its end."""

    coordinator: Institution
    sites: list[Institution]

    def __init__(
        self, num_sites: int, *, port: int = 8002, clock_shifts_s: Sequence[int] = ()
    ) -> None:
        """Describe them.

        Args:
            num_sites: Besides the coordinator.
            port: Of the coordinator, the only one that is open, to sites only.
            clock_shifts_s: How far the clock of every site is ahead, for all of its processes (of
                files, times are the machine's); negative if it is behind. Empty: none is shifted.
        """
        self.port = port
        self._shifts_s = (0, *(clock_shifts_s or [0] * num_sites))
        self._num_sites = num_sites

    def __enter__(self) -> Self:
        _remove_stale()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_NAME}-{os.getpid()}-")).resolve()
        try:
            _script(_ROUTER, _FIREWALL.format(port=self.port), router=f"{self.folder.name}-router")
            names = ["coordinator", *(f"site-{index}" for index in range(self._num_sites))]
            self.coordinator, *self.sites = (
                Institution(self.folder / name, subnet=f"10.78.{index}", clock_shift_s=shift_s)
                for index, (name, shift_s) in enumerate(zip(names, self._shifts_s, strict=True))
            )
        except BaseException:
            _remove(self.folder)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _remove(self.folder)

    def start_clusters(self) -> None:
        """Bring up a SLURM cluster in every site, of one node with 4 CPUs; all at once."""
        _at_once([site.cluster.up for site in self.sites])


def _remove_stale() -> None:
    common = Path(tempfile.gettempdir()).resolve()
    lock = os.open(common, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of pytest may begin at once
        for folder in common.glob(f"{_NAME}-*-*"):
            holder = int(folder.name.removeprefix(f"{_NAME}-").partition("-")[0])
            if not psutil.pid_exists(holder):
                _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove the clusters, processes, namespaces and files of institutions."""
    _at_once([Cluster(path).down for path in folder.glob("*/cluster")])
    for path in _NAMESPACES.glob(f"{folder.name}-*"):
        deadline = time.monotonic() + TIMEOUT_S
        while pids := _run("ip", "netns", "pids", path.name).split():
            assert time.monotonic() < deadline, f"{path.name}: processes {pids} do not end"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        _run("ip", "netns", "delete", path.name)
    shutil.rmtree(folder)


def _at_once(tasks: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


def _script(script: str, text: str = "", **variables: str) -> None:
    _run("sh", "-c", script, text=text, variables=variables)


def _run(*command: str, text: str = "", variables: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, input=text, env={**os.environ, **(variables or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
