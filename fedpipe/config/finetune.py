"""The configuration of ``fedpipe finetune``: frozen dataclasses, one per YAML section. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal, cast

from fedpipe.config.evaluation import Precision
from fedpipe.config.federation import FederationConfig
from fedpipe.config.load import build, lay_over, names_of, overridden
from fedpipe.config.paths import UserPath
from fedpipe.config.require import above_zero, at_least, folder_name, require
from fedpipe.config.schema import (
    CheckpointConfig,
    DeepSpeedConfig,
    LogConfig,
    OptimizerConfig,
    PipelineConfig,
)
from fedpipe.config.tree import Node

PACKAGED_CONFIG = "finetune.yaml"
"""What ``load_finetune`` reads when it is given neither preset nor file."""
QUICKSTART = "quickstart"
"""Value of ``model.path``: the model of ``make pretrain``, or an untrained one of its kind."""

CAUSAL_LM = "causal-lm"
"""Value of ``task.name``: next-token prediction on texts without labels."""

Method = Literal[
    "full",
    "houlsby",
    "pfeiffer",
    "parallel",
    "houlsby_inv",
    "pfeiffer_inv",
    "lora",
    "ia3",
    "compacter",
    "prefix_tuning",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModelConfig:
    """The model that is fine-tuned."""

    path: UserPath = QUICKSTART
    """Hugging Face folder with weights and tokenizer; quickstart is runs/quickstart/export, or
    where that is not there a small RoBERTa with random weights."""
    random_weights: bool = False
    """Take only sizes and tokenizer from the folder: a baseline without pre-training."""
    precision: Precision = "auto"
    """auto is bf16 autocast on a GPU, fp32 on a CPU; weights and optimizer are always fp32. With
    pipeline.cut, what deepspeed.config says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """What is trained and sent. Fields that are ``null`` take the value of FATE-LLM 1.0."""

    name: Method = "lora"
    """full trains everything; the others freeze the model and train an adapter of the adapters
    library and the task's head."""
    path: UserPath = ""
    """Adapter folder to start from, RUN_DIR/adapter of another run; empty starts anew."""
    first_layer: int = 0
    """First layer with an adapter. Every example runs through those below once, without dropout;
    what they give is kept on disk for as long as the run lasts."""
    reduction_factor: float | None = None
    """Hidden size over bottleneck, of the bottleneck methods: 16, Parallel 2, Compacter 32."""
    rank: int = 8
    """LoRA: rank of the update."""
    alpha: int = 8
    """LoRA: the update is scaled by ``alpha / rank``."""
    matrices: tuple[Literal["q", "k", "v"], ...] = ("q", "v")
    """LoRA: projections of the self-attention that get an update."""
    dropout: float = 0.0
    """LoRA and prefix tuning: dropout inside of the adapter."""
    prefix_length: int = 30
    """Prefix tuning: virtual tokens per layer."""
    lora_average: Literal["factors", "product"] = "factors"
    """factors averages A and B apart, as FATE does; product adds what that leaves out,
    ``mean(B A) - mean(B) mean(A)``, to the frozen weight (FedEx-LoRA)."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "method.", first_layer=0, rank=1, alpha=1, prefix_length=1)
        above_zero(self, "method.", "reduction_factor")
        from_first = self.name == "full" or self.name.endswith("_inv")
        require(
            not (self.first_layer and from_first),
            "method.first_layer",
            f"0 with method.name={self.name}",
            self.first_layer,
            "It trains what is below every layer.",
        )
        require(len(self.matrices) > 0, "method.matrices", "at least one", list(self.matrices))
        require(0 <= self.dropout < 1, "method.dropout", "a value in [0, 1)", self.dropout)
        require(
            not self.path or self.name != "full",
            "method.path",
            "empty with method.name=full",
            self.path,
            "Set model.path instead.",
        )
        require(
            self.lora_average == "factors" or self.name == "lora",
            "method.lora_average",
            "factors without method.name=lora",
            self.lora_average,
            "Only LoRA has products.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What is learnt, from which examples, and whose they are."""

    name: str = ""
    """A task that ``fedpipe evaluate`` knows, one that a task file describes, or ``causal-lm`` for
    the texts of ``task.data``. Empty means that of the task file, or else ncbi-disease."""
    file: UserPath = ""
    """File that describes a task of your own; empty also finds a task.yaml in ``task.data``."""
    data: UserPath = "packaged"
    """Folder with the task's files, ``hf:NAME`` or ``hf:NAME:CONFIG``, or ``packaged``."""
    max_length: int = 128
    """Tokens per example; longer ones are cut."""
    max_train_examples: int = 0
    """Training examples in all, drawn once from the seed; 0 means all."""
    max_test_examples: int = 0
    """Held-out examples in all, drawn likewise; 0 means all."""
    split: Literal["iid", "label_sorted", "dirichlet", "column"] = "iid"
    """Who owns an example: random; sorted by label and cut (Hilmkil et al. 2021); proportions
    ``Dir(dirichlet_alpha)`` per label; or by the value of a column."""
    dirichlet_alpha: float = 0.5
    """Small values give each client few labels."""
    column: str = ""
    """Column of ``split=column``; more values than clients are spread by size."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "task.", max_length=8, max_train_examples=0, max_test_examples=0)
        above_zero(self, "task.", "dirichlet_alpha")
        require(
            (self.split == "column") == bool(self.column),
            "task.column",
            "a column's name with task.split=column, and none without",
            self.column,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CutConfig:
    """How the model is cut into stages, for the engine of pre-training."""

    cut: tuple[int, ...] = ()
    """Index of the first encoder layer of every stage but the first; [] is no cut: every
    process holds a whole model. Every stage has its layers' adapters and a task head of its own."""
    objective: Literal["local_loss", "end_to_end"] = "local_loss"
    """local_loss: nothing flows back. end_to_end: back-propagation over the cuts, the baseline."""
    schedule: Literal["streaming", "1f1b", "sequential"] = "streaming"
    """streaming goes with local_loss; 1f1b and sequential with end_to_end."""
    num_client_stages: int = 1
    """Leading stages that belong to the data owner."""
    head_location: Literal["server", "client"] = "server"
    """server: labels travel with the activations. client: they stay at home, where the heads of the
    server's stages are; what a head reads comes there, and its gradients go back."""
    num_micro_batches: int = 4
    """Parts of a local step's batch that follow each other through the stages."""
    in_flight: int = 2
    """Messages a stage may have sent that the next stage has not yet received."""
    wire: tuple[Literal["auto", "fp32", "bf16", "int8"], ...] = ("auto",)
    """Format of hidden states and their gradients on the edges: one for all, or one per edge."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    colocate: bool = False
    """Run all stages of a replica as threads of one process."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else; without a cut all must be the defaults."""
        if self.cut:
            self.for_batch(self.num_micro_batches)

    def for_batch(self, batch_size: int) -> PipelineConfig:
        """Return what the engine needs to know, for so many examples per local step."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        size = max(1, batch_size // max(1, self.num_micro_batches))
        return PipelineConfig(**values, micro_batch_size=size)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioConfig:
    """What goes wrong in a round, drawn from the seed."""

    straggler_share: float = 0.0
    """Chance of a client to be slow in a round: it ends after straggler_work of its steps."""
    straggler_work: float = 0.5
    """Share of the local steps that a straggler makes, at least one."""
    dropout_share: float = 0.0
    """Chance of a client to be lost in a round: its update never arrives."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        for name in ("straggler_share", "dropout_share"):
            value = getattr(self, name)
            require(0 <= value < 1, f"scenario.{name}", "a value in [0, 1)", value)
        require(
            0 < self.straggler_work <= 1,
            "scenario.straggler_work",
            "a value in (0, 1]",
            self.straggler_work,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How the averaged model is scored on held-out examples."""

    every_rounds: int = 1
    """Rounds between scorings; the last round is always scored."""
    batch_size: int = 32
    """Examples per forward pass."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "scoring.", every_rounds=1, batch_size=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that defines a federated fine-tuning."""

    name: str = "finetune"
    """Name of the run; its default directory is runs/NAME."""
    seed: int = 0
    """Seeds the adapter, the head, the split, cohorts, order of the examples and dropout."""
    batch_size: int = 16
    """Examples per local step."""
    hang_timeout_s: float = 300.0
    """Seconds without a sign of life after which a process is taken for hung; 0 means never."""
    model: BaseModelConfig = field(default_factory=BaseModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pipeline: CutConfig = field(default_factory=CutConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def is_cut(self) -> bool:
        """Stages are trained, not whole models."""
        return bool(self.pipeline.cut)

    @property
    def stages(self) -> PipelineConfig:
        """The pipeline, as the engine sees it; one stage without a cut."""
        return self.pipeline.for_batch(self.batch_size)

    def __post_init__(self) -> None:
        """Check the values that need several sections."""
        folder_name(self.name)
        at_least(self, "", batch_size=1, hang_timeout_s=0)
        require(
            self.optimizer.name != "muon",
            "optimizer.name",
            "adamw, adam or sgd in fine-tuning",
            self.optimizer.name,
            "Set optimizer.name=adamw: only pre-training has Muon.",
        )
        self._check_federation()
        if self.method.lora_average == "product":
            self._check_product()
        if self.is_cut:
            self._check_cut()
        else:
            self._check_whole()

    def _check_cut(self) -> None:
        num = self.pipeline.num_micro_batches
        require(
            self.batch_size % num == 0,
            "batch_size",
            f"a multiple of pipeline.num_micro_batches ({num})",
            self.batch_size,
        )
        require(
            self.task.name != CAUSAL_LM,
            "pipeline.cut",
            f"[] with task.name={CAUSAL_LM}",
            list(self.pipeline.cut),
            "Decoders are not cut.",
        )
        require(
            self.method.name != "prefix_tuning",
            "method.name",
            "a method whose parameters lie in layers, with pipeline.cut",
            self.method.name,
            "Use another method: all prefixes come out of one module.",
        )
        require(
            self.method.lora_average == "factors",
            "method.lora_average",
            "factors with pipeline.cut",
            self.method.lora_average,
        )
        require(
            self.method.first_layer == 0,
            "method.first_layer",
            "0 with pipeline.cut",
            self.method.first_layer,
            "Every stage trains an adapter.",
        )
        require(
            self.model.precision == "auto",
            "model.precision",
            "auto with pipeline.cut",
            self.model.precision,
            "deepspeed.config says it: ds_configs/bf16.json, or none for fp32.",
        )
        frozen = self.method.name != "full" and self.pipeline.cut[0] == 0
        require(
            not (frozen and self.pipeline.objective == "end_to_end"),
            "pipeline.cut",
            f"1 or more first, with {self.method.name} and end_to_end",
            list(self.pipeline.cut),
            "A first stage without layers has nothing to train.",
        )

    def _check_whole(self) -> None:
        require(
            self.pipeline == CutConfig(),
            "pipeline.cut",
            "a cut with other keys of pipeline",
            [],
            "Set for example pipeline.cut=[2].",
        )
        require(
            not self.deepspeed.config,
            "deepspeed.config",
            "nothing without pipeline.cut",
            self.deepspeed.config,
            "Only stages are run by DeepSpeed.",
        )
        for name in ("embeddings", "client_layers", "aux_head", "server_layers"):
            require(
                getattr(self.federation.average, name),
                f"federation.average.{name}",
                "true without pipeline.cut",
                False,
                "Only the final head can stay with its client.",
            )

    def _check_federation(self) -> None:
        federation = self.federation
        require(
            federation.server == "replicated",
            "federation.server",
            "replicated in fine-tuning",
            federation.server,
            "Set federation.server=replicated.",
        )
        require(
            federation.data_parallel_degree == 1,
            "federation.data_parallel_degree",
            "1 in fine-tuning",
            federation.data_parallel_degree,
            "Raise federation.num_replicas instead.",
        )

    def _check_product(self) -> None:
        with_product = "with method.lora_average=product"
        aggregation, server = self.federation.aggregation, self.federation.server_optimizer
        for key, expected, found in (
            ("aggregation.rule", "mean", aggregation.rule),
            ("server_optimizer.name", "fedavg", server.name),
            ("server_optimizer.lr", 1, server.lr),
            ("wire", "fp32", self.federation.wire),
        ):
            require(
                found == expected,
                f"federation.{key}",
                f"{expected} {with_product}",
                found,
                f"Set federation.{key}={expected}: the residual belongs to the plain mean.",
            )


def load_finetune(
    path: str | Node | None, overrides: Sequence[str], *, preset: str | None = None
) -> FinetuneConfig:
    """Return the checked configuration of a fine-tuning.

    Args:
        path: YAML file, or its tree where it was read before; without it and without a preset the
            packaged example is read.
        overrides: ``section.key=value`` each; the value is YAML.
        preset: One of ``finetune_presets()``; the file is laid over it.

    Returns:
        The configuration, with every default in place.

    Raises:
        ConfigError: A key is unknown, given twice or of the wrong type, values do not fit, or there
            is no such preset.
    """
    node = overridden(finetune_tree(path, preset=preset), overrides)
    return cast(FinetuneConfig, build(FinetuneConfig, node))


def finetune_tree(path: str | Node | None, *, preset: str | None = None) -> Node:
    """Read file and preset once, for ``load_finetune`` with overrides of several runs.

    Arguments are those of ``load_finetune``.
    """
    packaged = resources.files("fedpipe.config").joinpath(PACKAGED_CONFIG)
    return lay_over(path, preset=preset, presets=_presets(), packaged=packaged)


def finetune_presets() -> list[str]:
    """Return the names of the packaged presets of ``fedpipe finetune``."""
    return names_of(_presets())


def _presets() -> Traversable:
    return resources.files("fedpipe.config").joinpath("finetune_presets")
