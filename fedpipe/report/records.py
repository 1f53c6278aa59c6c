"""What a run tells while it works, and writes down in metrics.jsonl and env.json. No torch.

A number that is not finite is null in the file, so what is measured may be None where it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

Emit = Callable[[str, Any], None]
"""Is told a record by its kind, ("note", line) or ("training", whether the rank trains)."""


class RefusedUpdate(TypedDict):
    """A client whose update is left out of a round, and the first number that was not finite."""

    client: int
    stage: int
    step: int
    what: str


EdgeTraffic = TypedDict(
    "EdgeTraffic",
    {
        "from": int,
        "to": int,
        "bytes_forward": int,
        "bytes_backward": int,
        "messages_forward": int,
        "messages_backward": int,
    },
)
"""What crossed a pipe edge in a round."""


class StepRecord(TypedDict):
    """A local step of a stage."""

    kind: Literal["step"]
    round: int
    step: int
    client: int
    replica: int
    stage: int
    loss: float | None
    """None for a stage without a head, too."""
    lr: float
    grad_norm: float | None
    tokens: int
    seconds: float


class StartRecord(TypedDict):
    """How a pre-training started, or went on."""

    kind: Literal["system"]
    event: Literal["start"]
    world_size: int
    seconds_to_first_step: float


class ProgressRecord(TypedDict):
    """The latest step of every stage and replica, for whoever follows a job."""

    kind: Literal["system"]
    event: Literal["progress"]
    steps: list[StepRecord]


# -- a pre-training --------------------------------------------------------------------------------


class RoundRecord(TypedDict):
    """A round."""

    kind: Literal["round"]
    round: int
    clients: list[int]
    weights: list[float]
    refused: list[RefusedUpdate]
    averaged: bool
    tokens: int
    loss: list[float | None]
    """By stage."""
    seconds: float
    tokens_per_s: float
    sync_s: float
    sync_bytes: int


class StageScore(TypedDict):
    """A validation of a stage's head."""

    stage: int
    loss: float | None
    perplexity: float | None
    worst_loss: float | None
    worst_client: int | None
    clients: dict[str, float | None]
    """Loss by client."""


NOT_VALIDATED: StageScore = {
    "stage": -1, "loss": None, "perplexity": None, "worst_loss": None, "worst_client": None,
    "clients": {},
}  # fmt: skip
"""What a reader takes where a validation is missing."""


class EvalRecord(TypedDict):
    """A validation."""

    kind: Literal["eval"]
    round: int
    stages: list[StageScore]
    tokens: int


class OuterRecord(TypedDict):
    """A validation of weights that have come from other sites, when an outer round begins."""

    kind: Literal["outer"]
    round: int
    """The round that begins."""
    stages: list[StageScore]
    tokens: int


class TrafficRecord(TypedDict):
    """Bytes of a round, counted where they are sent."""

    kind: Literal["traffic"]
    round: int
    edges: list[EdgeTraffic]
    collectives: dict[str, int]


# -- a fine-tuning ---------------------------------------------------------------------------------


class TurnRecord(TypedDict):
    """A client's training in a round."""

    kind: Literal["turn"]
    round: int
    client: int
    replica: int
    steps: int
    examples: int
    tokens: int
    weight: float
    seconds: float
    loss: float
    last_loss: float
    stages: NotRequired[dict[str, float]]
    """Mean loss by stage, where the model is cut."""


class TuningRoundRecord(TypedDict):
    """A round."""

    kind: Literal["round"]
    round: int
    clients: list[int]
    stragglers: list[int]
    dropped: list[int]
    refused: list[RefusedUpdate]
    averaged: bool
    loss: float | None
    """None where every client is lost."""
    examples: int
    tokens: int
    seconds: float
    sync_s: float
    sync_bytes: int
    memory_bytes: list[int]
    """By rank."""


class TuningTrafficRecord(TypedDict):
    """Bytes of a round that leave and reach the clients, and that cross the edges of a cut."""

    kind: Literal["traffic"]
    round: int
    edges: list[EdgeTraffic]
    client_bytes_up: int
    client_bytes_down: int
    bytes_up: int
    bytes_down: int


class TuningEvalRecord(TypedDict):
    """A scoring of the averaged model."""

    kind: Literal["eval"]
    round: int
    metric: str
    score: float | None
    mean: float | None
    worst: float | None
    worst_client: int | None
    clients: dict[str, float | None]
    """Score by client."""
    stages: NotRequired[dict[str, float | None]]
    """Score by stage, where the model is cut."""


NOT_SCORED: TuningEvalRecord = {
    "kind": "eval", "round": -1, "metric": "score", "score": None, "mean": None, "worst": None,
    "worst_client": None, "clients": {},
}  # fmt: skip
"""What a reader takes where a scoring is missing."""


# -- a training of an evaluation -------------------------------------------------------------------


class TrainingStepRecord(TypedDict):
    """A step, one of about fifty that are recorded."""

    kind: Literal["step"]
    epoch: int
    step: int
    num_steps: int
    loss: float | None
    lr: float
    grad_norm: float | None


class DevScoreRecord(TypedDict):
    """A score on the dev split after an epoch."""

    kind: Literal["eval"]
    epoch: int
    step: int
    score: float | None


# -- where it all came from ------------------------------------------------------------------------


class Environment(TypedDict):
    """Versions, host and commit: the content of env.json, and a part of every table's JSON."""

    fedpipe: str
    commit: str
    """Empty outside of a git repository."""
    python: str
    packages: dict[str, str]
    """Version by name."""
    host: str
    cores: int
    processor: str
    command: str
    """As it was typed."""
    repeat: NotRequired[str]
    """The command that repeats it."""


Record = (
    StepRecord | StartRecord | ProgressRecord
    | RoundRecord | EvalRecord | OuterRecord | TrafficRecord
    | TurnRecord | TuningRoundRecord | TuningEvalRecord | TuningTrafficRecord
    | TrainingStepRecord | DevScoreRecord
)  # fmt: skip
