"""ModernBERT from scratch over 4 clients and 2 stages: AdamW and Muon at equal tokens and time.

    python benchmarks/modernbert.py DATA_FOLDER [--rounds 12] [--seeds 0,1] [--out runs/modernbert]
        [key=value ...]

DATA_FOLDER holds corpus/bio_pmc_fulltext.{train,valid}.jsonl.gz and ner/NAME.{train,dev,test}
.jsonl.gz. A run of each optimizer has the same tokens; a third run, of Muon, has as many rounds as
take the time of AdamW's. The time of a step is measured first, the optimizers in turns, so what
else the machine does later does not matter. The first seed's model of Muon is then trained on from
its own export, and every model is fine-tuned on two tagging tasks, by `fedpipe evaluate` and by a
loop of plain transformers. What is done is not done again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ranks import run_ranks, step_s

from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.comm import Comm
from fedpipe.report.drawing import BLUE, GREEN, ORANGE, label_ends, render
from fedpipe.report.writer import read_metrics

SETTINGS = [
    "model.family=modernbert", "model.size=ettin-32m", "pipeline.cut=[5]",
    "data.partition=column", "data.sequence_length=128", "data.mask_probability=0.3",
    "pipeline.micro_batch_size=16", "pipeline.num_micro_batches=1", "federation.num_clients=4",
    "federation.clients_per_round=4", "federation.num_replicas=1",
    "federation.num_local_steps=10", "federation.optimizer_state=keep",
    "validation.max_blocks_per_client=32", "checkpoint.keep_last=1", "log.to=[]",
]  # fmt: skip
"""Of every run; the journals are spread over the four clients."""
OPTIMIZERS = {
    "AdamW": ["optimizer.name=adamw", "optimizer.lr=1e-3"],
    "Muon": ["optimizer.name=muon", "optimizer.lr=1e-3"],
}
"""One rate for both, which is not tuned."""
EQUAL_TIME, CONTINUED = "Muon, time of AdamW", "Muon, continued"
COLORS = {"AdamW": ORANGE, "Muon": BLUE, EQUAL_TIME: GREEN}
CONTINUED_SHARE, CONTINUED_LR = 4, "optimizer.lr=5e-4"
"""The continued run has a quarter of the rounds at a lower rate."""
TASKS = {"ncbi-disease": "ncbi_disease", "bc5cdr-chemical": "bc5cdr_chem"}
"""Names for `fedpipe evaluate`, and of the files."""
EXAMPLES, EPOCHS, RATE, BATCH, LENGTH = 2000, 4, 3e-4, 32, 128


class Step(NamedTuple):
    """What a local step costs and holds."""

    seconds: dict[str, float]
    """By optimizer: the median of what was measured in turns."""
    ratios: list[float]
    """Muon's over AdamW's, repetition by repetition."""
    tokens: int


def main() -> None:
    """Run what is missing, then write table.md and curves.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/modernbert"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    out: Path = args.out
    corpus = args.data / "corpus" / "bio_pmc_fulltext"
    settings = [
        *SETTINGS, f"data.train=[{corpus}.train.jsonl.gz]", f"data.valid=[{corpus}.valid.jsonl.gz]",
        *args.overrides,
    ]  # fmt: skip
    step = _step(settings, out / "step.json")
    rounds = {name: args.rounds for name in OPTIMIZERS}
    rounds[EQUAL_TIME] = round(args.rounds / statistics.median(step.ratios))
    seeds, folders = args.seeds.split(","), {}
    for seed in seeds:
        for name, count in rounds.items():
            folders[name, seed] = _folder(out, name, seed)
            optimizer = OPTIMIZERS[name.partition(",")[0]]
            _pretrain(folders[name, seed], count, seed, settings + optimizer)
    first = folders["Muon", seeds[0]] / "export"
    folders[CONTINUED, seeds[0]] = _folder(out, CONTINUED, seeds[0])
    more = [f"model.path={first}", f"data.tokenizer={first}", *OPTIMIZERS["Muon"], CONTINUED_LR]
    _pretrain(
        folders[CONTINUED, seeds[0]],
        max(1, args.rounds // CONTINUED_SHARE),
        seeds[0],
        [s for s in settings if not s.startswith("model.size")] + more,
    )
    scores = {
        key: _evaluated(folder, args.data / "ner", int(key[1])) for key, folder in folders.items()
    }
    curves = {key: _curve(folder) for key, folder in folders.items()}
    table = _table(folders, scores, curves, step)
    (out / "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
    _draw(curves, step, out / "curves.png")


def _step(settings: list[str], path: Path) -> Step:
    """Return what is in ``path``, or measure it: five repetitions of twelve steps in turns."""
    if not path.is_file():
        seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        tokens = 0
        for repetition in range(5):
            for name in sorted(OPTIMIZERS, reverse=bool(repetition % 2)):
                config = load_config(None, settings + OPTIMIZERS[name])
                tokens = config.blocks_per_step * config.data.sequence_length
                seconds[name].append(max(run_ranks(config, _step_s)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds, "tokens": tokens}), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    pairs = zip(found["seconds"]["Muon"], found["seconds"]["AdamW"], strict=True)
    return Step(
        seconds={name: statistics.median(values) for name, values in found["seconds"].items()},
        ratios=[muon / adamw for muon, adamw in pairs],
        tokens=found["tokens"],
    )


def _step_s(config: RunConfig, data: PreparedData, comm: Comm) -> float:
    return step_s(PretrainingReplica(config, data, comm=comm), comm, 12)


def _folder(out: Path, name: str, seed: str) -> Path:
    return out / f"{name.lower().replace(', ', '_').replace(' ', '_')}_seed{seed}"


def _fedpipe(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "fedpipe", *arguments], check=True)


def _pretrain(run_dir: Path, rounds: int, seed: str, overrides: list[str]) -> None:
    if not (run_dir / "report.html").is_file():
        _fedpipe(
            "pretrain", "--run-dir", str(run_dir), *overrides, f"seed={seed}",
            f"federation.num_rounds={rounds}",
        )  # fmt: skip


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    """Tokens trained so far and held-out loss of the final head, after every round."""
    tokens, points = 0, []
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if record["kind"] == "round":
            tokens += record["tokens"]
        elif record["kind"] == "eval":
            points.append((tokens, record["stages"][-1]["loss"]))
    return points


def _evaluated(run_dir: Path, data: Path, seed: int) -> dict[str, tuple[float, float]]:
    """F1 of every task, by `fedpipe evaluate` and by plain transformers."""
    folder, plain = run_dir / "scores", run_dir / "plain.json"
    _fedpipe(
        "evaluate", "--model", str(run_dir / "export"), "--data", str(data), "--tasks",
        ",".join(TASKS), "--seeds", str(seed), "--run-dir", str(folder),
        f"evaluation.max_train_examples={EXAMPLES}", f"evaluation.num_epochs={EPOCHS}",
        f"evaluation.learning_rate={RATE}", f"evaluation.batch_size={BATCH}",
        f"evaluation.max_length={LENGTH}",
    )  # fmt: skip
    if not plain.is_file():
        found = {t: tag_plainly(run_dir / "export", data / n, seed) for t, n in TASKS.items()}
        plain.write_text(json.dumps(found), encoding="utf-8")
    results = map(_json, folder.glob("cells/*/result.json"))
    ours = {result["task"]: result["scores"]["entity_f1"] for result in results}
    return {task: (ours[task], value) for task, value in _json(plain).items()}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tag_plainly(model_folder: Path, data: Path, seed: int) -> float:
    """Fine-tune with transformers, datasets of lists and torch alone; return test F1 in percent.

    Args:
        model_folder: What `fedpipe pretrain` exported.
        data: Path of the files without their ending, ``.train.jsonl.gz`` and ``.test.jsonl.gz``.
        seed: Draws the head, the examples and their order.
    """
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        get_linear_schedule_with_warmup,
        set_seed,
    )

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, add_prefix_space=True)
    rows = {split: _rows(data, split) for split in ("train", "test")}
    train = random.sample(rows["train"], min(EXAMPLES, len(rows["train"])))
    names = sorted({tag for row in rows["train"] for tag in row["tags"]})
    model = AutoModelForTokenClassification.from_pretrained(model_folder, num_labels=len(names))

    def encode(row: dict[str, list[str]]) -> dict[str, list[int]]:
        tokens = tokenizer(
            row["tokens"], is_split_into_words=True, truncation=True, max_length=LENGTH
        )
        labels, before = [], None
        for word in tokens.word_ids():  # only the first token of a word has its tag
            first = word is not None and word != before
            labels.append(names.index(row["tags"][word]) if first else -100)
            before = word
        return {"input_ids": tokens["input_ids"], "labels": labels}

    collate = DataCollatorForTokenClassification(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    batches = -(-len(train) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, batches * EPOCHS // 10, batches * EPOCHS)
    examples = [encode(row) for row in train]
    model.train()
    for _ in range(EPOCHS):
        random.shuffle(examples)
        for start in range(0, len(examples), BATCH):
            model(**collate(examples[start : start + BATCH])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    truth, said = [], []
    for row in rows["test"]:
        example = encode(row)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        at = [i for i, label in enumerate(example["labels"]) if label != -100]
        found = [names[i] for i in logits.argmax(-1)[at].tolist()]
        truth.append(row["tags"])
        said.append(found + ["O"] * (len(row["tags"]) - len(found)))
    return 100 * float(f1_score(truth, said, mode="strict", scheme=IOB2))


def _rows(data: Path, split: str) -> list[dict[str, list[str]]]:
    with gzip.open(f"{data}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if row["tokens"]]


def _table(
    folders: dict[tuple[str, str], Path],
    scores: dict[tuple[str, str], dict[str, tuple[float, float]]],
    curves: dict[tuple[str, str], list[tuple[int, float]]],
    step: Step,
) -> str:
    heads = [f"{task}, {by}" for task in TASKS for by in ("evaluate", "plain")]
    columns = ["run", "seed", "tokens", "minutes", "held-out loss, nats", *heads]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, seed in folders:
        tokens, loss = curves[name, seed][-1]
        cells = [name, seed, f"{tokens:,}", f"{_minutes(name, tokens, step):.1f}", f"{loss:.3f}"]
        cells += [f"{f1:.1f}" for task in TASKS for f1 in scores[name, seed][task]]
        lines.append(f"| {' | '.join(cells)} |")
    low, high = min(step.ratios), max(step.ratios)
    times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in step.seconds.items())
    ratio = f"{statistics.median(step.ratios):.2f} ({low:.2f} to {high:.2f})"
    return "\n".join(lines) + f"\n\nA step of {step.tokens:,} tokens: {times}; ratio {ratio}.\n"


def _minutes(name: str, tokens: int, step: Step) -> float:
    """Minutes of training on an idle machine."""
    return tokens / step.tokens * step.seconds[name.partition(",")[0]] / 60


def _draw(curves: dict[tuple[str, str], list[tuple[int, float]]], step: Step, path: Path) -> None:
    def draw(figure: Any) -> None:
        by_tokens, by_time = figure.subplots(1, 2, sharey=True)
        ends: dict[str, float] = {}
        for (name, _), points in curves.items():
            if name == CONTINUED:
                continue
            losses = [loss for _, loss in points]
            minutes = [_minutes(name, tokens, step) for tokens, _ in points]
            by_time.plot(minutes, losses, color=COLORS[name])
            ends.setdefault(name, losses[-1])
            if name in OPTIMIZERS:
                by_tokens.plot([t / 1e6 for t, _ in points], losses, color=COLORS[name])
        by_tokens.set_xlabel("million tokens")
        by_time.set_xlabel("minutes of training on 2 cores")
        by_tokens.set_ylabel("held-out loss, nats")
        label_ends(by_time, [(loss, name, COLORS[name]) for name, loss in ends.items()])

    render(draw, path)


if __name__ == "__main__":
    main()
