"""Make the packaged text and vocabulary anew: ``python -m fedpipe.data.samples.build CORPUS_DIR``.

CORPUS_DIR holds ``bio_pmc_fulltext.train.jsonl.gz``: a full-text article a row, with the fields id,
title, journal, year, license and text. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

SOURCE = "bio_pmc_fulltext.train.jsonl.gz"
FIELDS = ("id", "journal", "year", "license", "title", "text")
SEED = 20
NUM_JOURNALS = 8
TRAIN_BYTES = 4_000_000
"""Text for training; a journal's share goes with the square root of its number of articles."""
VALID_PER_JOURNAL = 2
VOCAB_SIZE = 8192
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""In the order of RoBERTa's ids, 0 to 4."""
MAX_LENGTH = 512

ATTRIBUTION = """# Packaged text: sources and licences

The documents below are the body text (tables, figures, formulas, citations and references removed)
of articles from the PubMed Central open access subset. Every one is published under a Creative
Commons Attribution licence (CC BY, https://creativecommons.org/licenses/by/4.0/ and the earlier
version that its row names) or dedicated to the public domain (CC0); the authors named at
https://www.ncbi.nlm.nih.gov/pmc/articles/PMCID/ hold the rights, and whoever passes the text on
must keep this table.

The articles were gathered for Evidence Inference 2.0: J. DeYoung, E. Lehman, B. Nye, I. Marshall
and B. Wallace, "Evidence Inference 2.0: More Data, Better Models", BioNLP 2020,
https://aclanthology.org/2020.bionlp-1.13/.

| PMCID | title | journal | year | licence | file |
|---|---|---|---|---|---|
"""

Row = dict[str, str]


def read_articles(path: Path) -> dict[str, list[Row]]:
    """Read the freely licensed articles of the largest journals.

    Args:
        path: The corpus file.

    Returns:
        Articles by journal, the journal with the most articles first.
    """
    journals: dict[str, list[Row]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["license"].startswith(("CC-BY ", "CC0")):
                journals[row["journal"]].append({field: row[field] for field in FIELDS})
    largest = sorted(journals, key=lambda name: (-len(journals[name]), name))[:NUM_JOURNALS]
    return {name: sorted(journals[name], key=lambda row: row["id"]) for name in largest}


def choose(journals: dict[str, list[Row]]) -> tuple[list[Row], list[Row]]:
    """Draw the training and the held-out documents, journal by journal.

    Args:
        journals: Articles by journal.

    Returns:
        Training and held-out rows, each in a shuffled order that mixes the journals.
    """
    rng = random.Random(SEED)
    weights = {name: math.sqrt(len(rows)) for name, rows in journals.items()}
    train: list[Row] = []
    valid: list[Row] = []
    for name, rows in journals.items():
        quota = TRAIN_BYTES * weights[name] / sum(weights.values())
        shuffled = rng.sample(rows, len(rows))
        valid += shuffled[:VALID_PER_JOURNAL]
        used = 0
        for row in shuffled[VALID_PER_JOURNAL:]:
            if used >= quota:
                break
            train.append(row)
            used += len(row["text"].encode())
    rng.shuffle(train)
    rng.shuffle(valid)
    return train, valid


def write_rows(rows: list[Row], path: Path) -> None:
    """Write documents as gzipped JSON lines, without the time of day in the header."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def write_attribution(files: dict[str, list[Row]], path: Path) -> None:
    """Write the table that names every document, its journal, year and licence."""
    lines = []
    for name, rows in files.items():
        for row in sorted(rows, key=lambda row: (row["journal"], row["id"])):
            cells = (row["id"], row["title"], row["journal"], row["year"], row["license"], name)
            clean = (" ".join(cell.replace("|", "/").split()) for cell in cells)
            lines.append("| " + " | ".join(clean) + " |\n")
    path.write_text(ATTRIBUTION + "".join(lines), encoding="utf-8")


def write_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int = VOCAB_SIZE) -> None:
    """Train a cased byte-level BPE in RoBERTa's form and save it as a Hugging Face folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    cls, pad, sep, unk, mask = SPECIAL_TOKENS
    # The mask takes the space before it, so that a filled-in word keeps it: as in roberta-base.
    mask_token = AddedToken(mask, lstrip=True, normalized=False, special=True)
    tokenizer = Tokenizer(models.BPE(unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS[:-1], mask_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=(sep, tokenizer.token_to_id(sep)),
        cls=(cls, tokenizer.token_to_id(cls)),
        add_prefix_space=False,
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    mask_entry = {
        "content": mask,
        "lstrip": True,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    names = {
        "bos_token": cls,
        "cls_token": cls,
        "eos_token": sep,
        "sep_token": sep,
        "pad_token": pad,
        "unk_token": unk,
        "mask_token": mask_entry,
    }
    settings = {
        **names,
        "mask_token": {"__type": "AddedToken", **mask_entry},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("special_tokens_map", names), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def build(corpus_dir: Path, output_dir: Path) -> None:
    """Write the packaged text, its attribution and its vocabulary.

    Args:
        corpus_dir: Folder with the corpus file.
        output_dir: Where the packaged files go.
    """
    train, valid = choose(read_articles(corpus_dir / SOURCE))
    write_rows(train, output_dir / "bio_pmc.train.jsonl.gz")
    write_rows(valid, output_dir / "bio_pmc.valid.jsonl.gz")
    write_attribution({"train": train, "valid": valid}, output_dir / "ATTRIBUTION.md")
    write_tokenizer([row["text"] for row in train], output_dir / "tokenizer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus_dir", type=Path, help=f"folder that holds {SOURCE}")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    build(arguments.corpus_dir, arguments.output_dir)
