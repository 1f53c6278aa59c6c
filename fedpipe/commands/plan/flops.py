"""Count the FLOPs of a stage for a micro-batch. No torch."""

from __future__ import annotations

from fedpipe.config.model_shape import ModelShape
from fedpipe.config.schema import RunConfig
from fedpipe.models.split import StageSpec
from fedpipe.pipeline.timeline import StageCost


def stage_flops(spec: StageSpec, config: RunConfig, shape: ModelShape) -> StageCost:
    """Count the FLOPs of a stage for one micro-batch.

    A backward pass has the FLOPs of two forward passes, of three with recomputed activations.

    Args:
        spec: The stage.
        config: The run, for sequence length, micro-batch and recomputation.
        shape: Sizes of the whole model.

    Returns:
        A cost in FLOPs instead of seconds, which the simulator accepts as well.
    """
    first, end = spec.first_layer, spec.end_layer
    backward = 3.0 if config.pipeline.activation_checkpointing else 2.0
    head = 0.0
    if spec.has_head:
        batch = config.pipeline.micro_batch_size
        head = 3.0 * batch * config.data.num_scored * shape.head_flops_per_token()
        if spec.head == "mlm+layer":
            head += (1.0 + backward) * masked_layer_flops(config, shape, end)
    layers = float(_layers_flops(config, shape, first, end - spec.ends_encoder))
    if spec.ends_encoder:
        layers += masked_layer_flops(config, shape, end - 1)
    return StageCost(forward_s=layers, backward_s=layers * backward, head_s=head)


def layer_flops(config: RunConfig, shape: ModelShape, index: int) -> int:
    """Count the forward FLOPs of an encoder layer for one micro-batch."""
    return _layers_flops(config, shape, index, index + 1)


def _layers_flops(config: RunConfig, shape: ModelShape, first: int, end: int) -> int:
    length = config.data.num_positions
    per_sequence = shape.layers_flops(first, end, sequence_length=length)
    return config.pipeline.micro_batch_size * per_sequence


def masked_layer_flops(config: RunConfig, shape: ModelShape, index: int) -> int:
    """Count the same for a layer in front of a head, which runs at masked positions only."""
    if config.data.padded_length:  # all positions are scored
        return layer_flops(config, shape, index)
    return config.pipeline.micro_batch_size * shape.masked_layer_flops(
        config.data.num_positions, num_masked=config.data.num_scored
    )
