"""``site.yaml``: what a site trains on, what it accepts, and what it lets out. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from fedpipe.commands.consortium.config import OF_THE_SITE, PRETRAIN
from fedpipe.config.load import build, check, flatten, to_dict
from fedpipe.config.model_shape import model_shape
from fedpipe.config.require import at_least, require
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node, dump, merge, parse, wrap
from fedpipe.data.sources import resolve
from fedpipe.errors import ConfigError, FederationError

METRICS = ("train_loss", "base_valid_loss", "valid_loss", "valid_tokens", "seconds")
"""Numbers beside an update that a site may let out; the number of tokens always goes with it."""
_PATHS = {
    "data": {"train", "valid", "tokenizer", "cache_dir"},
    "deepspeed": {"config"},
}  # fmt: skip
_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptsConfig:
    """The most that a coordinator may ask for."""

    max_parameters: int = 500_000_000
    """Of the model."""
    max_steps: int = 100_000
    """Local steps of every client in an outer round."""
    max_hours: float = 0.0
    """Of an outer round, waiting in queues included, after which the site gives it up; 0 means no
    limit."""

    def __post_init__(self) -> None:
        """Check the values."""
        at_least(self, "accepts.", max_parameters=1, max_steps=1, max_hours=0)

    @property
    def max_seconds(self) -> float:
        """``max_hours`` in seconds; infinite without a limit."""
        return self.max_hours * _HOUR_S or float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class SendsConfig:
    """What leaves the site beside the weights' change and its number of tokens."""

    metrics: tuple[str, ...] = ()
    """Any of train_loss, base_valid_loss, valid_loss, valid_tokens and seconds."""

    def __post_init__(self) -> None:
        """Check the names."""
        for name in self.metrics:
            require(name in METRICS, "sends.metrics", " or ".join(METRICS), name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteConfig:
    """The part of ``site.yaml`` that is not the site's run."""

    accepts: AcceptsConfig = field(default_factory=AcceptsConfig)
    sends: SendsConfig = field(default_factory=SendsConfig)
    dry_run: bool = False
    """Train, and show what would be sent, but send nothing."""


def read_site(text: str, *, source: str) -> tuple[SiteConfig, Node]:
    """Return what a site has decided, and its part of its run's configuration.

    Args:
        text: Of ``site.yaml``.
        source: What to call it in errors.

    Raises:
        ConfigError: A key is unknown, or is not the site's to decide.
    """
    tree = parse(text, source=source)
    sections = dict(tree.value)
    own = sections.pop(PRETRAIN, wrap({}, source))
    site = cast(SiteConfig, build(SiteConfig, replace(tree, value=sections)))
    if not isinstance(own.value, dict):
        raise ConfigError(
            f"{PRETRAIN}: expected keys that a site decides for itself, got {own.plain()!r} in"
            f" {own.where}. Leave it out, or see docs/how-to/consortium.md."
        )
    for key in _keys(own):
        if not _is_of_the_site(key) or key == "outer.folder":
            raise ConfigError(
                f"{PRETRAIN}.{key}: expected a key that a site decides for itself"
                f" ({', '.join(k for k in OF_THE_SITE if k != 'outer.folder')}), got one that is"
                " the same at all sites. Leave it out."
            )
    build(RunConfig, own)
    return site, own


def settled(text: str, *, source: str) -> str:
    """Return ``site.yaml`` with every default written out and every path absolute.

    Args:
        text: Of the file that the site has written.
        source: What to call it in errors.

    Raises:
        FedPipeError: It cannot be used, or its text is not there.
    """
    site, own = read_site(text, source=source)
    plain: dict[str, Any] = own.plain()
    for section, names in _PATHS.items():
        for name in names & plain.get(section, {}).keys():
            value = plain[section][name]
            plain[section][name] = (
                [_absolute(entry) for entry in value]
                if isinstance(value, list)
                else _absolute(value)
            )
    data = cast(RunConfig, build(RunConfig, wrap(plain, source))).data
    for name in ("train", "valid"):
        resolve(f"data.{name}", getattr(data, name))
    return dump({**to_dict(site), PRETRAIN: plain})


def _absolute(entry: str) -> str:
    """Make a path absolute; names that are none (packaged, hf:NAME) stay."""
    return str(Path(entry).absolute()) if "*" in entry or Path(entry).exists() else entry


def run_config(ordered: str, own: Node, *, folder: str) -> RunConfig:
    """Return the configuration of a site's run.

    Args:
        ordered: YAML of the coordinator.
        own: From ``read_site``.
        folder: In which outer rounds arrive.

    Raises:
        ConfigError: The coordinator's part has what a site decides for itself, or a path.
    """
    tree = parse(ordered, source="settings")
    for key in _keys(tree):
        if _is_of_the_site(key) or key == "model.path":
            raise ConfigError(
                f"{key}: expected no value from a coordinator, got one. This site decides it."
            )
    tree = merge(merge(tree, own), wrap({"outer": {"folder": folder}}, "settings"))
    config = cast(RunConfig, build(RunConfig, tree))
    check(config)
    return config


def check_limits(site: SiteConfig, config: RunConfig, *, num_bytes: int) -> None:
    """Refuse an outer round that is more than a site accepts.

    Args:
        site: What it accepts.
        config: Of its run, from ``run_config``.
        num_bytes: Of the weights, float32.

    Raises:
        FederationError: It is; the message may leave the site.
    """
    if config.federation.num_local_epochs:
        raise FederationError(
            "expected federation.num_local_steps, which accepts.max_steps of the site limits, got"
            " federation.num_local_epochs."
        )
    shape = model_shape(config, vocab_size=1)
    encoder = shape.embedding_parameters() + shape.layer_parameters(0, shape.num_hidden_layers)
    steps = config.federation.num_local_steps * config.outer.num_inner_rounds
    for what, asked, limit in (
        ("parameters", max(num_bytes // 4, encoder), site.accepts.max_parameters),
        ("steps", steps, site.accepts.max_steps),
    ):
        if asked > limit:
            raise FederationError(
                f"expected at most {limit:,} {what} in an outer round (accepts.max_{what} of the"
                f" site), got {asked:,}."
            )


def _is_of_the_site(key: str) -> bool:
    return any(key == own or key.startswith(f"{own}.") for own in OF_THE_SITE)


def _keys(node: Node) -> Iterator[str]:
    data: dict[str, Any] = node.plain()
    return (key for key, _ in flatten(data))
