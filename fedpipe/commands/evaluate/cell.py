"""One cell of an evaluation, from its folder to its result: trained, scored, written whole."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpipe.commands.evaluate.setup import CELL_FILE, RESULT_FILE
from fedpipe.commands.evaluate.training import drawn, load_model, predict, train
from fedpipe.data.tasks.encoding import IGNORED, Encoded, load_tokenizer
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.data.tasks.scoring import METRICS
from fedpipe.distributed.device import device_name, own_device
from fedpipe.files import write_atomically
from fedpipe.report.writer import METRICS_FILE, MetricsWriter, finite
from fedpipe.run.run_dir import locked

PREDICTIONS_FILE = "predictions.jsonl.gz"
STATISTICS_FILE = "statistics.npz"
_ALSO = {"ner": ("entity_precision", "entity_recall")}
"""Metrics that are written down but not shown in the table."""


def run_cell(run_dir: Path, *, local_rank: int = 0) -> dict[str, Any]:
    """Fine-tune and score one model on one task with one seed.

    Writes metrics.jsonl as it goes, then predictions.jsonl.gz, statistics.npz and, last of all,
    result.json; each is complete or absent.

    Args:
        run_dir: Folder of the cell, with its cell.json.
        local_rank: Of this process on its node; each takes its own GPU, if there are any.

    Returns:
        The content of result.json.

    Raises:
        FedPipeError: The model cannot be read, or another process works on the cell.
    """
    with locked(run_dir):
        cell = json.loads((run_dir / CELL_FILE).read_text(encoding="utf-8"))
        for name in (METRICS_FILE, RESULT_FILE):  # of a start that was cut short, or out of date
            (run_dir / name).unlink(missing_ok=True)
        writer = MetricsWriter(run_dir)
        try:
            return _run(run_dir, cell, writer, device=own_device(local_rank))
        finally:
            writer.close()


def _run(
    run_dir: Path, cell: dict[str, Any], writer: MetricsWriter, *, device: torch.device
) -> dict[str, Any]:
    started = time.monotonic()
    task, settings = TaskSpec.from_dict(cell["spec"]), cell["settings"]
    labels = task.labels
    splits = {path.stem: Encoded.load(path) for path in Path(cell["data_dir"]).glob("*.npz")}
    pad_id = int(load_tokenizer(cell["model_path"]).pad_token_id)
    torch.manual_seed(cell["seed"])
    model = load_model(
        cell["model_path"], kind=task.kind, labels=labels, pad_id=pad_id, device=device
    )

    def judge(split: Encoded) -> tuple[list[Any], list[Any], NDArray[np.int32]]:
        sequences = drawn(split, settings["max_test_examples"])
        outputs = predict(
            model, split, sequences=sequences, kind=task.kind, pad_id=pad_id, settings=settings
        )
        return _by_example(split, sequences, outputs, kind=task.kind, labels=labels)

    def dev_score() -> float:
        gold, predicted, _ = judge(splits["dev"])
        return METRICS[task.metrics[0]].whole(gold, predicted, task.positive)

    trained = train(
        model, splits["train"], settings, kind=task.kind, seed=cell["seed"], pad_id=pad_id,
        dev_score=dev_score if "dev" in splits else None, note=lambda r: writer.write([r]),
    )  # fmt: skip
    scores, statistics, rows, sizes = {}, {}, [], {}
    for name in ("test", "mismatched"):
        if name not in splits:
            continue
        gold, predicted, examples = judge(splits[name])
        sizes[name] = len(gold)
        rows += _rows(name, gold, predicted, examples, kind=task.kind, labels=labels)
        for metric in (*task.metrics, *_ALSO.get(task.kind, ())):
            key = metric if name == "test" else f"{metric}:{name}"
            scores[key] = METRICS[metric].whole(gold, predicted, task.positive)
            statistics[key] = METRICS[metric].statistics(gold, predicted, task.positive)
    train_examples = len(
        np.unique(splits["train"].examples[drawn(splits["train"], settings["max_train_examples"])])
    )
    result = {
        "key": cell["key"], "model": cell["model"], "task": cell["task"], "seed": cell["seed"],
        "scores": scores, "dev_scores": list(trained.dev_scores),
        "best_epoch": trained.best_epoch, "num_steps": trained.num_steps,
        "diverged_at": trained.diverged_at,
        "num_train": train_examples, "num_test": sizes, "settings": settings,
        "gold_digest": gold_digest(rows),
        "seconds": time.monotonic() - started, "threads": torch.get_num_threads(),
        "device": device_name(device), "host": socket.gethostname(),
    }  # fmt: skip
    _write(run_dir, result, statistics, rows)
    return result


def gold_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Identify the test examples and their labels, whatever files they came from."""
    gold = [[row["split"], row["example"], row["gold"]] for row in rows]
    return hashlib.sha256(json.dumps(gold).encode()).hexdigest()


def _by_example(
    split: Encoded,
    sequences: NDArray[np.int64],
    outputs: Sequence[NDArray[Any]],
    *,
    kind: str,
    labels: Sequence[str],
) -> tuple[list[Any], list[Any], NDArray[np.int32]]:
    """Put windows together again: gold and predicted labels of every example, and which those are.

    Raises:
        AssertionError: A word has no prediction.
    """
    owners = split.examples[sequences]
    if kind != "ner":
        gold = [float(x) if kind == "regression" else int(x) for x in split.labels[sequences]]
        return gold, [output.item() for output in outputs], owners
    examples = np.unique(owners)
    there: dict[int, list[str]] = {int(example): [] for example in examples}
    found: dict[int, list[str]] = {int(example): [] for example in examples}
    for sequence, owner, output in zip(sequences, owners, outputs, strict=True):
        tags = split.labels[split.starts[sequence] : split.starts[sequence + 1]]
        tags = tags[tags != IGNORED]
        assert len(tags) == len(output), "every labelled position has a prediction"
        there[int(owner)] += [labels[int(tag)] for tag in tags]
        found[int(owner)] += [labels[int(tag)] for tag in output]
    return list(there.values()), list(found.values()), examples


def _rows(
    split: str,
    gold: Sequence[Any],
    predicted: Sequence[Any],
    examples: Sequence[Any] | NDArray[np.int32],
    *,
    kind: str,
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    named = kind == "classification"
    return [
        {"split": split, "example": int(example), "gold": labels[a] if named else a,
         "predicted": labels[b] if named else b}
        for example, a, b in zip(examples, gold, predicted, strict=True)
    ]  # fmt: skip


def _write(
    run_dir: Path,
    result: dict[str, Any],
    statistics: Mapping[str, NDArray[np.float64]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Write the files of a finished cell; result.json says that the others are there."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(lines.encode(), mtime=0)
    arrays = io.BytesIO()
    named: Any = dict(statistics)
    np.savez_compressed(arrays, **named)
    text = json.dumps(finite(result), indent=1) + "\n"
    for name, content in (
        (PREDICTIONS_FILE, packed),
        (STATISTICS_FILE, arrays.getvalue()),
        (RESULT_FILE, text.encode()),
    ):
        write_atomically(run_dir / name, partial(Path.write_bytes, data=content))
