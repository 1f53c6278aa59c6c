"""Tiny encoders with random weights and a vocabulary of their own, and tasks to train them on."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from tests.helpers.cli import REPOSITORY

WORDS = [f"w{number}" for number in range(60)]
"""Words of the made-up tasks; each is one token."""
PIECES = [chr(ord("a") + number) for number in range(26)]
PACKAGED = REPOSITORY / "fedpipe/data/samples/tasks/ncbi_disease"


def wordpiece(folder: Path, *, lower: bool = True) -> Path:
    """A BERT vocabulary: special tokens, WORDS, and letters that spell every other word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*PIECES, *"0123456789"]
    tokens = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = ("[CLS]", 2), ("[SEP]", 3)
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder


def bert(folder: Path, *, hidden: int = 32, positions: int = 64, seed: int = 0) -> Path:
    """A BERT of two layers without dropout, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    wordpiece(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=5 + len(WORDS) + 2 * 36, hidden_size=hidden, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=positions,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def easy_ner(folder: Path, *, name: str = "ncbi_disease", size: int = 60) -> Path:
    """Words w0 to w9 open an entity, w10 to w19 go on with one, all others are outside."""
    rng = random.Random(1)
    for split, number in (("train", size), ("dev", size // 2), ("test", size // 2)):
        rows = []
        for _ in range(number):
            words: list[str] = []
            tags: list[str] = []
            while len(words) < 8:
                if rng.random() < 0.3:
                    words += [f"w{rng.randrange(10)}", f"w{rng.randrange(10, 20)}"]
                    tags += ["B-Disease", "I-Disease"]
                else:
                    words.append(f"w{rng.randrange(20, 60)}")
                    tags.append("O")
            rows.append({"tokens": words, "tags": tags})
        write_jsonl(folder / f"{name}.{split}.jsonl", rows)
    return folder


def easy_pairs(folder: Path, *, name: str = "rte", size: int = 60) -> Path:
    """The label says whether w0 stands in the first text; train and dev only, as in GLUE."""
    rng = random.Random(2)
    for split, number in (("train", size), ("dev", size // 2)):
        rows = []
        for index in range(number):
            words = [f"w{rng.randrange(5, 60)}" for _ in range(rng.randrange(3, 9))]
            words[rng.randrange(len(words))] = "w0" if index % 2 else "w1"
            rows.append({"text": " ".join(words), "text_pair": "w2 w3", "label": index % 2})
        write_jsonl(folder / f"{name}.{split}.jsonl.gz", rows)
    return folder
