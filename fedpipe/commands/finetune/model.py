"""The model of a fine-tuning: read from ``model.path``, with the task's head and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.data.tokenizer import SAMPLES
from fedpipe.errors import ConfigError
from fedpipe.models.lengths import OFFSET_FAMILIES
from fedpipe.models.peft import attach, load_adapter
from fedpipe.models.tuned import build_model
from fedpipe.models.weights import stable_seed

UNTRAINED = "untrained"
"""Value of ``model.path``: the quick start's model with random weights, packaged tokenizer."""


def load_tuning_tokenizer(config: FinetuneConfig) -> Any:
    """Read the tokenizer of ``model.path``; without a pad token, its end token is used for padding.

    Raises:
        ConfigError: There is no tokenizer, or it cannot tell where words begin.
    """
    from transformers import AutoTokenizer

    path = config.model.path
    folder = SAMPLES / "tokenizer" if path == UNTRAINED else Path(path)
    try:
        if not (folder / "config.json").is_file() and path != UNTRAINED:
            raise OSError("no config.json")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.is_fast:
            raise ValueError("a slow tokenizer, without tokenizer.json")
    except Exception as error:  # tokenizers and transformers raise many classes
        raise ConfigError(
            f"model.path: expected a Hugging Face folder with a model and a fast tokenizer, got"
            f" {path!r} ({' '.join(str(error).split())[:120]}). Name one that save_pretrained, or"
            " fedpipe export, wrote."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: FinetuneConfig, tokenizer: Any) -> Any:
    """Read the configuration of ``model.path``."""
    from transformers import AutoConfig, RobertaConfig

    path = config.model.path
    if path == UNTRAINED:
        return RobertaConfig(
            num_hidden_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            intermediate_size=512,
            vocab_size=len(tokenizer),
            max_position_embeddings=514,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            initializer_range=0.05,
        )
    try:
        result = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # an unknown model_type, or no JSON
        raise ConfigError(
            f"model.path: expected a config.json of transformers in {path}, got"
            f" {' '.join(str(error).split())[:120]}. Save the model again."
        ) from error
    own, padding = result.pad_token_id, tokenizer.pad_token_id
    if result.model_type in OFFSET_FAMILIES and own not in (None, padding):
        raise ConfigError(
            f"model.path: expected a tokenizer that pads with token {own} (pad_token_id of {path}),"
            f" after which the positions of {result.model_type} begin, got {padding}. Save the"
            " model's own tokenizer there."
        )
    result.pad_token_id = padding
    return result


def build_tuned(config: FinetuneConfig, task: TaskSpec) -> Any:
    """Build the model of a run with the head of its task, without an adapter."""
    tokenizer = load_tuning_tokenizer(config)
    torch.manual_seed(stable_seed(config.seed, "head"))
    path = config.model.path
    return build_model(
        load_model_config(config, tokenizer),
        task.kind,
        num_labels=task.num_outputs,
        labels=task.labels,
        path="" if path == UNTRAINED or config.model.random_weights else path,
    )


def attach_seeded(model: Any, config: FinetuneConfig, task: TaskSpec) -> Any:
    """Attach the adapter of the run with its first values, drawn from the seed."""
    torch.manual_seed(stable_seed(config.seed, "adapter"))
    split, causal = config.is_cut, task.kind == "causal-lm"
    counts = attach(model, config.method, causal=causal, split=split)
    if config.method.path:
        load_adapter(
            model,
            Path(config.method.path),
            config.method,
            kind=task.kind,
            labels=task.labels,
            split=split,
        )
    return counts
