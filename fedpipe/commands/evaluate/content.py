"""Types of the JSON files of an evaluation: cell.json, result.json, evaluation.json, ..."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from fedpipe.config.evaluation import Precision
from fedpipe.report.records import Environment

CELL_FILE, RESULT_FILE, STATISTICS_FILE = "cell.json", "result.json", "statistics.npz"
"""In the folder of a cell."""
JSON_FILE = "evaluation.json"
"""In the folder of the evaluation."""


class Settings(TypedDict):
    """Settings of a fine-tuning: ``EvaluationConfig`` with a value for every field."""

    learning_rate: float
    batch_size: int
    num_epochs: int
    max_length: int
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float
    max_train_examples: int
    max_test_examples: int
    typed_entities: bool
    precision: Precision


class CellFile(TypedDict):
    """The content of ``cells/NAME/cell.json``: everything that a process needs to run the cell."""

    key: str
    name: str
    model: str
    model_path: str
    task: str
    spec: dict[str, Any]
    """Fields of ``TaskSpec``, without the id of the pad token, which belongs to the model."""
    seed: int
    settings: Settings
    data_dir: str
    """Folder of the tokenised task."""
    test_split: str


class CellResult(TypedDict):
    """The content of ``cells/NAME/result.json``."""

    key: str
    """Digest of everything that the result depends on."""
    model: str
    task: str
    seed: int
    scores: dict[str, float | None]
    """By metric, or ``METRIC:NAME`` for a second test set; None if a score is not defined."""
    dev_scores: list[float | None]
    """Dev score after every epoch; empty without a dev split."""
    best_epoch: int
    num_steps: int
    diverged_at: int | None
    """First recorded step whose loss or gradient norm is not finite; None if there is none."""
    num_train: int
    """Number of training examples."""
    num_test: dict[str, int]
    """Number of examples, by test set."""
    settings: Settings
    gold_digest: str
    """Digest of the test examples and their labels."""
    seconds: float
    threads: int
    device: str
    host: str


class Score(TypedDict, total=False):
    """The scores of a model in a row of the table, over its seeds."""

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    n: int
    """Number of seeds."""
    seeds: dict[int, float | None]
    """Score by seed of fine-tuning; keys are text, because JSON has no other keys."""
    interval: list[float] | None
    """95 % interval of the mean."""
    over: str | None
    """What varies in the interval: seeds and test examples, or test examples alone."""


class TableRow(TypedDict):
    """One row of the table: a metric of a task."""

    task: str
    metric: str
    title: str
    num_test: int | None
    cells: int
    """Number of seeds that each model is to be trained with."""
    models: dict[str, Score | None]


class TaskFacts(TypedDict):
    """A task, its examples, and the settings of the fine-tunings."""

    name: str
    format: str
    folder: str
    examples: dict[str, int]
    truncated: dict[str, dict[str, int]]
    """By model and split, the number of examples that did not fit whole."""
    test_split: str
    left_out: dict[str, str]
    """By split, a text about rows that cannot be used."""
    best_epoch_by: str
    num_train: int | None
    num_test: dict[str, int] | None
    settings: dict[str, Settings]
    """Settings by model."""
    cites: str


class ModelFacts(TypedDict):
    """A model of an evaluation."""

    name: str
    path: str
    digest: str


class CellFacts(TypedDict):
    """A fine-tuning and its result."""

    name: str
    model: str
    task: str
    seed: int
    done: bool
    tokenised: str
    """Name of the folder of the tokenised task in the cache."""
    scores: NotRequired[dict[str, float | None]]
    """This field and those below are copied from the result of a finished cell."""
    best_epoch: NotRequired[int]
    num_steps: NotRequired[int]
    seconds: NotRequired[float]
    threads: NotRequired[int]
    device: NotRequired[str]
    host: NotRequired[str]
    num_test: NotRequired[dict[str, int]]
    gold_digest: NotRequired[str]
    diverged_at: NotRequired[int | None]


class Content(TypedDict):
    """The content of ``evaluation.json``."""

    models: list[ModelFacts]
    seeds: list[int]
    data: str
    num_draws: int
    intervals: str
    tasks: list[TaskFacts]
    rows: list[TableRow]
    average: dict[str, Score | None]
    cells: list[CellFacts]
    environment: Environment


class EstimateFacts(TypedDict):
    """An ``Estimate`` as JSON."""

    value: float
    interval: tuple[float, float] | None
    over: str | None
    n: list[int]
    p_value: float | None


class Tested(EstimateFacts):
    """A difference that is tested together with the others of a table."""

    stands_out: bool
    """Whether it differs from 0 after Holm's correction over the table."""


class Difference(TypedDict):
    """The difference of two means over trainings."""

    first: float | None
    second: float | None
    value: float | None
    interval: tuple[float, float] | None
    over: str | None
    n: list[int]
    p_value: float | None
    paired: bool
    stands_out: bool
    """Whether it differs from 0 after Holm's correction over the table."""


class DifferenceRow(Difference):
    """The differences of a metric of a task."""

    task: str
    metric: str
    title: str
    num_test: int | None


class Comparison(TypedDict):
    """The content of ``comparison.json``."""

    first: str
    second: str
    num_draws: int
    unit: str
    intervals: str
    rows: list[DifferenceRow]
    average: Difference | None
    environment: Environment
