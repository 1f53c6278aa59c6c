"""A consortium over the network: real NVFlare processes, mutual TLS, and runs that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpipe.commands.site.config import read_site
from fedpipe.run.outer import UPDATE
from fedpipe.run.tensor_file import TensorFile
from tests.helpers.cli import Command, fedpipe
from tests.helpers.guide import blocks_of
from tests.helpers.network import GUIDE, Network

SITES = ("alpha", "beta")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Network:
    network = Network(tmp_path_factory.mktemp("consortium"), SITES)
    network.provision()
    return network


@pytest.fixture
def network(provisioned: Network, tmp_path: Path) -> Iterator[Network]:
    fresh = provisioned.fresh(tmp_path / "network")
    yield fresh
    fresh.close()


@pytest.fixture(scope="module")
def undisturbed(
    provisioned: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Network]:
    """Two outer rounds in which nothing goes wrong."""
    fresh = provisioned.fresh(tmp_path_factory.mktemp("undisturbed") / "network")
    fresh.start()
    finished = fresh.coordinate().finish()
    fresh.close()
    assert finished.code == 0, finished.err
    yield fresh


def equal(one: TensorFile, other: TensorFile) -> bool:
    return one.layouts == other.layouts and all(
        np.array_equal(one.read(name), other.read(name)) for name in one.layouts
    )


def test_the_next_weights_are_the_mean_of_what_the_sites_have_sent(undisturbed: Network) -> None:
    for index in range(2):
        base, after = undisturbed.weights(index), undisturbed.weights(index + 1)
        changes = [TensorFile(undisturbed.inbox(site, index) / UPDATE) for site in SITES]
        for name in after.layouts:
            mean = np.float32(0.5) * changes[0].read(name) + np.float32(0.5) * changes[1].read(name)
            assert np.array_equal(after.read(name), base.read(name) + mean), name
    assert (undisturbed.folder / "run/export/config.json").is_file()
    assert (undisturbed.folder / "run/report.html").is_file()


def test_a_site_says_where_it_is_and_what_it_lets_out(undisturbed: Network) -> None:
    said = undisturbed.as_shown("at site alpha: look")
    assert "2 updates sent" in said
    assert "certificate  until 20" in said
    assert "metrics: [train_loss, valid_loss]" in said
    of_all = undisturbed.tool("consortium", "status", "--run-dir", "run")
    assert "2 of 2 outer rounds" in of_all


def test_the_files_of_the_guide_can_be_used(tmp_path: Path) -> None:
    shown = {block.title: block.text for block in blocks_of(GUIDE)}
    (tmp_path / "consortium.yaml").write_text(shown["consortium.yaml"])
    planned = fedpipe("plan", "--config", "consortium.yaml", folder=tmp_path)
    assert planned.code == 0, planned.err
    assert "leaves: change of" in planned.out
    site, own = read_site(shown["site.yaml"], source="site.yaml")
    assert site.accepts.max_hours == 48
    assert own.plain()["federation"] == {"num_clients": 2, "num_replicas": 1}


def test_the_ledgers_of_sites_and_coordinator_tell_the_same(undisturbed: Network) -> None:
    arrived = undisturbed.ledger("run", "received")
    for site in SITES:
        sent = undisturbed.ledger(site, "sent")
        of_site = [line for line in arrived if line["site"] == site]
        keys = ("round", "sha256", "bytes", "tensors", "facts")
        assert [[line[k] for k in keys] for line in sent] == [
            [line[k] for k in keys] for line in of_site
        ]
        assert len(sent) == 2
        for line in sent:
            assert line["facts"]["train_loss"], "the policy lets it out"
            assert line["facts"]["seconds"] == 0.0, "the policy keeps it"


def kill_group_of(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)


def the_run(network: Network, coordinator: Command) -> Command:
    kill_group_of(int((network.inbox("alpha", 0) / "pid").read_text()))
    return coordinator


def the_agent(network: Network, coordinator: Command) -> Command:
    network.agents["alpha"].kill()
    network.start("alpha")
    return coordinator


def the_coordinator(network: Network, coordinator: Command) -> Command:
    coordinator.kill()
    return network.coordinate()


FAULTS: dict[str, Callable[[Network, Command], Command]] = {
    "the site's run": the_run,
    "the agent": the_agent,
    "the coordinator": the_coordinator,
}


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("what", FAULTS)
def test_whatever_is_killed_in_an_outer_round_the_weights_are_the_same(
    network: Network, undisturbed: Network, what: str
) -> None:
    network.start()
    coordinator = network.coordinate()
    network.wait_for(lambda: network.has_begun("alpha", 0), "a run at alpha")
    coordinator = FAULTS[what](network, coordinator)
    finished = coordinator.finish()
    assert finished.code == 0, finished.err
    for index in range(3):
        assert equal(network.weights(index), undisturbed.weights(index)), index
    for site in SITES:
        assert {line["round"] for line in network.ledger(site, "sent")} == {0, 1}
