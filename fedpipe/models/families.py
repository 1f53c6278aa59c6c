"""BERT and RoBERTa: the transformers modules that stages consist of, and their first weights.

Works with transformers 4.57, whose layers return a tuple, and 5.x, whose layers return a tensor.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig

from fedpipe.config.half_files import read_json_object, weight_files
from fedpipe.config.model_shape import ModelShape
from fedpipe.errors import ConfigError
from fedpipe.models.split import AUX_HEADS


def _absent() -> bool:
    return False


# Where scikit-learn and scipy are installed, as they are for ``fedpipe evaluate``, transformers
# imports them with every model, for assisted generation and object detection that fedpipe does not
# use: a fifth of the time to the first local step. So transformers is told that they are absent
# while it imports BERT and RoBERTa; whatever needs its models imports this module first.
with mock.patch.multiple(
    "transformers.utils", is_sklearn_available=_absent, is_scipy_available=_absent
):
    bert: Any = import_module("transformers.models.bert.modeling_bert")
    roberta: Any = import_module("transformers.models.roberta.modeling_roberta")

_SHAPE_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "classifier_dropout",
)


@dataclass(frozen=True, slots=True)
class Family:
    """The modules of a model family, and their parameter names."""

    prefix: str
    head_path: str
    config_class: type[PretrainedConfig]
    embeddings_class: type[nn.Module]
    layer_class: type[nn.Module]
    head_class: type[nn.Module]

    @property
    def word_embeddings(self) -> str:
        """Full name of the word embedding's weight."""
        return f"{self.prefix}.embeddings.word_embeddings.weight"

    @property
    def decoder(self) -> str:
        """Full name of the final decoder's weight."""
        return f"{self.head_path}.decoder.weight"


# The configuration classes are taken from the modeling modules: transformers 5.x imports
# scikit-learn when it is asked for one of them.
FAMILY_MODULES = {
    "roberta": Family(
        "roberta", "lm_head", roberta.RobertaConfig,
        roberta.RobertaEmbeddings, roberta.RobertaLayer, roberta.RobertaLMHead,
    ),
    "bert": Family(
        "bert", "cls.predictions", bert.BertConfig,
        bert.BertEmbeddings, bert.BertLayer, bert.BertLMPredictionHead,
    ),
}  # fmt: skip


def hf_config(shape: ModelShape, *, pad_id: int, cls_id: int, sep_id: int) -> PretrainedConfig:
    """Build the transformers configuration of the whole, unsplit model.

    Args:
        shape: Sizes of the model.
        pad_id: Padding token; RoBERTa counts positions from ``pad_id + 1``.
        cls_id: First token of a block.
        sep_id: Last token of a block.

    Returns:
        A configuration with an untied decoder: stages are built one by one, and the caller ties
        the decoder of a stage to the word embedding where that is wanted.
    """
    config = FAMILY_MODULES[shape.family].config_class(
        **{name: getattr(shape, name) for name in _SHAPE_FIELDS},
        pad_token_id=pad_id,
        bos_token_id=cls_id,
        eos_token_id=sep_id,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"  # modules are built without a PreTrainedModel to set it
    return config


def initialise(
    module: nn.Module, *, family: Family, seed: int, std: float, sinusoidal_positions: bool = False
) -> None:
    """Give every parameter its first value, a function of the seed and of its full name only.

    So a parameter starts with the same value for every cut, number of stages and process. Matrices
    are N(0, std), biases 0, LayerNorm weights 1 (Devlin et al. 2019). Every decoder starts as a
    copy of the word embedding, as a tied one would. Every auxiliary head starts as a copy of the
    final head, so that all stages begin with the same mapping from hidden states to words; later
    stages then learn from earlier ones at once. Position embeddings may start as sinusoids, Vaswani
    et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762, scaled to the same standard
    deviation.
    """
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if sinusoidal_positions and name.endswith("position_embeddings.weight"):
                parameter.copy_(_sinusoids(*parameter.shape).mul_(std * 2**0.5))
            elif name.endswith("bias"):
                parameter.zero_()
            elif "layernorm" in name.lower() or "layer_norm" in name:
                parameter.fill_(1.0)
            else:
                source = _in_final_head(name, family=family)
                if name.endswith("decoder.weight"):
                    source = family.word_embeddings
                generator = torch.Generator().manual_seed(stable_seed(seed, source))
                parameter.normal_(0.0, std, generator=generator)


def _sinusoids(num_positions: int, size: int) -> torch.Tensor:
    """(positions, size) sines in the even columns, cosines in the odd ones."""
    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * 10000.0**-steps
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :size].float()


def stable_seed(*parts: object) -> int:
    """Derive a 63-bit seed from values whose text is the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def load_pretrained(module: nn.Module, *, family: Family, path: str) -> list[str]:
    """Fill a stage from a Hugging Face folder, reading only the tensors that the stage holds.

    Every head of the stages is filled from the folder's head. If the folder has no masked-LM head,
    the heads keep their first values. A tied decoder is read from the word embedding.
    ``LayerNorm.gamma`` and ``.beta`` of old folders, such as the original BERT's, are read as
    weight and bias.

    Args:
        module: A stage; changed in place.
        family: The stage's family.
        path: Folder with model.safetensors or pytorch_model.bin, whole or in shards.

    Returns:
        Names of the parameters that the folder does not hold: those of heads, and new positions.

    Raises:
        ConfigError: A file cannot be read, a tensor has another shape, or a parameter of the
            encoder is missing.
    """
    wanted = dict(module.named_parameters())
    candidates = {name: _candidates(name, family=family) for name in wanted}
    found = _read_tensors(path, {option for options in candidates.values() for option in options})
    missing = []
    for name, parameter in wanted.items():
        source = next((c for c in candidates[name] if c in found), None)
        if source is None:
            if name.startswith(f"{family.prefix}."):
                raise ConfigError(
                    f"model.path: expected {name} in {path}, got a folder without it. Use a whole "
                    f"{family.prefix} model, written by save_pretrained."
                )
            missing.append(name)
            continue
        tensor, target = found[source], parameter
        if name.endswith("position_embeddings.weight") and len(tensor) == _num_positions(path):
            target = parameter[: len(tensor)]  # model.max_position_embeddings may ask for more
            missing += [f"{name}[{len(tensor)}:]"] if len(target) < len(parameter) else []
        if tensor.shape != target.shape:
            raise ConfigError(
                f"model.path: expected {source} of shape {list(parameter.shape)}, got "
                f"{list(tensor.shape)} in {path}. Use that model's own tokenizer and sizes."
            )
        with torch.no_grad():
            target.copy_(tensor)
    return missing


def _num_positions(path: str) -> int:
    """Return the rows of the position table as config.json gives them; -1 if it does not."""
    config = read_json_object(Path(path) / "config.json", key="model.path")
    return int(config.get("max_position_embeddings", -1))


def _in_final_head(name: str, *, family: Family) -> str:
    """Return the name that a parameter of an auxiliary head has in the final head."""
    return re.sub(rf"^{AUX_HEADS}\.\d+\.head\.", f"{family.head_path}.", name)


def _candidates(name: str, *, family: Family) -> list[str]:
    """Return the names under which a folder may hold a parameter, best first."""
    name = _in_final_head(name, family=family)
    if name.endswith("decoder.weight"):
        options = [name, family.word_embeddings]
    elif name.startswith(f"{AUX_HEADS}."):
        return []
    else:
        options = [name]
    if name == f"{family.head_path}.bias":
        # transformers 4.x saves one bias under two names; 5.x has two, and uses this one.
        options.insert(0, f"{family.head_path}.decoder.bias")
    options += [
        o.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for o in options
        if "LayerNorm." in o
    ]
    return options + [o.removeprefix(f"{family.prefix}.") for o in options]


def _read_tensors(path: str, wanted: set[str]) -> dict[str, torch.Tensor]:
    folder = Path(path)
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, key="model.path"):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as handle:
                    for name in wanted & set(handle.keys()):
                        found[name] = handle.get_tensor(name)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
                found |= {name: state[name] for name in wanted & set(state)}
        except Exception as error:  # a damaged pickle can raise any exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"model.path: expected readable weights in {file}, got {reason}. "
                "Download or save the model again."
            ) from error
    return found
