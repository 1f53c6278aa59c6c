"""A consortium of sites in networks and on SLURM clusters of their own, and what goes wrong.

Whatever goes wrong, the weights are bit for bit those of the same sites on one machine, without
SLURM and without a network. The sites' clocks are an hour apart in all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM

from fedpipe.commands.consortium.config import read_consortium, settings_for
from fedpipe.commands.consortium.run import ROUND_FILE
from fedpipe.commands.site.config import read_site, run_config
from fedpipe.config.load import to_yaml
from fedpipe.config.tree import dump, parse
from fedpipe.federation.outer import read_update, write_first_global, write_next_global
from fedpipe.run.outer import GLOBAL, GLOBAL_FACTS, has_arrived, round_name
from fedpipe.run.tensor_file import TensorFile
from tests.helpers.cli import TIMEOUT_S, Command
from tests.helpers.institutions import Institution, Institutions, obstacle
from tests.helpers.network import Network
from tests.helpers.slurm import Cluster

SITES = ("alpha", "beta", "gamma")
_HOUR_S = 3600
_MINUTE_S = 60.0
_MBIT = 10.0
PROFILE = "timeout_min: 30\ncpus_per_task: 1\nmem_gb: 2\ntasks_per_node: 1\n"
SETTINGS = (
    "pretrain.model.hidden_size=256", "pretrain.federation.num_local_steps=8",
    "federation.min_sites=2",
)  # fmt: skip
"""An update is 11 MB: three pieces of NVFlare."""


@pytest.fixture(autouse=True)
def _cleared() -> None:
    """The cluster of the session is not used here."""


@dataclass
class Clusters(Network):
    """A consortium whose coordinator and sites are institutions; a site trains on its cluster."""

    world: Institutions = field(kw_only=True)

    def institution(self, site: str) -> Institution:
        return self.world.sites[self.names.index(site)] if site else self.world.coordinator

    def cluster(self, site: str) -> Cluster:
        return self.institution(site).cluster

    def command(
        self, *arguments: str, site: str = "", environment: Mapping[str, str] | None = None
    ) -> Command:
        institution = self.institution(site)
        if arguments[:2] == ("site", "join"):
            (self.folder / "slurm.yaml").write_text(PROFILE)
            arguments += ("--profile", "slurm.yaml")
        # Kits are valid from when they are signed, and the last site's clock is behind.
        signs = arguments[:2] in (("consortium", "init"), ("consortium", "sign"))
        return Command(
            *arguments, folder=self.folder, 
            environment={**institution.cluster.environment, **(environment or {})},
            prefix=self.world.sites[-1].prefix if signs else institution.prefix,
        )  # fmt: skip

    def address(self) -> tuple[str, int]:
        return self.world.coordinator.address, self.world.port

    def write_policy(self, site: str, *settings: str) -> None:
        number = self.names.index(site) + 1  # so that every site's share is another one
        clients = ("num_clients", "clients_per_round")
        own = (f"pretrain.federation.{key}={number}" for key in clients)
        super().write_policy(site, *own, *settings)

    def run_dir(self, site: str) -> Path:
        """Directory of a site's run; a pattern until it has begun."""
        return self.inbox(site, 0).parents[1] / "run"

    def jobs(self, site: str) -> list[str]:
        """The jobs that a site has submitted, the oldest first."""
        folders = (self.folder / site).glob("runs/*/run/logs/*_submission.sh")
        return sorted(path.name.partition("_")[0] for path in folders)

    def job(self, site: str, number: int = 1, state: str = "RUNNING") -> str:
        """Wait until a site has submitted so many jobs and the last is in a state; return its id.

        A job that runs has also begun to train.
        """
        self.wait_for(lambda: len(self.jobs(site)) >= number, f"job {number} of {site}")
        job = self.jobs(site)[-1]
        self.cluster(site).wait_for_state(job, state, timeout_s=TIMEOUT_S)
        if state == "RUNNING":
            log = self.run_dir(site) / "metrics.jsonl"
            before = log.stat().st_size if log.is_file() else 0
            self.wait_for(lambda: log.is_file() and log.stat().st_size > before, f"steps of {site}")
        return job

    def updates(self, index: int) -> Path:
        """What the coordinator has got of the sites in an outer round."""
        return self.folder / "run/rounds" / round_name(index) / "updates"


@pytest.fixture(scope="module")
def world() -> Iterator[Institutions]:
    """Three sites; the second one's clocks are an hour ahead, the third one's an hour behind."""
    if why := obstacle():
        pytest.skip(why)
    with Institutions(len(SITES), clock_shifts_s=(0, _HOUR_S, -_HOUR_S)) as world:
        world.start_clusters()
        yield world


@pytest.fixture(scope="module")
def provisioned(world: Institutions, tmp_path_factory: pytest.TempPathFactory) -> Clusters:
    network = Clusters(tmp_path_factory.mktemp("consortium"), SITES, world=world)
    network.provision(*SETTINGS)
    return network


@pytest.fixture
def network(provisioned: Clusters, tmp_path: Path) -> Iterator[Clusters]:
    fresh = provisioned.fresh(tmp_path / "network")
    yield fresh
    fresh.close()
    for site in SITES:
        fresh.cluster(site).clear()


def on_one_machine(network: Clusters, folder: Path, *rounds: Sequence[str]) -> list[TensorFile]:
    """Train outer rounds without SLURM and without a network; return all weights.

    Args:
        network: Whose sites train.
        folder: Empty.
        rounds: By outer round, the sites whose updates make the next weights.
    """
    text = (network.folder / "consortium.yaml").read_text()
    consortium, run = read_consortium(parse(text, source="tests"), source="tests")
    for site in network.names:
        policy = (network.folder / site / "site.yaml").read_text()
        ordered, own = dump(settings_for(site, run)), read_site(policy, source="tests")[1]
        (folder / site).mkdir()
        config = run_config(ordered, own, folder=str(folder / site / "outer"))
        (folder / site / "pretrain.yaml").write_text(to_yaml(config))
    current = folder / round_name(0)
    current.mkdir()
    write_first_global(current, run)
    weights = [TensorFile(current / GLOBAL)]
    for index, sites in enumerate(rounds):
        inboxes = {s: folder / s / "outer" / round_name(index) for s in network.names}
        for inbox in inboxes.values():
            shutil.copytree(current, inbox)
        commands = [
            Command(
                "pretrain", "--config", "pretrain.yaml", "--run-dir", "run", folder=folder / site
            )
            for site in network.names
        ]
        for command in commands:
            finished = command.finish()
            assert finished.code == 0, finished.err
        base = json.loads((current / GLOBAL_FACTS).read_text())
        updates = [read_update(s, inboxes[s], base, weights[-1].layouts) for s in sites]
        after = folder / round_name(index + 1)
        after.mkdir()
        write_next_global(
            after, current, updates, index=index, config=run,
            aggregation=consortium.federation.aggregation,
            optimizer=consortium.federation.server_optimizer,
        )  # fmt: skip
        current = after
        weights.append(TensorFile(current / GLOBAL))
    return weights


@pytest.fixture(scope="module")
def expected(provisioned: Clusters, tmp_path_factory: pytest.TempPathFactory) -> list[TensorFile]:
    """The weights of two outer rounds of all sites."""
    return on_one_machine(provisioned, tmp_path_factory.mktemp("one-machine"), SITES, SITES)


def assert_equal(network: Clusters, expected: list[TensorFile]) -> None:
    for index, other in enumerate(expected):
        weights = network.weights(index)
        assert weights.layouts == other.layouts
        for name in weights.layouts:
            assert np.array_equal(weights.read(name), other.read(name)), (index, name)


def begin(network: Clusters, *overrides: str) -> Command:
    """Start the coordinator and then the sites, which dial again seconds after they have failed."""
    coordinator = network.coordinate(*overrides)
    network.wait_for(lambda: "handed out" in coordinator.output(), "an outer round")
    network.start()
    return coordinator


def assert_done(network: Clusters, coordinator: Command) -> str:
    """The coordinator ends well, and everybody tells the same; return what it says."""
    finished = coordinator.finish()
    assert finished.code == 0, finished.out + finished.err
    assert (network.folder / "run/report.html").is_file()
    weights = network.weights(2)
    model = AutoModelForMaskedLM.from_pretrained(network.folder / "run/export")
    for name, parameter in model.named_parameters():
        if name in weights.layouts:
            assert np.array_equal(parameter.detach().numpy(), weights.read(name)), name
    keys = ("round", "sha256", "bytes", "tensors", "facts")
    received = network.ledger("run", "received")
    for site in network.names:
        sent = network.ledger(site, "sent")  # or about to be, when the link was cut
        theirs = {
            tuple(map(str, map(line.get, keys)))
            for line in sent
            if site in network.record(line["round"])["sites"]
        }
        ours = {tuple(map(str, map(line.get, keys))) for line in received if line["site"] == site}
        assert theirs == ours
    return finished.out


@pytest.mark.matrix(sample=0)  # with its clusters two minutes; the network alone is in tests/e2e
def test_clusters_apart_train_the_weights_of_their_sites_on_one_machine(
    network: Clusters, expected: list[TensorFile]
) -> None:
    assert_done(network, begin(network))
    assert [len(network.jobs(site)) for site in SITES] == [2, 2, 2]
    assert_equal(network, expected)


def killed_jobs_agents_and_coordinators(network: Clusters) -> None:
    """A job is requeued, one is cancelled, an agent is killed twice, and the coordinator once."""
    alpha, beta, gamma = SITES
    (node,) = network.cluster(gamma).nodes
    network.cluster(gamma).drain(node)
    coordinator = begin(network)

    first = network.job(alpha)
    network.cluster(alpha).run("scontrol", "requeue", first)
    cancelled = network.job(beta)
    network.cluster(beta).run("scancel", cancelled)

    waiting = network.job(gamma, state="PENDING")
    network.agents[gamma].kill()
    os.killpg(int((network.inbox(gamma, 0) / "pid").read_text()), signal.SIGKILL)  # its machine
    network.start(gamma)
    run_log = network.inbox(gamma, 0) / "run.log"
    network.wait_for(lambda: f"job     {waiting} is in the queue already" in run_log.read_text(),
                     "the job that waits")  # fmt: skip

    network.wait_for(lambda: has_arrived(network.updates(0) / alpha), "an update of alpha")
    coordinator.kill()
    coordinator = network.coordinate()
    network.cluster(gamma).resume(node)
    assert network.job(gamma) == waiting
    network.agents[gamma].kill()
    network.start(gamma)
    assert_done(network, coordinator)

    assert [len(network.jobs(site)) for site in SITES] == [2, 3, 2]
    assert "Restarts=1" in network.cluster(alpha).run("scontrol", "show", "job", first).stdout
    assert cancelled in network.jobs(beta)
    assert [
        line["round"] for line in network.ledger("run", "received") if line["site"] == alpha
    ] == [0, 1]


def cut_and_slow_links(network: Clusters) -> None:
    """A link is cut for a minute while its site trains, and a slow one in an upload."""
    alpha, beta, _ = SITES
    network.institution(beta).limit(_MBIT)
    coordinator = begin(network)

    network.job(alpha)
    network.institution(alpha).cut()
    restore_alpha = time.monotonic() + _MINUTE_S

    def comes() -> bool:
        files = [file for file in network.updates(0).glob(f"{beta}/*") if file.stat().st_size]
        return bool(files) and not has_arrived(network.updates(0) / beta)

    network.wait_for(comes, "the first piece of an update of beta")
    network.institution(beta).cut()
    restore_beta = time.monotonic() + _MINUTE_S
    time.sleep(restore_alpha - time.monotonic())
    assert has_arrived(network.inbox(alpha, 0)), "trained while it was cut"
    assert not has_arrived(network.updates(0) / alpha)
    network.institution(alpha).restore()
    network.wait_for(lambda: has_arrived(network.updates(0) / alpha), "the update of alpha")
    time.sleep(max(0.0, restore_beta - time.monotonic()))
    assert not has_arrived(network.updates(0) / beta)
    network.institution(beta).restore()
    assert_done(network, coordinator)
    network.institution(beta).unlimit()

    assert [len(network.jobs(site)) for site in SITES] == [2, 2, 2]


FAULTS: dict[str, Callable[[Clusters], None]] = {
    "killed": killed_jobs_agents_and_coordinators,
    "links": cut_and_slow_links,
}


@pytest.mark.matrix(sample=0)  # two to four minutes each
@pytest.mark.parametrize("what", FAULTS)
def test_whatever_goes_wrong_the_weights_are_those_of_the_sites_on_one_machine(
    network: Clusters, expected: list[TensorFile], what: str
) -> None:
    FAULTS[what](network)
    assert_equal(network, expected)


@pytest.mark.matrix(sample=0)
def test_the_story_of_the_guide_with_a_preemption_a_lost_site_and_a_long_queue(
    network: Clusters, tmp_path: Path
) -> None:
    """Gamma's link is down until the first outer round is over; alpha's queue takes the second."""
    alpha, beta, gamma = SITES
    (network.folder / alpha / "profile.yaml").write_text(PROFILE + "slurm_partition: preemptible\n")
    (node,) = network.cluster(alpha).nodes
    coordinator = begin(network, "federation.deadline_s=1")  # and two sites, whichever

    network.job(gamma)
    network.institution(gamma).cut()
    preempted = network.job(alpha)
    urgent = ("srun", "--partition=urgent", "--exclusive", "--mem=0", "true")
    network.cluster(alpha).run(*urgent)
    # It runs again, and its outer round is not over before the node is closed to the next one.
    network.cluster(alpha).wait_for_state(preempted, "RUNNING", timeout_s=TIMEOUT_S)
    network.cluster(alpha).drain(node)
    assert network.jobs(alpha) == [preempted]
    decided = network.updates(0).parent / ROUND_FILE
    network.wait_for(decided.is_file, "the end of the first outer round")
    network.institution(gamma).restore()

    said = assert_done(network, coordinator)
    assert f"{gamma}: no answer before the deadline" in said
    assert [network.record(index)["absent"] for index in range(2)] == [[gamma], [alpha]]
    assert "Restarts=1" in network.cluster(alpha).run("scontrol", "show", "job", preempted).stdout
    assert_equal(network, on_one_machine(network, tmp_path, (alpha, beta), (beta, gamma)))

    network.tool("site", "stop", "--site-dir", alpha, site=alpha)
    network.cluster(alpha).run("scancel", network.job(alpha, 2, "PENDING"))
    network.agents[alpha].assert_nothing_left(60)
