"""What the JSON files of an evaluation hold: a cell's result, evaluation.json, comparison.json."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from fedpipe.config.evaluation import Precision

CELL_FILE, RESULT_FILE, STATISTICS_FILE = "cell.json", "result.json", "statistics.npz"
"""In the folder of a cell."""
JSON_FILE = "evaluation.json"
"""In the folder of the evaluation."""


class Settings(TypedDict):
    """How a model is fine-tuned on a task: ``EvaluationConfig`` with every value in place."""

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
    """The content of ``cells/NAME/cell.json``: what a process needs to know to run the cell."""

    key: str
    name: str
    model: str
    model_path: str
    task: str
    spec: dict[str, Any]
    """The fields of ``TaskSpec``, without the pad token of the model."""
    seed: int
    settings: Settings
    data_dir: str
    """Of the tokenised task."""
    test_split: str


class CellResult(TypedDict):
    """The content of ``cells/NAME/result.json``."""

    key: str
    """Of everything that the result depends on."""
    model: str
    task: str
    seed: int
    scores: dict[str, float | None]
    """By metric; of a second test set by ``METRIC:NAME``. None where a score is not defined."""
    dev_scores: list[float | None]
    """After every epoch; empty without a dev split."""
    best_epoch: int
    num_steps: int
    diverged_at: int | None
    """First step whose loss or gradients are not finite."""
    num_train: int
    """Examples."""
    num_test: dict[str, int]
    """Examples, by test set."""
    settings: Settings
    gold_digest: str
    """Of the test examples and their labels."""
    seconds: float
    threads: int
    device: str
    host: str


class Score(TypedDict, total=False):
    """What a model reaches in a row of the table, over its seeds."""

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    n: int
    """Seeds."""
    seeds: dict[int, float | None]
    """By seed of fine-tuning; JSON has the seeds as text."""
    interval: list[float] | None
    """Of the mean, 95 %."""
    over: str | None
    """What the interval is over."""


class TableRow(TypedDict):
    """A metric of a task."""

    task: str
    metric: str
    title: str
    num_test: int | None
    cells: int
    """Seeds that each model is to be trained with."""
    models: dict[str, Score | None]


class TaskFacts(TypedDict):
    """A task, its data, and how models are fine-tuned on it."""

    name: str
    format: str
    folder: str
    examples: dict[str, int]
    truncated: dict[str, dict[str, int]]
    """By model and split, examples of which something did not fit."""
    test_split: str
    left_out: dict[str, str]
    """By split, the rows that cannot be used."""
    best_epoch_by: str
    num_train: int | None
    num_test: dict[str, int] | None
    settings: dict[str, Settings]
    """By model."""
    cites: str


class ModelFacts(TypedDict):
    """A model."""

    name: str
    path: str
    digest: str


class CellFacts(TypedDict):
    """A fine-tuning, and what it reached."""

    name: str
    model: str
    task: str
    seed: int
    done: bool
    tokenised: str
    """Folder of the tokenised task in the cache."""
    scores: NotRequired[dict[str, float | None]]
    """This and what follows is that of its result, once it is done."""
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
    environment: dict[str, Any]


class EstimateFacts(TypedDict):
    """An estimate in JSON."""

    value: float
    interval: tuple[float, float] | None
    over: str | None
    n: list[int]
    p_value: float | None


class Tested(EstimateFacts):
    """A difference, and whether it stands out of a table."""

    stands_out: bool
    """By Holm's correction over the table."""


class Difference(TypedDict):
    """Of two means over trainings."""

    first: float | None
    second: float | None
    value: float | None
    interval: tuple[float, float] | None
    over: str | None
    n: list[int]
    p_value: float | None
    paired: bool
    stands_out: bool
    """By Holm's correction over the table."""


class DifferenceRow(Difference):
    """Of a metric of a task."""

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
    environment: dict[str, Any]
