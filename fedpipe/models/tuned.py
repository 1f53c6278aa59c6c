"""Models that can be fine-tuned: families, the heads of their tasks, published base sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fedpipe.errors import ConfigError

Kind = Literal["classification", "regression", "ner", "causal-lm"]

_AUTO: dict[Kind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "ner": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_DECODERS = ("gpt2", "llama")
_IN_A_LAYER = re.compile(r"\.(layers?|h|transformer)\.\d+\.")
_WITHOUT: dict[tuple[str, Kind], str] = {
    ("bart", "ner"): "transformers has no BART for token classification",
    ("bart", "causal-lm"): "the adapters library fails on BART's decoder alone",
}


@dataclass(frozen=True, slots=True)
class Published:
    """A published checkpoint's sizes."""

    name: str
    """As on the model hub."""
    values: Mapping[str, Any]
    """What differs from the defaults of its family's configuration class."""


_BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_DISENTANGLED = {
    "relative_attention": True, "max_relative_positions": -1, "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip

FAMILIES: dict[str, Published] = {
    "bert": Published("bert-base-uncased", {}),
    "albert": Published(
        "albert-base-v2",
        _BERT | {"intermediate_size": 3072, "embedding_size": 128, "vocab_size": 30000},
    ),
    "roberta": Published(
        "roberta-base",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "distilbert": Published("distilbert-base-uncased", {}),
    "deberta": Published("deberta-base", _DISENTANGLED | {"vocab_size": 50265}),
    "deberta-v2": Published(
        "deberta-v3-base",
        _BERT | _DISENTANGLED | {
            "intermediate_size": 3072, "vocab_size": 128100, "position_buckets": 256,
            "share_att_key": True, "norm_rel_ebd": "layer_norm",
        },
    ),
    "gpt2": Published("gpt2", {}),
    "bart": Published(
        "bart-base",
        {
            "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072, "encoder_attention_heads": 12,
            "decoder_attention_heads": 12, "vocab_size": 50265,
        },
    ),
    "llama": Published(
        "SmolLM2-135M",
        {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
"""By ``model_type``, the base model whose parameters are counted."""


def base_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a family's published base model.

    Args:
        family: Key of ``FAMILIES``.
        **changes: Fields to set otherwise.
    """
    return AutoConfig.for_model(family, **dict(FAMILIES[family].values) | changes)


def check_family(model_type: str, kind: Kind, *, key: str = "model.path") -> None:
    """Refuse a model that cannot be fine-tuned on a kind of task.

    Raises:
        ConfigError: The family is unknown, or has no head for the task.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{key}: expected a model of {', '.join(FAMILIES)}, got {model_type!r}. Choose another"
            " folder."
        )
    reason = _WITHOUT.get((model_type, kind), "")
    if kind == "causal-lm" and model_type not in _DECODERS:
        reason = reason or "it reads text in both directions"
    if reason:
        decoders = " or ".join(_DECODERS)
        way_out = f"Use {decoders}." if kind == "causal-lm" else "Use another family."
        raise ConfigError(
            f"{key}: expected a model for {kind}, got {model_type}: {reason}. {way_out}"
        )


def build_model(
    config: PretrainedConfig,
    kind: Kind,
    *,
    num_labels: int = 0,
    path: str = "",
    device: str = "cpu",
) -> PreTrainedModel:
    """Build a model with the head of a task.

    The head's first values come from torch's generator: seed it for equal ones in every process.

    Args:
        config: Of the family; its labels are replaced.
        kind: Of the task.
        num_labels: Classes or tags; 1 for regression.
        path: Folder to read the encoder's weights from; "" leaves all at first values.
        device: "meta" allocates nothing.

    Raises:
        ConfigError: The weights cannot be read, or are those of another architecture.
    """
    auto = getattr(transformers, _AUTO[kind])
    if kind != "causal-lm":
        config.num_labels = num_labels
        config.problem_type = "regression" if kind == "regression" else None
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    if not path:
        with torch.device(device):
            return _plain(auto.from_config(config))
    try:
        model = read_model(auto, path, key="model.path", config=config)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file raises whatever it stumbles over
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"model.path: expected a model folder that transformers reads, got {path!r}: {reason}."
            " Save it again with save_pretrained."
        ) from error
    return _plain(model)


def read_model(auto: Any, path: str, *, key: str, **options: Any) -> Any:
    """Read a whole model; only what is not the encoder's may be missing, or left over.

    Args:
        auto: transformers' class with the head.
        path: Its folder.
        key: That named it.
        **options: For ``from_pretrained``.

    Returns:
        The model in float32.

    Raises:
        ConfigError: Weights of the encoder are not there, or belong to another encoder.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every head that starts anew
    try:
        model, info = auto.from_pretrained(
            path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            dtype=torch.float32, **options,
        )  # fmt: skip
    finally:
        logging.set_verbosity(before)
    prefix, family = f"{model.base_model_prefix}.", model.config.model_type
    lost = [
        name for name in info["missing_keys"] if name.startswith(prefix) and "pooler" not in name
    ]
    other = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    lost += [name for name in other if name.startswith(prefix)]
    if lost:
        raise ConfigError(
            f"{key}: expected all weights of the model in {path}, got none of {lost[0]} and"
            f" {len(lost) - 1} more. Use the folder of a whole {family} model."
        )
    unused = sorted(
        name for name in info["unexpected_keys"]
        if name.startswith(prefix) and _IN_A_LAYER.search(name)
    )  # fmt: skip
    if unused:
        raise ConfigError(
            f"{key}: expected the weights of a {family} model in {path}, got {unused[0]} and"
            f" {len(unused) - 1} more, which transformers {transformers.__version__} does not use."
            " Use the folder of a model that it knows."
        )
    return model


def _plain(model: Any) -> PreTrainedModel:
    assert isinstance(model, PreTrainedModel)
    return model


def head_names(model: PreTrainedModel) -> set[str]:
    """Return the full names of the parameters that are the task's head, not the encoder's."""
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
