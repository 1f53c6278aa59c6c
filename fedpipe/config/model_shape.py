"""Sizes of the encoder: presets, explicit fields and Hugging Face folders make a ``ModelShape``.

Pure arithmetic over a ``config.json``; counts and FLOPs let the plan speak without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedpipe.config.families import FAMILIES, FamilyName
from fedpipe.config.half_files import check_weights, read_json_object
from fedpipe.config.schema import ModelConfig, RunConfig
from fedpipe.errors import ConfigError

# Layers, hidden size, heads, feed-forward width. base and large are BERT's, Devlin et al. 2018,
# https://arxiv.org/abs/1810.04805; small keeps its 64 per head and 4 x hidden.
_PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (4, 128, 4, 512),
    "small": (4, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}
_ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "mish",
    "quick_gelu", "relu", "relu2", "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.(.+)$")
_SHAPES = {
    "embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
    "embeddings.position_embeddings.weight": ("max_position_embeddings", "hidden_size"),
    "embeddings.token_type_embeddings.weight": ("type_vocab_size", "hidden_size"),
    "attention.self.query.weight": ("hidden_size", "hidden_size"),
    "intermediate.dense.weight": ("intermediate_size", "hidden_size"),
}
"""By the ends of tensors' names, the sizes of config.json that make their shapes."""
_SHORTEST_BLOCK = 8
"""Tokens; what ``data.sequence_length`` is at least."""
_MAX_VOCAB_PADDING = 127
"""Folders pad their embedding to a multiple of up to 128; a larger surplus is another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Every size of the encoder, nothing left open."""

    family: FamilyName
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    initializer_range: float
    layer_norm_eps: float
    tie_word_embeddings: bool
    classifier_dropout: float | None
    """Of no meaning to pre-training; an exported model keeps that of the folder."""

    def embedding_parameters(self) -> int:
        """Return the parameters of word, position and type embeddings and their LayerNorm."""
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        return (rows + 2) * self.hidden_size

    def layer_parameters(self) -> int:
        """Return the parameters of one encoder layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = 4 * (hidden * hidden + hidden)
        feed_forward = 2 * hidden * inner + inner + hidden
        return attention + feed_forward + 2 * 2 * hidden

    def head_parameters(self, *, tied: bool) -> int:
        """Return the parameters of a masked-LM head.

        Args:
            tied: The decoder's matrix is the stage's own word embedding and not counted again.

        Returns:
            Dense layer, LayerNorm, decoder bias and, unless tied, the decoder's matrix.
        """
        hidden = self.hidden_size
        decoder = 0 if tied else self.decoder_parameters()
        return hidden * hidden + hidden + 2 * hidden + self.vocab_size + decoder

    def decoder_parameters(self) -> int:
        """Return the parameters of the decoder's matrix, or of the word embedding: ``V D``."""
        return self.vocab_size * self.hidden_size

    def layer_flops_per_token(self, sequence_length: int) -> int:
        """Return the forward FLOPs of one layer for one token; the backward pass takes twice that.

        Two per multiply-add: projections ``4 D^2``, feed-forward ``2 D F``, attention ``2 T D``.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        return 2 * (4 * hidden * hidden + 2 * hidden * inner + 2 * sequence_length * hidden)

    def masked_layer_flops(self, sequence_length: int, *, num_masked: int) -> int:
        """Return the forward FLOPs of a layer for one sequence where only masked positions go on.

        Keys and values ``2 T D^2`` for all T tokens; for the M masked ones the rest of a layer.
        """
        everywhere = 2 * 2 * self.hidden_size * self.hidden_size
        there = self.layer_flops_per_token(sequence_length) - everywhere
        return sequence_length * everywhere + num_masked * there

    def head_flops_per_token(self) -> int:
        """Return the forward FLOPs of the head for one *masked* token, ``2 (D^2 + D V)``."""
        return 2 * (self.hidden_size * self.hidden_size + self.hidden_size * self.vocab_size)


def model_shape(config: RunConfig, *, vocab_size: int, pad_id: int | None = None) -> ModelShape:
    """Return all sizes of the model of a run, whose positions reach as far as its blocks.

    The arguments and errors are those of ``resolve``.
    """
    return resolve(
        config.model,
        vocab_size=vocab_size,
        sequence_length=config.data.num_positions,
        pad_id=pad_id,
    )


def resolve(
    model: ModelConfig, *, vocab_size: int, sequence_length: int, pad_id: int | None = None
) -> ModelShape:
    """Return all sizes of the model: explicit fields, then ``model.path``, then ``model.size``.

    Args:
        model: The section of the configuration.
        vocab_size: Tokens of the tokenizer.
        sequence_length: Of a block, padding included; the positions must reach that far.
        pad_id: Padding token of the tokenizer, after which the positions of some families begin;
            None where the tokenizer has not been read, and positions are not compared.

    Returns:
        The sizes.

    Raises:
        ConfigError: Sizes contradict each other, the tokenizer, the blocks or the folder, or the
            folder's config.json says what the stages do not honour.
    """
    family = FAMILIES[model.family]
    if model.path:
        sizes = _read_folder(model, pad_id=pad_id)
        _check_folder(model, sizes, vocab_size=vocab_size)
    else:
        padding = family.pad_token_id if pad_id is None else pad_id
        positions = sequence_length + family.first_position(padding)
        sizes = _new_model(model, vocab_size=vocab_size, num_positions=positions)
        explicit = {name: getattr(model, name, None) for name in sizes}
        sizes |= {name: value for name, value in explicit.items() if value is not None}
    shape = ModelShape(family=model.family, **sizes)
    _check_values(model, shape)
    _check_vocabulary(shape, vocab_size=vocab_size)
    if pad_id is not None:
        first = family.first_position(pad_id)
        _check_positions(model, shape, sequence_length=sequence_length, first=first)
    return shape


def _new_model(model: ModelConfig, *, vocab_size: int, num_positions: int) -> dict[str, Any]:
    layers, hidden, heads, inner = _PRESETS[model.size]
    return {
        **FAMILIES[model.family].defaults,
        **FAMILIES[model.family].new,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocab_size,
        "max_position_embeddings": num_positions,
    }


def _read_folder(model: ModelConfig, *, pad_id: int | None) -> dict[str, Any]:
    """Read the sizes of ``model.path``, and refuse what the stages would not compute exactly."""
    folder = Path(model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: expected a Hugging Face folder, got {model.path!r}, which is not there."
            " Download the model first, or leave model.path empty to start from random weights."
        )
    file, family = folder / "config.json", FAMILIES[model.family]
    found = read_json_object(file, key="model.path")
    _check_model_type(model, found.get("model_type"), file)
    for name, (value, way_out) in family.fixed.items():
        if found.get(name) not in (None, value):
            raise ConfigError(
                f"model.path: expected {name} {value!r} in {file}, got {_short(found[name])}."
                f" {way_out}"
            )
    known = {*family.defaults, *family.fixed, *family.harmless, "pad_token_id"}
    other = {name: value for name, value in found.items() if name not in known}
    unknown = [f"{name} = {_short(value)}" for name, value in other.items() if value is not None]
    if unknown:
        raise ConfigError(
            f"model.path: expected the fields of a {model.family} model in {file}, got"
            f" {', '.join(unknown)}. Remove it there if the model computes the same without it, or"
            " use another folder."
        )
    padding = found.get("pad_token_id")
    padding = family.pad_token_id if padding is None else padding
    if family.positions_after_padding and pad_id not in (None, padding):
        raise ConfigError(
            f"model.path: expected pad_token_id {pad_id} (data.tokenizer) in {file}, got"
            f" {padding}: the positions of a {model.family} model begin after it. Set"
            " data.tokenizer to the folder of the model's own tokenizer."
        )
    sizes = {name: found.get(name, default) for name, default in family.defaults.items()}
    _check_tensors(model, sizes, check_weights(folder, key="model.path"))
    return sizes


def _check_tensors(
    model: ModelConfig, sizes: dict[str, Any], shapes: Mapping[str, list[int]]
) -> None:
    """Refuse tensors of layers that would be left out, such as an adapter's, and other sizes."""
    num_layers = sizes["num_hidden_layers"]
    known = FAMILIES[model.family].layer_tensors
    found = [(name, match) for name in shapes if (match := _LAYER.search(name))]
    unknown = sorted(
        name
        for name, match in found
        if match[2] not in known or (isinstance(num_layers, int) and int(match[1]) >= num_layers)
    )
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"model.path: expected the tensors of {num_layers} {model.family} layers (config.json)"
            f" in {model.path}, got {unknown[0]}{more}. Use the folder of a whole model, with every"
            " adapter merged into it."
        )
    if not shapes:  # of files that only torch can read, which the ranks compare
        return
    layers = {int(match[1]) for _, match in found}
    if layers and isinstance(num_layers, int) and len(layers) < num_layers:
        raise ConfigError(
            f"model.path: expected the tensors of {num_layers} {model.family} layers (config.json)"
            f" in {model.path}, got those of {len(layers)}. Use the folder of a whole model."
        )
    for end, names in _SHAPES.items():
        wanted = [sizes[field] for field in names]
        if not all(type(size) is int for size in wanted):
            continue  # refused with the name of the field
        for name, shape in shapes.items():
            if name.endswith(end) and shape and shape != wanted:
                raise ConfigError(
                    f"model.path: expected {name} of shape {wanted} (config.json) in {model.path},"
                    f" got {shape}. Use the config.json that belongs to the weights."
                )


def _check_model_type(model: ModelConfig, found: object, file: Path) -> None:
    if found == model.family:
        return
    way_out = f"Set model.family={found}."
    if not isinstance(found, str) or found not in FAMILIES:
        way_out = f"fedpipe pre-trains {' and '.join(FAMILIES)}: use the folder of such a model."
    raise ConfigError(
        f"model.path: expected model_type {model.family!r} (model.family) in {file}, got"
        f" {_short(found)}. {way_out}"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_folder(model: ModelConfig, sizes: dict[str, Any], *, vocab_size: int) -> None:
    for name, value in sizes.items():
        explicit = getattr(model, name, None)
        # These do not belong to the weights: another value is a choice, not a contradiction.
        if name.endswith("_dropout_prob") or name == "initializer_range":
            sizes[name] = value if explicit is None else explicit
        elif name == "tie_word_embeddings" and explicit is False:
            sizes[name] = False  # one tensor may become two
        elif name == "max_position_embeddings" and _is_more(explicit, value):
            sizes[name] = explicit  # the first ones are the folder's
        elif explicit is not None and explicit != value:
            raise ConfigError(
                f"model.{name}: expected {value!r} (config.json in {model.path}), got"
                f" {explicit!r}. Remove model.{name}, or leave model.path empty."
            )
    surplus = sizes["vocab_size"] - vocab_size if type(sizes["vocab_size"]) is int else 0
    if vocab_size > 1 and surplus > _MAX_VOCAB_PADDING:
        raise ConfigError(
            f"model.path: vocabulary and model disagree: {model.path} has"
            f" {sizes['vocab_size']} tokens, data.tokenizer {vocab_size}."
            " Set data.tokenizer to the folder of the model's own tokenizer."
        )


def _is_more(explicit: int | None, found: object) -> bool:
    return explicit is not None and isinstance(found, int) and explicit > found


def _check_values(model: ModelConfig, shape: ModelShape) -> None:
    for field in fields(shape):
        name, value = field.name, getattr(shape, field.name)
        if name == "family":
            continue
        fits, expectation = _expected(name, value)
        if fits:
            continue
        if model.path and getattr(model, name, None) is None:
            raise ConfigError(
                f"model.path: expected {expectation} as {name} in {model.path}/config.json, got"
                f" {_short(value)}. Correct it there, or use another folder."
            )
        raise ConfigError(
            f"model.{name}: expected {expectation}, got {value!r}. Set it, or leave it out."
        )
    if shape.hidden_size % shape.num_attention_heads:
        way_out = f"Set model.num_attention_heads={_nearest_divisor(shape)}."
        if model.path:
            way_out = f"Correct config.json in {model.path}, or use another folder."
        raise ConfigError(
            f"model.num_attention_heads: expected a divisor of model.hidden_size"
            f" ({shape.hidden_size}), got {shape.num_attention_heads}. {way_out}"
        )


def _expected(name: str, value: Any) -> tuple[bool, str]:
    """Say whether a field has a possible value, and what is possible."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and math.isfinite(value)
    if name.endswith("_dropout_prob"):
        return number and 0 <= value < 1, "a value in [0, 1)"
    if name == "classifier_dropout":
        return value is None or (number and 0 <= value < 1), "null or a value in [0, 1)"
    if name in ("initializer_range", "layer_norm_eps"):
        return number and value > 0, "a value above 0"
    if name == "hidden_act":
        return value in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}"
    if name == "tie_word_embeddings":
        return isinstance(value, bool), "true or false"
    return type(value) is int and value >= 1, "1 or more"


def _nearest_divisor(shape: ModelShape) -> int:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    divisors = [n for n in range(1, hidden + 1) if hidden % n == 0]
    return min(divisors, key=lambda n: (abs(n - heads), n))


def _check_vocabulary(shape: ModelShape, *, vocab_size: int) -> None:
    if shape.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: vocabulary and model disagree: expected at least {vocab_size}"
            f" (data.tokenizer), got {shape.vocab_size}. Set model.vocab_size to null, or"
            " data.tokenizer to the model's own."
        )


def _check_positions(
    model: ModelConfig, shape: ModelShape, *, sequence_length: int, first: int
) -> None:
    positions = shape.max_position_embeddings
    if positions >= sequence_length + first:
        return
    extra = f" + {first}, where RoBERTa's positions start" if first else ""
    ways_out = []
    if positions - first >= _SHORTEST_BLOCK:
        ways_out.append(f"the longer of them to {positions - first} or less")
    if model.path:
        longer = f"model.max_position_embeddings={sequence_length + first}"
        ways_out.append(f"{longer}, where those after the folder's {positions} start anew")
    way_out = f"Set {', or '.join(ways_out)}" if ways_out else "Leave it out"
    raise ConfigError(
        f"model.max_position_embeddings: expected at least {sequence_length + first}"
        f" (data.sequence_length or data.padded_length{extra}), got {positions}. {way_out}."
    )
