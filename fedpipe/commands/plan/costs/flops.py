"""How much a stage computes, counted: FLOPs of a micro-batch. No torch."""

from __future__ import annotations

from fedpipe.config.model_shape import ModelShape
from fedpipe.config.schema import RunConfig
from fedpipe.models.split import StageSpec
from fedpipe.pipeline.timeline import StageCost


def stage_flops(spec: StageSpec, config: RunConfig, shape: ModelShape) -> StageCost:
    """FLOPs of one micro-batch; a backward pass is two forwards, three where it recomputes.

    Args:
        spec: The stage.
        config: Length, micro-batch and recomputation; the cut is the specification's.
        shape: Of the whole model.

    Returns:
        FLOPs in place of seconds, so that the simulator takes them.
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
    """Forward FLOPs of an encoder layer for one micro-batch."""
    length = config.data.num_positions
    return config.pipeline.micro_batch_size * length * shape.layer_flops_per_token(length)


def masked_layer_flops(config: RunConfig, shape: ModelShape) -> int:
    """Count the same of the model's last layer, which runs at the scored positions only."""
    return config.pipeline.micro_batch_size * shape.masked_layer_flops(
        config.data.num_positions, num_masked=config.data.num_scored
    )
