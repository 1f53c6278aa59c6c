"""Models for fine-tuning: their families, the heads of tasks, and published base sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fedpipe.config.evaluation import Kind
from fedpipe.errors import ConfigError

_AUTO: dict[Kind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "ner": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_DECODERS = ("gpt2", "llama")
_REGRESSION_LABELS = ("LABEL_0",)
"""Label names that transformers gives to the single output of a regression."""
_INIT_STD = 0.02
"""Standard deviation of first weights if a family's configuration gives none."""
_IN_A_LAYER = re.compile(r"\.(layers?|h|transformer)\.\d+\.")
_UNSUPPORTED: dict[tuple[str, Kind], str] = {
    ("bart", "ner"): "transformers has no BART for token classification",
    ("bart", "causal-lm"): "the adapters library fails on BART's decoder alone",
}


@dataclass(frozen=True, slots=True)
class Published:
    """Sizes of a published checkpoint."""

    name: str
    """Name on the model hub."""
    values: Mapping[str, Any]
    """Fields that differ from the defaults of the family's configuration class."""


_BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_DISENTANGLED = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}

TUNED_FAMILIES: dict[str, Published] = {
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
"""Published base model of every ``model_type`` that can be fine-tuned."""
_SAME_AS_ROBERTA = ("camembert", "xlm-roberta")
"""Families whose folders transformers reads as RoBERTa's, to the same logits."""


def base_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a family's published base model.

    Args:
        family: A key of ``TUNED_FAMILIES``.
        **changes: Fields with other values.
    """
    return AutoConfig.for_model(family, **dict(TUNED_FAMILIES[family].values) | changes)


def check_family(model_type: str, kind: Kind, *, key: str = "model.path") -> None:
    """Check that a model family can be fine-tuned on a kind of task.

    Raises:
        ConfigError: The family is unknown, or has no head for the kind of task.
    """
    if model_type not in TUNED_FAMILIES:
        way_out = "Choose another folder; fedpipe evaluate fine-tunes any encoder, without clients."
        if model_type in _SAME_AS_ROBERTA:
            way_out = 'Set model_type to "roberta" in a copy of the folder: it computes the same.'
        raise ConfigError(
            f"{key}: expected a model of {', '.join(TUNED_FAMILIES)}, got {model_type!r}. {way_out}"
        )
    reason = _UNSUPPORTED.get((model_type, kind), "")
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
    labels: Sequence[str] = (),
    path: str = "",
    device: str = "cpu",
) -> PreTrainedModel:
    """Build a model with the head of a task.

    The head's first values are drawn from torch's generator; seed it to get the same values in
    every process. The head in the folder is used only if it belongs to the same labels.

    Args:
        config: Configuration of the model; its labels are replaced.
        kind: Kind of the task.
        num_labels: Number of classes or tags; 1 for regression.
        labels: Names of the labels; empty for regression.
        path: Folder to read the encoder's weights from; "" for random weights.
        device: Device of a model without ``path``; "meta" allocates nothing.

    Raises:
        ConfigError: The weights cannot be read, or belong to another architecture.
    """
    auto = getattr(transformers, _AUTO[kind])
    new_head = kind != "causal-lm" and not is_head_of(config.to_dict(), kind, labels)
    if kind != "causal-lm":
        config.num_labels = num_labels
        config.problem_type = "regression" if kind == "regression" else None
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    if not path:
        with torch.device(device):
            return _checked(auto.from_config(config))
    try:
        model = read_model(auto, path, key="model.path", new_head=new_head, config=config)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can raise any exception
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"model.path: expected a model folder that transformers reads, got {path!r}: {reason}."
            " Save it again with save_pretrained."
        ) from error
    return _checked(model)


def is_head_of(saved: Mapping[str, Any], kind: Kind, labels: Sequence[str]) -> bool:
    """Whether a saved head fits a task: it has the same kind and the same labels in this order.

    Args:
        saved: Content of a model's config.json, or of an adapter's head_config.json.
        kind: Kind of the task.
        labels: Classes or tags of the task; empty for regression.
    """
    suffix = _AUTO[kind].removeprefix("AutoModel")
    classes = [saved.get("model_class"), *(saved.get("architectures") or ())]
    of_kind = any(str(name).endswith(suffix) for name in classes)
    return of_kind and saved_labels(saved) == list(labels or _REGRESSION_LABELS)


def saved_labels(saved: Mapping[str, Any]) -> list[str]:
    """Return the labels of a config.json or head_config.json, in the order of their ids."""
    ids = saved.get("label2id")
    return sorted(ids, key=lambda name: int(ids[name])) if isinstance(ids, dict) else []


def read_model(auto: Any, path: str, *, key: str, new_head: bool, **options: Any) -> Any:
    """Read a whole model; weights of the encoder must be complete, those of the head may differ.

    Args:
        auto: The transformers class with the head.
        path: Folder of the model.
        key: The configuration key that names the folder, for errors.
        new_head: Draw the head from torch's generator, even if the folder has one.
        **options: Arguments for ``from_pretrained``.

    Returns:
        The model in float32.

    Raises:
        ConfigError: Weights of the encoder are missing, or belong to another encoder.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # 5.x shows one for every folder, on stderr
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns about every head that is not in the folder
    try:
        model, info = auto.from_pretrained(
            path,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **options,
        )
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
        name
        for name in info["unexpected_keys"]
        if name.startswith(prefix) and _IN_A_LAYER.search(name)
    )
    if unused:
        raise ConfigError(
            f"{key}: expected the weights of a {family} model in {path}, got {unused[0]} and"
            f" {len(unused) - 1} more, which transformers {transformers.__version__} does not use."
            " Use the folder of a model that it knows."
        )
    if new_head:
        _draw_head(model, set(info["missing_keys"]) | set(other))
    return model


@torch.no_grad()
def _draw_head(model: Any, drawn: set[str]) -> None:
    """Draw the head again where the folder has filled it, that is, all but ``drawn``.

    Source: Devlin et al. 2019.
    """
    prefix = f"{model.base_model_prefix}."
    std = getattr(model.config, "initializer_range", None) or getattr(
        model.config, "init_std", _INIT_STD
    )
    for path, module in model.named_modules():
        given = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)} - drawn
        if path.startswith(prefix) or not given or not isinstance(module, torch.nn.Linear):
            continue
        module.weight.normal_(0.0, std)
        if module.bias is not None:
            module.bias.zero_()


def _checked(model: Any) -> PreTrainedModel:
    assert isinstance(model, PreTrainedModel)
    return model


def head_names(model: PreTrainedModel) -> set[str]:
    """Return the full names of the parameters of the task's head, which are not the encoder's."""
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
