"""Which parameter belongs to which stage: a split is a filter, a merge is a union.

Parameters keep their full Hugging Face names on every stage (``roberta.encoder.layer.7...`` is
called so wherever layer 7 lives), so nothing is ever renumbered. Pure: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, TypeVar

from fedpipe.config.model_shape import ModelShape
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.errors import FederationError

T = TypeVar("T")

Part = Literal["embeddings", "client_layers", "aux_head", "server_layers", "final_head"]
AUX_HEADS = "aux_heads"
_EMBEDDINGS = re.compile(r"\.(embeddings|invertible_adapters)\.")
_LAYER = re.compile(r"\.encoder\.layer\.(\d+)\.")


class StageRole(Enum):
    """Who owns a stage."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What one stage holds."""

    stage_id: int
    num_stages: int
    role: StageRole
    first_layer: int
    """Index of its first encoder layer."""
    end_layer: int
    """One past its last encoder layer."""
    head: Literal["", "mlm", "mlm+layer"]
    """Its own loss: "" where a gradient that comes back trains it."""
    scores: int
    """The stage whose hidden states its head reads: itself, unless it is a head at home."""
    next_stage: int | None = None
    """The stage that its activations go to; None after the last layer."""
    decoder: Literal["own", "shared", "lent"] = "own"
    """What its head reads words with. shared: the word embedding, one tensor, for both are on the
    first process. lent: a copy of the word embedding at the start of every turn, which is trained
    and, at the end of it, dropped."""
    home_head: int | None = None
    """The head at the client's that gets the masked positions' hidden states and returns their
    gradients (U-shape)."""
    sends_labels: bool = True
    """Its messages to the next stage carry the masked tokens' labels beside their positions."""
    sends_grad: bool = False
    """It hands the gradient of what it received back to where it came from."""
    receives_grad: bool = False
    """The next stage hands the gradient of what it sent back."""

    @property
    def is_first(self) -> bool:
        """It holds the embeddings and reads text."""
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        """It holds the final head."""
        return self.stage_id == self.num_stages - 1

    @property
    def ends_encoder(self) -> bool:
        """It holds the model's last layer, which is computed at masked positions only."""
        return self.next_stage is None and self.num_layers > 0

    @property
    def is_home_head(self) -> bool:
        """It is the head of a server stage, alone on the client's first process (U-shape)."""
        return self.scores != self.stage_id

    @property
    def previous_stage(self) -> int:
        """The stage that its inputs come from; meaningless for the first."""
        return self.scores if self.is_home_head else self.stage_id - 1

    @property
    def num_layers(self) -> int:
        """Encoder layers, the auxiliary one not counted."""
        return self.end_layer - self.first_layer

    @property
    def has_head(self) -> bool:
        """It computes a loss."""
        return bool(self.head)

    @property
    def contents(self) -> tuple[str, ...]:
        """What it holds, in words."""
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

    With ``head_location: client`` the server's stages know no labels: their heads are virtual
    stages of their own after the encoder's, on the process of stage 0. Under ``local_loss`` every
    server stage has one, the last of them being the final head; under ``end_to_end`` only the last
    server stage has.

    Args:
        pipeline: Cut, objective and heads.
        num_hidden_layers: Encoder layers of the whole model.
        tied: The final decoder is the word embedding wherever it can be; see ``model_stages``.

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
        decoder: Literal["own", "shared", "lent"] = "own"
        if at_home or (end_to_end and not last):
            head = ""
        elif last:
            head = "mlm"
            if tied and (stage_id == 0 or not end_to_end):
                decoder = "lent" if stage_id else "shared"
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
            decoder=("shared" if end_to_end else "lent") if tied and final else "own",
            sends_grad=True,
        )

    return tuple(encoder(s) if s < num_encoders else home_head(s) for s in range(num_stages))


def model_stages(config: RunConfig, shape: ModelShape) -> tuple[StageSpec, ...]:
    """Describe every stage of a pre-training; see ``stage_specs``.

    With ``model.tie_word_embeddings`` the final decoder is the word embedding, or learns from there
    in every turn, but where the one is the server's to know and the other stays with its client.
    """
    layers, tied = shape.num_hidden_layers, shape.tie_word_embeddings
    specs = stage_specs(config.pipeline, num_hidden_layers=layers, tied=tied)
    if specs[-1].role is StageRole.SERVER and not config.federation.average.embeddings:
        return stage_specs(config.pipeline, num_hidden_layers=layers)
    return specs


class Edge(NamedTuple):
    """Where messages pass from one stage to another."""

    source: int
    target: int
    backward: bool
    """Gradients come back."""


def edges(specs: Iterable[StageSpec]) -> tuple[Edge, ...]:
    """List the edges of a pipeline: from stage to stage, then those to the heads at home."""
    specs = tuple(specs)
    onwards = [
        Edge(s.stage_id, s.next_stage, s.receives_grad) for s in specs if s.next_stage is not None
    ]
    return (
        *onwards,
        *(Edge(s.stage_id, s.home_head, True) for s in specs if s.home_head is not None),
    )


def pipeline_edges(pipeline: PipelineConfig) -> tuple[Edge, ...]:
    """List the edges of a pipeline whose model is not known."""
    layers = pipeline.cut[-1] + 1 if pipeline.cut else 1  # how many does not matter
    return edges(stage_specs(pipeline, num_hidden_layers=layers))


def placement(specs: Sequence[StageSpec]) -> tuple[tuple[StageSpec, ...], ...]:
    """Group the stages by process: one each, and the heads that are at home with the first."""
    first, *others = (spec for spec in specs if not spec.is_home_head)
    heads = (spec for spec in specs if spec.is_home_head)
    return ((first, *heads), *((spec,) for spec in others))


def owner(name: str, specs: Iterable[StageSpec]) -> int:
    """Stage that holds the parameter ``name`` (full Hugging Face name, or an auxiliary head's)."""
    specs = tuple(specs)
    if name.startswith(f"{AUX_HEADS}."):
        scored = int(name.split(".")[1])
        return next(s.stage_id for s in specs if s.has_head and s.scores == scored)
    layer = _LAYER.search(name)
    if layer:
        index = int(layer.group(1))
        return next(s.stage_id for s in specs if s.first_layer <= index < s.end_layer)
    return 0 if _EMBEDDINGS.search(name) else specs[-1].stage_id


def split(state: Mapping[str, T], specs: Iterable[StageSpec]) -> tuple[dict[str, T], ...]:
    """Filter a model's tensors into one dictionary per stage; the tensors are not copied."""
    specs = tuple(specs)
    parts: tuple[dict[str, T], ...] = tuple({} for _ in specs)
    for name, value in state.items():
        parts[owner(name, specs)][name] = value
    return parts


def merge(parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """Unite the stages' tensors into a model's, without the auxiliary heads.

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
    """Which switch of ``federation.average`` a parameter of a stage obeys."""
    if name.startswith(f"{AUX_HEADS}."):
        return "aux_head"
    if _LAYER.search(name):
        return "client_layers" if spec.role is StageRole.CLIENT else "server_layers"
    return "embeddings" if _EMBEDDINGS.search(name) else "final_head"
