"""What a model family is: one ``model_type`` of transformers, described in one file.

A family says what of a config.json it honours, how large its parts are, and what its parameters are
called; that needs no torch. It also makes the modules that stages consist of, and runs a layer of
them. These methods import torch and transformers when they are called.

To add a family, write a file like its neighbours and name it in ``fedpipe.families``.
"""

# B = sequences, T = positions per sequence, M = scored positions per sequence, D = hidden size,
# F = feed-forward width, V = vocabulary

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "mish",
    "quick_gelu", "relu", "relu2", "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip
SIZES: Mapping[str, tuple[int, int, int]] = {
    "tiny": (4, 128, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
"""Layers, hidden size and heads of new models. base and large are BERT's, Devlin et al. 2018,
https://arxiv.org/abs/1810.04805; small keeps its 64 per head."""

Config = Mapping[str, Any]
"""Fields of a config.json, under the family's own names for them."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of config.json that a family honours."""

    default: Any
    """What transformers takes where config.json leaves it out."""
    kind: Literal["count", "above zero", "share", "activation", "flag", "choice"] = "count"
    """What it may be: a whole number from 1, a number above 0, a number in [0, 1), the name of an
    activation, true or false, or one of ``choices``."""
    may_be_null: bool = False
    choices: tuple[str, ...] = ()
    is_carried: bool = False
    """It is of no meaning to pre-training; an exported model keeps it."""

    @property
    def expectation(self) -> str:
        """Say what is possible."""
        text = {
            "count": "1 or more",
            "above zero": "a value above 0",
            "share": "a value in [0, 1)",
            "activation": f"one of {', '.join(ACTIVATIONS)}",
            "flag": "true or false",
            "choice": f"one of {', '.join(self.choices)}",
        }[self.kind]
        return f"null or {text}" if self.may_be_null else text

    def accepts(self, value: Any) -> bool:
        """Say whether a value is possible."""
        if value is None:
            return self.may_be_null
        if self.kind in ("activation", "choice"):
            return value in (self.choices or ACTIVATIONS)
        if self.kind == "flag":
            return isinstance(value, bool)
        if self.kind == "count":
            return type(value) is int and value >= 1
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:  # nan is not
            return False
        return 0 <= value < 1 if self.kind == "share" else value > 0


class Family(ABC):
    """The contract of a family.

    Names are full Hugging Face names of the model with a masked-LM head. A stage holds whole
    modules under these names, so a model is cut and merged by name.
    """

    # -- what of config.json is honoured --------------------------------------------------------

    model_type: str
    """Of transformers, and the value of ``model.family``."""
    fields: Mapping[str, Field]
    """Everything in config.json that the result depends on, or that an export carries on."""
    keys: Mapping[str, tuple[str, ...]]
    """Keys of the section ``model``, and the fields that each of them sets. A key that is not here
    is refused."""
    fixed: Mapping[str, tuple[object, str]]
    """Fields that are honoured with one value only, with what to do about another one."""
    harmless: frozenset[str]
    """Fields that neither the encoder nor the masked-LM head depends on."""
    pad_token_id: int
    """What transformers takes where config.json leaves it out."""
    special_tokens: Mapping[str, Literal["pad", "cls", "sep"]] = {
        "pad_token_id": "pad",
        "bos_token_id": "cls",
        "eos_token_id": "sep",
    }
    """Fields of an exported config.json, and which token of ``data.tokenizer`` each of them gets.
    """
    positions: Literal["from zero", "after padding", "rotary"]
    """Where the rows of the position table begin; ``after padding`` is at ``pad_token_id + 1``.
    rotary has no table."""
    sizes: Mapping[str, Config]
    """Values of ``model.size``, and the fields of a new model of that size."""

    # -- names ----------------------------------------------------------------------------------

    prefix: str
    """Of the encoder; folders without a masked-LM head leave it out."""
    embeddings: str
    """Path of the embeddings' module."""
    word_embeddings: str
    """Name of the word embedding's weight, (V, D)."""
    layers: str
    """Path of the layers; layer 3 is at ``layers + ".3"``."""
    head: str
    """The path that all modules of the masked-LM head have in common, or ""."""
    decoder: str
    """Name of the weight (V, D) that scores the vocabulary."""
    twins: Mapping[str, str] = {}
    """Parameters that transformers has under a second name, by the first."""
    layer_tensors: frozenset[str]
    """Names of the parameters of a layer, of which layer 0 may lack some. An old name counts."""

    def first_position(self, pad_id: int) -> int:
        """Return the row of the position table that the first token of a sequence reads."""
        return pad_id + 1 if self.positions == "after padding" else 0

    def read(self, content: Config) -> Config:
        """Return the content of a config.json with the names of ``fields``, whoever wrote it."""
        return content

    def get(self, config: Config, key: str) -> Any:
        """Return a field by the name that the section ``model`` has for it."""
        return config[self.keys[key][0]]

    # -- counts -----------------------------------------------------------------------------------

    @abstractmethod
    def embedding_parameters(self, config: Config) -> int:
        """Count the parameters of the embeddings."""

    @abstractmethod
    def layer_parameters(self, config: Config, index: int) -> int:
        """Count the parameters of an encoder layer."""

    @abstractmethod
    def head_parameters(self, config: Config) -> int:
        """Count the parameters of a head, with its norm and without the decoder's matrix."""

    @abstractmethod
    def linear_flops(self, config: Config) -> tuple[int, int]:
        """Count the multiply-adds per token of a layer's matrices.

        Returns:
            Those of keys and values, and of all other matrices.
        """

    def attention_pairs(self, config: Config, first: int, end: int, *, length: int) -> int:
        """Count the pairs of a query and a key that layers ``first..end`` compute for a sequence.

        Args:
            config: Fields.
            first: Index of the first layer.
            end: Index after the last one.
            length: T.
        """
        return (end - first) * length**2

    @abstractmethod
    def tensor_shapes(self, config: Config) -> Mapping[str, list[int]]:
        """Return, by the ends of tensors' names, shapes that config.json implies."""

    # -- modules ----------------------------------------------------------------------------------

    @abstractmethod
    def config_class(self) -> Any:
        """Return the configuration class of transformers."""

    @abstractmethod
    def masked_lm_class(self) -> Any:
        """Return the class of transformers that reads an exported folder."""

    @abstractmethod
    def make_embeddings(self, config: Any) -> nn.Module:
        """Build the embeddings, which map ``input_ids`` (B, T) int64 to (B, T, D).

        Args:
            config: Of transformers, as for the other modules.
        """

    @abstractmethod
    def make_layer(self, config: Any, index: int) -> nn.Module:
        """Build an encoder layer."""

    @abstractmethod
    def make_head(self, config: Any) -> Mapping[str, nn.Module]:
        """Build a masked-LM head.

        Returns:
            Modules by full path, run one after the other, from hidden states (..., D) to logits
            (..., V). In a family whose layers normalise their inputs (pre-normalisation), the first
            one is the norm behind the last layer, so that every head has a norm of its own.
        """

    def surroundings(
        self, config: Any, length: int, visible: Tensor | None, device: torch.device
    ) -> Any:
        """Return what layers need beside hidden states, for sequences of one length.

        Args:
            config: Of transformers.
            length: T.
            visible: bool, broadcast to (B, heads, T, T): what may be attended to; None for all.
            device: Of the stage.
        """
        return visible

    @abstractmethod
    def run_layer(self, layer: Any, hidden_BTD: Tensor, surroundings: Any) -> Tensor:
        """Run an encoder layer; returns (B, T, D)."""

    @abstractmethod
    def run_layer_at(
        self, layer: Any, hidden_BTD: Tensor, positions_BM: Tensor, surroundings: Any
    ) -> Tensor:
        """Run an encoder layer for some positions only, because its head reads no others.

        They attend to every token, so keys and values are computed at all positions; all else is
        computed at theirs only. With 15 % masked tokens and a feed-forward of 4 D this needs 29 %
        of the projections' FLOPs.

        Returns:
            (B, M, D), the rows that ``gather`` would take from the output of the whole layer.
        """

    def deviation(self, config: Any, name: str) -> float:
        """Return the standard deviation of a matrix' first values."""
        return float(config.initializer_range)

    def cutoff(self, config: Any) -> float | None:
        """Return the deviations beyond which no first value lies; None for no limit."""
        return None


def gather(hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
    """Return the hidden states (B, M, D) at positions (B, M) int."""
    index = positions_BM.long().unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
    return hidden_BTD.gather(1, index)


def rows_of(visible: Tensor | None, positions_BM: Tensor) -> Tensor | None:
    """Return the rows (B, 1, M, T) of a mask (B or 1, 1, T or 1, T) for some positions."""
    if visible is None or visible.shape[-2] == 1:
        return visible
    visible_BTT = visible.expand(len(positions_BM), -1, -1, -1).squeeze(1)
    index = positions_BM.long().unsqueeze(-1).expand(-1, -1, visible.shape[-1])
    return visible_BTT.gather(1, index).unsqueeze(1)


@cache
def modeling(name: str) -> Any:
    """Import a module of transformers.

    Where scikit-learn and scipy are installed, as they are for ``fedpipe evaluate``, transformers
    imports them with every model, for assisted generation and object detection that fedpipe does
    not use: a fifth of the time to the first local step. So it is told that they are absent while
    it imports a model.
    """
    with mock.patch.multiple(
        "transformers.utils", is_sklearn_available=_absent, is_scipy_available=_absent
    ):
        return import_module(f"transformers.{name}")


def _absent() -> bool:
    return False
