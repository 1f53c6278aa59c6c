"""Sizes of the encoder: presets, explicit fields and Hugging Face folders make a ``ModelShape``.

Pure arithmetic over a ``config.json``; counts and FLOPs let the plan speak without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fedpipe.config.schema import ModelConfig
from fedpipe.errors import ConfigError

# Layers, hidden size, heads, feed-forward width. base and large are BERT's, Devlin et al. 2018,
# https://arxiv.org/abs/1810.04805; small keeps its 64 per head and 4 x hidden.
_PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (4, 128, 4, 512),
    "small": (4, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}
_POSITION_OFFSET = {"roberta": 2, "bert": 0}
"""RoBERTa's positions start at the padding index + 1."""
_PRESET_POSITIONS = {"roberta": 514, "bert": 512}
_TYPE_VOCAB = {"roberta": 1, "bert": 2}
_LAYER_NORM_EPS = {"roberta": 1e-5, "bert": 1e-12}
_ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "mish",
    "quick_gelu", "relu", "relu2", "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MAX_VOCAB_PADDING = 127
"""Folders pad their embedding to a multiple of up to 128; a larger surplus is another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Every size of the encoder, nothing left open."""

    family: Literal["roberta", "bert"]
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


def resolve(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> ModelShape:
    """Return all sizes of the model: explicit fields, then ``model.path``, then ``model.size``.

    Args:
        model: The section of the configuration.
        vocab_size: Tokens of the tokenizer.
        sequence_length: Of a block, padding included; the positions must reach that far.

    Returns:
        The sizes.

    Raises:
        ConfigError: Sizes contradict each other, the tokenizer, the blocks or the folder.
    """
    if model.path:
        sizes = _read_folder(model)
        _check_folder(model, sizes, vocab_size=vocab_size)
    else:
        sizes = _preset(model, vocab_size=vocab_size, sequence_length=sequence_length)
        explicit = {name: getattr(model, name) for name in sizes}
        sizes |= {name: value for name, value in explicit.items() if value is not None}
    shape = ModelShape(family=model.family, **sizes)
    _check_values(shape)
    _check_vocabulary(shape, vocab_size=vocab_size)
    _check_positions(shape, sequence_length=sequence_length)
    return shape


def _preset(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    layers, hidden, heads, inner = _PRESETS[model.size]
    needed = sequence_length + _POSITION_OFFSET[model.family]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocab_size,
        "max_position_embeddings": max(needed, _PRESET_POSITIONS[model.family]),
        "type_vocab_size": _TYPE_VOCAB[model.family],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": _LAYER_NORM_EPS[model.family],
        "tie_word_embeddings": True,
    }


def _read_folder(model: ModelConfig) -> dict[str, Any]:
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: expected a Hugging Face folder, got {model.path!r}, which is not there."
            " Download the model first, or leave model.path empty to start from random weights."
        )
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.path: expected a readable config.json in {model.path!r}, got"
            f" {type(error).__name__}. Point it at a folder written by save_pretrained."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"model.path: expected JSON in {file}, got {error}. Write the folder again with"
            " save_pretrained."
        ) from error
    found = found if isinstance(found, dict) else {}
    if found.get("model_type") != model.family:
        raise ConfigError(
            f"model.path: expected model_type {model.family!r} (model.family) in {file}, got"
            f" {found.get('model_type')!r}. Set model.family to the folder's, or use another."
        )
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise ConfigError(
            f"model.path: expected weights in {model.path!r}, got none of"
            f" {', '.join(_WEIGHT_FILES)}. Download them, or leave model.path empty."
        )
    # transformers leaves out nothing here, but hand-written folders do: their defaults are BERT's.
    base = _preset(ModelConfig(family=model.family, size="base"), vocab_size=0, sequence_length=0)
    return {name: found.get(name, default) for name, default in base.items()}


def _check_folder(model: ModelConfig, sizes: dict[str, Any], *, vocab_size: int) -> None:
    for name, value in sizes.items():
        explicit = getattr(model, name)
        # These do not belong to the weights: another value is a choice, not a contradiction.
        if name.endswith("_dropout_prob") or name == "initializer_range":
            sizes[name] = value if explicit is None else explicit
        elif name == "tie_word_embeddings" and explicit is False:
            sizes[name] = False  # one tensor may become two
        elif explicit is not None and explicit != value:
            raise ConfigError(
                f"model.{name}: expected {value!r} (config.json in {model.path}), got"
                f" {explicit!r}. Remove model.{name}, or leave model.path empty."
            )
    surplus = sizes["vocab_size"] - vocab_size
    if vocab_size > 1 and surplus > _MAX_VOCAB_PADDING:
        raise ConfigError(
            f"model.path: vocabulary and model disagree: {model.path} has"
            f" {sizes['vocab_size']} tokens, data.tokenizer {vocab_size}."
            " Set data.tokenizer to the folder of the model's own tokenizer."
        )


def _check_values(shape: ModelShape) -> None:
    for field in fields(shape):
        value, key = getattr(shape, field.name), f"model.{field.name}"
        if field.name.endswith("_dropout_prob"):
            _expect(0 <= value < 1, key, "a value in [0, 1)", value)
        elif field.name in ("initializer_range", "layer_norm_eps"):
            _expect(value > 0, key, "a value above 0", value)
        elif field.name == "hidden_act":
            _expect(value in _ACTIVATIONS, key, f"one of {', '.join(_ACTIVATIONS)}", value)
        elif field.name == "tie_word_embeddings":
            _expect(isinstance(value, bool), key, "true or false", value)
        elif field.name != "family":
            _expect(value >= 1, key, "1 or more", value)
    if shape.hidden_size % shape.num_attention_heads:
        raise ConfigError(
            f"model.num_attention_heads: expected a divisor of model.hidden_size"
            f" ({shape.hidden_size}), got {shape.num_attention_heads}. Set"
            f" model.num_attention_heads={_nearest_divisor(shape)}."
        )


def _expect(condition: bool, key: str, expectation: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expectation}, got {value!r}. Set it, or leave it out.")


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


def _check_positions(shape: ModelShape, *, sequence_length: int) -> None:
    offset = _POSITION_OFFSET[shape.family]
    if shape.max_position_embeddings < sequence_length + offset:
        extra = f" + {offset}, where RoBERTa's positions start" if offset else ""
        raise ConfigError(
            f"model.max_position_embeddings: expected at least {sequence_length + offset}"
            f" (data.sequence_length or data.padded_length{extra}), got"
            f" {shape.max_position_embeddings}. Set the longer of them to"
            f" {shape.max_position_embeddings - offset} or less."
        )
