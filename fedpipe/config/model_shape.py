"""Sizes of the encoder: presets, explicit fields and Hugging Face folders make a ``ModelShape``.

Pure arithmetic over a ``config.json``; counts and FLOPs let the plan speak without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from fedpipe.config.half_files import check_weights, read_json_object
from fedpipe.config.schema import ModelConfig, RunConfig
from fedpipe.errors import ConfigError
from fedpipe.families import FAMILIES, REFUSED, FamilyName
from fedpipe.families.family import Family

_SHORTEST_BLOCK = 8
"""Tokens; what ``data.sequence_length`` is at least."""
_MAX_VOCAB_PADDING = 127
"""Folders pad their embedding to a multiple of up to 128; a larger surplus is another one."""
_SECTION = tuple(dict.fromkeys(key for family in FAMILIES.values() for key in family.keys))
"""Keys of the section ``model`` that are fields of config.json in one family or another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Every size of the encoder, nothing left open."""

    family: FamilyName
    config: Mapping[str, Any]
    """All fields of config.json that the family honours, under its own names for them."""

    @property
    def kind(self) -> Family:
        """The family itself."""
        return FAMILIES[self.family]

    def _get(self, key: str) -> Any:
        return self.kind.get(self.config, key)

    @property
    def num_hidden_layers(self) -> int:
        """Encoder layers."""
        return int(self._get("num_hidden_layers"))

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._get("hidden_size"))

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of a layer."""
        return int(self._get("num_attention_heads"))

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward layers."""
        return int(self._get("intermediate_size"))

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self._get("vocab_size"))

    @property
    def max_position_embeddings(self) -> int:
        """Positions that the model has."""
        return int(self._get("max_position_embeddings"))

    @property
    def tie_word_embeddings(self) -> bool:
        """The final decoder is the word embedding."""
        return bool(self._get("tie_word_embeddings"))

    def embedding_parameters(self) -> int:
        """Return the parameters of the embeddings."""
        return self.kind.embedding_parameters(self.config)

    def layer_parameters(self, first: int, end: int) -> int:
        """Return the parameters of the encoder layers from ``first`` on and before ``end``.

        They are not counted one by one: a number of layers may be anybody's.
        """
        each = self.kind.layer_parameters(self.config, 1)
        lacking = each - self.kind.layer_parameters(self.config, 0) if first == 0 < end else 0
        return (end - first) * each - lacking

    def head_parameters(self, *, tied: bool) -> int:
        """Return the parameters of a masked-LM head.

        Args:
            tied: The decoder's matrix is the stage's own word embedding and not counted again.
        """
        decoder = 0 if tied else self.decoder_parameters()
        return self.kind.head_parameters(self.config) + decoder

    def decoder_parameters(self) -> int:
        """Return the parameters of the decoder's matrix, or of the word embedding: ``V D``."""
        return self.vocab_size * self.hidden_size

    def layers_flops(self, first: int, end: int, *, sequence_length: int) -> int:
        """Return the forward FLOPs of layers for one sequence; the backward pass takes twice that.

        Two per multiply-add, with ``2 D`` of them for every pair of a query and a key.

        Args:
            first: Index of the first layer.
            end: Index after the last one.
            sequence_length: T.
        """
        linear = (end - first) * sum(self.kind.linear_flops(self.config)) * sequence_length
        pairs = self.kind.attention_pairs(self.config, first, end, length=sequence_length)
        return 2 * (linear + 2 * pairs * self.hidden_size)

    def masked_layer_flops(self, sequence_length: int, *, num_masked: int) -> int:
        """Return the forward FLOPs of a layer for one sequence where only masked positions go on.

        Keys and values for all tokens; for the masked ones the rest of a layer.
        """
        everywhere, there = self.kind.linear_flops(self.config)
        there += 2 * sequence_length * self.hidden_size
        return 2 * (sequence_length * everywhere + num_masked * there)

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
    _check_keys(model, family)
    if model.path:
        sizes = _read_folder(model, pad_id=pad_id)
        _check_folder(model, sizes, vocab_size=vocab_size)
    else:
        padding = family.pad_token_id if pad_id is None else pad_id
        positions = sequence_length + family.first_position(padding)
        sizes = _new_model(model, vocab_size=vocab_size, num_positions=positions)
    _check_values(model, sizes)
    shape = ModelShape(family=model.family, config=sizes)
    _check_vocabulary(shape, vocab_size=vocab_size)
    if pad_id is not None:
        first = family.first_position(pad_id)
        _check_positions(model, shape, sequence_length=sequence_length, first=first)
    return shape


def _check_keys(model: ModelConfig, family: Family) -> None:
    """Refuse keys that the family has nothing for."""
    for name in _SECTION:
        if getattr(model, name) is not None and name not in family.keys:
            raise ConfigError(
                f"model.{name}: expected null with model.family={model.family}, whose models have"
                f" no such field, got {getattr(model, name)!r}. Leave it out."
            )


def _new_model(model: ModelConfig, *, vocab_size: int, num_positions: int) -> dict[str, Any]:
    family = FAMILIES[model.family]
    if model.size not in family.sizes:
        others = [name for name, other in FAMILIES.items() if model.size in other.sizes]
        raise ConfigError(
            f"model.size: expected one of {', '.join(family.sizes)} with"
            f" model.family={model.family}, got {model.size}. Choose one of these, or set"
            f" model.family={others[0]}."
        )
    sizes = {name: field.default for name, field in family.fields.items()}
    sizes |= family.sizes[model.size]
    sizes["vocab_size"] = vocab_size
    if family.positions != "rotary":
        sizes["max_position_embeddings"] = num_positions
    for key, names in family.keys.items():
        if (value := getattr(model, key)) is not None:
            sizes |= dict.fromkeys(names, value)
    return sizes


def _read_folder(model: ModelConfig, *, pad_id: int | None) -> dict[str, Any]:
    """Read the sizes of ``model.path``, and refuse what the stages would not compute exactly."""
    folder = Path(model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: expected a Hugging Face folder, got {model.path!r}, which is not there."
            " Download the model first, or leave model.path empty to start from random weights."
        )
    file, family = folder / "config.json", FAMILIES[model.family]
    content = read_json_object(file, key="model.path")
    _check_model_type(model, content.get("model_type"), file)
    found = family.read(content)
    for name, (value, way_out) in family.fixed.items():
        if found.get(name) not in (None, value):
            raise ConfigError(
                f"model.path: expected {name} {value!r} in {file}, got {_short(found[name])}."
                f" {way_out}"
            )
    known = {*family.fields, *family.fixed, *family.harmless, "pad_token_id"}
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
    if family.positions == "after padding" and pad_id not in (None, padding):
        raise ConfigError(
            f"model.path: expected pad_token_id {pad_id} (data.tokenizer) in {file}, got"
            f" {_short(padding)}: the positions of a {model.family} model begin after it. Set"
            " data.tokenizer to the folder of the model's own tokenizer."
        )
    sizes = {name: found.get(name, field.default) for name, field in family.fields.items()}
    _check_tensors(model, sizes, check_weights(folder, key="model.path"))
    return sizes


def _check_tensors(
    model: ModelConfig, sizes: dict[str, Any], shapes: Mapping[str, list[int]]
) -> None:
    """Refuse tensors of layers that would be left out, such as an adapter's, and other sizes."""
    family = FAMILIES[model.family]
    num_layers = family.get(sizes, "num_hidden_layers")
    known = family.layer_tensors
    path = re.escape(family.layers.removeprefix(f"{family.prefix}."))
    layer = re.compile(rf"(?:^|\.){path}\.(\d+)\.(.+)$")
    found = [(name, match) for name in shapes if (match := layer.search(name))]
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
    counts = [name for name, field in family.fields.items() if field.kind == "count"]
    if not all(type(sizes[name]) is int for name in counts):
        return  # refused with the name of the field
    for end, wanted in family.tensor_shapes(sizes).items():
        for name, shape in shapes.items():
            if name.endswith(end) and shape and shape != wanted:
                raise ConfigError(
                    f"model.path: expected {name} of shape {wanted} (config.json) in {model.path},"
                    f" got {shape}. Use the config.json that belongs to the weights."
                )
    _check_counts(model, sizes, shapes, layer)


def _check_counts(
    model: ModelConfig,
    sizes: dict[str, Any],
    shapes: Mapping[str, list[int]],
    layer: re.Pattern[str],
) -> None:
    """Refuse an encoder of which tensors are missing, such as biases that config.json asks for."""
    family = FAMILIES[model.family]
    embeddings = family.embeddings.removeprefix(f"{family.prefix}.")
    of_embeddings = re.compile(rf"(?:^|\.){embeddings}\.(?!position_ids$)")  # of BERTs, a buffer
    found: Counter[int] = Counter()  # by layer; -1 for the embeddings
    for name, shape in shapes.items():
        if match := layer.search(name):
            found[int(match[1])] += prod(shape)
        elif of_embeddings.search(name):
            found[-1] += prod(shape)
    flags = all(f.accepts(sizes[n]) for n, f in family.fields.items() if f.kind == "flag")
    for index, numel in sorted(found.items()) if flags else ():
        what, wanted = "the embeddings", family.embedding_parameters
        if index >= 0:
            what, wanted = f"layer {index}", partial(family.layer_parameters, index=index)
        if numel != (expected := wanted(sizes)):
            raise ConfigError(
                f"model.path: expected {expected:,} weights of {what} (config.json) in"
                f" {model.path}, got {numel:,}. Use the folder of a whole model with its own"
                " config.json."
            )


def _check_model_type(model: ModelConfig, found: object, file: Path) -> None:
    if found == model.family:
        return
    way_out = f"Set model.family={found}."
    if isinstance(found, str) and found in REFUSED:
        way_out = (
            f"fedpipe does not pre-train {found}: {REFUSED[found]}. Use the folder of a"
            f" {', '.join(FAMILIES)} model."
        )
    elif found is None:
        way_out = f'Write "model_type": "{model.family}" into it if that is what the model is.'
    elif not isinstance(found, str) or found not in FAMILIES:
        way_out = f"fedpipe pre-trains {', '.join(FAMILIES)}: use the folder of such a model."
    raise ConfigError(
        f"model.path: expected model_type {model.family!r} (model.family) in {file}, got"
        f" {_short(found)}. {way_out}"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_folder(model: ModelConfig, sizes: dict[str, Any], *, vocab_size: int) -> None:
    family = FAMILIES[model.family]
    for key, names in family.keys.items():
        explicit, value = getattr(model, key), sizes[names[0]]
        # These do not belong to the weights: another value is a choice, not a contradiction.
        free = key.endswith("_dropout_prob") or key == "initializer_range"
        free = free or (key == "tie_word_embeddings" and explicit is False)  # one becomes two
        # The first positions are the folder's.
        free = free or (key == "max_position_embeddings" and _is_more(explicit, value))
        if explicit is None:
            continue
        if not free and any(sizes[name] != explicit for name in names):
            raise ConfigError(
                f"model.{key}: expected {value!r} (config.json in {model.path}), got"
                f" {explicit!r}. Remove model.{key}, or leave model.path empty."
            )
        sizes |= dict.fromkeys(names, explicit)
    surplus = sizes["vocab_size"] - vocab_size if type(sizes["vocab_size"]) is int else 0
    if vocab_size > 1 and surplus > _MAX_VOCAB_PADDING:
        raise ConfigError(
            f"model.path: vocabulary and model disagree: {model.path} has"
            f" {sizes['vocab_size']} tokens, data.tokenizer {vocab_size}."
            " Set data.tokenizer to the folder of the model's own tokenizer."
        )


def _is_more(explicit: int | None, found: object) -> bool:
    return explicit is not None and isinstance(found, int) and explicit > found


def _check_values(model: ModelConfig, sizes: Mapping[str, Any]) -> None:
    family = FAMILIES[model.family]
    keys = {name: key for key, names in family.keys.items() for name in names}
    for name, field in family.fields.items():
        if field.accepts(sizes[name]):
            continue
        key = keys.get(name)
        if model.path and (key is None or getattr(model, key) is None):
            raise ConfigError(
                f"model.path: expected {field.expectation} as {name} in {model.path}/config.json,"
                f" got {_short(sizes[name])}. Correct it there, or use another folder."
            )
        raise ConfigError(
            f"model.{key}: expected {field.expectation}, got {sizes[name]!r}. Set it, or leave it"
            " out."
        )
    hidden, heads = family.get(sizes, "hidden_size"), family.get(sizes, "num_attention_heads")
    if hidden % heads:
        if model.path:
            way_out = f"Correct config.json in {model.path}, or use another folder."
        else:
            way_out = f"Set model.num_attention_heads={_nearest_divisor(hidden, heads)}."
        raise ConfigError(
            f"model.num_attention_heads: expected a divisor of model.hidden_size"
            f" ({hidden}), got {heads}. {way_out}"
        )

    if family.positions == "rotary" and hidden // heads % 2:
        raise ConfigError(
            f"model.num_attention_heads: expected heads of an even width, which rotary positions"
            f" turn in pairs, got {hidden} / {heads}. Choose another number of heads."
        )


def _nearest_divisor(hidden: int, heads: int) -> int:
    nearest = min(heads, hidden)
    near = (n for distance in range(nearest) for n in (nearest - distance, nearest + distance))
    return next(n for n in near if hidden % n == 0)  # 1 is the last one


def _check_vocabulary(shape: ModelShape, *, vocab_size: int) -> None:
    if shape.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: vocabulary and model disagree: expected at least {vocab_size}"
            f" (data.tokenizer), got {shape.vocab_size}. Set model.vocab_size to null, or"
            " data.tokenizer to the model's own."
        )


def _is_rotary(model: ModelConfig) -> bool:
    return FAMILIES[model.family].positions == "rotary"


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
        untrained = "have not been trained" if _is_rotary(model) else "start anew"
        ways_out.append(f"{longer}, where those after the folder's {positions} {untrained}")
    way_out = f"Set {', or '.join(ways_out)}" if ways_out else "Leave it out"
    raise ConfigError(
        f"model.max_position_embeddings: expected at least {sequence_length + first}"
        f" (data.sequence_length or data.padded_length{extra}), got {positions}. {way_out}."
    )
