"""A finished or running run, read back from its directory, and the numbers that follow from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from fedpipe.errors import CheckpointError
from fedpipe.report.format import is_number
from fedpipe.report.records import (
    Environment,
    EvalRecord,
    RoundRecord,
    StageScore,
    StartRecord,
    StepRecord,
    TrafficRecord,
    TuningEvalRecord,
    TuningRoundRecord,
    TuningTrafficRecord,
)
from fedpipe.report.sinks import TokenCount
from fedpipe.report.writer import METRICS_FILE, read_metrics

logger = logging.getLogger(__name__)

TEXT_FILE = "text.json"
"""Counts of the prepared text, per client."""


class ClientText(TypedDict):
    """The prepared text of a client."""

    client: int
    owners: list[str]
    """The first values of the partition column that it owns."""
    num_owners: int
    documents: int
    tokens: int
    blocks: int
    left_out: int
    """Blocks with too few ordinary tokens to mask."""
    held_out_documents: NotRequired[int]
    """This and what follows only where text is held out."""
    held_out_blocks: NotRequired[int]
    held_out_left_out: NotRequired[int]


class TextFacts(TypedDict):
    """The content of text.json: the prepared text of a run."""

    prepared: str
    """Its folder in the cache."""
    sequence_length: int
    num_masked: int
    """Masked tokens of a block."""
    held_out_documents: int
    held_out_ignored: int
    """Held-out documents whose owner is no client's."""
    held_out_in_training: int
    """Held-out documents that stand in the training text, too."""
    clients: list[ClientText]


Guess = tuple[str, float]
"""A word and its probability."""


class Sample(TypedDict):
    """A masked word of held-out text, and what is guessed for it."""

    text: str
    truth: str
    truth_probability: float
    truth_unigram: float
    model: list[Guess]
    unigram: list[Guess]


class Samples(TypedDict):
    """The content of samples.json."""

    unigram_loss: float
    examples: list[Sample]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The files of a run directory, parsed; a file that is not there is empty."""

    run_dir: Path
    """The run directory."""
    records: dict[str, list[Any]]
    """Records of metrics.jsonl by kind, in their order."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.yaml."""
    plan: str = ""
    """plan.txt."""
    environment: Environment | None = None
    """env.json."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Trace events of timeline.json."""
    samples: Samples | None = None
    """samples.json."""
    text: TextFacts | None = None
    """text.json."""

    @classmethod
    def load(cls, run_dir: Path) -> RunSummary:
        """Read a run directory.

        Raises:
            CheckpointError: There is no metrics.jsonl, or it is damaged.
        """
        path = run_dir / METRICS_FILE
        if not path.is_file():
            raise CheckpointError(
                f"run directory: expected a {METRICS_FILE} to report on, got {run_dir}. "
                "Pass the directory of a run that has started."
            )
        by_kind: dict[str, list[Any]] = {}
        for record in read_metrics(path):
            by_kind.setdefault(str(record.get("kind")), []).append(record)
        plan = run_dir / "plan.txt"
        return cls(
            run_dir=run_dir,
            records=by_kind,
            config=_read_yaml(run_dir / "config.yaml"),
            plan=plan.read_text(encoding="utf-8") if plan.is_file() else "",
            environment=cast(Environment, _read_json(run_dir / "env.json")) or None,
            events=_read_json(run_dir / "timeline.json").get("traceEvents") or [],
            samples=cast(Samples, _read_json(run_dir / "samples.json")) or None,
            text=cast(TextFacts, _read_json(run_dir / TEXT_FILE)) or None,
        )

    @property
    def steps(self) -> list[StepRecord]:
        """Local steps of a pre-training; like all records in the order in which they came."""
        return self.records.get("step", [])

    @property
    def rounds(self) -> list[RoundRecord]:
        """Rounds of a pre-training."""
        return self.records.get("round", [])

    @property
    def validations(self) -> list[EvalRecord]:
        """Validations of a pre-training."""
        return self.records.get("eval", [])

    @property
    def traffic(self) -> list[TrafficRecord]:
        """Traffic of a pre-training."""
        return self.records.get("traffic", [])

    @property
    def starts(self) -> list[StartRecord]:
        """How a pre-training started, and went on."""
        return [r for r in self.records.get("system", []) if "seconds_to_first_step" in r]

    @property
    def tuning_rounds(self) -> list[TuningRoundRecord]:
        """Rounds of a fine-tuning."""
        return self.records.get("round", [])

    @property
    def tuning_scores(self) -> list[TuningEvalRecord]:
        """Scorings of a fine-tuning."""
        return self.records.get("eval", [])

    @property
    def tuning_traffic(self) -> list[TuningTrafficRecord]:
        """Traffic of a fine-tuning."""
        return self.records.get("traffic", [])

    @property
    def num_stages(self) -> int:
        """Stages that left a record."""
        stages = {r.get("stage") or 0 for r in self.steps}
        stages |= {e.get("stage") or 0 for r in self.validations for e in r.get("stages") or []}
        lengths = [len(r.get("loss") or []) for r in self.rounds]
        return max([*(stage + 1 for stage in stages), *lengths], default=0)

    @property
    def num_encoder_stages(self) -> int:
        """Stages with layers of the encoder; those after them are heads at home."""
        cut = (self.config.get("pipeline") or {}).get("cut")
        return len(cut) + 1 if cut is not None else self.num_stages

    @property
    def head_location(self) -> str:
        """The configured place of the final head, ``server`` unless the configuration says so."""
        return str((self.config.get("pipeline") or {}).get("head_location") or "server")

    @property
    def num_client_stages(self) -> int:
        """Leading stages that belong to the data owners."""
        return int((self.config.get("pipeline") or {}).get("num_client_stages") or 1)

    @property
    def objective(self) -> str:
        """The configured objective, ``local_loss`` unless the configuration says otherwise."""
        return str((self.config.get("pipeline") or {}).get("objective") or "local_loss")

    @property
    def tokens(self) -> int:
        """Tokens trained in all."""
        counter = TokenCount()
        for record in self.steps:
            counter.add(record)
        return counter.total or int(total(r.get("tokens") for r in self.rounds))

    @property
    def train_seconds(self) -> float:
        """Time spent in rounds, without start-up and validation."""
        return total(r.get("seconds") for r in self.rounds)

    def training_loss(self, stage_id: int) -> tuple[list[float], list[float]]:
        """Trained tokens and loss of a stage, one point per local step, mean over the replicas.

        Replicas work at the same time, so the k-th steps that they make in a round are one point.
        """
        points: dict[tuple[int, int], tuple[float, list[float]]] = {}
        position: dict[tuple[int, int], int] = {}
        for record in self.steps:
            if (record.get("stage") or 0) != stage_id:
                continue
            round_id, replica = record.get("round") or 0, record.get("replica") or 0
            index = position.get((round_id, replica), 0)
            position[round_id, replica] = index + 1
            tokens, losses = points.setdefault((round_id, index), (0.0, []))
            points[round_id, index] = (tokens + (record.get("tokens") or 0), losses)
            if is_number(loss := record.get("loss")):
                losses.append(loss)
        trained, xs, ys = 0.0, [], []
        for _, (tokens, losses) in sorted(points.items()):
            trained += tokens
            if losses:
                xs.append(trained)
                ys.append(sum(losses) / len(losses))
        return xs, ys

    def tokens_after_round(self) -> dict[int, float]:
        """Trained tokens at the end of every round; 0 before the first."""
        trained, after = 0.0, {-1: 0.0}
        for record in self.rounds:
            trained += record.get("tokens") or 0
            after[record.get("round") or 0] = trained
        return after

    def stage_scores(self, stage_id: int) -> list[tuple[int, StageScore]]:
        """Round and entry of every validation of a stage's head."""
        return [
            (record.get("round") or 0, entry)
            for record in self.validations
            for entry in record.get("stages") or []
            if (entry.get("stage") or 0) == stage_id
        ]

    @property
    def last_validated_stage(self) -> int | None:
        """The last stage whose head was validated."""
        stages = [e.get("stage") or 0 for r in self.validations for e in r.get("stages") or []]
        return max(stages, default=None)

    def edges(self) -> dict[tuple[int, int], dict[str, float]]:
        """Sums of the traffic ledger per pipe edge, in the order of the pipe."""
        sums: dict[tuple[int, int], dict[str, float]] = {}
        for record in self.traffic:
            for edge in record.get("edges") or []:
                entry = sums.setdefault((edge.get("from", 0), edge.get("to", 0)), {})
                for name, value in edge.items():
                    if name not in ("from", "to") and is_number(value):
                        entry[name] = entry.get(name, 0) + value
        return dict(sorted(sums.items()))

    def collectives(self) -> dict[str, float]:
        """Bytes per collective, summed over the run."""
        sums: dict[str, float] = {}
        for record in self.traffic:
            for name, value in (record.get("collectives") or {}).items():
                sums[name] = sums.get(name, 0) + (value if is_number(value) else 0)
        return sums

    def bytes_sent(self, direction: str) -> float:
        """Bytes over all pipe edges, ``forward`` or ``backward``."""
        return sum(edge.get(f"bytes_{direction}", 0) for edge in self.edges().values())


def total(values: Iterable[Any]) -> float:
    """Sum the numbers among the values of a field, leaving out what is missing."""
    return float(sum(filter(is_number, values)))


def smooth(values: list[float]) -> list[float]:
    """Centred moving mean over a twentieth of the curve, narrower towards both ends."""
    half = max(len(values) // 40, 2)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smoothed = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        low, high = index - reach, index + reach + 1
        smoothed.append((sums[high] - sums[low]) / (high - low))
    return smoothed


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s: left out of the report, it is not JSON: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        logger.warning("%s: left out of the report, it is not YAML: %s", path, reason)
        return {}
    return value if isinstance(value, dict) else {}
