"""Describe the messages of every pipeline edge, for the plan, the links and the traffic ledger.

No torch.
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
    """Description for people."""
    shape: tuple[int, ...]
    dtype: str
    """Name of the torch dtype that the receiver gets."""
    wire: str = ""
    """Wire format: "" for ``dtype``, "fp32", "bf16", or "int8" with a float32 scale per row."""

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        if self.wire == "int8":
            return prod(self.shape) + prod(self.shape[:-1]) * _ITEM_BYTES["float32"]
        return prod(self.shape) * _ITEM_BYTES[self.wire or self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeMessages:
    """Messages of one micro-batch and one data-parallel rank over an edge, in both directions."""

    edge: Edge
    forward: tuple[WireTensor, ...]
    backward: tuple[WireTensor, ...]
    """Empty if nothing is sent back."""

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
    """Sizes of a micro-batch's tensors, and names for their contents."""

    length: int
    """T."""
    num_targets: int
    """Columns of the targets, M."""
    num_rows: int
    """Rows per sequence that a head at the client gets."""
    known: str
    """Name of the first plane of the targets, which every stage gets."""
    labels: str
    """Name of the other planes."""
    num_planes: int = 2
    """P."""
    rows: str = ""
    """Name of the rows that a head at the client gets, as a prefix."""


def edge_messages(
    config: RunConfig, specs: tuple[StageSpec, ...], *, hidden_size: int
) -> tuple[EdgeMessages, ...]:
    """Describe the messages of every edge in pre-training.

    Args:
        config: Batch, precision and wire formats.
        specs: All stages.
        hidden_size: D.

    Returns:
        The result of ``messages_of``, for targets that are positions and labels of masked tokens.
        With ``data.padded_length`` all positions are targets, so M = T. With ``data.attention``
        document the words that say where documents begin are further columns.
    """
    which = "all" if config.data.padded_length else "masked"
    return messages_of(
        config.pipeline,
        specs,
        MicroBatchShape(
            length=config.data.num_positions,
            num_targets=config.data.num_scored + config.data.start_words,
            num_rows=config.data.num_scored,
            known=f"{which} positions" + ", document starts" * bool(config.data.start_words),
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
        shape: Sizes and names of a micro-batch's tensors.
        hidden_size: D.
        dtype: Name of the dtype in which the stages compute.

    Returns:
        Messages in the order of ``fedpipe.models.split.edges``. A forward message holds the
        activations (B, T, D) and the int32 targets (P, B, M), or (1, B, M) without labels. To a
        head at the client it holds the hidden states at the targets, (B, M, D), alone. A backward
        message holds the gradient of the activations.
    """
    batch = pipeline.micro_batch_size
    result = []
    for index, edge in enumerate(edges(specs)):
        spec = specs[edge.source]
        wire = pipeline.wire_of(index).replace("auto", "")
        to_home_head = edge.target == spec.home_head
        rows, prefix = (shape.num_rows, shape.rows) if to_home_head else (shape.length, "")
        size = (batch, rows, hidden_size)
        forward = [WireTensor(name=f"{prefix}activations", shape=size, dtype=dtype, wire=wire)]
        if not to_home_head:
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
