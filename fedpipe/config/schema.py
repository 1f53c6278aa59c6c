"""The run configuration: frozen dataclasses, one per YAML section, every field documented.

``RunConfig`` is plain data. Checks that need one section live in its ``__post_init__``; checks that
need several live in ``fedpipe.config.load.check``. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from fedpipe.config.evaluation import EvaluationConfig as EvaluationConfig
from fedpipe.config.federation import AverageConfig as AverageConfig
from fedpipe.config.federation import FederationConfig as FederationConfig
from fedpipe.config.paths import UserPath
from fedpipe.config.require import above_zero, at_least, folder_name, require
from fedpipe.families import FamilyName

PACKAGED = "packaged"
"""Value of ``data.train``, ``data.valid`` and ``data.tokenizer``: the text that fedpipe ships."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The encoder. Fields that are ``null`` come from ``path`` where it is set, else ``size``."""

    family: FamilyName = "roberta"
    """The model family, which sets the embeddings, the layers and the masked-LM head. A folder in
    ``path`` must be of this family."""
    size: Literal["tiny", "small", "base", "large", "ettin-32m", "modernbert-base"] = "tiny"
    """Layers and hidden size of a new model: tiny is 4 x 128, small 4 x 512, base 12 x 768, large
    24 x 1024. A ModernBERT may also be ettin-32m, 10 x 384, or modernbert-base, 22 x 768."""
    path: UserPath = ""
    """Hugging Face folder to continue from. Its config.json, weights and sizes are used."""
    num_hidden_layers: int | None = None
    """Number of encoder layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_attention_heads: int | None = None
    """Number of attention heads; it must divide hidden_size."""
    intermediate_size: int | None = None
    """Width of the feed-forward layers."""
    vocab_size: int | None = None
    """Rows of the word embedding; null takes the size of the tokenizer."""
    max_position_embeddings: int | None = None
    """Rows of the position embedding; null takes those of a block (in RoBERTa they begin after the
    id of the padding token), or those of ``path``. Rows that ``path`` does not have start anew, and
    blocks train only the positions that they reach."""
    hidden_act: str | None = None
    """Activation of the feed-forward layers and heads."""
    hidden_dropout_prob: float | None = None
    """Dropout on hidden states, in [0, 1)."""
    attention_probs_dropout_prob: float | None = None
    """Dropout on attention weights, in [0, 1)."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights."""
    position_init: Literal["normal", "sinusoidal"] = "normal"
    """First values of the position embeddings, which are learnt like all others: random as in every
    matrix (normal), or sinusoids of the same standard deviation, which show distances from the
    start. A family with rotary positions has none to begin with."""
    layer_norm_eps: float | None = None
    """Epsilon of every LayerNorm."""
    type_vocab_size: int | None = None
    """Number of token types; only type 0 occurs in pre-training."""
    tie_word_embeddings: bool | None = None
    """The final decoder is the word embedding, as in BERT: one tensor if one process holds both
    and back-propagation reaches both (one stage, or end_to_end with pipeline.head_location client).
    Under local_loss the final decoder begins every client's turn as the embedding, and what it
    learns there is dropped at the end. Not under end_to_end with the head on the server, nor where
    the embedding stays with its client and the head does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text, its tokens and who owns it."""

    train: tuple[UserPath, ...] = (PACKAGED,)
    """Training text: files or globs (.jsonl, .jsonl.gz, .txt, .txt.gz, .parquet), a save_to_disk
    folder, ``hf:NAME[:SPLIT]`` for a hub dataset, or ``packaged``."""
    valid: tuple[UserPath, ...] = (PACKAGED,)
    """Held-out text in the same forms, partitioned by the same rule. A client may have none of it,
    and an empty list means no validation."""
    text_column: str = "text"
    """Column that holds a document. Plain text files have one document per line."""
    tokenizer: UserPath = PACKAGED
    """Folder with a tokenizer.json (Hugging Face), or ``packaged``."""
    sequence_length: int = 128
    """Tokens of a block, with its two special tokens. Every block is full."""
    padded_length: int = 0
    """Positions that every sequence is padded to, with logits, hidden states and gradients at every
    one of them, as the published code of FedBERT and FedBioBERT computes: the baseline of speed
    comparisons. Padding is hidden from attention and the loss is still that of the masked tokens,
    so what is learnt stays the same. 0: nothing is padded, only masked positions reach a head."""
    attention: Literal["block", "document"] = "block"
    """What a token attends to: all tokens of its block, or those of its own document. Blocks are
    full of documents, one behind the other, in both cases. Where documents begin then travels with
    the masked positions, one bit per token."""
    mask_probability: float | tuple[float, ...] = 0.15
    """Share of a block's tokens that are predicted; the count per block is constant. Two shares,
    [0.3, 0.15], hold before and after ``data.mask_switch``. Validation masks as the last round."""
    mask_switch: float = 0.9
    """Share of all steps after which the second share holds, from the next round on."""
    partition: Literal["column", "iid", "dirichlet", "paths"] = "column"
    """How documents get to clients: by the value of a column, at random (iid), by a Dirichlet
    distribution over the values of a column, or by file, with one entry of ``data.train`` per
    client (paths)."""
    partition_column: str = "journal"
    """The column for ``column`` and ``dirichlet``. If it has more values than there are clients,
    the values are spread by size. 1, "1" and 1.0 are one value, and the rows without a value are an
    owner of their own."""
    dirichlet_alpha: float = 0.5
    """Concentration of ``dirichlet``; a small one gives each client few values of the column."""
    cache_dir: UserPath = ""
    """Where tokenised blocks are kept; empty means ``$XDG_CACHE_HOME/fedpipe``, or else
    ~/.cache/fedpipe. Only their owner can read new directories."""
    num_workers: int = 0
    """Threads of the tokenizer; 0 means one per core."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        require(len(self.train) > 0, "data.train", "at least one file", list(self.train))
        at_least(self, "data.", sequence_length=8, num_workers=0)
        above_zero(self, "data.", "dirichlet_alpha")
        require(
            self.padded_length == 0 or self.padded_length >= self.sequence_length,
            "data.padded_length",
            f"0 or at least data.sequence_length ({self.sequence_length})",
            self.padded_length,
        )
        given, shares = self.mask_probability, self.mask_probabilities
        require(
            self.attention == "block" or not self.padded_length,
            "data.attention",
            "block with data.padded_length",
            self.attention,
            "Leave data.padded_length out: it is a baseline of speed.",
        )
        require(
            len(shares) == 1 + isinstance(given, tuple) and all(0 < share < 1 for share in shares),
            "data.mask_probability",
            "a value in (0, 1), or two of them",
            list(given) if isinstance(given, tuple) else given,
        )
        require(0 < self.mask_switch < 1, "data.mask_switch", "a value in (0, 1)", self.mask_switch)

    @property
    def mask_probabilities(self) -> tuple[float, ...]:
        """The shares of masked tokens, in the order in which they hold."""
        shares = self.mask_probability
        return shares if isinstance(shares, tuple) else (shares,)

    @property
    def num_masked(self) -> int:
        """Tokens to predict in a block, ``max(1, round(T * p))``; of two shares, by the larger.

        The same for every block, which keeps messages and logit matrices at one shape.
        """
        return max(1, round(self.sequence_length * max(self.mask_probabilities)))

    @property
    def num_positions(self) -> int:
        """Positions per sequence that layers compute, padding included."""
        return self.padded_length or self.sequence_length

    @property
    def num_scored(self) -> int:
        """Positions per sequence that reach a head: the masked ones, or all where it is padded."""
        return self.padded_length or self.num_masked

    @property
    def start_words(self) -> int:
        """Words of 32 bits per sequence that say where documents begin; 0 where no stage asks."""
        return math.ceil(self.sequence_length / 32) if self.attention == "document" else 0

    @property
    def padded_after(self) -> int:
        """Tokens of a sequence that padding follows; 0 where nothing is padded."""
        return self.sequence_length if self.padded_length else 0


class OpenCut(tuple[int, ...]):
    """A cut that nobody has chosen yet (``auto``); until then the layers are spread evenly."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return it as in a file."""
        return f"auto:{len(self) + 1}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """How the model is cut into stages and how micro-batches move through them."""

    objective: Literal["local_loss", "end_to_end"] = "local_loss"
    """local_loss gives every stage its own loss, and nothing flows back. end_to_end back-propagates
    over the cuts; it is the baseline."""
    schedule: Literal["streaming", "1f1b", "sequential"] = "streaming"
    """streaming goes with local_loss. 1f1b (DeepSpeed's schedule) and sequential (FedBERT's) go
    with end_to_end."""
    cut: tuple[int, ...] = (2,)
    """Index of the first encoder layer of every stage but the first, increasing. [] makes one
    stage, and 0 as the first index leaves only the embeddings on the client. auto and auto:N let a
    run measure its layers where it starts, choose a cut into two or N stages, and write it down."""
    num_client_stages: int = 1
    """Number of leading stages that belong to the data owner."""
    head_location: Literal["server", "client"] = "server"
    """Where the final head is. server: the labels of the masked tokens travel with the activations.
    client (U-shape): labels stay at home; the hidden states of the masked positions come to a head
    there, and their gradients go back to the server stage that they came from."""
    local_head: Literal["mlm", "mlm+layer"] = "mlm"
    """Auxiliary head of a stage that is not the last one: a masked-LM head (mlm), or an encoder
    layer and then the head (mlm+layer)."""
    micro_batch_size: int = 8
    """Sequences per micro-batch and data-parallel rank."""
    num_micro_batches: int = 4
    """Micro-batches per local step (gradient accumulation)."""
    in_flight: int = 2
    """Number of messages that a stage may have sent before the next stage has received them."""
    wire: tuple[Literal["auto", "fp32", "bf16", "int8"], ...] = ("auto",)
    """Format of hidden states and their gradients on the edges: one for all edges, or one per edge.
    auto is the format that the stages compute in; int8 has one scale per row."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Let torch compile layers and heads at the first step, for GPUs. It needs a C++ compiler and
    about a minute; on CPUs it made nothing faster."""
    colocate: bool = False
    """Run all stages of a replica as threads of one process, for one GPU or for debugging."""
    hang_timeout_s: float = 120.0
    """Seconds without a sign of life, or in one instruction, after which a process counts as hung;
    the run then ends and names the process. 0 means never. A resumed run may have another value."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        increasing = all(a < b for a, b in zip(self.cut, self.cut[1:], strict=False))
        require(
            increasing and all(c >= 0 for c in self.cut),
            "pipeline.cut",
            "increasing layer indices, 0 or more",
            list(self.cut),
        )
        require(
            1 <= self.num_client_stages <= self.num_stages,
            "pipeline.num_client_stages",
            f"1..{self.num_stages} (there are {self.num_stages} stages)",
            self.num_client_stages,
        )
        at_least(
            self,
            "pipeline.",
            micro_batch_size=1,
            num_micro_batches=1,
            in_flight=1,
            hang_timeout_s=0,
        )
        fitting = ("streaming",) if self.objective == "local_loss" else ("1f1b", "sequential")
        require(
            self.schedule in fitting,
            "pipeline.schedule",
            f"{' or '.join(fitting)} with pipeline.objective={self.objective}",
            self.schedule,
            f"Set pipeline.schedule={fitting[0]} or change pipeline.objective.",
        )
        self._check_home_head()
        edges = self.num_stages - 1 + self.num_home_heads
        require(
            len(self.wire) == 1 or len(self.wire) == edges,
            "pipeline.wire",
            f"one format, or {edges} (one per edge)",
            list(self.wire),
        )

    def _check_home_head(self) -> None:
        require(
            self.head_location == "server" or self.num_client_stages < self.num_stages,
            "pipeline.head_location",
            "server where no stage is the server's",
            self.head_location,
            "Add a cut, or lower pipeline.num_client_stages.",
        )

    @property
    def is_open(self) -> bool:
        """The cut is still to be chosen."""
        return isinstance(self.cut, OpenCut)

    @property
    def num_stages(self) -> int:
        """Stages with a part of the encoder: processes along the pipe axis."""
        return len(self.cut) + 1

    def wire_of(self, edge: int) -> str:
        """Format on an edge, by its index in ``fedpipe.models.split.edges``."""
        return self.wire[0] if len(self.wire) == 1 else self.wire[edge]

    @property
    def num_home_heads(self) -> int:
        """Heads on the client's first process that score what the server's stages send home."""
        if self.head_location == "server":
            return 0
        return 1 if self.objective == "end_to_end" else self.num_stages - self.num_client_stages

    @property
    def num_virtual_stages(self) -> int:
        """``num_stages`` and the heads at home."""
        return self.num_stages + self.num_home_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig:
    """What ``optimizer.name=muon`` has of its own; its learning rate and its decay are AdamW's."""

    momentum: float = 0.95
    """Decay of the momentum, which looks one step ahead (Nesterov)."""
    num_iterations: int = 5
    """Newton-Schulz iterations that make an update orthogonal. Their time is most of a step's."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        require(
            0 <= self.momentum < 1, "optimizer.muon.momentum", "a value in [0, 1)", self.momentum
        )
        at_least(self, "optimizer.muon.", num_iterations=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Each stage has an optimizer of its own; these numbers hold for all of them."""

    name: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """adamw decays weights apart from the gradient. adam and sgd add the decay to the gradient, and
    sgd has no momentum. muon makes the updates of the encoder layers' matrices orthogonal, at the
    same lr and weight_decay; embeddings, heads, norms and biases have adamw."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, ...] = (0.9, 0.98)
    """Decay of the first moment and of the second."""
    eps: float = 1e-6
    """Term in the denominator."""
    weight_decay: float = 0.01
    """Weight decay, which never applies to biases and LayerNorms."""
    decay: Literal["linear", "polynomial", "constant", "wsd"] = "linear"
    """Shape of the learning rate after the warm-up, counted across rounds. wsd (warm-up, stable,
    decay) stays at lr and then falls linearly over the last steps."""
    decay_ratio: float = 0.2
    """Share of all steps in which ``wsd`` falls."""
    power: float = 2.0
    """Exponent of ``polynomial``."""
    end_lr: float = 0.0
    """Learning rate after the last step."""
    warmup_ratio: float = 0.1
    """Share of all steps with a linearly rising learning rate."""
    max_grad_norm: float = 1.0
    """Gradients of a stage are scaled down to this norm; 0 means never."""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        above_zero(self, "optimizer.", "lr", "power")
        at_least(self, "optimizer.", eps=0, weight_decay=0, end_lr=0, max_grad_norm=0)
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            "two values in [0, 1)",
            list(self.betas),
        )
        require(
            0 <= self.warmup_ratio <= 1,
            "optimizer.warmup_ratio",
            "a value in [0, 1]",
            self.warmup_ratio,
        )
        require(
            0 < self.decay_ratio <= 1,
            "optimizer.decay_ratio",
            "a value in (0, 1]",
            self.decay_ratio,
        )
        room = 1 - self.warmup_ratio
        require(
            self.decay != "wsd" or self.decay_ratio <= room,
            "optimizer.decay_ratio",
            f"at most {room:g} beside optimizer.warmup_ratio={self.warmup_ratio:g}",
            self.decay_ratio,
            "Lower one of them: the decay begins after the warm-up.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved."""

    every_rounds: int = 1
    """Rounds between checkpoints. The last round is always saved."""
    every_steps: int = 0
    """Local steps between checkpoints inside the turn of a client; 0 means none."""
    keep_last: int = 2
    """Number of checkpoints that are kept."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "checkpoint.", every_rounds=1, every_steps=0, keep_last=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """How the averaged model is scored on held-out text."""

    every_rounds: int = 1
    """Rounds between validations. The last round is always scored."""
    max_blocks_per_client: int = 64
    """Held-out blocks scored per client; 0 means all."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "validation.", every_rounds=1, max_blocks_per_client=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig:
    """Rounds between sites that share no cluster (see docs/how-to/consortium.md)."""

    folder: UserPath = ""
    """Folder in which outer rounds arrive, one folder ``round_000000`` each, and in which the run
    leaves its updates. A run trains for the newest outer round and ends. Empty means that there are
    no other sites."""
    num_inner_rounds: int = 1
    """Rounds of this site in an outer round. All outer rounds make federation.num_rounds."""
    wire: Literal["fp32", "bf16", "int8", "sparse"] = "fp32"
    """Format in which an update leaves the site. What bf16 and int8 round off is sent in a later
    outer round (error feedback). sparse sends the share federation.density of the changes."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "outer.", num_inner_rounds=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is shown while the run goes on; metrics.jsonl always holds everything."""

    every: int = 10
    """Local steps between console lines."""
    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where the numbers of metrics.jsonl are shown as well: tensorboard writes event files to
    RUN_DIR/tensorboard; wandb, mlflow and trackio are services, set up by their own environment
    variables, each installed by an extra of its name. [] is nowhere."""

    def __post_init__(self) -> None:
        """Check the values that need nothing else."""
        at_least(self, "log.", every=1)
        require(len(set(self.to)) == len(self.to), "log.to", "every name once", list(self.to))


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """The pure DeepSpeed part."""

    config: UserPath = ""
    """DeepSpeed JSON with precision, ZeRO stage 0 or 1, timers and profiler; empty means plain
    fp32. Batch sizes and the optimizer are filled in from this configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines a run."""

    name: str = "pretrain"
    """Name of the run; its default directory is runs/NAME."""
    seed: int = 0
    """Seeds weights, cohorts, order of blocks, masks and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        """Check the values that no section holds."""
        folder_name(self.name)

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        stages = 1 if self.pipeline.colocate else self.pipeline.num_stages
        return stages * self.federation.num_replicas * self.federation.data_parallel_degree

    @property
    def switch_round(self) -> int:
        """The first round, from 0, of the second share of masked tokens; 0 without a second one.

        It is the first that begins at ``data.mask_switch`` or later, because messages have one
        shape for as long as a round lasts.
        """
        if len(self.data.mask_probabilities) == 1:
            return 0
        # What rounding leaves of 0.3 * 10 delays no round.
        return math.ceil(round(self.data.mask_switch * self.federation.num_rounds, 9))

    def in_round(self, round_id: int) -> RunConfig:
        """Return the same configuration with the one share of masked tokens of a round."""
        before, *after = self.data.mask_probabilities
        share = after[0] if after and round_id >= self.switch_round else before
        return replace(self, data=replace(self.data, mask_probability=share))

    @property
    def in_last_round(self) -> RunConfig:
        """The configuration in the last round, and in every validation."""
        return self.in_round(self.federation.num_rounds - 1)

    @property
    def blocks_per_step(self) -> int:
        """Blocks one client consumes in one local step, over all its data-parallel ranks."""
        p = self.pipeline
        return p.micro_batch_size * p.num_micro_batches * self.federation.data_parallel_degree
