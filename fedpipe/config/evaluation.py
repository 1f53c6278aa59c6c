"""The section ``evaluation``: which models are fine-tuned on which tasks, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpipe.config.paths import UserPath
from fedpipe.config.require import above_zero, at_least, require

Precision = Literal["auto", "fp32", "bf16"]
"""What a model computes in; its weights are always float32."""

DEFAULT_TASK = "ncbi-disease"
"""What is evaluated where nobody names a task."""
Kind = Literal["ner", "classification", "regression", "causal-lm"]
"""What the head of a model gives: a tag per word, a class, a number, or a text's next token."""

PACKAGED_TASKS = "packaged"
"""Value of ``evaluation.data``: the slice of NCBI-disease that fedpipe ships."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """``fedpipe evaluate``; fields that are ``null`` take the published value of each task."""

    models: tuple[UserPath, ...] = ()
    """Hugging Face folders, or run directories with an export; an empty list means
    runs/quickstart."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; docs/how-to/evaluate.md lists them. Empty: the tasks of ``task_files``, or
    of the task files in the data folder, or else ncbi-disease."""
    task_files: tuple[UserPath, ...] = ()
    """Files that each describe a task of your own, or folders with a task.yaml."""
    data: UserPath = PACKAGED_TASKS
    """Folder with the tasks' files, ``hf:NAME`` or ``hf:NAME:CONFIG`` for Hugging Face datasets, or
    ``packaged``."""
    seeds: tuple[int, ...] = (0,)
    """One fine-tuning per task and seed; the seed sets the head, the order of the examples and
    dropout."""
    learning_rate: float | None = None
    """Peak of the learning rate, at the end of the warm-up."""
    batch_size: int | None = None
    """Sequences per optimizer step."""
    num_epochs: int | None = None
    """Passes over the training examples."""
    max_length: int | None = None
    """Tokens per sequence; null takes the published length of the task, or the number of positions
    of the model where that is smaller."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, which never applies to biases and LayerNorms."""
    warmup_ratio: float = 0.1
    """Share of all steps with a linearly rising learning rate; then it falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 means never."""
    max_train_examples: int = 0
    """Number of training examples, drawn once, the same ones for all models and seeds; 0 means
    all."""
    max_test_examples: int = 0
    """Number of dev examples and of test examples, drawn likewise; 0 means all."""
    typed_entities: bool = False
    """Keep the entity types of JNLPBA; by default they are mapped to one, as BioBERT does."""
    precision: Precision = "auto"
    """auto is bf16 autocast on a GPU, fp32 on a CPU; weights and optimizer are always fp32."""
    num_draws: int = 1000
    """Bootstrap samples of the test set behind every 95 % interval."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        require(len(self.seeds) > 0, "evaluation.seeds", "at least one", list(self.seeds))
        for name in ("models", "tasks", "task_files", "seeds"):
            values = getattr(self, name)
            distinct = len(set(values)) == len(values)
            require(distinct, f"evaluation.{name}", "every value once", list(values))
        require(
            all(seed >= 0 for seed in self.seeds),
            "evaluation.seeds",
            "whole numbers, 0 or more",
            list(self.seeds),
        )
        above_zero(self, "evaluation.", "learning_rate", "batch_size", "num_epochs")
        require(
            self.max_length is None or self.max_length >= 8,
            "evaluation.max_length",
            "8 or more",
            self.max_length,
        )
        at_least(
            self,
            "evaluation.",
            weight_decay=0,
            max_grad_norm=0,
            max_train_examples=0,
            max_test_examples=0,
            num_draws=1000,
        )
        require(
            0 <= self.warmup_ratio < 1,
            "evaluation.warmup_ratio",
            "a value in [0, 1)",
            self.warmup_ratio,
        )
