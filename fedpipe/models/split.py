"""Which parameter belongs to which stage: a split is a filter, a merge is a union.

Parameters keep their full Hugging Face names on every stage (``roberta.encoder.layer.7...`` is
called so wherever layer 7 lives), so nothing is ever renumbered. Pure: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeVar

from fedpipe.config.schema import PipelineConfig
from fedpipe.errors import FederationError

T = TypeVar("T")

Part = Literal["embeddings", "client_layers", "aux_head", "server_layers", "final_head"]
AUX_HEADS = "aux_heads"
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
    """Its own loss: "" where a later stage's gradient trains it."""
    sends_labels: bool = True
    """Its messages carry the masked tokens' labels beside their positions."""
    sends_grad: bool = False
    """It hands the gradient of what it received back to the stage before it."""
    receives_grad: bool = False
    """The stage after it hands the gradient of what it sent back."""
    sends_home: bool = False
    """It sends the masked positions' hidden states alone, to the head at the client's (U-shape)."""

    @property
    def is_first(self) -> bool:
        """It holds the embeddings and reads text."""
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        """It holds the final head."""
        return self.stage_id == self.num_stages - 1

    @property
    def is_home_head(self) -> bool:
        """It is the final head alone, on the client's first process (U-shape)."""
        return self.is_last and not self.is_first and self.num_layers == 0

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
        head = ("lm_head",) if self.is_last else ("aux_head",) if self.has_head else ()
        return (("embeddings",) if self.is_first else ()) + layers + head


def stage_specs(pipeline: PipelineConfig, *, num_hidden_layers: int) -> tuple[StageSpec, ...]:
    """Describe every stage of a pipeline.

    With ``head_location: client`` the final head is a virtual stage of its own after the encoder's,
    on the process of stage 0. The server's stages then know no labels: the head's gradient comes
    back to the last of them and goes on to the first, and no further under ``local_loss``.

    Args:
        pipeline: Cut, objective and heads.
        num_hidden_layers: Encoder layers of the whole model.

    Returns:
        One description per virtual stage, in order.
    """
    bounds = [0, *pipeline.cut, num_hidden_layers, num_hidden_layers]
    at_home = pipeline.head_location == "client"
    end_to_end = pipeline.objective == "end_to_end"
    num_stages, clients = pipeline.num_virtual_stages, pipeline.num_client_stages

    def role(stage_id: int) -> StageRole:
        at_client = stage_id < clients or stage_id == pipeline.num_stages
        return StageRole.CLIENT if at_client else StageRole.SERVER

    def coupled(stage_id: int) -> bool:
        """Whether gradients cross the edge from a stage to the one after it."""
        inside = 0 <= stage_id < num_stages - 1
        return inside and (end_to_end or (at_home and role(stage_id) is StageRole.SERVER))

    def head(stage_id: int) -> Literal["", "mlm", "mlm+layer"]:
        if stage_id == num_stages - 1:
            return "mlm"
        return "" if coupled(stage_id) else pipeline.local_head

    return tuple(
        StageSpec(
            stage_id=s,
            num_stages=num_stages,
            role=role(s),
            first_layer=bounds[s],
            end_layer=bounds[s + 1],
            head=head(s),
            sends_labels=not at_home or role(s + 1) is StageRole.CLIENT,
            sends_grad=coupled(s - 1),
            receives_grad=coupled(s),
            sends_home=at_home and s == pipeline.num_stages - 1,
        )
        for s in range(num_stages)
    )


def backward_edges(pipeline: PipelineConfig) -> frozenset[int]:
    """Stages to which the stage after them hands gradients; empty for a stream of local losses."""
    layers = pipeline.cut[-1] + 1 if pipeline.cut else 1  # how many does not matter
    specs = stage_specs(pipeline, num_hidden_layers=layers)
    return frozenset(s.stage_id for s in specs if s.receives_grad)


def placement(specs: Sequence[StageSpec]) -> tuple[tuple[StageSpec, ...], ...]:
    """Group the stages by process: one each, and a head that is at home with the first stage."""
    *encoder, last = specs
    if not last.is_home_head:
        return tuple((spec,) for spec in specs)
    return ((encoder[0], last), *((spec,) for spec in encoder[1:]))


def owner(name: str, specs: Iterable[StageSpec]) -> int:
    """Stage that holds the parameter ``name`` (full Hugging Face name, or an auxiliary head's)."""
    specs = tuple(specs)
    if name.startswith(f"{AUX_HEADS}."):
        return int(name.split(".")[1])
    layer = _LAYER.search(name)
    if layer:
        index = int(layer.group(1))
        return next(s.stage_id for s in specs if s.first_layer <= index < s.end_layer)
    return 0 if ".embeddings." in name else specs[-1].stage_id


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
    return "embeddings" if ".embeddings." in name else "final_head"
