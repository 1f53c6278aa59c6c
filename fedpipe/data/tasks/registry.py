"""What a task is, and the tasks that fedpipe knows, with their published settings. No torch.

A task that is not one of them is described by a file: see ``fedpipe.data.tasks.task_file``.

Settings follow the reference evaluations: BioBERT (Lee et al. 2020) and BLURB (Gu et al. 2021) for
the biomedical tasks, BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) for GLUE. Like them,
no class is weighted, however rare it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpipe.config.evaluation import Kind
from fedpipe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """How a task is fine-tuned where the configuration does not say."""

    learning_rate: float
    """Peak."""
    batch_size: int
    """Sequences per step."""
    num_epochs: int
    """Passes over the training examples."""
    max_length: int
    """Tokens per sequence at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task."""

    name: str
    """As users write it."""
    kind: Kind
    """What the head predicts: a tag per word, a class or a number."""
    metrics: tuple[str, ...]
    """Names of ``fedpipe.data.tasks.scoring.METRICS``; the first one chooses the best epoch."""
    defaults: Defaults
    """Published settings."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; of a NER task its entity types."""
    merges_types: bool = False
    """Score all entity types as one, unless ``evaluation.typed_entities`` keeps them."""
    negative: tuple[str, ...] = ()
    """Classes that F1 does not count as found."""
    text: tuple[str, ...] = ("text", "sentence", "sentence1")
    """Columns that may hold the text (a NER task: the words)."""
    pair: tuple[str, ...] = ()
    """Columns that may hold the second text; empty for tasks of one."""
    label: tuple[str, ...] = ("label",)
    """Columns that may hold the label (a NER task: the tags)."""
    files: tuple[str, ...] = ()
    """Other names of its files and folders."""
    headless: tuple[str, ...] = ()
    """Columns of its TSV file where that has no header."""
    cites: str = ""
    """Where it was published."""
    file: str = ""
    """Path of the task file that describes it; empty for a task of this module."""
    splits: tuple[tuple[str, str], ...] = ()
    """Split and path, where the task file names the files of its splits."""

    @property
    def names(self) -> tuple[str, ...]:
        """Under which files and folders are found, in one spelling."""
        return tuple(spelling(name) for name in (self.name, *self.files))


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """What a model predicts, and how that is scored: what training and scoring know of a task."""

    kind: Kind
    labels: tuple[str, ...]
    """Classes or tags; empty for numbers and texts."""
    positive: tuple[int, ...]
    """Classes that F1 counts as found."""
    metrics: tuple[str, ...]
    """As of the task; ``loss`` of texts."""
    pad_id: int
    """Token that fills short sequences up."""

    @property
    def metric(self) -> str:
        """The metric that chooses between models."""
        return self.metrics[0]

    @property
    def num_outputs(self) -> int:
        """Numbers that the head gives per text, or per token."""
        return len(self.labels) or 1

    @classmethod
    def of(cls, task: Task | None, *, typed: bool = False, pad_id: int = 0) -> TaskSpec:
        """Describe what is predicted in a task.

        Args:
            task: Any; None for texts without labels, whose next tokens are predicted.
            typed: Keep the entity types apart that the task merges.
            pad_id: Of the tokenizer.
        """
        if task is None:
            return cls(kind="causal-lm", labels=(), positive=(), metrics=("loss",), pad_id=pad_id)
        return cls(
            pad_id=pad_id,
            kind=task.kind,
            labels=tag_names(task, typed=typed) if task.kind == "ner" else task.labels,
            positive=tuple(i for i, name in enumerate(task.labels) if name not in task.negative),
            metrics=task.metrics,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TaskSpec:
        """Read what ``asdict`` gave, after JSON."""
        names = ("labels", "positive", "metrics")
        return cls(**{**content, **{name: tuple(content[name]) for name in names}})


def spelling(name: str) -> str:
    """Reduce a name to what spellings of it share."""
    return name.lower().replace("-", "_").removesuffix("_iob")


_NER = Defaults(learning_rate=5e-5, batch_size=32, num_epochs=20, max_length=512)
_RELATION = Defaults(learning_rate=2e-5, batch_size=16, num_epochs=10, max_length=512)
_QA = Defaults(learning_rate=2e-5, batch_size=16, num_epochs=20, max_length=512)
_SMALL_GLUE = Defaults(learning_rate=2e-5, batch_size=16, num_epochs=10, max_length=128)
_WNLI = Defaults(learning_rate=2e-5, batch_size=16, num_epochs=5, max_length=128)
_LARGE_GLUE = Defaults(learning_rate=2e-5, batch_size=32, num_epochs=3, max_length=128)


def _ner(name: str, *types: str, files: tuple[str, ...] = (), cites: str) -> Task:
    return Task(
        name=name,
        kind="ner",
        metrics=("entity_f1",),
        defaults=_NER,
        labels=types,
        merges_types=len(types) > 1,
        text=("tokens", "words"),
        label=("tags", "ner_tags"),
        files=files,
        cites=cites,
    )


def _glue(
    name: str,
    metrics: tuple[str, ...],
    defaults: Defaults,
    labels: tuple[str, ...] = ("0", "1"),
    *,
    text: tuple[str, ...] = ("text", "sentence1"),
    pair: tuple[str, ...] = ("text_pair", "sentence2"),
    label: tuple[str, ...] = ("label",),
    kind: Kind = "classification",
    files: tuple[str, ...] = (),
    headless: tuple[str, ...] = (),
) -> Task:
    return Task(
        name=name,
        kind=kind,
        metrics=metrics,
        defaults=defaults,
        labels=labels,
        text=text,
        pair=pair,
        label=label,
        files=files,
        headless=headless,
        cites="Wang et al. 2018 (GLUE)",
    )


def _text_task(name: str, labels: tuple[str, ...], *files: str, cites: str) -> Task:
    return Task(
        name=name,
        kind="classification",
        metrics=("accuracy",),
        defaults=_LARGE_GLUE,
        labels=labels,
        files=files,
        cites=cites,
    )


_ENTAILMENT = ("entailment", "not_entailment")
_ONE_TEXT: tuple[str, ...] = ("text", "sentence")

_ALL = (
    _ner("bc2gm", "GENE", files=("bc2gm_gene",), cites="Smith et al. 2008"),
    _ner("bc5cdr-chemical", "Chemical", files=("bc5cdr_chem",), cites="Li et al. 2016"),
    _ner("bc5cdr-disease", "Disease", cites="Li et al. 2016"),
    _ner("ncbi-disease", "Disease", files=("ncbi",), cites="Dogan et al. 2014"),
    _ner(
        "jnlpba", "protein", "DNA", "RNA", "cell_type", "cell_line",
        files=("jnlpba_bio",), cites="Kim et al. 2004",
    ),
    Task(
        name="ddi", kind="classification", metrics=("micro_f1",), defaults=_RELATION,
        labels=("DDI-false", "DDI-advise", "DDI-effect", "DDI-int", "DDI-mechanism"),
        negative=("DDI-false",), files=("ddi2013", "ddi_corpus"),
        cites="Herrero-Zazo et al. 2013",
    ),
    Task(
        name="gad", kind="classification", metrics=("micro_f1", "f1"), defaults=_RELATION,
        labels=("0", "1"), cites="Bravo et al. 2015",
    ),
    Task(
        name="pubmedqa", kind="classification", metrics=("accuracy",), defaults=_QA,
        labels=("yes", "no", "maybe"), text=("question", "text"), pair=("context", "text_pair"),
        label=("label", "final_decision"), files=("pubmed_qa",), cites="Jin et al. 2019",
    ),
    _glue("rte", ("accuracy",), _SMALL_GLUE, _ENTAILMENT),
    _glue(
        "mrpc", ("accuracy", "f1"), _SMALL_GLUE, text=("text", "sentence1", "#1 String"),
        pair=("text_pair", "sentence2", "#2 String"), label=("label", "Quality"),
    ),
    _glue(
        "mnli", ("accuracy",), _LARGE_GLUE, ("entailment", "neutral", "contradiction"),
        text=("text", "premise", "sentence1"), pair=("text_pair", "hypothesis", "sentence2"),
        label=("label", "gold_label"),
    ),
    _glue(
        "qnli", ("accuracy",), _LARGE_GLUE, _ENTAILMENT, text=("text", "question"),
        pair=("text_pair", "sentence"), files=("qnli_devsplit",),
    ),
    _glue(
        "qqp", ("accuracy", "f1"), _LARGE_GLUE, text=("text", "question1"),
        pair=("text_pair", "question2"), label=("label", "is_duplicate"),
    ),
    _glue(
        "stsb", ("pearson", "spearman"), _SMALL_GLUE, (), kind="regression",
        label=("label", "score"), files=("sts_b",),
    ),
    _glue("sst2", ("accuracy",), _LARGE_GLUE, text=_ONE_TEXT, pair=(), files=("sst_2",)),
    _glue(
        "cola", ("matthews",), _SMALL_GLUE, text=_ONE_TEXT, pair=(),
        headless=("source", "label", "star", "sentence"),
    ),
    _glue("wnli", ("accuracy",), _WNLI),
)  # fmt: skip

TASKS = {task.name: task for task in _ALL}
"""Every task by its name."""

SENTIMENT_TASKS = {
    task.name: task
    for task in (
        _text_task("imdb", ("negative", "positive"), "imdb_subset", cites="Maas et al. 2011"),
        _text_task(
            "movie-reviews",
            ("negative", "positive"),
            "movie_reviews_v2",
            cites="Pang and Lee 2004",
        ),
        _text_task(
            "ag-news", ("World", "Sports", "Business", "Sci/Tech"), cites="Zhang et al. 2015"
        ),
    )
}
"""Text classification of the studies with many clients; ``fedpipe finetune`` knows them, too."""


def find_task(name: str, *, own: Sequence[Task] = ()) -> Task:
    """Return a task by its name, in any usual spelling.

    Args:
        name: As the user wrote it.
        own: Tasks of the user's, which are looked through first.

    Raises:
        ConfigError: There is no such task.
    """
    wanted, tasks = spelling(name), (*own, *TASKS.values())
    for task in tasks:
        if wanted in task.names:
            return task
    spellings = {other: task.name for task in tasks for other in task.names}
    close = difflib.get_close_matches(wanted, spellings, n=1)
    hint = f"Did you mean {spellings[close[0]]}?" if close else "Choose one."
    names = ", ".join(task.name for task in tasks)
    raise ConfigError(f"evaluation.tasks: expected one of {names}, got {name!r}. {hint}")


def tag_names(task: Task, *, typed: bool) -> tuple[str, ...]:
    """List the tags of a NER task: ``O``, then ``B-`` and ``I-`` of every type.

    Args:
        task: Of kind ``ner``.
        typed: Keep the entity types apart that the task merges.
    """
    types = ("entity",) if task.merges_types and not typed else task.labels
    return ("O", *(f"{part}-{entity}" for entity in types for part in "BI"))
