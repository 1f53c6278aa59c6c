"""Sites and a coordinator that meet over the network, through NVFlare, as their guide says."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpipe.commands.consortium.run import Consortium, locate
from fedpipe.config.tree import dump, merge, parse_override, wrap
from fedpipe.run.ledger import Ledger
from fedpipe.run.outer import (
    GLOBAL,
    UPDATE,
    UPDATE_FACTS,
    VERSION,
    UpdateFacts,
    digest_of,
    round_name,
)
from fedpipe.run.tensor_file import TensorFile, write_tensors
from tests.helpers.cli import TIMEOUT_S, Command
from tests.helpers.corpora import write_rows
from tests.helpers.guide import blocks_of, commands

GUIDE = "docs/how-to/consortium.md"
PRETRAIN = {
    "model": {
        "family": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "data": {"sequence_length": 16},
    "pipeline": {"cut": [1], "micro_batch_size": 2, "num_micro_batches": 2},
    "federation": {"num_local_steps": 4},
    "outer": {"num_inner_rounds": 2},
}  # fmt: skip
POLICY = {
    "pretrain": {
        "data": {"partition": "iid"},
        "federation": {"num_clients": 2, "num_replicas": 1},
        "pipeline": {"colocate": True},
        "validation": {"max_blocks_per_client": 2},
        "log": {"to": []},
    },
    "sends": {"metrics": ["train_loss", "valid_loss"]},
}  # fmt: skip


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class Network:
    """A coordinator and its sites, with kits, in folders below one, on this machine."""

    folder: Path
    names: Sequence[str]
    agents: dict[str, Command] = field(default_factory=dict)

    def command(
        self, *arguments: str, site: str = "", environment: Mapping[str, str] | None = None
    ) -> Command:
        """Start ``fedpipe``, at a site or at the coordinator."""
        return Command(*arguments, folder=self.folder, environment=environment)

    def address(self) -> tuple[str, int]:
        """Where the sites reach a new coordinator."""
        return "localhost", free_port()

    # -- once -------------------------------------------------------------------------------------

    def provision(self, *settings: str) -> None:
        """Make the authority and all kits, and let every site join."""
        host, port = self.address()
        tree = {
            "name": "heart",
            "server": {"host": host, "port": port, "kits": str(self.folder / "kits")},
            "federation": {"sites": list(self.names), "num_rounds": 2, "min_sites": 1},
            "pretrain": PRETRAIN,
        }
        (self.folder / "consortium.yaml").write_text(_yaml(tree, settings))
        self.as_shown("at the coordinator: begin")
        for index, site in enumerate(self.names):
            self.join(site, index)

    def join(self, site: str, seed: int) -> None:
        """Request, sign and join, as the guide shows; files go by mail."""
        for name, other in ((f"{site}.jsonl", seed), (f"{site}-held-out.jsonl", 99)):
            write_rows(self.folder / name, 40, seed=other)
        self.write_policy(site)
        self._mail(f"kits/invitations/{site}.yaml")
        self.as_shown("at site alpha: request", site)
        self._mail(f"{site}/kit/request/{site}.request.zip")
        self.as_shown("at the coordinator: sign", site)
        self._mail(f"kits/signed/{site}.signed.zip")
        self.as_shown("at site alpha: join", site)

    def _mail(self, path: str) -> None:
        shutil.copy(self.folder / path, self.folder)

    def as_shown(self, title: str, site: str = "alpha") -> str:
        """Run the commands of a block of the guide, for a site; return what they say."""
        block = next(block.text for block in blocks_of(GUIDE) if block.title == title)
        at = site if title.startswith("at site") else ""
        return "".join(
            self.tool(*shlex.split(command.replace("alpha", site))[1:], site=at)
            for command in commands(block)
        )

    def write_policy(self, site: str, *settings: str) -> None:
        """Write ``site.yaml`` with overrides, for ``join`` and for a site that has joined."""
        own = merge(
            wrap(POLICY, "tests"),
            wrap({"pretrain": {"data": {
                "train": [str(self.folder / f"{site}.jsonl")],
                "valid": [str(self.folder / f"{site}-held-out.jsonl")],
            }}}, "tests"),
        ).plain()  # fmt: skip
        text = _yaml(own, settings)
        (self.folder / "site.yaml").write_text(text)
        if (self.folder / site / "site.yaml").is_file():
            (self.folder / site / "site.yaml").write_text(text)

    def tool(self, *arguments: str, site: str = "") -> str:
        """Run a command that must work; return what it says."""
        finished = self.command(*arguments, site=site).finish()
        assert finished.code == 0, finished.err
        return finished.out

    def begin(self) -> None:
        """Let the coordinator write the first weights, so that updates can be placed."""
        self._consortium.begin()

    @property
    def _consortium(self) -> Consortium:
        return locate(str(self.folder / "consortium.yaml"), [], str(self.folder / "run"))

    def place(
        self, site: str, index: int, *, value: float = 0.0, base: str = "", cut: int = 0
    ) -> None:
        """Put an update where the run of a site would leave it, so that nothing is trained.

        Args:
            site: Whose.
            index: The outer round.
            value: Of its first number; the others are 0. Without it the next weights are the same,
                so that updates can be placed for later outer rounds, too.
            base: SHA-256 of the weights that it is a change of; those of ``begin`` without.
            cut: How much shorter than it should be its first tensor is.
        """
        weights = self.weights(0)
        layouts = dict(weights.layouts)
        first = next(iter(layouts))
        rows, *rest = layouts[first].shape
        layouts[first] = layouts[first]._replace(shape=(rows - cut, *rest))
        tensors = [np.zeros(layout.shape, np.float32) for layout in layouts.values()]
        tensors[0].flat[0] = value
        folder = self.folder / site / "runs" / self._consortium.identity / "outer"
        folder = folder / round_name(index)
        folder.mkdir(parents=True)
        write_tensors(folder / UPDATE, layouts, tensors)
        facts: UpdateFacts = {
            "version": VERSION, "round": index, "base_sha256": base or digest_of(weights.path),
            "sha256": digest_of(folder / UPDATE), "wire": "fp32", "tokens": 64, "train_loss": [1.0],
            "base_valid_loss": [2.0], "valid_loss": [1.5], "valid_tokens": 16, "seconds": 3.0,
            "fedpipe": "0",
        }  # fmt: skip
        (folder / UPDATE_FACTS).write_text(json.dumps(facts))

    def fresh(self, folder: Path) -> Network:
        """The same consortium, with its kits, in another folder and on another port."""
        shutil.copytree(self.folder, folder, symlinks=True)
        copy = replace(self, folder=folder, agents={})
        _, port = self.address()
        old = _port(self.folder)
        for path in (
            *folder.rglob("fed_server.json"), *folder.rglob("fed_client.json"),
            *folder.rglob("fed_admin.json"), *folder.rglob("*.yaml"),
            *folder.rglob("resources.json"),
        ):  # fmt: skip
            text = path.read_text().replace(str(self.folder), str(folder))
            path.write_text(text.replace(str(old), str(port)))
        return copy

    # -- running ----------------------------------------------------------------------------------

    def start(self, *sites: str, environment: Mapping[str, str] | None = None) -> None:
        """Start agents, by default all."""
        for site in sites or self.names:
            self.agents[site] = self.command(
                "site", "start", "--foreground", "--site-dir", site,
                site=site, environment=environment,
            )  # fmt: skip

    def stop(self, site: str) -> None:
        """End an agent, and wait until it has ended."""
        agent = self.agents.pop(site)
        agent.process.send_signal(signal.SIGTERM)
        agent.process.wait(30)

    def coordinate(self, *overrides: str) -> Command:
        """Start the coordinator."""
        arguments = ("--config", "consortium.yaml", "--run-dir", "run", *overrides)
        return self.command("consortium", "run", *arguments)

    def close(self) -> None:
        """End everything."""
        for agent in self.agents.values():
            if agent.process.poll() is None:
                agent.process.send_signal(signal.SIGTERM)
                agent.process.wait(30)
            agent.assert_nothing_left(60)

    # -- looking ----------------------------------------------------------------------------------

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Return once a condition holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {TIMEOUT_S} s"
            time.sleep(0.05)

    def inbox(self, site: str, index: int) -> Path:
        """Where an outer round lies at a site; a pattern until its run has begun."""
        (run,) = (self.folder / site / "runs").iterdir()
        return run / "outer" / round_name(index)

    def has_begun(self, site: str, index: int) -> bool:
        """Whether a site's run of an outer round has been started."""
        return any((self.folder / site).glob(f"runs/*/outer/{round_name(index)}/pid"))

    def log(self, site: str) -> str:
        """What a site has said to its own people."""
        file = self.folder / site / "site.log"
        return file.read_text() if file.is_file() else ""

    def ledger(self, where: str, what: str) -> list[dict[str, Any]]:
        """Lines of a kind in the ledger of a site, or of the run directory."""
        lines = Ledger(self.folder / where / "ledger.jsonl").read()
        return [line for line in lines if line["what"] == what]

    def weights(self, index: int) -> TensorFile:
        """The coordinator's weights of an outer round."""
        return TensorFile(self.folder / "run/rounds" / round_name(index) / GLOBAL)

    def record(self, index: int) -> dict[str, Any]:
        """What became of an outer round."""
        file = self.folder / "run/rounds" / round_name(index) / "round.json"
        return dict(json.loads(file.read_text()))


def _port(folder: Path) -> int:
    for line in (folder / "consortium.yaml").read_text().splitlines():
        if line.strip().startswith("port:"):
            return int(line.partition(":")[2])
    raise AssertionError("no port")


def _yaml(tree: dict[str, Any], settings: Sequence[str]) -> str:
    node = wrap(tree, "tests")
    for setting in settings:
        node = merge(node, parse_override(setting))
    return dump(node.plain())
