"""Sites with clusters of their own share nothing but the coordinator's one open port."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import REPOSITORY, Command
from tests.helpers.institutions import Institution, Institutions, obstacle
from tests.helpers.sites import Consortium, make_sites
from tests.helpers.slurm import Cluster, wait_until

_HOUR_S = 3600
_SILENCE_S = 1.5
"""A connection in a network on one machine takes milliseconds."""
_SERVER = """
import socket, sys, threading
def serve(connection):
    for line in connection.makefile("rb"):
        connection.sendall(line)
listener = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
# Sends every line of its input and prints the answer.
_CLIENT = """
import socket, sys
try:
    connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))
except TimeoutError:
    sys.exit("timed out")
connection.settimeout(None)
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.makefile().readline(), end="", flush=True)
"""


@pytest.fixture(autouse=True)
def _cleared() -> None:
    """The cluster of the session is not used here."""


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    """Two sites with clusters; the second one's clocks are an hour ahead."""
    if why := obstacle():
        pytest.skip(why)
    with Institutions(2, clock_shifts_s=(0, _HOUR_S)) as institutions:
        institutions.start_clusters()
        _serve(institutions.coordinator, institutions.port)
        yield institutions
    assert _left_of(institutions.folder) == []
    assert [site.cluster.leftovers() for site in institutions.sites] == [[], []]


def _left_of(folder: Path) -> list[str]:
    ours = [path.name for path in Path("/run/netns").glob(f"{folder.name}-*")]
    return sorted(ours) + Cluster(folder).leftovers()


def _serve(institution: Institution, port: int) -> None:
    """Start a server that sends back what it gets."""
    process = institution.start(sys.executable, "-c", _SERVER, str(port))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def _connect(
    institution: Institution, other: Institution, port: int, timeout_s: float = _SILENCE_S
) -> subprocess.Popen[str]:
    arguments = (other.address, str(port), str(timeout_s))
    return institution.start(sys.executable, "-c", _CLIENT, *arguments)


def _answer(client: subprocess.Popen[str]) -> str:
    """End a client; return what it got back for a line, or why it got nothing."""
    out, err = client.communicate("hello\n")
    return (out or err).strip()


def _send(client: subprocess.Popen[str], line: str) -> None:
    assert client.stdin is not None
    client.stdin.write(line)
    client.stdin.flush()


def _receive(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline()


def test_every_cluster_runs_its_own_job_and_sees_no_other(institutions: Institutions) -> None:
    clusters = [site.cluster for site in institutions.sites]
    outputs = [site.folder / "job.out" for site in institutions.sites]
    script = "hostname; echo $SLURM_CLUSTER_NAME $SLURM_JOB_PARTITION; exec sleep 300"
    for cluster, output in zip(clusters, outputs, strict=True):
        cluster.run("sbatch", f"--job-name={output.parent.name}", f"--output={output}",
                    f"--wrap={script}")  # fmt: skip

    def words() -> list[list[str]]:
        return [output.read_text().split() if output.exists() else [] for output in outputs]

    wait_until(lambda: [len(of_job) for of_job in words()] == [3, 3], what=lambda: str(words()))
    names = [cluster.run("squeue", "-ho%j %T").stdout for cluster in clusters]
    assert names == ["site-0 RUNNING\n", "site-1 RUNNING\n"]
    first, second = words()
    assert (first[0], first[2]) == (second[0], second[2]) == ("node1", "main")
    assert first[1] != second[1]
    for cluster in clusters:
        cluster.clear()


def test_a_site_reaches_the_coordinators_port_and_nothing_else(institutions: Institutions) -> None:
    coordinator, sites, port = institutions.coordinator, institutions.sites, institutions.port
    _serve(coordinator, port + 1)
    _serve(sites[0], port)
    assert _answer(_connect(sites[0], sites[0], port)) == "hello"
    allowed = [_connect(site, coordinator, port) for site in sites]
    refused = [
        _connect(sites[0], coordinator, port + 1),
        _connect(sites[1], sites[0], port),
        _connect(coordinator, sites[0], port),
    ]
    assert [_answer(client) for client in allowed] == ["hello", "hello"]
    assert [_answer(client) for client in refused] == ["timed out"] * 3


def test_a_cut_link_is_silent_and_a_restored_one_goes_on_with_its_connections(
    institutions: Institutions,
) -> None:
    coordinator, (site, other) = institutions.coordinator, institutions.sites
    client = _connect(site, coordinator, institutions.port)
    _send(client, "before\n")
    assert _receive(client) == "before\n"
    site.cut()
    _send(client, "during\n")
    assert _answer(_connect(site, coordinator, institutions.port)) == "timed out"
    assert _answer(_connect(other, coordinator, institutions.port)) == "hello"
    assert client.poll() is None
    site.restore()
    assert _receive(client) == "during\n"
    assert _answer(client) == "hello"
    assert _answer(_connect(site, coordinator, institutions.port)) == "hello"


def test_a_limited_link_is_slow_in_both_directions(institutions: Institutions) -> None:
    site = institutions.sites[0]
    client = _connect(site, institutions.coordinator, institutions.port)
    _send(client, "hello\n")
    assert _receive(client) == "hello\n"
    line = "x" * 625_000 + "\n"

    def seconds() -> float:
        start = time.monotonic()
        _send(client, line)
        assert _receive(client) == line
        return time.monotonic() - start

    site.limit(10)
    assert seconds() > 0.9  # half of it for each direction: the server answers whole lines
    site.unlimit()
    assert seconds() < 0.9
    client.communicate()


def test_a_site_an_hour_ahead_trains_an_outer_round_as_a_job_of_its_own_cluster(
    institutions: Institutions, tmp_path: Path
) -> None:
    institution = institutions.sites[1]
    now = float(institution.run("date", "+%s"))
    assert abs(now - time.time() - _HOUR_S) < 60
    job_now = float(institution.cluster.run("srun", "date", "+%s").stdout)
    assert abs(job_now - time.time() - _HOUR_S) < 60
    [site] = make_sites(tmp_path, 2)
    consortium = Consortium(tmp_path, [site])
    consortium.begin()
    consortium.hand_out(0)
    profile = tmp_path / "profile.yaml"
    profile.write_text("timeout_min: 30\ncpus_per_task: 1\nmem_gb: 2\ntasks_per_node: 1\n")
    result = Command(
        "submit", "pretrain", "--profile", str(profile), "--run-dir", str(site.run_dir),
        *site.overrides(), "--follow", folder=site.folder,
        environment=institution.cluster.environment, prefix=institution.prefix,
    ).finish()  # fmt: skip
    assert (result.code, result.err) == (0, ""), result.out + result.err
    [update] = consortium.updates(0)
    assert update.facts["tokens"] > 0


_HOLD = """
import sys, time
from tests.helpers.institutions import Institutions
with Institutions(1) as institutions:
    institutions.start_clusters()
    print(institutions.folder, flush=True)
    time.sleep(300)
"""


def test_what_a_killed_test_run_has_left_is_removed_by_the_next(institutions: Institutions) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", _HOLD], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    folder = Path(killed.stdout.readline().strip())
    killed.kill()
    killed.communicate()
    spaces = [f"{folder.name}-{name}" for name in ("coordinator", "router", "site-0")]
    left = _left_of(folder)
    assert left[:3] == spaces
    assert any("slurmctld" in process for process in left)
    with Institutions(0):
        assert _left_of(folder) == []
    assert institutions.sites[0].cluster.run("srun", "echo", "here").stdout == "here\n"
