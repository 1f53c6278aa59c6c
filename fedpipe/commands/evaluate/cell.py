"""Run one cell of an evaluation: fine-tune a model on a task, score it, and write the result."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpipe.commands.evaluate.content import (
    CELL_FILE,
    RESULT_FILE,
    STATISTICS_FILE,
    CellFile,
    CellResult,
)
from fedpipe.commands.evaluate.training import drawn, forward_of, load_model, train
from fedpipe.data.tasks.batches import predict
from fedpipe.data.tasks.encoding import Encoded, load_tokenizer
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.data.tasks.scoring import METRICS, by_example
from fedpipe.distributed.device import device_name, select_device
from fedpipe.files import write_atomically
from fedpipe.report.writer import METRICS_FILE, MetricsWriter, finite
from fedpipe.run.run_dir import locked

PREDICTIONS_FILE = "predictions.jsonl.gz"
_SCORED_AT_A_TIME = 64
"""Sequences per batch when a model is scored."""
_ALSO = {"ner": ("entity_precision", "entity_recall")}
"""Metrics that result.json has and the table does not show."""


def run_cell(run_dir: Path, *, local_rank: int = 0) -> CellResult:
    """Fine-tune and score one model on one task with one seed.

    It writes metrics.jsonl while it trains, then predictions.jsonl.gz and statistics.npz, and
    finally result.json. Each of these files is complete or absent.

    Args:
        run_dir: Folder of the cell, with its cell.json.
        local_rank: Index of this process on its node, which chooses its GPU if there are any.

    Returns:
        The content of result.json.

    Raises:
        FedPipeError: The model cannot be read, or another process runs the cell.
    """
    with locked(run_dir):
        cell = json.loads((run_dir / CELL_FILE).read_text(encoding="utf-8"))
        for name in (METRICS_FILE, RESULT_FILE):  # of a start that was cut short, or out of date
            (run_dir / name).unlink(missing_ok=True)
        writer = MetricsWriter(run_dir)
        try:
            return _run(run_dir, cell, writer, device=select_device(local_rank))
        finally:
            writer.close()


def _run(
    run_dir: Path, cell: CellFile, writer: MetricsWriter, *, device: torch.device
) -> CellResult:
    started = time.monotonic()
    settings, seed = cell["settings"], cell["seed"]
    pad_id = int(load_tokenizer(cell["model_path"]).pad_token_id)
    spec = replace(TaskSpec.from_dict(cell["spec"]), pad_id=pad_id)
    splits = {path.stem: Encoded.load(path) for path in Path(cell["data_dir"]).glob("*.npz")}
    torch.manual_seed(seed)
    model = load_model(cell["model_path"], spec, device=device)
    forward = forward_of(model, spec, precision=settings["precision"])

    def judge(split: Encoded) -> tuple[list[Any], list[Any], list[int]]:
        model.eval()
        sequences = drawn(split, settings["max_test_examples"])
        outputs = predict(
            split, sequences, kind=spec.kind, batch_size=_SCORED_AT_A_TIME, forward=forward
        )
        return by_example(spec, split, sequences, outputs)

    def dev_score() -> float:
        gold, predicted, _ = judge(splits["dev"])
        return METRICS[spec.metric].whole(gold, predicted, spec.positive)

    trained = train(
        model,
        splits["train"],
        settings,
        kind=spec.kind,
        seed=seed,
        forward=forward,
        dev_score=dev_score if "dev" in splits else None,
        note=lambda r: writer.write([r]),
    )
    scores: dict[str, float | None] = {}
    sizes: dict[str, int] = {}
    statistics, rows = {}, []
    for name in ("test", "mismatched"):
        if name not in splits:
            continue
        gold, predicted, examples = judge(splits[name])
        sizes[name] = len(gold)
        rows += _rows(name, spec, gold, predicted, examples)
        for metric in (*spec.metrics, *_ALSO.get(spec.kind, ())):
            key = metric if name == "test" else f"{metric}:{name}"
            scores[key] = METRICS[metric].whole(gold, predicted, spec.positive)
            statistics[key] = METRICS[metric].statistics(gold, predicted, spec.positive)
    train_examples = len(
        np.unique(splits["train"].examples[drawn(splits["train"], settings["max_train_examples"])])
    )
    result: CellResult = {
        "key": cell["key"],
        "model": cell["model"],
        "task": cell["task"],
        "seed": cell["seed"],
        "scores": scores,
        "dev_scores": [*trained.dev_scores],
        "best_epoch": trained.best_epoch,
        "num_steps": trained.num_steps,
        "diverged_at": trained.diverged_at,
        "num_train": train_examples,
        "num_test": sizes,
        "settings": settings,
        "gold_digest": gold_digest(rows),
        "seconds": time.monotonic() - started,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "host": socket.gethostname(),
    }
    _write(run_dir, result, statistics, rows)
    return result


def gold_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of the test examples and their labels, independent of their files."""
    gold = [[row["split"], row["example"], row["gold"]] for row in rows]
    return hashlib.sha256(json.dumps(gold).encode()).hexdigest()


def _rows(
    split: str,
    spec: TaskSpec,
    gold: Sequence[Any],
    predicted: Sequence[Any],
    examples: Sequence[int],
) -> list[dict[str, Any]]:
    named, labels = spec.kind == "classification", spec.labels
    return [
        {
            "split": split,
            "example": example,
            "gold": labels[a] if named else a,
            "predicted": labels[b] if named else b,
        }
        for example, a, b in zip(examples, gold, predicted, strict=True)
    ]


def _write(
    run_dir: Path,
    result: CellResult,
    statistics: Mapping[str, NDArray[np.float64]],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Write the files of a finished cell; result.json is the last one."""
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
