"""Two nodes by hand: DeepSpeed's launcher over pdsh and ssh, torchrun started by ssh."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.cli import REPOSITORY
from tests.helpers.runs import LONG, TINY, num_rounds, outcome, run_locally
from tests.helpers.slurm import Cluster, held_until, wait_until
from tests.helpers.ssh import Launcher, SshNodes

LATE = ("checkpoint.every_rounds=100",)
"""Only a stop saves before the run is done."""
DEEPSPEED = ("deepspeed", "--no_local_rank", "--hostfile")


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshNodes]:
    path = f"{os.defpath}:/usr/sbin"
    missing = [name for name in ("sshd", "pdsh", "ssh") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"no {' '.join(missing)}: run `make slurm-packages` as root")
    if not (cluster.folder / "hosts").read_text().startswith("10."):
        pytest.skip("nodes have networks of their own only as root, where namespaces are allowed")
    nodes = SshNodes(cluster, tmp_path_factory.mktemp("ssh"))
    try:
        yield nodes
    finally:
        nodes.stop()


def _arguments(run_dir: Path, *arguments: str) -> tuple[str, ...]:
    cache = f"data.cache_dir={run_dir.parent / 'cache'}"
    return ("launch/pretrain.py", "--run-dir", str(run_dir), *TINY, *LATE, cache, *arguments)


def _deepspeed(nodes: SshNodes, run_dir: Path, *arguments: str, hosts: str = "hosts") -> Launcher:
    command = (*DEEPSPEED, str(nodes.folder / hosts), *_arguments(run_dir, *arguments))
    return nodes.start("node1", *command, log=run_dir.with_suffix(".log"))


def _trains(launcher: Launcher, run_dir: Path) -> None:
    before = num_rounds(run_dir)

    def there() -> bool:
        assert launcher.is_alive(), launcher.output()
        return num_rounds(run_dir) > before

    wait_until(there, what=launcher.output, timeout_s=240)


def _wait_until_nothing_is_left(nodes: SshNodes, launcher: Launcher) -> None:
    wait_until(
        lambda: not nodes.processes(),
        what=lambda: f"{[p.cmdline() for p in nodes.processes()]}\n{launcher.output()}",
        timeout_s=120,
    )


def test_sigterm_to_deepspeed_saves_on_both_nodes_and_torchrun_goes_on_as_one_machine_would(
    nodes: SshNodes, folder: Path
) -> None:
    run_dir = folder / "ssh"
    launcher = _deepspeed(nodes, run_dir)
    _trains(launcher, run_dir)
    with held_until(nodes.ranks(), signal.SIGTERM):
        launcher.send(signal.SIGTERM, "deepspeed")
    assert launcher.wait() == 1, launcher.output()
    _wait_until_nothing_is_left(nodes, launcher)
    assert list(run_dir.glob("checkpoints/round_*_step_*")), launcher.output()

    # One core each, hence one thread: with another number of them a sum rounds in another way.
    torchrun = (
        "taskset", "--cpu-list", str(min(os.sched_getaffinity(0))),
        "torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        "--rdzv_endpoint=node1:29501", "--rdzv_id=1", *_arguments(run_dir),
    )  # fmt: skip
    variables = f"PATH={Path(sys.executable).parent}:$PATH PYTHONPATH=. OMP_NUM_THREADS=1"
    there = f"cd {shlex.quote(str(REPOSITORY))}; {variables} {shlex.join(torchrun)}"
    other = nodes.start("node1", "ssh", "node2", there, log=folder / "other.log")
    launcher = nodes.start("node1", *torchrun, log=folder / "torchrun.log")
    assert launcher.wait() == 0, launcher.output() + other.output()
    assert other.wait() == 0, other.output()
    assert outcome(run_dir) == outcome(run_locally(folder / "alone", *LATE))
    _wait_until_nothing_is_left(nodes, launcher)


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("end", ["terminal closed", "connection lost", "launcher killed", "rank"])
def test_whatever_ends_a_run_over_ssh_no_rank_is_left_and_what_can_be_saved_is(
    end: str, nodes: SshNodes, folder: Path
) -> None:
    run_dir = folder / end.replace(" ", "-")
    launcher = _deepspeed(nodes, run_dir, *LONG)
    _trains(launcher, run_dir)
    if end == "terminal closed":  # pdsh gives its ssh sessions of their own: they live on
        launcher.send(signal.SIGHUP, "deepspeed")
        launcher.send(signal.SIGHUP, "pdsh")
    elif end == "connection lost":
        launcher.send(signal.SIGKILL, "ssh")
    elif end == "launcher killed":  # of a node
        psutil.Process(nodes.ranks()[1]).parent().kill()
    else:
        os.kill(nodes.ranks()[1], signal.SIGKILL)
    launcher.wait()  # the code is pdsh's, 0 where its ssh processes were killed
    _wait_until_nothing_is_left(nodes, launcher)
    saved = list(run_dir.glob("checkpoints/round_*"))
    assert bool(saved) == (end != "rank"), launcher.output()


def test_a_node_that_does_not_answer_is_named_and_sigterm_ends_the_others(
    nodes: SshNodes, folder: Path
) -> None:
    (nodes.folder / "absent").write_text("node1 slots=1\nnode9 slots=1\n")
    launcher = _deepspeed(nodes, folder / "absent", hosts="absent")
    said = ("node9: ssh exited with exit code 255", "waiting for rank 1,")
    wait_until(
        lambda: all(text in launcher.output() for text in said),
        what=launcher.output, timeout_s=240,
    )  # fmt: skip
    launcher.send(signal.SIGTERM, "deepspeed")
    assert launcher.wait() == 1, launcher.output()
    _wait_until_nothing_is_left(nodes, launcher)
