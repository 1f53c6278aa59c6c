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
    layer = float(layer_flops(config, shape))
    masked_layer = float(masked_layer_flops(config, shape))
    backward = 3.0 if config.pipeline.activation_checkpointing else 2.0
    head = 0.0
    if spec.has_head:
        batch = config.pipeline.micro_batch_size
        head = 3.0 * batch * config.data.num_scored * shape.head_flops_per_token()
        head += (1.0 + backward) * masked_layer if spec.head == "mlm+layer" else 0.0
    layers = spec.num_layers * layer
    if spec.ends_encoder:
        layers -= layer - masked_layer
    return StageCost(forward_s=layers, backward_s=layers * backward, head_s=head)


def layer_flops(config: RunConfig, shape: ModelShape) -> int:
    """Count the forward FLOPs of an encoder layer for one micro-batch."""
    length = config.data.num_positions
    return config.pipeline.micro_batch_size * length * shape.layer_flops_per_token(length)


def masked_layer_flops(config: RunConfig, shape: ModelShape) -> int:
    """Count the same for the model's last layer, which runs at masked positions only."""
    return config.pipeline.micro_batch_size * shape.masked_layer_flops(
        config.data.num_positions, num_masked=config.data.num_scored
    )
