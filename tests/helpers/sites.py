"""Sites of a consortium as folders: what a coordinator does between them, by hand and by the code.

Every site is a run of ``fedpipe pretrain`` on its own text; nothing but four files moves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedpipe.config.federation import AggregationConfig, ServerOptimizerConfig
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.federation.outer import SiteUpdate, read_update, write_first_global, write_next_global
from fedpipe.run.outer import GLOBAL, GLOBAL_FACTS, UPDATE_FACTS, round_name
from fedpipe.run.tensor_file import TensorFile
from tests.helpers.cli import Command, Finished
from tests.helpers.corpora import make_wordpiece, write_rows

MODEL = (
    "model.family=bert", "model.num_hidden_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.intermediate_size=64", "data.sequence_length=16",
    "data.partition=iid", "data.text_column=text", "pipeline.cut=[1]", "pipeline.colocate=true",
    "pipeline.micro_batch_size=2", "pipeline.num_micro_batches=2", "federation.num_replicas=1",
    "federation.num_rounds=4", "federation.num_local_steps=2", "outer.num_inner_rounds=2",
    "optimizer.lr=1e-3", "log.to=[]",
)  # fmt: skip
"""What all sites have in common."""


@dataclass
class Site:
    """An institution: its text, its clients, and the directory of its one run."""

    name: str
    folder: Path
    settings: tuple[str, ...] = ()
    inbox_name: str = "outer"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def inbox(self) -> Path:
        """``outer.folder``."""
        return self.folder / self.inbox_name

    def move_inbox(self, name: str) -> None:
        """Let ``outer.folder`` lie elsewhere."""
        self.inbox.rename(self.folder / name)
        self.inbox_name = name

    def round(self, index: int) -> Path:
        return self.inbox / round_name(index)

    def overrides(self) -> list[str]:
        return [*MODEL, *self.settings, f"outer.folder={self.inbox}"]

    def config(self) -> RunConfig:
        return load_config(None, self.overrides())

    def start(self, *further: str) -> Command:
        arguments = ("pretrain", "--run-dir", str(self.run_dir), *self.overrides(), *further)
        return Command(*arguments, folder=self.folder)

    def train(self, *further: str) -> Finished:
        return self.start(*further).finish()

    def facts(self, index: int) -> dict[str, object]:
        return dict(json.loads((self.round(index) / UPDATE_FACTS).read_text()))

    def files(self, index: int) -> dict[str, bytes]:
        """What leaves the site, without wall times."""
        facts = self.facts(index) | {"seconds": 0.0}
        return {
            "update": (self.round(index) / "update.safetensors").read_bytes(),
            "facts": json.dumps(facts).encode(),
        }


@dataclass
class Consortium:
    """A coordinator in this process, and its sites."""

    folder: Path
    sites: list[Site]
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)

    def round(self, index: int) -> Path:
        path = self.folder / "coordinator" / round_name(index)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def begin(self) -> None:
        write_first_global(self.round(0), self.sites[0].config())

    def hand_out(self, index: int, sites: Sequence[Site] | None = None) -> None:
        for site in sites or self.sites:
            site.round(index).mkdir(parents=True, exist_ok=True)
            for name in (GLOBAL, GLOBAL_FACTS):
                shutil.copy(self.round(index) / name, site.round(index) / name)

    def updates(self, index: int, sites: Sequence[Site] | None = None) -> list[SiteUpdate]:
        base = json.loads((self.round(index) / GLOBAL_FACTS).read_text())
        layouts = TensorFile(self.round(index) / GLOBAL).layouts
        chosen = sites or self.sites
        density = self.sites[0].config().federation.density
        return [
            read_update(site.name, site.round(index), base, layouts, density=density)
            for site in chosen
        ]

    def advance(self, index: int, sites: Sequence[Site] | None = None) -> None:
        write_next_global(
            self.round(index + 1),
            self.round(index),
            self.updates(index, sites),
            index=index,
            aggregation=self.aggregation,
            optimizer=self.optimizer,
            config=self.sites[0].config(),
        )

    def run(self, num_rounds: int) -> None:
        self.begin()
        for index in range(num_rounds):
            self.hand_out(index)
            for site in self.sites:
                finished = site.train()
                assert finished.code == 0, finished.err
            self.advance(index)

    def weights(self, index: int) -> dict[str, np.ndarray]:
        file = TensorFile(self.round(index) / GLOBAL)
        return {name: file.read(name) for name in file.layouts}


def make_sites(folder: Path, *clients: int, settings: tuple[str, ...] = ()) -> list[Site]:
    """Sites with so many clients each, on texts of their own; one vocabulary for all."""
    texts = [write_rows(folder / f"text_{k}.jsonl", 60, seed=k) for k in range(len(clients) + 1)]
    lines = Path(texts[0]).read_text().splitlines()
    tokenizer = make_wordpiece(folder / "tokenizer", [json.loads(line)["text"] for line in lines])
    sites = []
    for index, count in enumerate(clients):
        site_folder = folder / f"site_{index}"
        site_folder.mkdir()
        own = (
            f"data.train=[{texts[index]}]", f"data.valid=[{texts[-1]}]",
            f"data.tokenizer={tokenizer}", f"federation.num_clients={count}",
            f"federation.clients_per_round={count}", f"seed={index}", *settings,
        )  # fmt: skip
        sites.append(Site(name=f"site-{index}", folder=site_folder, settings=own))
    return sites
