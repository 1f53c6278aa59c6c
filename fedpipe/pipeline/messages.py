"""What crosses every edge of the pipeline, as plain data: the plan, the links and the ledger agree.

Pure: no torch.
"""

# B = sequences, T = positions per sequence, M = targets per sequence, P = planes of the targets,
# D = hidden size

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fedpipe.config.deepspeed import autocast_dtype, deepspeed_config
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.models.split import Edge, StageSpec, edges

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class WireTensor:
    """One tensor of a message."""

    name: str
    """What it is, in words."""
    shape: tuple[int, ...]
    dtype: str
    """What its receiver gets, a torch dtype's name."""
    wire: str = ""
    """How it travels: "" as ``dtype``, "fp32", "bf16", or "int8" with a float32 scale per row."""

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        if self.wire == "int8":
            return prod(self.shape) + prod(self.shape[:-1]) * _ITEM_BYTES["float32"]
        return prod(self.shape) * _ITEM_BYTES[self.wire or self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeMessages:
    """What one micro-batch of one data-parallel rank sends over an edge, both ways."""

    edge: Edge
    forward: tuple[WireTensor, ...]
    backward: tuple[WireTensor, ...]
    """Empty where nothing goes back."""

    @property
    def bytes_forward(self) -> int:
        """Bytes from the edge's source to its target."""
        return sum(tensor.nbytes for tensor in self.forward)

    @property
    def bytes_backward(self) -> int:
        """Bytes from the edge's target to its source."""
        return sum(tensor.nbytes for tensor in self.backward)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchShape:
    """What travels with a micro-batch's hidden states, by size and by name."""

    length: int
    """T."""
    num_targets: int
    """M: rows that a head at home gets of every sequence."""
    known: str
    """The first plane of the targets, which every stage gets."""
    labels: str
    """Its other planes."""
    num_planes: int = 2
    rows: str = ""
    """What a head at home gets, as the beginning of a name."""


def edge_messages(
    config: RunConfig, specs: tuple[StageSpec, ...], *, hidden_size: int
) -> tuple[EdgeMessages, ...]:
    """Describe the messages of every edge in pre-training.

    Args:
        config: Batch, precision and wire formats.
        specs: All stages.
        hidden_size: D.

    Returns:
        As ``messages_of``: the targets are the masked tokens' positions and labels. With
        ``data.padded_length`` M = T: all positions take the masked ones' place.
    """
    which = "all" if config.data.padded_length else "masked"
    return messages_of(
        config.pipeline,
        specs,
        MicroBatchShape(
            length=config.data.num_positions,
            num_targets=config.data.num_scored,
            known=f"{which} positions",
            labels="labels",
            rows=f"{which} positions' ",
        ),
        hidden_size=hidden_size,
        dtype=autocast_dtype(deepspeed_config(config)) or "float32",
    )


def messages_of(
    pipeline: PipelineConfig,
    specs: tuple[StageSpec, ...],
    shape: MicroBatchShape,
    *,
    hidden_size: int,
    dtype: str,
) -> tuple[EdgeMessages, ...]:
    """Describe the messages of every edge.

    Args:
        pipeline: Batch and wire formats.
        specs: All stages.
        shape: What a micro-batch holds.
        hidden_size: D.
        dtype: What the stages compute in.

    Returns:
        In the order of ``fedpipe.models.split.edges``. Forwards the activations (B, T, D) and,
        int32, the targets (P, B, M), or without labels (1, B, M); to a head at home the activations
        that it reads, (B, M, D), alone. Backwards the gradient of the activations, or nothing.
    """
    batch = pipeline.micro_batch_size
    result = []
    for index, edge in enumerate(edges(specs)):
        spec = specs[edge.source]
        wire = pipeline.wire_of(index).replace("auto", "")
        homewards = edge.target == spec.home_head
        rows, prefix = (shape.num_targets, shape.rows) if homewards else (shape.length, "")
        size = (batch, rows, hidden_size)
        forward = [WireTensor(name=f"{prefix}activations", shape=size, dtype=dtype, wire=wire)]
        if not homewards:
            name = f"{shape.known} and {shape.labels}" if spec.sends_labels else shape.known
            planes = shape.num_planes if spec.sends_labels else 1
            targets = (planes, batch, shape.num_targets)
            forward.append(WireTensor(name=name, shape=targets, dtype="int32"))
        back = WireTensor(name=f"{prefix}gradients", shape=size, dtype=dtype, wire=wire)
        result.append(
            EdgeMessages(
                edge=edge, forward=tuple(forward), backward=(back,) if edge.backward else ()
            )
        )
    return tuple(result)
