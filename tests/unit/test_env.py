"""Rank and rendezvous, as torchrun, deepspeed and srun announce them."""

from __future__ import annotations

import pytest

from fedpipe.distributed.env import ProcessEnv, detect, threads_per_process
from fedpipe.errors import TopologyError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2",
    "MASTER_ADDR": "node-7", "MASTER_PORT": "40000",
}  # fmt: skip


def test_torchrun_is_understood() -> None:
    assert detect(TORCHRUN) == ProcessEnv(
        rank=5, world_size=8, local_rank=1, local_world_size=4, rendezvous="tcp://node-1:29500",
        attempt=2,
    )  # fmt: skip


def test_deepspeed_is_understood() -> None:
    """Its launcher sets neither LOCAL_WORLD_SIZE on old versions nor a restart count."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = detect({name: TORCHRUN[name] for name in names})
    assert (env.rank, env.world_size, env.local_rank, env.attempt) == (5, 8, 1, 0)
    assert env.local_world_size == 8, "one host is assumed"


def test_srun_is_understood() -> None:
    assert detect(SRUN) == ProcessEnv(
        rank=3, world_size=4, local_rank=1, local_world_size=2, rendezvous="tcp://node-7:40000"
    )


def test_a_launcher_inside_a_slurm_job_wins_over_slurm() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert detect(batch | TORCHRUN) == detect(TORCHRUN)


def test_one_process_needs_no_address() -> None:
    env = detect({"RANK": "0", "WORLD_SIZE": "1"})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (0, 1, 0, 1)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("base", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_several_processes_need_an_address(base: dict[str, str], missing: str) -> None:
    with pytest.raises(
        TopologyError, match=r"^MASTER_ADDR and MASTER_PORT: expected the address of rank 0, got "
    ):  # fmt: skip
        detect({name: value for name, value in base.items() if name != missing})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"RANK": "first"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "?"}, "LOCAL_RANK"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_a_variable_that_is_no_number_is_named(change: dict[str, str], name: str) -> None:
    with pytest.raises(TopologyError, match=rf"^{name}: expected a number from the launcher, got "):
        detect(TORCHRUN | change)


def test_without_a_launcher_the_error_says_how_to_start() -> None:
    with pytest.raises(
        TopologyError, match=r"^SLURM_PROCID: .* got None\. Start with `fedpipe pre"
    ):
        detect({})


def test_the_processes_of_a_host_share_its_cores() -> None:
    assert threads_per_process(4, cores=32) == 8
    assert threads_per_process(3, cores=8) == 2
    assert threads_per_process(16, cores=2) == 1
    assert threads_per_process(0, cores=2) == 2
    assert threads_per_process(1) >= 1


def test_rank_0_hosts_the_store_unless_torchrun_does() -> None:
    first = TORCHRUN | {"RANK": "0"}
    assert detect(first).hosts_store and not detect(TORCHRUN).hosts_store
    assert not detect(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store
