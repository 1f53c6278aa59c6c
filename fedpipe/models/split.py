"""Describe the stages of a model, and tell which stage holds which parameter. No torch.

Parameters keep their full Hugging Face names on every stage (``roberta.encoder.layer.7...``), so a
split is a filter, a merge is a union, and nothing is renumbered.

With a head at the client (U-shape) labels do not leave the client: a server stage sends the masked
positions' hidden states to its head, which is a virtual stage on the client's first process, and
gets their gradients back. Identifiers call such a head a home head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, TypeVar

from fedpipe.config.model_shape import ModelShape
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.errors import FederationError
from fedpipe.families import EMBEDDINGS, LAYER

T = TypeVar("T")

Part = Literal["embeddings", "client_layers", "aux_head", "server_layers", "final_head"]
AUX_HEADS = "aux_heads"


class StageRole(Enum):
    """The owner of a stage: a client or the server."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """Description of one stage: its layers, its head, and its messages."""

    stage_id: int
    num_stages: int
    role: StageRole
    first_layer: int
    """Index of the first encoder layer."""
    end_layer: int
    """Index after the last encoder layer."""
    head: Literal["", "mlm", "mlm+layer"]
    """Head of the local loss; "" if the stage is trained by a gradient that it receives."""
    scores: int
    """The stage whose hidden states the head reads: this one, except for a head at the client."""
    next_stage: int | None = None
    """The stage that receives the activations; None after the last layer."""
    decoder: Literal["own", "shared", "copied"] = "own"
    """The matrix that the head multiplies hidden states with to score the vocabulary. own: a
    parameter of the head. shared: the word embedding itself, which is on the same process. copied:
    starts every turn as a copy of the word embedding, is trained, and is dropped after the turn."""
    home_head: int | None = None
    """The head at the client that gets the masked positions' hidden states (U-shape)."""
    sends_labels: bool = True
    """Messages to the next stage hold labels beside the positions of masked tokens."""
    sends_grad: bool = False
    """The stage sends the gradient of its inputs back to the stage that they came from."""
    receives_grad: bool = False
    """The stage gets the gradient of its activations from the next stage."""

    @property
    def is_first(self) -> bool:
        """The stage holds the embeddings and reads text."""
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        """The stage holds the final head."""
        return self.stage_id == self.num_stages - 1

    @property
    def ends_encoder(self) -> bool:
        """The stage holds the model's last layer, which is computed at masked positions only."""
        return self.next_stage is None and self.num_layers > 0

    @property
    def is_home_head(self) -> bool:
        """The stage is the head of a server stage, placed on the client's first process."""
        return self.scores != self.stage_id

    @property
    def previous_stage(self) -> int:
        """The stage that sends the inputs; meaningless for the first stage."""
        return self.scores if self.is_home_head else self.stage_id - 1

    @property
    def num_layers(self) -> int:
        """Number of encoder layers, without an auxiliary one."""
        return self.end_layer - self.first_layer

    @property
    def has_head(self) -> bool:
        """The stage computes a loss."""
        return bool(self.head)

    @property
    def contents(self) -> tuple[str, ...]:
        """Contents of the stage in words, for people."""
        layers = {0: (), 1: (f"layer {self.first_layer}",)}.get(
            self.num_layers, (f"layers {self.first_layer}-{self.end_layer - 1}",)
        )
        aux = f"aux_head of stage {self.scores}" if self.is_home_head else "aux_head"
        head = ("lm_head",) if self.is_last else (aux,) if self.has_head else ()
        return (("embeddings",) if self.is_first else ()) + layers + head


def stage_specs(
    pipeline: PipelineConfig, *, num_hidden_layers: int, tied: bool = False
) -> tuple[StageSpec, ...]:
    """Describe every stage of a pipeline.

    With ``head_location: client`` the server stages get no labels. Their heads are virtual stages,
    numbered after the encoder's stages, on the process of stage 0. Under ``local_loss`` every
    server stage has such a head, and that of the last one is the final head; under ``end_to_end``
    only the last server stage has one.

    Args:
        pipeline: Cut, objective and place of the heads.
        num_hidden_layers: Encoder layers of the whole model.
        tied: Tie the final decoder to the word embedding where possible; see ``model_stages``.

    Returns:
        One description per virtual stage, in order.
    """
    bounds = [0, *pipeline.cut, num_hidden_layers]
    num_encoders, num_stages = pipeline.num_stages, pipeline.num_virtual_stages
    first_at_home = num_encoders - (num_stages - num_encoders)
    end_to_end = pipeline.objective == "end_to_end"

    def encoder(stage_id: int) -> StageSpec:
        at_client = stage_id < pipeline.num_client_stages
        last = stage_id == num_encoders - 1
        at_home = num_stages > num_encoders and stage_id >= first_at_home
        head: Literal["", "mlm", "mlm+layer"] = pipeline.local_head
        decoder: Literal["own", "shared", "copied"] = "own"
        if at_home or (end_to_end and not last):
            head = ""
        elif last:
            head = "mlm"
            if tied and (stage_id == 0 or not end_to_end):
                decoder = "copied" if stage_id else "shared"
        elif stage_id == 0:
            decoder = "shared"
        return StageSpec(
            stage_id=stage_id,
            num_stages=num_stages,
            role=StageRole.CLIENT if at_client else StageRole.SERVER,
            first_layer=bounds[stage_id],
            end_layer=bounds[stage_id + 1],
            head=head,
            scores=stage_id,
            decoder=decoder,
            next_stage=None if last else stage_id + 1,
            home_head=num_encoders + stage_id - first_at_home if at_home else None,
            sends_labels=(
                pipeline.head_location == "server" or stage_id + 1 < pipeline.num_client_stages
            ),
            sends_grad=end_to_end and stage_id > 0,
            receives_grad=end_to_end and not last,
        )

    def home_head(stage_id: int) -> StageSpec:
        final = stage_id == num_stages - 1
        return StageSpec(
            stage_id=stage_id,
            num_stages=num_stages,
            role=StageRole.CLIENT,
            first_layer=num_hidden_layers,
            end_layer=num_hidden_layers,
            head="mlm",
            scores=stage_id - num_encoders + first_at_home,
            decoder=("shared" if end_to_end else "copied") if tied and final else "own",
            sends_grad=True,
        )

    return tuple(encoder(s) if s < num_encoders else home_head(s) for s in range(num_stages))


def model_stages(config: RunConfig, shape: ModelShape) -> tuple[StageSpec, ...]:
    """Describe every stage of a pre-training; see ``stage_specs``.

    With ``model.tie_word_embeddings`` the final decoder is the word embedding or starts every turn
    as a copy of it. It is untied if the server holds the decoder and word embeddings stay with
    their clients.
    """
    layers, tied = shape.num_hidden_layers, shape.tie_word_embeddings
    specs = stage_specs(config.pipeline, num_hidden_layers=layers, tied=tied)
    if specs[-1].role is StageRole.SERVER and not config.federation.average.embeddings:
        return stage_specs(config.pipeline, num_hidden_layers=layers)
    return specs


class Edge(NamedTuple):
    """A pair of stages that exchange messages."""

    source: int
    target: int
    backward: bool
    """Whether gradients go back from target to source."""


def edges(specs: Iterable[StageSpec]) -> tuple[Edge, ...]:
    """List the edges of a pipeline: from stage to stage, then those to heads at the client."""
    specs = tuple(specs)
    onwards = [
        Edge(s.stage_id, s.next_stage, s.receives_grad) for s in specs if s.next_stage is not None
    ]
    return (
        *onwards,
        *(Edge(s.stage_id, s.home_head, True) for s in specs if s.home_head is not None),
    )


def pipeline_edges(pipeline: PipelineConfig) -> tuple[Edge, ...]:
    """List the edges of a pipeline without knowing its model."""
    layers = (
        pipeline.cut[-1] + 1 if pipeline.cut else 1
    )  # any number beyond the last cut gives the same edges
    return edges(stage_specs(pipeline, num_hidden_layers=layers))


def placement(specs: Sequence[StageSpec]) -> tuple[tuple[StageSpec, ...], ...]:
    """Group the stages by process: one stage each, and the heads at the client with the first."""
    first, *others = (spec for spec in specs if not spec.is_home_head)
    heads = (spec for spec in specs if spec.is_home_head)
    return ((first, *heads), *((spec,) for spec in others))


def owner(name: str, specs: Iterable[StageSpec]) -> int:
    """Return the stage that holds a parameter, given its full name."""
    specs = tuple(specs)
    if name.startswith(f"{AUX_HEADS}."):
        scored = int(name.split(".")[1])
        return next(s.stage_id for s in specs if s.has_head and s.scores == scored)
    layer = LAYER.search(name)
    if layer:
        index = int(layer.group(1))
        return next(s.stage_id for s in specs if s.first_layer <= index < s.end_layer)
    return 0 if EMBEDDINGS.search(name) else specs[-1].stage_id


def split(state: Mapping[str, T], specs: Iterable[StageSpec]) -> tuple[dict[str, T], ...]:
    """Filter a model's tensors into one dictionary per stage, without copying them."""
    specs = tuple(specs)
    parts: tuple[dict[str, T], ...] = tuple({} for _ in specs)
    for name, value in state.items():
        parts[owner(name, specs)][name] = value
    return parts


def merge(parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """Unite the tensors of all stages into those of a model, without the auxiliary heads.

    Raises:
        FederationError: Two stages hold the same parameter.
    """
    whole: dict[str, T] = {}
    for part in parts:
        for name, value in part.items():
            if name.startswith(f"{AUX_HEADS}."):
                continue
            if name in whole:
                raise FederationError(f"{name}: expected on one stage, got two. Merge each once.")
            whole[name] = value
    return whole


def part_of(name: str, spec: StageSpec) -> Part:
    """Return the key of ``federation.average`` that applies to a parameter of a stage."""
    if name.startswith(f"{AUX_HEADS}."):
        return "aux_head"
    if LAYER.search(name):
        return "client_layers" if spec.role is StageRole.CLIENT else "server_layers"
    return "embeddings" if EMBEDDINGS.search(name) else "final_head"
