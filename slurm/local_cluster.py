#!/usr/bin/env python3
"""A real SLURM cluster on one machine, for tests and trials; nothing of it is left afterwards.

    python3 slurm/local_cluster.py install          # Debian packages; nothing if they are there
    eval "$(python3 slurm/local_cluster.py up)"     # 2 nodes x 4 CPUs x 2 pretended GPUs
    srun -N 2 hostname; sbatch ...; sacct           # as on a real cluster
    python3 slurm/local_cluster.py status           # daemons and nodes
    python3 slurm/local_cluster.py down             # leaves no process, interface or file

Several clusters can run side by side, one per ``--dir``. Each can have a network of its own:

    ip netns add site                               # then every command within it
    nsenter --net=/run/netns/site python3 slurm/local_cluster.py up --dir /tmp/site

A cluster starts these daemons in order:

- ``munged`` signs messages, so that daemons and commands trust each other;
- ``mariadbd`` (unix socket only) keeps the history of jobs for ``slurmdbd``, which answers sacct;
- ``slurmctld`` schedules jobs, and answers sbatch, srun, squeue, scontrol and scancel;
- one ``slurmd`` per node starts and signals the processes of jobs.

Nodes share this machine's files, as the nodes of a site share a file system. For root each node has
its own host name, /dev/shm and network (Linux namespaces that a bridge connects), and so its own
address and ports. Without namespaces nodes differ in name only: 127.0.0.1, 127.0.0.2, which resolve
everywhere.

Partitions: ``main`` (the default, one hour), ``preemptible`` (its jobs make room for all others:
they get the signal of ``--signal`` or SIGTERM, have 30 s of grace, and are requeued), and
``urgent`` (first in the queue). Limits are counted but not enforced. A GPU is only a number in
CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core iproute2"
PROGRAMS = "munged slurmctld slurmd sbatch slurmdbd mariadbd ip unshare"
TEST_PACKAGES, TEST_PROGRAMS = "openssh-server pdsh nftables gcc libc6-dev", "sshd pdsh nft cc"
"""Packages and programs that only tests need, for ranks over ssh and for institutions."""
COMMANDS = {"srun", "salloc", "sbatch", "sacct", "squeue", "sinfo", "scontrol", "scancel"}
START_S = 60.0
"""Time limit for the start of a daemon: it takes a second, but test machines are busy."""
MARK = "LOCAL_SLURM_CLUSTER"
"""Environment variable of every daemon, by which ``down`` finds all of them."""
ROOT_WAS_PRIVATE = Path("/run/local_slurm_cluster")
"""One file per cluster that needs the root's mounts shared, while the machine has them private."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}({controller})
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
MailProg=/bin/true
MpiDefault=none

# The cluster's own munge. A requeued job also waits for cred_expire seconds before it starts again.
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge,cred_expire=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller}
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/run/munge
AccountingStorageTRES=gres/gpu

# No cgroups. Nodes may have more CPUs and memory than this machine (config_overrides).
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Otherwise one job takes the memory of a whole node.
DefMemPerCPU={memory_per_cpu}
GresTypes=gpu

# Job ids depend on the clock, because files are named by job, and earlier clusters had jobs, too.
FirstJobId={first_job}
# Finished jobs stay visible to `scontrol show job` for a session of tests.
MinJobAge=7200
JobRequeue=1
# Seconds between SIGTERM and SIGKILL.
KillWait=5
# A dead node is noticed within seconds, a busy one must not be; it returns when it answers again.
SlurmdTimeout=15
MessageTimeout=20
BatchStartTimeout=60
ReturnToService=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1

PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=60 DefaultTime=60
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preemptible PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent PriorityTier=20 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser={user}
PidFile={folder}/run/slurmdbd.pid
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm
"""

UNSHARE = ("unshare", "--uts", "--mount", "--propagation", "slave")
# Sets up a node in the process' new namespaces, then runs slurmd. The namespaces end with the
# node's last process.
NODE = """\
set -e
name=$1 address=$2 outside=$3 bridge=$4 interface=$5
shift 5
hostname "$name"
readlink /proc/self/ns/uts >"run/$name.namespace"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind hosts /etc/hosts
if [ -n "$bridge" ]; then
    ip link set lo up
    ip link add eth0 type veth peer name "$interface" netns "$outside"
    nsenter --net="/proc/$outside/ns/net" ip link set "$interface" master "$bridge" up
    ip address add "$address/24" dev eth0
    ip link set eth0 up
fi
exec "$@"
"""

# Debian starts services when it installs them, unless policy-rc.d exits with 101.
INSTALL = f"""\
set -e
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\\nexit 101\\n' >$policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends {PACKAGES} {TEST_PACKAGES} >/dev/null
"""


class ClusterError(Exception):
    """An error whose message says in one line what failed and what to do."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the cluster, as given to ``up``."""

    nodes: int
    cpus: int
    gpus: int
    memory_mb: int
    isolation: str


@dataclass(frozen=True)
class Node:
    """A node, and the address and port of its slurmd."""

    name: str
    address: str
    port: int


@dataclass(frozen=True)
class Cluster:
    """A cluster; its names follow from its directory, so that ``down`` needs no other record."""

    folder: Path

    @property
    def name(self) -> str:
        """A unique name on this machine, short enough for interfaces (at most 15 characters)."""
        return "sl" + hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    @property
    def conf(self) -> str:
        """The configuration of every daemon and command."""
        return str(self.folder / "slurm.conf")

    @property
    def client_environment(self) -> dict[str, str]:
        """All that a command needs to reach the cluster; the file names the socket of munge."""
        return {"SLURM_CONF": self.conf}

    @property
    def mark(self) -> Path:
        """The first file of every cluster; a directory without it is not touched."""
        return self.folder / "local_cluster"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of daemons, with nothing of the caller's except LD_PRELOAD.

        By that, tests let the clock of a whole cluster be wrong.
        """
        preload = {"LD_PRELOAD": os.environ["LD_PRELOAD"]} if "LD_PRELOAD" in os.environ else {}
        ours = {MARK: str(self.folder), "MYSQL_UNIX_PORT": f"{self.folder}/run/db"}
        return {"PATH": SYSTEM_PATH, "LC_ALL": "C", **ours, **self.client_environment, **preload}

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command on this cluster."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def log(self, daemon: str) -> Path:
        """Return the log of a daemon."""
        return self.folder / "log" / f"{daemon}.log"

    def daemons(self) -> dict[str, int]:
        """Return the daemons that ``up`` has started, with their process ids."""
        return {file.stem: int(file.read_text()) for file in self.folder.glob("run/*.daemon")}


# --- install and up --------------------------------------------------------------------------


def missing_programs(programs: str = PROGRAMS) -> str:
    """Return the programs that this machine lacks."""
    return " ".join(p for p in programs.split() if not shutil.which(p, path=SYSTEM_PATH))


def install() -> int:
    """Install missing packages; if that is impossible, say so and return 0."""
    missing = missing_programs(f"{PROGRAMS} {TEST_PROGRAMS}")
    if not missing:
        return 0
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not (shutil.which("apt-get") and (not root or works(*root, "true"))):
        print(
            f"*** TESTS ON SLURM WILL BE SKIPPED: no {missing}. As root on Debian: apt-get install "
            f"--no-install-recommends {PACKAGES} {TEST_PACKAGES} ***"
        )
        return 0
    packages = f"{PACKAGES} {TEST_PACKAGES}"
    print(f"installing {packages} for tests on SLURM; their services stay off", flush=True)
    return subprocess.run([*root, "sh", "-c", INSTALL]).returncode


def up(cluster: Cluster, sizes: Sizes) -> None:
    """Start the cluster unless a healthy one is running; after a failure nothing is left."""
    if missing := missing_programs():
        raise ClusterError(f"programs: expected {PROGRAMS}, got no {missing}. Run install first.")
    if min(sizes.nodes, sizes.cpus, sizes.memory_mb // max(1, sizes.cpus), sizes.gpus + 1) < 1:
        raise ClusterError(f"sizes: expected positive numbers (gpus may be 0), got {sizes}.")
    if len(str(cluster.folder)) > 60:  # the path of a socket inside has at most 107
        raise ClusterError(f"--dir: expected at most 60 characters, got {cluster.folder}.")
    if is_healthy(cluster):
        if (found := cluster.mark.read_text()) != str(sizes):
            raise ClusterError(f"{cluster.folder}: expected {sizes}, got {found}. Run down first.")
        return
    down(cluster)
    try:
        cluster.folder.mkdir(parents=True, exist_ok=True)
        cluster.mark.write_text(str(sizes))
        isolation = best_isolation() if sizes.isolation == "best" else sizes.isolation
        subnet = free_subnet(cluster) if isolation == "network" else "127.0.0"
        nodes = write_configuration(cluster, sizes, isolation, subnet)
        if isolation == "network":
            run("ip", "link", "add", cluster.name, "type", "bridge")
            run("ip", "address", "add", f"{subnet}.1/24", "dev", cluster.name)
            run("ip", "link", "set", cluster.name, "up")
        start_accounting(cluster)
        start(
            cluster,
            "slurmctld",
            ["slurmctld", "-D", "-f", cluster.conf],
            is_ready=lambda: " UP" in cluster.ask("scontrol", "ping").stdout,
        )
        start_nodes(cluster, nodes, isolation)
        (cluster.folder / "run" / "complete").touch()
    except BaseException:
        down(cluster)
        raise


def best_isolation() -> str:
    """Return the best isolation of nodes on this machine: ``network``, ``hosts`` or ``none``."""
    if not works(*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"):
        return "none"
    # The interfaces are made in a namespace that ends with the probe.
    probes = [("ip", "link", "add", "probe", "type", kind) for kind in ("bridge", "veth")]
    return "network" if all(works("unshare", "--net", *probe) for probe in probes) else "hosts"


def free_subnet(cluster: Cluster) -> str:
    """Return the first three numbers of a subnet that no interface of this machine has."""
    used = subprocess.run(["ip", "-4", "-o", "address"], capture_output=True, text=True).stdout
    first = int(cluster.name[2:], 16)
    candidates = (f"10.77.{(first + offset) % 256}" for offset in range(256))
    return next(subnet for subnet in candidates if f" {subnet}." not in used)


def free_ports(count: int) -> list[int]:
    """Return unused ports below the range that the kernel assigns to connections."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_000), 1000):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # in use
                listener.bind(("", port))
                ports.append(port)
        if len(ports) == count:
            break
    return ports


def write_configuration(cluster: Cluster, sizes: Sizes, isolation: str, subnet: str) -> list[Node]:
    """Write the configuration of the daemons, and return the nodes."""
    folder = cluster.folder
    for name in ("run", "log", "state", "spool", "gpu", "db"):
        (folder / name).mkdir()
    ctld_port, dbd_port, *ports = free_ports(2 + sizes.nodes)
    nodes = []
    for number, port in enumerate(ports, start=1):
        name = f"127.0.0.{number}" if isolation == "none" else f"node{number}"
        last = 10 + number if isolation == "network" else 1
        nodes.append(Node(name, f"{subnet}.{last}", port))
    host = socket.gethostname().partition(".")[0]
    values = {
        "name": cluster.name,
        "folder": folder,
        "user": pwd.getpwuid(os.getuid()).pw_name,
        "host": host,
        "controller": f"{subnet}.1",
        "ctld_port": ctld_port,
        "dbd_port": dbd_port,
        "memory_per_cpu": sizes.memory_mb // sizes.cpus,
        "first_job": int(time.time()) % 50_000_000 + 1,  # SLURM's ids end at 67 million
        "nodes": "\n".join(
            f"NodeName={node.name} NodeAddr={node.address} Port={node.port} CPUs={sizes.cpus} "
            f"RealMemory={sizes.memory_mb} Gres=gpu:{sizes.gpus}"
            for node in nodes
        ),
    }
    Path(cluster.conf).write_text(SLURM_CONF.format(**values))
    (folder / "slurmdbd.conf").touch(0o600)  # slurmdbd requires this mode
    (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
    # Nothing uses cgroups, but without this file slurmd requires version 2 to be mounted.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    # slurmd wants a character device per GPU; a symbolic link to one will do.
    for gpu in range(sizes.gpus):
        (folder / "gpu" / str(gpu)).symlink_to("/dev/null")
    gpus = f"Name=gpu File={folder}/gpu/[0-{sizes.gpus - 1}]\n" if sizes.gpus else ""
    (folder / "gres.conf").write_text(gpus)
    names = "".join(f"{node.address} {node.name}\n" for node in nodes)
    here = f"{subnet}.1 {host}\n" + Path("/etc/hosts").read_text()
    (folder / "hosts").write_text(names + here)
    return nodes


def start_accounting(cluster: Cluster) -> None:
    """Start munged, mariadbd and slurmdbd, and register the cluster."""
    folder = cluster.folder
    (folder / "run" / "munge.key").touch(0o600)
    (folder / "run" / "munge.key").write_bytes(os.urandom(128))
    munge = {"socket": "munge", "key-file": "munge.key", "pid-file": "munged.pid"}
    munge |= {"seed-file": "munge.seed", "log-file": "munged.log"}
    options = [f"--{option}={folder}/run/{file}" for option, file in munge.items()]
    start(
        cluster,
        "munged",
        ["munged", "--foreground", "--force", *options],
        is_ready=lambda: cluster.ask("munge", "-n", "-S", f"{folder}/run/munge").returncode == 0,
    )
    database = [
        "mariadbd",
        "--no-defaults",
        f"--datadir={folder}/db",
        f"--tmpdir={folder}/db",
        f"--socket={folder}/run/db",
        f"--pid-file={folder}/run/mariadbd.pid",
        "--skip-networking",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-log-file-size=16M",
        *(["--user=root"] if os.geteuid() == 0 else []),
    ]
    # As mariadb-install-db does, which fails with Debian's core package alone.
    sql = [Path(f"/usr/share/mysql/mysql_system_tables{part}.sql") for part in ("", "_data")]
    tables = b"create database mysql;\nuse mysql;\n" + b"".join(file.read_bytes() for file in sql)
    with cluster.log("mariadbd").open("wb") as log:
        bootstrap = subprocess.run(
            [*database, "--bootstrap"],
            input=tables,
            stdout=log,
            stderr=log,
            env=cluster.environment,
        )
    if bootstrap.returncode:
        raise ClusterError(failure(cluster, "mariadbd", f"ended with {bootstrap.returncode}"))
    start(
        cluster,
        "mariadbd",
        [*database, "--skip-grant-tables"],
        is_ready=lambda: answers(f"{folder}/run/db"),
    )
    start(
        cluster,
        "slurmdbd",
        ["slurmdbd", "-D"],
        is_ready=lambda: cluster.ask("sacctmgr", "-n", "show", "cluster").returncode == 0,
    )
    cluster.ask("sacctmgr", "-i", "add", "cluster", cluster.name)


def start_nodes(cluster: Cluster, nodes: list[Node], isolation: str) -> None:
    """Start all nodes at once, and wait until each is idle."""
    if isolation != "none":
        share_later_mounts(cluster)
    processes = {}
    for number, node in enumerate(nodes, start=1):
        command = ["slurmd", "-D", "-N", node.name, "-f", cluster.conf]
        if isolation != "none":
            bridge = cluster.name if isolation == "network" else ""
            arguments = [node.name, node.address, str(os.getpid()), bridge, f"{bridge}v{number}"]
            unshare = [*UNSHARE, *(["--net"] if bridge else [])]
            command = [*unshare, "sh", "-c", NODE, "sh", *arguments, *command]
        processes[node.name] = spawn(cluster, node.name, command)
    for name, process in processes.items():
        wait_for(cluster, name, process, functools.partial(is_idle, cluster, name))


def is_idle(cluster: Cluster, node: str) -> bool:
    """Whether a node has registered and is idle."""
    return "idle\n" in cluster.ask("sinfo", "-h", "-n", node, "-o", "%T").stdout


def share_later_mounts(cluster: Cluster) -> None:
    """Make later mounts visible to nodes; the root of a container is often mounted as private.

    The last cluster that is taken down makes it private again.
    """
    propagation = ("findmnt", "--noheadings", "--output", "PROPAGATION", "/")
    is_private = "private" in subprocess.run(propagation, capture_output=True, text=True).stdout
    if is_private or ROOT_WAS_PRIVATE.exists():
        ROOT_WAS_PRIVATE.mkdir(exist_ok=True)
        (ROOT_WAS_PRIVATE / cluster.name).touch()
        run("mount", "--make-shared", "/")


# --- daemons ---------------------------------------------------------------------------------


def start(cluster: Cluster, name: str, command: list[str], *, is_ready: Callable[[], bool]) -> None:
    """Start a daemon and wait until it answers."""
    wait_for(cluster, name, spawn(cluster, name, command), is_ready)


def spawn(cluster: Cluster, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    """Start a daemon that outlives this command; its log is its standard error."""
    with cluster.log(name).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=cluster.folder,
            env=cluster.environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    (cluster.folder / "run" / f"{name}.daemon").write_text(str(process.pid))
    return process


def wait_for(
    cluster: Cluster, name: str, process: subprocess.Popen[bytes], is_ready: Callable[[], bool]
) -> None:
    """Poll until a daemon is ready.

    Raises:
        ClusterError: It ended, or is not ready in time.
    """
    deadline = time.monotonic() + START_S
    while not is_ready():
        if process.poll() is not None:
            raise ClusterError(failure(cluster, name, f"ended with {process.returncode}"))
        if time.monotonic() > deadline:
            raise ClusterError(failure(cluster, name, f"is not ready after {START_S:.0f} s"))
        time.sleep(0.05)


def failure(cluster: Cluster, name: str, what: str) -> str:
    """Write in one line what a daemon did, and the end of its log."""
    lines = cluster.log(name).read_text(errors="replace").splitlines()
    tail = " / ".join([line.strip() for line in lines if line.strip()][-4:])
    return f"{name}: expected it to start, it {what}. Its log ends: {tail or '(empty)'}"


def answers(path: str) -> bool:
    """Whether something listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def run(*command: str) -> None:
    """Run a system command.

    Raises:
        ClusterError: The command failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{shlex.join(command)}: failed: {' '.join(done.stderr.split())}")


def works(*command: str) -> bool:
    """Whether a command exists and succeeds."""
    return bool(shutil.which(command[0], path=SYSTEM_PATH)) and not (
        subprocess.run(command, capture_output=True).returncode
    )


def processes_of(cluster: Cluster) -> Iterator[int]:
    """Yield the processes of the cluster: daemons, jobs, and commands that wait for it."""
    ours = {f"{MARK}={cluster.folder}".encode(), f"SLURM_CLUSTER_NAME={cluster.name}".encode()}
    client = f"SLURM_CONF={cluster.conf}".encode()
    namespaces = {file.read_text().strip() for file in cluster.folder.glob("run/*.namespace")}
    steps = set(step_daemons(cluster))
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(") ")
            state, parent = rest.split()[:2]
            if state in "ZX":  # dead, but not collected yet
                continue
            if not steps & {int(entry.name), int(parent)}:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
                is_client = client in environment and name in COMMANDS
                on_node = os.readlink(entry / "ns" / "uts") in namespaces
                if not (environment & ours or is_client or on_node):
                    continue
        except OSError:  # it has just ended, or belongs to another user
            continue
        yield int(entry.name)


def step_daemons(cluster: Cluster) -> Iterator[int]:
    """Yield the slurmstepd of every step, whose environment only root can read."""
    for path in cluster.folder.glob("spool/*/*_*.*"):
        with socket.socket(socket.AF_UNIX) as client:
            if path.is_socket() and client.connect_ex(str(path)) == 0:
                peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                yield int.from_bytes(peer[:4], sys.byteorder)


# --- down, status, command line --------------------------------------------------------------


def down(cluster: Cluster) -> None:
    """Remove everything that ``up`` and the jobs have left."""
    folder = cluster.folder
    if folder.exists() and not cluster.mark.exists() and any(folder.iterdir()):
        raise ClusterError(f"{folder}: expected a cluster's directory, got other files. Move them.")
    deadline = time.monotonic() + START_S
    while left := list(processes_of(cluster)):
        if time.monotonic() > deadline:
            raise ClusterError(f"{folder}: expected its processes to end, got {left}. Run again.")
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    # Not /sys/class/net, which shows the network of whoever has mounted /sys.
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True).stdout
    for line in links.splitlines():
        if line.startswith(cluster.name):
            works("ip", "link", "delete", line.split()[0].partition("@")[0])
    if (mark := ROOT_WAS_PRIVATE / cluster.name).exists():
        mark.unlink()
        with contextlib.suppress(OSError):  # another cluster needs it
            ROOT_WAS_PRIVATE.rmdir()
            works("mount", "--make-private", "/")
    if folder.exists():
        shutil.rmtree(folder)


def is_healthy(cluster: Cluster) -> bool:
    """Whether ``up`` has finished, and every daemon is alive."""
    complete = (cluster.folder / "run" / "complete").exists()
    return complete and set(processes_of(cluster)).issuperset(cluster.daemons().values())


def status(cluster: Cluster) -> int:
    """Print daemons and nodes; return 0 if all daemons are alive."""
    alive = set(processes_of(cluster))
    for name, pid in sorted(cluster.daemons().items()):
        print(f"{name:<12} {f'process {pid}' if pid in alive else 'dead'}")
    healthy = is_healthy(cluster)
    print(cluster.ask("sinfo").stdout if healthy else f"{cluster.folder}: no healthy cluster")
    return 0 if healthy else 1


def main() -> int:
    """Read the command line."""
    default = Path(tempfile.gettempdir()) / f"fedpipe-slurm-{os.getuid()}"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["install", "up", "down", "status", "env"])
    parser.add_argument("--dir", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="per node")
    parser.add_argument("--gpus", type=int, default=2, help="per node")
    parser.add_argument("--memory-mb", type=int, default=16_000, help="per node")
    levels = ["best", "network", "hosts", "none"]
    parser.add_argument("--isolation", choices=levels, default="best", help="of nodes")
    values = vars(parser.parse_args())
    command = values.pop("command")
    cluster = Cluster(values.pop("dir").resolve())
    # Clean up on SIGTERM as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if command == "install":
            return install()
        if command == "status":
            return status(cluster)
        if command == "down":
            down(cluster)
            return 0
        if command == "up":
            up(cluster, Sizes(**values))
        for name, value in cluster.client_environment.items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    except (ClusterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
