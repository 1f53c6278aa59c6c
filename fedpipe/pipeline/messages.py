"""What crosses every edge of the pipeline, as plain data: the plan, the links and the ledger agree.

Pure: no torch.
"""

# B = sequences, T = positions per sequence, M = scored positions per sequence, D = hidden size

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fedpipe.config.deepspeed import autocast_dtype, deepspeed_config
from fedpipe.config.schema import RunConfig
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


def edge_messages(
    config: RunConfig, specs: tuple[StageSpec, ...], *, hidden_size: int
) -> tuple[EdgeMessages, ...]:
    """Describe the messages of every edge.

    Args:
        config: Batch, precision and wire formats.
        specs: All stages.
        hidden_size: D.

    Returns:
        In the order of ``fedpipe.models.split.edges``. Forwards the activations (B, T, D) and,
        int32, the masked tokens' positions and labels (2, B, M), or without labels (1, B, M); to a
        head at home the masked positions' activations (B, M, D) alone. Backwards the gradient of
        the activations, or nothing. With ``data.padded_length`` M = T: all positions take the
        masked ones' place.
    """
    batch, length = config.pipeline.micro_batch_size, config.data.num_positions
    scored = config.data.num_scored
    which = "all" if config.data.padded_length else "masked"
    dtype = autocast_dtype(deepspeed_config(config)) or "float32"
    result = []
    for index, edge in enumerate(edges(specs)):
        spec = specs[edge.source]
        wire = config.pipeline.wire_of(index).replace("auto", "")
        homewards = edge.target == spec.home_head
        rows, prefix = (scored, f"{which} positions' ") if homewards else (length, "")
        shape = (batch, rows, hidden_size)
        forward = [WireTensor(name=f"{prefix}activations", shape=shape, dtype=dtype, wire=wire)]
        if not homewards:
            name = f"{which} positions{' and labels' if spec.sends_labels else ''}"
            targets = (1 + spec.sends_labels, batch, scored)
            forward.append(WireTensor(name=name, shape=targets, dtype="int32"))
        back = WireTensor(name=f"{prefix}gradients", shape=shape, dtype=dtype, wire=wire)
        result.append(
            EdgeMessages(
                edge=edge, forward=tuple(forward), backward=(back,) if edge.backward else ()
            )
        )
    return tuple(result)
