"""Make a small BERT, DistilBERT and ALBERT of one width out of plain text, for hilmkil.py.

    python benchmarks/small_models.py CORPUS_FOLDER [--out runs/small_models] [--steps 1000]

CORPUS_FOLDER holds books_public_domain.jsonl.gz, enwiki_articles.jsonl.gz and
wikitext2.{valid,test}.txt.gz. Written are OUT/bert, OUT/distilbert and OUT/albert, Hugging Face
folders with one vocabulary. BERT comes from `fedpipe pretrain`; DistilBERT is every second layer of
it, distilled from it (Sanh et al. 2019); ALBERT shares one layer's weights and starts anew. A model
that is there is not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedpipe.config.load import load_config
from fedpipe.data.blocks import PreparedData
from fedpipe.data.corpus import prepare
from fedpipe.data.masking import MaskedReader

VOCABULARY, WIDTH, LAYERS, LENGTH, BLOCKS = 8192, 128, 4, 64, 32
MASKED = 0.3
"""Share of the tokens; more to learn per token than 0.15 (Wettig et al. 2023)."""
LEARNING_RATE, WARMUP = 1e-3, 0.06
SPREAD = 0.05
"""Of first weights; 0.02 is for wider models."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of input ids (B, T), positions (B, M) and labels (B, M)."""


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/small_models"))
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    tokenizer = _tokenizer(args.out / "tokenizer", _files(args.corpus))
    overrides = _pretraining(args.corpus, args.out, args.steps)
    if not (args.out / "bert").is_dir():
        command = ["pretrain", "--run-dir", str(args.out / "pretrain_bert"), *overrides]
        subprocess.run([sys.executable, "-m", "fedpipe", *command], check=True)
        (args.out / "pretrain_bert" / "export").rename(args.out / "bert")
    config = load_config(None, overrides)
    data = prepare(config)
    for name, make in (("distilbert", _distilbert), ("albert", _albert)):
        if not (args.out / name).is_dir():
            torch.manual_seed(0)
            model, loss = make(args.out / "bert")
            _train(model, loss, data, name=name, steps=args.steps, masked=config.data.num_masked)
            model.save_pretrained(args.out / name)
            tokenizer.save_pretrained(args.out / name)


def _files(corpus: Path) -> list[Path]:
    names = (
        "books_public_domain.jsonl", "enwiki_articles.jsonl", "wikitext2.valid.txt",
        "wikitext2.test.txt",
    )  # fmt: skip
    return [corpus / f"{name}.gz" for name in names]


def _tokenizer(folder: Path, files: list[Path]) -> Any:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    if not folder.is_dir():
        backend = BertWordPieceTokenizer()
        backend.train_from_iterator(_texts(files), vocab_size=VOCABULARY, show_progress=False)
        BertTokenizerFast(tokenizer_object=backend._tokenizer).save_pretrained(folder)
    return BertTokenizerFast.from_pretrained(folder)


def _texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"] if ".jsonl" in path.name else line


def _pretraining(corpus: Path, out: Path, steps: int) -> list[str]:
    """Overrides of the packaged quick start: one client, one stage, back-propagation."""
    *train, valid = _files(corpus)
    return [
        "model.family=bert", f"model.num_hidden_layers={LAYERS}", f"model.hidden_size={WIDTH}",
        f"model.max_position_embeddings={LENGTH}", f"data.train=[{','.join(map(str, train))}]",
        f"data.valid=[{valid}]", f"data.tokenizer={out / 'tokenizer'}", "data.partition=iid",
        f"data.sequence_length={LENGTH}", f"data.mask_probability={MASKED}",
        "pipeline.objective=end_to_end", "pipeline.schedule=1f1b", "pipeline.cut=[]",
        f"pipeline.micro_batch_size={BLOCKS}", "federation.num_clients=1",
        "federation.clients_per_round=1", "federation.num_replicas=1", "federation.num_rounds=10",
        f"federation.num_local_steps={steps // 10}", "validation.every_rounds=1",
        f"optimizer.lr={LEARNING_RATE}", f"optimizer.warmup_ratio={WARMUP}",
        "checkpoint.keep_last=1",
    ]  # fmt: skip


def _albert(bert: Path) -> tuple[Any, Loss]:
    """One layer, used four times; first values as BERT's, position embeddings too."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    model = AlbertForMaskedLM(
        AlbertConfig(
            **_sizes(bert), embedding_size=WIDTH, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, intermediate_size=4 * WIDTH, initializer_range=SPREAD,
            hidden_act="gelu",
        )
    )  # fmt: skip
    model.albert.embeddings.position_embeddings.weight.data.copy_(_sinusoids())

    def loss(ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        hidden = model.albert(ids).last_hidden_state
        return _cross_entropy(model.predictions(_pick(hidden, positions)), labels)

    return model, loss


def _distilbert(bert: Path) -> tuple[Any, Loss]:
    """Every second layer of BERT, without its token types.

    Loss: 5 x divergence from BERT at temperature 2, 2 x masked-LM, 1 x angle between last hidden
    states, as in Sanh et al. 2019 (https://arxiv.org/abs/1910.01108).
    """
    from transformers import BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

    teacher = BertForMaskedLM.from_pretrained(bert).eval()
    model = DistilBertForMaskedLM(
        DistilBertConfig(
            **_sizes(bert), dim=WIDTH, n_layers=LAYERS // 2, n_heads=4, hidden_dim=4 * WIDTH,
            dropout=0.0, attention_dropout=0.0, initializer_range=SPREAD,
        )
    )  # fmt: skip
    state = {}
    for name, value in teacher.state_dict().items():
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        head, _, rest = name.partition("distilbert.transformer.layer.")
        if rest:
            index, _, rest = rest.partition(".")
            if int(index) % 2:
                continue
            name = f"{head}distilbert.transformer.layer.{int(index) // 2}.{rest}"
        state[name] = value
    types = state.pop("distilbert.embeddings.token_type_embeddings.weight")
    state["distilbert.embeddings.position_embeddings.weight"] += types[0]  # the only type that is
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert unexpected == ["cls.predictions.bias"], unexpected  # also under the decoder's name

    def loss(ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _pick(teacher.bert(ids).last_hidden_state, positions)
            target = functional.log_softmax(teacher.cls(wanted) / 2, dim=-1)
        hidden = _pick(model.distilbert(ids).last_hidden_state, positions)
        transformed = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        logits = model.vocab_projector(transformed)
        soft = functional.log_softmax(logits / 2, dim=-1)
        divergence = 4 * functional.kl_div(soft, target, log_target=True, reduction="batchmean")
        angle = 1 - functional.cosine_similarity(hidden, wanted, dim=-1).mean()
        return 5 * divergence / positions.shape[1] + 2 * _cross_entropy(logits, labels) + angle

    return model, loss


_RENAMED = (
    ("cls.predictions.transform.dense", "vocab_transform"),
    ("cls.predictions.transform.LayerNorm", "vocab_layer_norm"),
    ("cls.predictions.decoder", "vocab_projector"),
    ("bert.embeddings", "distilbert.embeddings"),
    ("bert.encoder", "distilbert.transformer"),
    ("attention.self.query", "attention.q_lin"),
    ("attention.self.key", "attention.k_lin"),
    ("attention.self.value", "attention.v_lin"),
    ("attention.output.dense", "attention.out_lin"),
    ("attention.output.LayerNorm", "sa_layer_norm"),
    ("intermediate.dense", "ffn.lin1"),
    ("output.dense", "ffn.lin2"),
    ("output.LayerNorm", "output_layer_norm"),
)
"""BERT's names in transformers, and DistilBERT's; in this order."""


def _sizes(bert: Path) -> dict[str, int]:
    config = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    return {k: config[k] for k in ("vocab_size", "max_position_embeddings", "pad_token_id")}


def _sinusoids() -> Tensor:
    angles = torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    return SPREAD * 2**0.5 * torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def _pick(hidden_BTD: Tensor, positions_BM: Tensor) -> Tensor:
    return hidden_BTD.gather(1, positions_BM[..., None].expand(-1, -1, hidden_BTD.shape[-1]))


def _cross_entropy(logits_BMV: Tensor, labels_BM: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BMV.flatten(0, 1), labels_BM.flatten())


def _train(
    model: Any, loss: Loss, data: PreparedData, *, name: str, steps: int, masked: int
) -> None:
    """AdamW with linear warm-up and decay over the blocks and masks that BERT had."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    rise = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    reader = MaskedReader(data, 0, split="train", seed=0, num_masked=masked)
    model.train()
    total = 0.0
    for step in range(steps):
        batch = reader.batch(step * BLOCKS, BLOCKS)
        value = loss(*map(torch.from_numpy, (batch.input_ids, batch.positions, batch.labels)))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += float(value.detach())
        if (step + 1) % 100 == 0:
            sys.stdout.write(f"{name} step {step + 1}/{steps} loss {total / 100:.3f}\n")
            sys.stdout.flush()
            total = 0.0


if __name__ == "__main__":
    main()
