"""A coordinator: hand weights out, take updates in, make the next weights, until all is done.

Everything that is decided is a file before it is acted upon, so the same command goes on wherever
it was killed. In an outer round's folder ``global.safetensors`` and ``global.json`` are the weights
that its sites start from, ``updates/SITE`` holds what has come in, and ``round.json`` says, once
and for all, whose updates make the next weights.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from fedpipe.commands.consortium.config import (
    PRETRAIN,
    ConsortiumConfig,
    read_consortium,
    settings_for,
)
from fedpipe.commands.consortium.exchange import Exchange, Folders
from fedpipe.commands.consortium.kits import require_nvflare
from fedpipe.config.load import to_dict
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import dump, merge, parse, parse_override, read_text
from fedpipe.errors import ConfigError, FederationError
from fedpipe.federation.cohort import draw_cohort
from fedpipe.files import write_text
from fedpipe.report.format import bytes_text, count, integer, number
from fedpipe.run.outer import (
    GLOBAL,
    GLOBAL_FACTS,
    UPDATE,
    UPDATE_FACTS,
    UpdateFacts,
    has_arrived,
    round_name,
)
from fedpipe.run.resume import check_config
from fedpipe.run.run_dir import RunDir

ROUNDS, UPDATES, ROUND_FILE = "rounds", "updates", "round.json"
EXPORT, IDENTITY = "export", "identity"
HANDED_OUT = "handed_out"
"""Holds the time at which an outer round was handed out."""
CONNECTED = "connected.json"
"""Names the sites that are connected, while the command runs."""
LOOK_S = 0.5
"""How often is looked for updates."""

Show = Callable[[str], None]


class SiteRecord(TypedDict):
    """What a coordinator knows of a site's part in an outer round."""

    facts: UpdateFacts
    bytes: int
    """Of the update."""
    answered_s: float
    """From the hand-out to the arrival; the rest of it that is not training is waiting."""


class RoundRecord(TypedDict):
    """The content of ``round.json``."""

    round: int
    sites: dict[str, SiteRecord]
    """Whose updates make the next weights."""
    refused: dict[str, str]
    """Whose updates must not be averaged, and why."""
    absent: list[str]
    """Who had not answered when the deadline came."""
    seconds: float
    """Of the outer round."""


class Consortium:
    """The directory of a consortium, and what is left to do in it."""

    def __init__(self, run: RunDir, config: ConsortiumConfig, pretrain: RunConfig) -> None:
        """Take what ``locate`` has found; nothing is written."""
        self.run_dir, self.config, self.pretrain = run, config, pretrain

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.run_dir.path

    @property
    def num_rounds(self) -> int:
        """Outer rounds in all."""
        return self.config.federation.num_rounds

    def round_dir(self, index: int) -> Path:
        """Folder of an outer round; that after the last one holds the model."""
        return self.path / ROUNDS / round_name(index)

    def record(self, index: int) -> RoundRecord | None:
        """What an outer round was decided to be; None before."""
        try:
            text = (self.round_dir(index) / ROUND_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        record: RoundRecord = json.loads(text)
        return record

    @property
    def records(self) -> list[RoundRecord]:
        """All outer rounds that were decided."""
        found = [self.record(index) for index in range(self.num_done + 1)]
        return [record for record in found if record is not None]

    @property
    def num_done(self) -> int:
        """Outer rounds whose next weights are there."""
        begun = (self.path / ROUNDS).glob(f"round_*/{GLOBAL_FACTS}")
        return max((int(file.parent.name.partition("_")[2]) for file in begun), default=0)

    @property
    def model_dir(self) -> Path:
        """The Hugging Face folder of the newest weights."""
        return self.path / EXPORT

    # -- the work of a coordinator -----------------------------------------------------------

    @contextmanager
    def exchange(self, show: Show) -> Iterator[Exchange]:
        """Have a way to the sites, and end it whatever happens."""
        exchange: Exchange = Folders(Path(self.config.exchange))
        if self.config.server.host:
            require_nvflare()
            from fedpipe.commands.consortium.network import Network

            exchange = Network(
                self.config.server,
                self.path,
                consortium=self.identity,
                num_rounds=self.num_rounds,
                show=show,
            )
        try:
            exchange.open(
                {
                    site: dump(settings_for(site, self.pretrain))
                    for site in self.config.federation.sites
                }
            )
            yield exchange
        finally:
            exchange.close()

    @cached_property
    def identity(self) -> str:
        """Name of this training for folders at sites; no other one has it."""
        return (self.path / IDENTITY).read_text(encoding="utf-8").strip()

    def begin(self) -> None:
        """Write the directory and the first weights."""
        self.run_dir.make()
        shared = to_dict(self.pretrain)
        del shared["seed"], shared["federation"]["num_rounds"]  # they follow from the consortium's
        self.run_dir.write(dump(to_dict(self.config) | {PRETRAIN: shared}))
        first = self.round_dir(0)
        first.mkdir(parents=True, exist_ok=True)
        if not (first / GLOBAL_FACTS).is_file():
            from fedpipe.federation.outer import write_first_global

            write_first_global(first, self.pretrain)
        if not (self.path / IDENTITY).is_file():
            write_text(self.path / IDENTITY, f"{self.config.name}-{secrets.token_hex(4)}\n")

    def train_round(self, index: int, exchange: Exchange, *, show: Show) -> None:
        """Hand an outer round out, wait for its sites, and make the next weights.

        Args:
            index: The outer round.
            exchange: The way to the sites.
            show: Shows a line.

        Raises:
            FederationError: Too few of the updates can be averaged, and nobody else will answer.
        """
        record = self.record(index)
        if record is None:
            invited = self.invited(index)
            exchange.hand_out(index, self.round_dir(index), invited)
            show(f"{self._label(index)} handed out to {', '.join(invited)}")
            record = self._collect(index, invited, exchange, show=show)
            exchange.recall()
            write_text(self.round_dir(index) / ROUND_FILE, json.dumps(record, indent=1) + "\n")
        self._aggregate(index, record)
        names = count(len(record["sites"]), "site")
        tokens = sum(site["facts"]["tokens"] for site in record["sites"].values())
        show(f"{self._label(index)} made the next weights of {names}, {integer(tokens)} tokens")

    def invited(self, index: int) -> list[str]:
        """Sites of an outer round, in the order of their names; a function of the seed."""
        sites = sorted(self.config.federation.sites)
        drawn = draw_cohort(
            self.config.seed,
            round_id=index,
            num_clients=len(sites),
            clients_per_round=self.config.federation.num_drawn,
        )
        return [sites[k] for k in sorted(drawn)]

    def _label(self, index: int) -> str:
        width = len(str(self.num_rounds))
        return f"{time.strftime('%H:%M:%S')} outer round {index + 1:>{width}}/{self.num_rounds}"

    def _collect(
        self, index: int, invited: list[str], exchange: Exchange, *, show: Show
    ) -> RoundRecord:
        """Take updates in until all have answered, or enough have when the deadline comes."""
        from fedpipe.federation.outer import read_update
        from fedpipe.run.tensor_file import TensorFile

        federation = self.config.federation
        handed_out = self._note_handed_out(index)
        base = json.loads((self.round_dir(index) / GLOBAL_FACTS).read_text(encoding="utf-8"))
        layouts = TensorFile(self.round_dir(index) / GLOBAL).layouts
        sites: dict[str, SiteRecord] = {}
        refused: dict[str, str] = {}
        while True:
            for site in [s for s in invited if s not in sites and s not in refused]:
                folder = self.round_dir(index) / UPDATES / site
                if why := exchange.declined(site, folder):
                    refused[site] = f"{site} declines: {why}"
                    show(f"{self._label(index)} {refused[site]}")
                    continue
                if not (has_arrived(folder) or exchange.take_in(site, index, folder)):
                    continue
                answered_s = (folder / UPDATE_FACTS).stat().st_mtime - handed_out
                try:
                    density = self.pretrain.federation.density
                    facts = read_update(site, folder, base, layouts, density=density).facts
                except FederationError as error:
                    refused[site] = str(error)
                    show(f"{self._label(index)} {error}")
                    continue
                size = (folder / UPDATE).stat().st_size
                sites[site] = {"facts": facts, "bytes": size, "answered_s": max(0.0, answered_s)}
                show(f"{self._label(index)} {site}: {_answer(facts, size)}")
            late = 0 < federation.deadline_s < time.time() - handed_out
            everyone = len(sites) + len(refused) == len(invited)
            if len(sites) >= federation.quorum and (everyone or late):
                break
            if everyone:
                raise FederationError(
                    f"outer round {index + 1}: expected {federation.quorum} updates or more that"
                    f" can be averaged, got {len(sites)}: {' '.join(refused.values())} Once those"
                    f" sites are mended, remove {self._answers(index, refused)}, then give the same"
                    " command again."
                )
            exchange.attend([s for s in invited if s not in sites and s not in refused])
            time.sleep(LOOK_S)
        absent = [s for s in invited if s not in sites and s not in refused]
        for site in absent:
            show(f"{self._label(index)} {site}: no answer before the deadline")
        return {
            "round": index,
            "sites": sites,
            "refused": refused,
            "absent": absent,
            "seconds": time.time() - handed_out,
        }

    def _answers(self, index: int, sites: Iterable[str]) -> str:
        """Name what to remove so that sites are asked again."""
        folders = ", ".join(str(self.round_dir(index) / UPDATES / site) for site in sites)
        if self.config.server.host:
            return folders
        return f"{folders}, and their update.json in {self.config.exchange}"

    def _note_handed_out(self, index: int) -> float:
        """Return when an outer round was handed out, by this machine's clock; written down once."""
        if (before := self.handed_out_at(index)) is not None:
            return before
        write_text(self.round_dir(index) / HANDED_OUT, f"{(now := time.time())}\n")
        return now

    def handed_out_at(self, index: int) -> float | None:
        """When an outer round was handed out; None before."""
        file = self.round_dir(index) / HANDED_OUT
        return float(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _aggregate(self, index: int, record: RoundRecord) -> None:
        from fedpipe.federation.outer import SiteUpdate, write_next_global
        from fedpipe.run.tensor_file import TensorFile

        folder = self.round_dir(index) / UPDATES
        updates = [
            SiteUpdate(site=site, facts=of_site["facts"], file=TensorFile(folder / site / UPDATE))
            for site, of_site in record["sites"].items()
        ]
        target = self.round_dir(index + 1)
        target.mkdir(exist_ok=True)
        write_next_global(
            target,
            self.round_dir(index),
            updates,
            index=index,
            aggregation=self.config.federation.aggregation,
            optimizer=self.config.federation.server_optimizer,
            config=self.pretrain,
        )

    def site_state(self, site: str, index: int) -> str:
        """Say how far a site is in an outer round."""
        if has_arrived(self.round_dir(index) / UPDATES / site):
            return "has answered"
        if self.config.server.host:
            return "has not answered"
        return Folders(Path(self.config.exchange)).state(site, index)

    def export(self) -> Path | None:
        """Write the newest weights as a Hugging Face folder; return it.

        Every outer round has a folder of its own; ``export`` leads to that of the newest.

        Returns:
            None where a part of the model stays with the clients, so that there is no single one.
        """
        from fedpipe.run.export import export_global

        newest = self.round_dir(self.num_done)
        folder = newest / EXPORT
        num_sites = len(self.config.federation.sites)
        if not (folder.is_dir() or export_global(newest, self.pretrain, folder, sites=num_sites)):
            return None
        aside = self.path / f".{EXPORT}.part"
        aside.unlink(missing_ok=True)
        aside.symlink_to(folder.relative_to(self.path))
        os.replace(aside, self.model_dir)
        return self.model_dir


def locate(config_path: str | None, overrides: list[str], run_dir: str | None) -> Consortium:
    """Find a consortium from its file, or from its directory.

    Raises:
        FedPipeError: Anything that a user can get wrong.
    """
    run = RunDir.at(run_dir, "consortium") if run_dir else None
    if config_path:
        tree, source = parse(read_text(config_path), source=config_path), config_path
    elif run and run.saved:
        tree, source = run.saved, str(run.config_file)
    else:
        raise ConfigError(
            "--config: expected the file of a consortium, got none. See"
            " docs/how-to/consortium.md for one, or name the --run-dir of one that has begun."
        )
    for override in overrides:
        tree = merge(tree, parse_override(override))
    config, pretrain = read_consortium(tree, source=source)
    run = run or RunDir.at(Path("runs") / config.name, "consortium")
    if bool(config.exchange) == bool(config.server.host):
        got = "both" if config.exchange else "none"
        raise ConfigError(
            "exchange: expected either the folder that connects coordinator and sites, or"
            f" server.host, got {got}. Write exchange: DIR, or server: {{host: NAME, port: 8002}}."
        )
    if config.server.host and (epochs := pretrain.federation.num_local_epochs):
        raise ConfigError(
            f"{PRETRAIN}.federation.num_local_epochs: expected 0 where sites are reached over the"
            f" network, because they limit steps (accepts.max_steps), got {epochs}. Set"
            f" {PRETRAIN}.federation.num_local_steps."
        )
    if run.saved and (config_path or overrides):
        saved = read_consortium(run.saved, source=str(run.config_file))
        _check_same(run.path, saved, (config, pretrain))
    return Consortium(run, config, pretrain)


def _check_same(directory: Path, before: Any, now: Any) -> None:
    way_out = "Go on with --run-dir alone, or choose a new --run-dir."
    if before[0].federation.num_rounds != now[0].federation.num_rounds:
        way_out = (
            "The learning rate follows from the number of outer rounds, so that more of them are"
            f" another training: choose a new --run-dir, and let it begin with the weights that are"
            f" there, {PRETRAIN}.model.path={directory / EXPORT}."
        )
    may_change = ("exchange", "server.", "federation.deadline_s", "federation.min_sites")
    for old, new in zip(before, now, strict=True):
        check_config(directory, old, new, may_change=may_change, what="consortium", way_out=way_out)


def _answer(facts: Mapping[str, Any], size: int) -> str:
    """Say what a site has sent."""
    text = f"{integer(facts['tokens'])} tokens, {bytes_text(size)}"
    for when, key in (("before", "base_valid_loss"), ("after", "valid_loss")):
        if facts[key]:
            text += f", held-out loss {when} {number(facts[key][-1], 3)}"
    return text
