"""Sinks: other places that show the numbers of a run, fed from the records of ``metrics.jsonl``.

The record is the truth, and a sink is a view of it: one that fails gets nothing more, with a
warning, and the run goes on. Where a service is, and whose account it takes, the service's own
environment variables say (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_DIR``, ...).
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedpipe.config.load import flatten
from fedpipe.config.tree import parse, read_text
from fedpipe.errors import ConfigError
from fedpipe.files import write_text

logger = logging.getLogger(__name__)

Point = tuple[int, dict[str, float]]
"""Tokens trained so far, and values by their tags."""
_PROJECT = "fedpipe"
"""What a run belongs to in a service, unless the service's own variable says otherwise."""
_IDS_FILE = "sinks.json"
"""In the run directory: by service, what this run is called there, for those who resume it."""


class Sink(Protocol):
    """One place that shows numbers."""

    def add(self, points: Sequence[Point]) -> None:
        """Show points, in the order of their tokens."""

    def close(self) -> None:
        """Show what is left, and end."""


class TensorBoard:
    """Event files in ``RUN_DIR/tensorboard``, one per start of the run."""

    def __init__(self, run_dir: Path, *, kept_tokens: int) -> None:
        """Open a file, and hide what earlier ones have after the kept tokens."""
        from torch.utils.tensorboard import SummaryWriter

        purge_step = kept_tokens + 1 if kept_tokens else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self.close = self._writer.close

    def add(self, points: Sequence[Point]) -> None:
        """Write scalars to the file."""
        for tokens, values in points:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, tokens)
        self._writer.flush()


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, run_dir: Path, *, kept_tokens: int) -> None:
        """Begin the run, or go on with it."""
        import wandb

        config = _config(run_dir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=config["name"],
            id=_id(run_dir, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            config=config,
            dir=run_dir,
        )
        self.close = self._run.finish

    def add(self, points: Sequence[Point]) -> None:
        """Log points; those that a resumed run repeats are there already, with the same losses."""
        for tokens, values in points:
            if tokens >= self._run.step:
                self._run.log(values, step=tokens)


class MLflow:
    """A run of an MLflow experiment."""

    def __init__(self, run_dir: Path, *, kept_tokens: int) -> None:
        """Begin the run, or go on with it."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client, self._metric = MlflowClient(), Metric
        self._id = _id(run_dir, "mlflow", lambda: self._begin(_config(run_dir)))

    def _begin(self, config: dict[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id: str = self._client.create_run(number, run_name=config["name"]).info.run_id
        for key, value in flatten(config):
            self._client.log_param(run_id, key, value)
        return run_id

    def add(self, points: Sequence[Point]) -> None:
        """Log points, in batches of the size that a server takes."""
        now = int(time.time() * 1e3)
        metrics = [
            self._metric(tag, value, now, tokens)
            for tokens, values in points
            for tag, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


class Trackio:
    """A run of a Trackio project."""

    def __init__(self, run_dir: Path, *, kept_tokens: int) -> None:
        """Begin the run, or go on with it."""
        import trackio

        config = _config(run_dir)
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=_id(run_dir, "trackio", lambda: f"{config['name']}-{uuid.uuid4().hex[:8]}"),
            config=dict(flatten(config)),
            resume="allow",
            embed=False,
        )
        self.close = self._run.finish

    def add(self, points: Sequence[Point]) -> None:
        """Log points."""
        for tokens, values in points:
            self._run.log(values, step=tokens)


_KINDS: dict[str, Callable[..., Sink]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio,
}  # fmt: skip
"""By the name in ``log.to``, which is that of the library, too, and of the extra with it."""


def check_sinks(names: Sequence[str]) -> None:
    """Refuse sinks whose libraries are not installed.

    Args:
        names: ``log.to`` of a configuration.

    Raises:
        ConfigError: One is missing.
    """
    for name in names:
        if find_spec(name) is None:
            what = "tensorboard" if name == "tensorboard" else f'"fedpipe[{name}]"'
            raise ConfigError(
                f"log.to: expected the library {name} to be installed, got none. Install it with"
                f" pip install {what}, or leave {name} out of log.to."
            )


class Sinks:
    """Gives the numbers of records to all sinks of a run, against the tokens trained so far."""

    def __init__(
        self, names: Sequence[str], run_dir: Path, kept: Iterable[Mapping[str, Any]]
    ) -> None:
        """Open all.

        Args:
            names: ``log.to`` of the configuration.
            run_dir: Holds the configuration.
            kept: Records that a resumed run goes on from.
        """
        self._tokens = TokenCount()
        for record in kept:
            self._tokens.add(record)
        self._sinks: dict[str, Sink] = {}
        for name in names:
            with self._left_out_if_it_fails(name):
                self._sinks[name] = _KINDS[name](run_dir, kept_tokens=self._tokens.total)

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Show a batch of records."""
        points: list[Point] = []
        for record in records:
            self._tokens.add(record)
            values = {tag: float(v) for tag, v in scalars(record) if isinstance(v, int | float)}
            if values:
                points.append((self._tokens.total, values))
        for name, sink in list(self._sinks.items()):
            with self._left_out_if_it_fails(name):
                sink.add(points)

    def close(self) -> None:
        """End all."""
        for name, sink in list(self._sinks.items()):
            with self._left_out_if_it_fails(name):
                sink.close()
        self._sinks.clear()

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service or its library has to say
            self._sinks.pop(name, None)
            text = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "log.to: %s gets no more numbers of this run (%s). metrics.jsonl has all of them.",
                name,
                text,
            )


class TokenCount:
    """Counts trained tokens while records pass by; every stage sees each token once."""

    def __init__(self) -> None:
        """Start at zero."""
        self._per_stage: dict[int, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record; only a step, or a client's turn in fine-tuning, carries new tokens."""
        if record.get("kind") in ("step", "turn"):
            stage = record.get("stage") or 0
            self._per_stage[stage] = self._per_stage.get(stage, 0) + (record.get("tokens") or 0)

    @property
    def total(self) -> int:
        """Tokens that the stage furthest ahead has seen."""
        return max(self._per_stage.values(), default=0)


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the scalars of a record; values may be ``None``."""
    kind = record.get("kind")
    if kind == "step":
        stage = f"stage_{record.get('stage') or 0:02d}"
        for name in ("loss", "lr", "grad_norm"):
            yield f"train/{name}/{stage}", record.get(name)
    elif kind == "round":
        for name in ("tokens_per_s", "seconds", "sync_s", "sync_bytes"):
            yield f"round/{name}", record.get(name)
        losses = record.get("loss") or []
        if isinstance(losses, float):  # of a fine-tuning, which has one
            yield "round/loss", losses
            losses = []
        for stage_id, loss in enumerate(losses):
            yield f"round/loss/stage_{stage_id:02d}", loss
    elif kind == "eval" and "score" in record:
        for name in ("score", "mean", "worst"):
            yield f"eval/{name}", record.get(name)
    elif kind == "eval":
        for entry in record.get("stages") or []:
            for name in ("loss", "perplexity", "worst_loss"):
                yield f"eval/{name}/stage_{entry.get('stage') or 0:02d}", entry.get(name)
    elif kind == "traffic":
        for edge in record.get("edges") or []:
            for direction in ("forward", "backward"):
                tag = f"traffic/{edge.get('from')}_to_{edge.get('to')}/bytes_{direction}"
                yield tag, edge.get(f"bytes_{direction}")
        for name, value in (record.get("collectives") or {}).items():
            yield f"traffic/collectives/{name}_bytes", value


def _config(run_dir: Path) -> dict[str, Any]:
    path = str(run_dir / "config.yaml")
    config: dict[str, Any] = parse(read_text(path), source=path).plain()
    return config


def _id(run_dir: Path, service: str, begin: Callable[[], str]) -> str:
    """Return what a run is called in a service; the first time, ``begin`` gives it a name."""
    path = run_dir / _IDS_FILE
    ids: dict[str, str] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if service not in ids:
        ids[service] = begin()
        write_text(path, json.dumps(ids, indent=1) + "\n")
    return ids[service]
