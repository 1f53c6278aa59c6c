"""What a consortium is: its sites, its outer rounds, and the run of every site. No torch."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from fedpipe.config.federation import AggregationConfig, ServerOptimizerConfig
from fedpipe.config.load import build, check, to_dict
from fedpipe.config.model_shape import ModelShape, model_shape, resolve
from fedpipe.config.paths import UserPath
from fedpipe.config.require import at_least, folder_name, require
from fedpipe.config.schema import ModelConfig, RunConfig
from fedpipe.config.tree import Node, wrap
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.errors import ConfigError

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERVER = "server"
"""Name of the coordinator's own process in NVFlare."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
PRETRAIN = "pretrain"
"""Section that holds the configuration of the run that every site makes."""
OF_THE_SITE = (
    "name", "data.train", "data.valid", "data.text_column", "data.tokenizer", "data.partition",
    "data.partition_column", "data.dirichlet_alpha", "data.cache_dir", "data.num_workers",
    "federation.num_clients", "federation.num_replicas", "federation.clients_per_round",
    "federation.data_parallel_degree", "federation.attack", "pipeline.in_flight",
    "pipeline.activation_checkpointing", "pipeline.compile", "pipeline.colocate",
    "pipeline.hang_timeout_s", "checkpoint", "validation", "evaluation", "log", "deepspeed",
    "outer.folder",
)  # fmt: skip
"""Keys and sections of a run that a site decides for itself; all others are the same at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SitesConfig:
    """Who takes part, and how their changes become one model."""

    sites: tuple[str, ...] = ()
    """Names of the sites: small letters, digits, hyphens, underscores and dots."""
    num_rounds: int = 1
    """Outer rounds."""
    sites_per_round: int = 0
    """Sites that are drawn for an outer round; 0 means all."""
    min_sites: int = 1
    """Updates that an outer round needs; it waits for them, however long that takes."""
    deadline_s: float = 0.0
    """Seconds after which an outer round ends without the sites that have not answered, if it has
    min_sites; 0 means that it waits for all."""
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    """Mean, or a rule that withstands false updates; the sites are its clients."""
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    """What is done with the aggregated change."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "federation.", num_rounds=1, sites_per_round=0, min_sites=1, deadline_s=0)
        require(len(self.sites) > 0, "federation.sites", "names of sites", [], "List them.")
        for name in self.sites:
            require(
                bool(_NAME.fullmatch(name)) and name != _SERVER,
                "federation.sites",
                f"small letters, digits, hyphens, underscores and dots, and not {_SERVER}",
                name,
                "Rename the site.",
            )
        require(
            len(set(self.sites)) == len(self.sites), "federation.sites", "every name once",
            list(self.sites),
        )  # fmt: skip
        drawn = self.num_drawn
        require(
            drawn <= len(self.sites),
            "federation.sites_per_round",
            f"0..{len(self.sites)} (the number of federation.sites)",
            self.sites_per_round,
        )
        fewest = max(self.min_sites, self.aggregation.fewest_clients())
        require(
            fewest <= drawn,
            "federation.min_sites",
            f"{self.aggregation.fewest_clients()}..{drawn} with federation.aggregation.rule="
            f"{self.aggregation.rule} and {drawn} sites in an outer round",
            self.min_sites,
        )

    @property
    def num_drawn(self) -> int:
        """Sites of an outer round."""
        return self.sites_per_round or len(self.sites)

    @property
    def quorum(self) -> int:
        """Updates without which an outer round does not end."""
        return max(self.min_sites, self.aggregation.fewest_clients())


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where sites reach the coordinator over the network."""

    host: str = ""
    """Name or address of this machine, as sites see it; empty: the sites are reached by folders."""
    port: int = 8002
    """The only port that is open."""
    kits: UserPath = "kits"
    """Folder of the authority, of the server's kit and of the invitations; holds private keys."""

    def __post_init__(self) -> None:
        """Check the port."""
        require(0 < self.port < 2**16, "server.port", "1..65535", self.port)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsortiumConfig:
    """The part of ``consortium.yaml`` that is not the run of a site."""

    name: str = "consortium"
    """Name of the consortium; its default directory is runs/NAME."""
    seed: int = 0
    """Seeds the first weights and the draw of sites."""
    exchange: UserPath = ""
    """Folder with one folder per site, which is that site's outer.folder; whatever brings its files
    to the site and back may be a shared folder, rsync or a transfer service."""
    server: ServerConfig = field(default_factory=ServerConfig)
    federation: SitesConfig = field(default_factory=SitesConfig)

    def __post_init__(self) -> None:
        """Check the name."""
        folder_name(self.name)
        require(
            not self.server.host or bool(_FOLDER.fullmatch(self.name)),
            "name",
            "up to 64 letters, digits, hyphens, underscores and dots, for a folder at every site",
            self.name,
        )


def read_consortium(tree: Node, *, source: str) -> tuple[ConsortiumConfig, RunConfig]:
    """Return what a consortium is, and the run of its sites as far as they have it in common.

    Args:
        tree: Of ``consortium.yaml``.
        source: What to call it in errors.

    Raises:
        ConfigError: A key is unknown, or values do not fit.
    """
    sections = dict(tree.value) if isinstance(tree.value, dict) else {}
    shared = sections.pop(PRETRAIN, wrap({}, source))
    consortium = cast(ConsortiumConfig, build(ConsortiumConfig, replace(tree, value=sections)))
    if isinstance(shared.value, dict) and shared.value.get("seed", wrap(0, source)).plain():
        raise ConfigError(
            f"{PRETRAIN}.seed: expected no value, because every site has a seed of its own, made of"
            " the consortium's, got one. Set seed beside name instead."
        )
    run = cast(RunConfig, build(RunConfig, shared))
    inner = run.outer.num_inner_rounds
    num_rounds = consortium.federation.num_rounds * inner
    default = RunConfig()
    if run.federation.num_rounds not in (num_rounds, default.federation.num_rounds):
        raise ConfigError(
            f"{PRETRAIN}.federation.num_rounds: expected {num_rounds} (federation.num_rounds times"
            f" {PRETRAIN}.outer.num_inner_rounds), got {run.federation.num_rounds}. Leave it out."
        )
    run = replace(
        run,
        name=consortium.name if run.name == default.name else run.name,
        seed=consortium.seed,
        federation=replace(run.federation, num_rounds=num_rounds),
    )
    rule = consortium.federation.aggregation.rule
    require(
        rule == "mean" or run.outer.wire != "sparse",
        f"{PRETRAIN}.outer.wire",
        f"fp32, bf16 or int8 with federation.aggregation.rule={rule}",
        run.outer.wire,
        "A robust rule needs whole changes.",
    )
    if run.pipeline.is_open:
        raise ConfigError(
            f"{PRETRAIN}.pipeline.cut: expected a list, got auto. All sites have the same cut: run"
            " fedpipe plan with auto at one of them, and write down what it chooses."
        )
    check(run)
    _described(run, model_shape(run, vocab_size=1))
    return consortium, run


def is_consortium(tree: Node) -> bool:
    """Whether a file describes a consortium, not a run."""
    return isinstance(tree.value, dict) and PRETRAIN in tree.value


def of_a_site(tree: Node, *, source: str) -> RunConfig:
    """Return the run of a site as far as all have it in common, for its plan.

    Args:
        tree: Of ``consortium.yaml``.
        source: What to call it in errors.

    Raises:
        ConfigError: A key is unknown, or values do not fit.
    """
    _, run = read_consortium(tree, source=source)
    return replace(run, outer=replace(run.outer, folder=run.outer.folder or "outer"))


def settings_for(site: str, run: RunConfig) -> dict[str, Any]:
    """Return what a site's run has in common with the others', for its ``--config``.

    Every default is written out, paths are left out, and a model that the first weights come from
    is described by the keys of the section ``model``. The seed is the site's own: cohorts, masks
    and dropout of different sites must not be the same.
    """
    info = tokenizer_info(run)
    shape = model_shape(run, vocab_size=info.vocab_size, pad_id=info.pad_id)
    settings = to_dict(run)
    for key in OF_THE_SITE:
        *sections, name = key.split(".")
        node = settings
        for section in sections:
            node = node[section]
        del node[name]
    model = _described(run, shape)
    known = {f.name for f in fields(ModelConfig)} - {"path", "size"}
    digest = hashlib.sha256(f"{run.seed}/{site}".encode()).digest()
    settings["seed"] = int.from_bytes(digest[:4], "little") >> 1
    settings["model"] = {
        name: getattr(shape, name, getattr(model, name, None)) for name in sorted(known)
    }
    return settings


def _described(run: RunConfig, shape: ModelShape) -> ModelConfig:
    """Return the section ``model`` by which a site makes the model without its folder.

    Raises:
        ConfigError: Its config.json says what no key of the section does.
    """
    if not run.model.path:
        return run.model
    family, path = shape.kind, run.model.path
    keys = {key: family.get(shape.config, key) for key in family.keys}
    size = ModelConfig().size
    model: ModelConfig = replace(run.model, path="", size=size, **keys)
    made = resolve(
        model, vocab_size=shape.vocab_size, sequence_length=run.data.num_positions
    ).config
    for name, field_ in family.fields.items():
        if not field_.is_carried and made[name] != shape.config[name]:
            raise ConfigError(
                f"{PRETRAIN}.model.path: expected {name} {made[name]!r} in {path}/config.json, as"
                f" at sites, which do not have the folder, got {shape.config[name]!r}. Use another"
                " folder: no key of the section model says it."
            )
    return model
