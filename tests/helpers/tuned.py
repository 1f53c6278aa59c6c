"""Tiny random models of every family that can be fine-tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizerFast, PretrainedConfig, PreTrainedModel

from fedpipe.config.evaluation import Kind
from fedpipe.models.tuned import base_config, build_model

VOCAB, LENGTH, LABELS = 60, 12, 3
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": VOCAB, "max_position_embeddings": 40,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "albert": _SIZES | {"embedding_size": 16},
    "roberta": _SIZES,
    "distilbert": {
        "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": VOCAB,
        "max_position_embeddings": 40,
    },
    "deberta": _SIZES,
    "deberta-v2": _SIZES | {"position_buckets": 8},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, "n_positions": 40,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "vocab_size": VOCAB, "max_position_embeddings": 40,
    },
    "llama": _SIZES | {"num_key_value_heads": 2, "pad_token_id": 0},
}  # fmt: skip
"""What differs from the published base model."""


def small_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a tiny model without dropout."""
    config = base_config(family, **SMALL[family] | changes)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return config


def small_model(
    family: str, kind: Kind = "classification", *, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Build a tiny random model with biases that are not zero; ``changes`` of its configuration."""
    torch.manual_seed(seed)
    config = small_config(family)
    config.update(changes)
    model = build_model(config, kind, num_labels=1 if kind == "regression" else LABELS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def small_batch(kind: Kind = "classification", *, size: int = 6, seed: int = 1) -> dict[str, Any]:
    """Return sequences and labels; the last token is the end that BART looks for."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
    ids[:, -1] = 2
    labels: Any = torch.arange(size) % LABELS
    if kind == "ner":
        labels = ids % LABELS
    elif kind == "regression":
        labels = torch.arange(size) / size
    elif kind == "causal-lm":
        labels = ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def small_task(folder: Path, *, sizes: tuple[int, int] = (96, 48), sites: int = 5) -> Path:
    """Write a sentiment task of sentences whose words tell the class; every row has a site."""
    rng = np.random.default_rng(4)
    folder.mkdir(parents=True, exist_ok=True)
    words = (["bad", "poor", "dull", "worse"], ["good", "fine", "great", "better"])
    for split, size in zip(("train", "test"), sizes, strict=True):
        rows = []
        for index in range(size):
            label = int(rng.integers(2))
            text = " ".join(rng.choice(words[label], size=int(rng.integers(3, 9))))
            rows.append(json.dumps({"text": text, "label": label, "site": f"s{index % sites}"}))
        (folder / f"imdb.{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def describe_task(folder: Path, *, labels: str = "[0, 1]") -> None:
    """Write the task file of opinions, whose examples are those of ``small_task``."""
    files = "{train: imdb.train.jsonl, test: imdb.test.jsonl}"
    text = f"name: opinions\nkind: classification\nlabels: {labels}\nfiles: {files}\n"
    (folder / "task.yaml").write_text(text, encoding="utf-8")


def small_folder(folder: Path, family: str = "bert", *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random encoder with a tokenizer of the words of ``small_task``."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] bad poor dull worse good fine great better".split()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    small_model(family, "regression", seed=seed, **changes).base_model.save_pretrained(folder)
    return folder
