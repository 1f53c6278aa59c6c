"""The configuration of ``fedpipe reproduce``: a run, an evaluation, and the compared systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import cast

from fedpipe.config.load import build, check, lay_over, overridden
from fedpipe.config.model_shape import model_shape
from fedpipe.config.require import require
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node

EXPERIMENTS = ("fedbiobert",)
SCALES = ("tiny", "small", "base")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonConfig:
    """The systems that are compared."""

    scale: str = "tiny"
    """Name of the packaged settings."""
    cuts: tuple[int, ...] = (1, 2, 3)
    """First layer of the server in every run of fedpipe; labels stay with the client."""
    published_length: int = 0
    """Value of ``data.padded_length`` for FedBERT as published."""
    timed_rounds: int = 0
    """Some systems provably reach the same weights as another one. Such a system is trained for
    these rounds only: later rounds take the mean of their seconds, and the other system's scores.
    0 means all rounds."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of pre-training; every variant is pre-trained once with each seed."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        for name in ("cuts", "seeds"):
            values = getattr(self, name)
            fits = bool(values) and len(set(values)) == len(values)
            require(fits, f"reproduce.{name}", "one or more, each once", list(values))
        require(min(self.seeds) >= 0, "reproduce.seeds", "whole numbers, 0 or more", self.seeds)
        require(
            self.timed_rounds >= 0,
            "reproduce.timed_rounds",
            "0 or more",
            self.timed_rounds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproductionConfig(RunConfig):
    """The run from which all variants are made, and the settings of their evaluation."""

    reproduce: ComparisonConfig = field(default_factory=ComparisonConfig)

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return model_shape(self, vocab_size=1).num_hidden_layers


def load_reproduction(
    path: str | Node | None, overrides: Sequence[str], *, scale: str = "tiny"
) -> ReproductionConfig:
    """Return the checked configuration of a reproduction.

    Args:
        path: YAML file, or its tree where it was read before; None takes the packaged settings of
            the scale.
        overrides: ``section.key=value`` each.
        scale: One of ``SCALES``.

    Returns:
        The configuration, with every default in place.

    Raises:
        ConfigError: A key is unknown, given twice or of the wrong type, or values do not fit.
    """
    home = resources.files("fedpipe.commands.reproduce")
    packaged = home.joinpath(f"{scale}.yaml")
    node = overridden(lay_over(path, preset=None, presets=home, packaged=packaged), overrides)
    config = cast(ReproductionConfig, build(ReproductionConfig, node))
    check(config)
    _check(config)
    return config


def _check(config: ReproductionConfig) -> None:
    compared, layers = config.reproduce, config.num_layers
    require(layers >= 2, "model.num_hidden_layers", "2 or more in a reproduction", layers)
    require(
        all(1 <= cut < layers for cut in compared.cuts),
        "reproduce.cuts",
        f"layers 1..{layers - 1} (the model has {layers})",
        list(compared.cuts),
    )
    length = config.data.sequence_length
    require(
        compared.published_length >= length,
        "reproduce.published_length",
        f"data.sequence_length ({length}) or more",
        compared.published_length,
    )
    require(
        len(config.data.mask_probabilities) == 1,
        "data.mask_probability",
        "one share of masked tokens in a reproduction",
        list(config.data.mask_probabilities),
        "Set for example data.mask_probability=0.15: the first rounds are compared, too.",
    )
    rounds = config.federation.num_rounds
    require(
        compared.timed_rounds <= rounds,
        "reproduce.timed_rounds",
        f"at most federation.num_rounds ({rounds})",
        compared.timed_rounds,
    )
    # A shorter run has the same learning rates only if what it has of the schedule is lines.
    whole = compared.timed_rounds in (0, rounds)
    decay = config.optimizer.decay
    within_warmup = compared.timed_rounds / rounds <= config.optimizer.warmup_ratio
    require(
        whole or decay != "wsd" and (within_warmup or decay != "polynomial"),
        "reproduce.timed_rounds",
        "0 (all), or optimizer.decay=linear",
        compared.timed_rounds,
    )
    for name in ("embeddings", "client_layers", "server_layers", "final_head"):
        kept = getattr(config.federation.average, name)
        require(
            kept,
            f"federation.average.{name}",
            "true, because one model is scored",
            kept,
            "Leave it out.",
        )
    for key, value, expected, way_out in (
        ("data.padded_length", config.data.padded_length, 0, "The variants set it."),
        ("data.attention", config.data.attention, "block", "Published systems pad sequences."),
        (
            "federation.num_local_epochs",
            config.federation.num_local_epochs,
            0,
            "Set federation.num_local_steps.",
        ),
    ):
        require(value == expected, key, f"{expected} in a reproduction", value, way_out)
    require(
        bool(config.data.valid),
        "data.valid",
        "held-out text",
        list(config.data.valid),
        "Name files, or packaged.",
    )
