"""Measure the time of layers, heads and optimizer steps on this device, to choose a cut.

One process computes one stage after the other, with as many threads as a process of the run has.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fedpipe.commands.plan.cut import LayerCosts
from fedpipe.commands.plan.flops import layer_flops, masked_layer_flops
from fedpipe.config.deepspeed import deepspeed_config, stage_precision
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.distributed.device import autocast, select_device, synchronize
from fedpipe.models.split import StageSpec, stage_specs
from fedpipe.models.stage import Stage, build_stage
from fedpipe.models.weights import hf_config
from fedpipe.pipeline.optimizer import build_optimizer
from fedpipe.pipeline.timeline import StageCost

MIN_REPETITIONS = 3
MAX_S = 20.0
"""Seconds after which no further repetition starts."""
_REPETITIONS = 9


def measure_layer_costs(config: RunConfig) -> LayerCosts:
    """Measure every stage with one layer, and the first stage also with two.

    Args:
        config: The run, for model, micro-batch, objective, heads and number of stages.

    Returns:
        Seconds on this device, with torch's present number of threads.
    """
    info = tokenizer_info(config)
    shape = model_shape(config, vocab_size=info.vocab_size, pad_id=info.pad_id)
    num_stages = config.pipeline.num_stages
    model = hf_config(shape, pad_id=info.pad_id, cls_id=info.cls_id, sep_id=info.sep_id)
    # The difference between the first stage with two layers and with one is the time of a layer.
    specs = _specs(config, tuple(range(1, num_stages)))
    longer = _specs(config, tuple(range(2, num_stages + 1)))[0]
    timed = [_TimedStage(spec, config, model) for spec in (*specs, longer)]
    started = time.monotonic()
    for repetition in range(1 + _REPETITIONS):  # the first one is warm-up and not counted
        if repetition > MIN_REPETITIONS and time.monotonic() - started > MAX_S:
            break
        for stage in timed:
            stage.run()
    *single, double = [stage.cost() for stage in timed]
    layer = _combine(double, single[0], -1.0)
    measured = layer.forward_s + layer.backward_s
    per_flop = measured / layer_flops(config, shape, 1)
    every = range(shape.num_hidden_layers)
    layers = [per_flop * layer_flops(config, shape, index) for index in every]
    last = per_flop * masked_layer_flops(config, shape, every[-1])
    own = [last if s.ends_encoder else sum(layers[s.first_layer : s.end_layer]) for s in specs]
    present = stage_specs(config.pipeline, num_hidden_layers=shape.num_hidden_layers)
    return LayerCosts(
        layers_s=(*layers[:-1], last),
        rest_s=tuple(
            max(0.0, cost.forward_s + cost.backward_s - own_s)
            for cost, own_s in zip(single, own, strict=True)
        ),
        stages=tuple(
            _combine(cost, layer, max(spec.num_layers - 1, 0))
            for cost, spec in zip(single, present, strict=True)
        ),
    )


def _specs(config: RunConfig, cut: tuple[int, ...]) -> tuple[StageSpec, ...]:
    pipeline = replace(config.pipeline, cut=cut)
    return stage_specs(pipeline, num_hidden_layers=(cut[-1] if cut else 0) + 1)


def _combine(a: StageCost, b: StageCost, times: float) -> StageCost:
    """Return ``a + times * b``, but not below 0, which noise could give."""
    return StageCost(
        forward_s=max(0.0, a.forward_s + times * b.forward_s),
        backward_s=max(0.0, a.backward_s + times * b.backward_s),
        optimizer_s=max(0.0, a.optimizer_s + times * b.optimizer_s),
    )


class _TimedStage:
    """A stage that repeats one micro-batch and measures its time."""

    def __init__(self, spec: StageSpec, config: RunConfig, model: PretrainedConfig) -> None:
        self._device = select_device()
        self._stage: Stage = build_stage(
            spec,
            model,
            seed=0,
            activation_checkpointing=config.pipeline.activation_checkpointing,
            compiled=config.pipeline.compile,
            padded_after=config.data.padded_after,
            start_words=config.data.start_words,
        )[0]
        self._stage.to(self._device).train()
        self._optimizer = build_optimizer(self._stage, config.optimizer)
        self._precision = stage_precision(deepspeed_config(config))
        batch, length = config.pipeline.micro_batch_size, config.data.num_positions
        scored = config.data.num_scored
        generator = torch.Generator().manual_seed(0)
        if spec.is_first:
            vocabulary = self._stage.get_parameter(self._stage.family.word_embeddings).shape[0]
            inputs = torch.randint(3, vocabulary, (batch, length), generator=generator)
        else:
            rows = scored if spec.is_home_head else length
            inputs = torch.randn(batch, rows, self._stage.hidden_size, generator=generator)
        self._inputs = inputs.to(self._device)
        positions = torch.arange(scored).expand(batch, -1)
        labels = torch.full_like(positions, 3)
        targets = torch.stack([positions, labels]).int()
        starts = targets.new_zeros(2, batch, config.data.start_words)
        self._targets = torch.cat([targets, starts], -1).to(self._device)
        self._times: list[tuple[float, float, float]] = []

    def run(self) -> None:
        """Run one local step of one micro-batch."""
        spec = self._stage.spec
        inputs = self._inputs.clone().requires_grad_(spec.sends_grad)
        times = [self._now()]
        with autocast(self._device, self._precision):
            outputs: Tensor = self._stage(inputs, self._targets[0])
        times.append(self._now())
        with autocast(self._device, self._precision):
            if spec.has_head:
                result = self._stage.loss(outputs, self._targets)
            elif spec.home_head is not None:
                result = self._stage.head_inputs(outputs, self._targets[0]).float().sum()
            else:
                result = outputs.float().sum()
        result.backward()
        times.append(self._now())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        times.append(self._now())
        a, b, c, d = times
        self._times.append((b - a, c - b, d - c))

    def cost(self) -> StageCost:
        """Return the median times of all steps but the first."""
        forward, backward, optimizer = zip(*self._times[1:], strict=True)
        return StageCost(
            forward_s=statistics.median(forward),
            backward_s=statistics.median(backward),
            optimizer_s=statistics.median(optimizer),
        )

    def _now(self) -> float:
        synchronize(self._device)
        return time.monotonic()
