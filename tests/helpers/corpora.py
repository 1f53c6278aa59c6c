"""Small corpora on disk and runs over them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
from fedpipe.data.blocks import PreparedData, Shard

WORDS = (
    "patients", "were", "randomised", "to", "placebo", "or", "caf\u00e9", "the", "trial", "<s>",
)  # fmt: skip


def make_text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def write_rows(path: Path, num_rows: int, *, wards: int = 4, seed: int = 0) -> str:
    rng = random.Random(seed)
    # Ward i has about i + 1 shares of the documents.
    names = [f"w{ward}" for ward in range(wards) for _ in range(ward + 1)]
    lines = []
    for index in range(num_rows):
        ward = names[index % len(names)]
        lines.append(json.dumps({"text": make_text(rng, rng.randint(20, 80)), "ward": ward}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_wordpiece(folder: Path, texts: list[str]) -> Path:
    """A BERT tokenizer folder as old ones are: with padding and truncation switched on."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(10)
    tokenizer.enable_padding(length=10)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run_maker(tmp_path: Path) -> Callable[..., RunConfig]:
    """Write rows partitioned by ward; gives a maker of runs whose keywords change ``data``."""
    train = write_rows(tmp_path / "train.jsonl", 120)
    valid = write_rows(tmp_path / "valid.jsonl", 40, seed=1)

    def make(*, num_clients: int = 3, seed: int = 0, **data: Any) -> RunConfig:
        fields: dict[str, Any] = {
            "train": (train,), "valid": (valid,), "partition_column": "ward", "num_workers": 1,
            "sequence_length": 32, "cache_dir": str(tmp_path / "cache"),
        } | data  # fmt: skip
        federation = FederationConfig(num_clients=num_clients, num_replicas=1, clients_per_round=1)
        return RunConfig(data=DataConfig(**fields), federation=federation, seed=seed)

    return make


def blocks_of(shard: Shard) -> np.ndarray:
    return np.fromfile(shard.path, shard.dtype).reshape(-1, shard.sequence_length)


def rows_of(config: RunConfig, key: str = "train") -> list[dict[str, Any]]:
    path = Path(getattr(config.data, key)[0])
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_content(one: PreparedData, two: PreparedData) -> bool:
    pairs = zip((*one.train, *one.valid), (*two.train, *two.valid), strict=True)
    return all(np.array_equal(blocks_of(a), blocks_of(b)) for a, b in pairs)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
