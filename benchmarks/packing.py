"""Packed blocks, packed blocks with attention inside documents, and padded documents.

    python benchmarks/packing.py CORPUS [--seeds 0,1] [--tokens 2000000] [--out runs/packing]
        [key=value ...]

CORPUS names CORPUS.train.jsonl.gz and CORPUS.valid.jsonl.gz with a field `text`; short documents
show the most. One stage trains on one thread to equal numbers of real tokens, by the product's own
stage, masks and optimizer. All three are scored on the same held-out documents: each alone in its
row, and packed as `data.attention=block` packs. Seconds are of the processor. Runs that are done
are not repeated, so two seeds may run at the same time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from fedpipe.config.load import load_config
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.data.masking import IGNORED, document_starts, mask_blocks
from fedpipe.data.packing import ClientStream
from fedpipe.data.tokenizer import TokenizerInfo, tokenizer_info
from fedpipe.models.split import model_stages
from fedpipe.models.stage import MaskedTargets, Stage, build_stage
from fedpipe.models.weights import hf_config
from fedpipe.pipeline.optimizer import build_optimizer, clip_, learning_rate

VARIANTS = ("block", "document", "padded")
"""data.attention=block and =document, and one document per row behind which is padding."""
SETTINGS = [
    "model.family=modernbert", "model.num_hidden_layers=4", "model.hidden_size=128",
    "model.num_attention_heads=4", "model.intermediate_size=192", "pipeline.cut=[]",
    "data.sequence_length=512", "data.attention=document",
    "pipeline.micro_batch_size=8", "optimizer.lr=2e-3",
]  # fmt: skip

Ids = NDArray[np.int64]


class Text(NamedTuple):
    """Rows (N, T) of token ids; a row of padded text ends with padding."""

    train: Ids
    valid: Ids


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/packing"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None, [*SETTINGS, *args.overrides])
    info = tokenizer_info(config)
    texts: dict[str, Text] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = args.seeds.split(",")
    for seed in seeds:
        for variant in VARIANTS:
            path = args.out / f"{variant}_seed{seed}.json"
            if not path.is_file():
                texts = texts or _texts(args.corpus, config, info)
                found = _train(config, info, texts, variant, int(seed), num_tokens=args.tokens)
                path.write_text(json.dumps(found), encoding="utf-8")
                sys.stdout.write(f"{path.name} {found}\n")
    sys.stdout.write(_table(args.out, seeds))


def _texts(corpus: str, config: RunConfig, info: TokenizerInfo) -> dict[str, Text]:
    """Return packed and padded rows of the same documents."""
    tokenizer = Tokenizer.from_file(f"{info.directory}/tokenizer.json")
    length = config.data.sequence_length
    packed, padded = [], []
    for split in ("train", "valid"):
        with gzip.open(f"{corpus}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for line in file]
        encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        packed.append(_packed(ids, config, info))
        padded.append(_padded(ids, length, info))
    return {"packed": Text(*packed), "padded": Text(*padded)}


def _packed(documents: list[list[int]], config: RunConfig, info: TokenizerInfo) -> Ids:
    """Blocks as a pre-training has them."""
    length = config.data.sequence_length
    with tempfile.NamedTemporaryFile() as file:
        stream = ClientStream(
            Path(file.name), tokenizer=info, sequence_length=length,
            num_masked=config.data.num_masked,
        )  # fmt: skip
        for ids in documents:
            stream.add(np.array(ids, dtype=stream.dtype))
        stream.flush()
        return np.fromfile(file.name, dtype=stream.dtype).reshape(-1, length).astype(np.int64)


def _padded(documents: list[list[int]], length: int, info: TokenizerInfo) -> Ids:
    """A document per row; a longer one is cut into several rows."""
    size = length - 2
    pieces = [d[at : at + size] for d in documents for at in range(0, len(d), size)]
    rows = np.full((len(pieces), length), info.pad_id)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece) + 2] = [info.cls_id, *piece, info.sep_id]
    return rows


def _batch(
    rows_BT: Ids, rng: np.random.Generator, *, config: RunConfig, info: TokenizerInfo, starts: bool
) -> tuple[Tensor, Tensor]:
    """Return inputs (B, T) and targets (2, B, M); a padded row masks its share of its own tokens.

    Args:
        rows_BT: Rows of the text.
        rng: Draws the masks.
        config: The share.
        info: The vocabulary.
        starts: Say where documents begin, so that attention stays inside them. Padding lies behind
            a separator, so it is a document of its own, to which no token attends.
    """
    width, share = config.data.num_masked, config.data.num_masked / rows_BT.shape[1]
    inputs, targets = rows_BT.copy(), np.full((2, len(rows_BT), width), IGNORED)
    targets[0] = 0
    for row, ids in enumerate(rows_BT):
        masked = mask_blocks(
            ids[None], rng=rng, num_masked=max(1, round(share * (ids != info.pad_id).sum())),
            mask_id=info.mask_id, special_ids=info.special_ids, vocab_size=info.vocab_size,
        )  # fmt: skip
        inputs[row] = masked.input_ids
        count = masked.labels.shape[1]
        targets[:, row, :count] = MaskedTargets(masked.positions[0], masked.labels[0])
    if starts:
        words = document_starts(rows_BT, sep_id=info.sep_id)
        targets = np.concatenate([targets, np.stack([words, words])], axis=-1)
    return torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int32))


def _stage(config: RunConfig, info: TokenizerInfo, *, starts: bool, seed: int) -> Stage:
    """Return a stage; two of one seed have equal weights."""
    shape = model_shape(config, vocab_size=info.vocab_size)
    settings = hf_config(shape, pad_id=info.pad_id, cls_id=info.cls_id, sep_id=info.sep_id)
    words = config.data.start_words if starts else 0
    stage, _ = build_stage(model_stages(config, shape)[0], settings, seed=seed, start_words=words)
    return stage


def _train(
    config: RunConfig,
    info: TokenizerInfo,
    texts: dict[str, Text],
    variant: str,
    seed: int,
    *,
    num_tokens: int,
) -> dict[str, float]:
    starts = variant != "block"
    rows_NT = texts["padded" if variant == "padded" else "packed"].train
    stage = _stage(config, info, starts=starts, seed=seed)
    optimizer = build_optimizer(stage, config.optimizer)
    stage.train()
    trained, seconds = 0, 0.0
    for step, chosen in enumerate(_chosen(len(rows_NT), config.pipeline.micro_batch_size, seed)):
        rng = np.random.default_rng([seed, step])
        rows_BT = rows_NT[chosen]
        inputs, targets = _batch(rows_BT, rng, config=config, info=info, starts=starts)
        done = int(1_000_000 * trained / num_tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, done, total_steps=1_000_000)
        started = time.process_time()
        loss = stage.loss(stage(inputs, targets[0]), targets)
        loss.backward()
        clip_(stage, max_norm=config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - started
        trained += int((rows_BT != info.pad_id).sum())
        if trained >= num_tokens:
            break
    state = stage.state_dict()
    found = {"tokens_per_s": trained / seconds, "tokens": float(trained), "steps": step + 1.0}
    for name, text in texts.items():
        scored = _stage(config, info, starts=name == "padded", seed=seed)
        scored.load_state_dict(state)
        found[f"loss_{name}"] = _held_out(scored.eval(), text.valid, config, info)
    return found


def _chosen(num_rows: int, size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield rows of steps without end, in a new order every time."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(num_rows)
        yield from (order[at : at + size] for at in range(0, num_rows - size + 1, size))


@torch.no_grad()
def _held_out(stage: Stage, rows_NT: Ids, config: RunConfig, info: TokenizerInfo) -> float:
    """Return nats per masked token, with the same masks for every model."""
    total, count = 0.0, 0
    starts = bool(stage.start_words)
    for at in range(0, len(rows_NT), 16):
        rng = np.random.default_rng([1, at])
        inputs, targets = _batch(
            rows_NT[at : at + 16], rng, config=config, info=info, starts=starts
        )
        known = stage.scored(targets[1]) != IGNORED
        total += float(stage.score(stage(inputs, targets[0]), targets)[known].double().sum())
        count += int(known.sum())
    return total / count


def _table(out: Path, seeds: list[str]) -> str:
    found = {
        variant: [_json(out / f"{variant}_seed{seed}.json") for seed in seeds]
        for variant in VARIANTS
    }
    lines = [
        "| rows | real tokens/s, over `block` | steps | held-out loss, documents alone | packed |",
        "|---|---|---|---|---|",
    ]
    for variant, runs in found.items():
        pairs = zip(runs, found["block"], strict=True)
        cells = [
            variant,
            _spread([a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]),
            f"{runs[0]['steps']:,.0f}",
            _spread([run["loss_padded"] for run in runs]),
            _spread([run["loss_packed"] for run in runs]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _json(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
