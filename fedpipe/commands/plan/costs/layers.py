"""Where to cut: stages taken apart into layers, and the cut that balances them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from fedpipe.commands.plan.costs.ideal import predict
from fedpipe.config.schema import RunConfig
from fedpipe.models.split import placement, stage_specs
from fedpipe.pipeline.timeline import StageCost


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCosts:
    """Measured stages taken apart: what moves with a layer, and what stays with its stage."""

    layers_s: tuple[float, ...]
    """Forward and backward of every encoder layer, for one micro-batch."""
    rest_s: tuple[float, ...]
    """The same of what a stage has beside its layers: its head."""
    stages: tuple[StageCost, ...]
    """As measured."""

    def with_cut(self, cut: Sequence[int]) -> list[StageCost]:
        """Put the stages together again, cut elsewhere.

        A stage divides its time between forward and backward as it was measured. Its optimizer
        step is left as it is.
        """
        bounds = [0, *cut, len(self.layers_s)]
        bounds += [len(self.layers_s)] * (len(self.stages) + 1 - len(bounds))  # heads at home
        costs = []
        for index, stage in enumerate(self.stages):
            total = self.rest_s[index] + sum(self.layers_s[bounds[index] : bounds[index + 1]])
            measured = stage.forward_s + stage.backward_s
            forward = stage.forward_s / measured if measured else 0.0
            costs.append(
                replace(stage, forward_s=total * forward, backward_s=total * (1.0 - forward))
            )
        return costs


def best_cut(costs: LayerCosts, config: RunConfig) -> tuple[int, ...]:
    """Find the cut whose busiest process has the least to do, and of such the nearest one.

    Args:
        costs: Of the stages of its objective.
        config: Its number of stages is kept; a client without layers may stay so.

    Returns:
        As ``pipeline.cut``.
    """
    num_layers, present = len(costs.layers_s), config.pipeline.cut
    num_micro_batches = config.pipeline.num_micro_batches
    held = placement(stage_specs(config.pipeline, num_hidden_layers=1))  # who is where
    fixed = [
        sum(num_micro_batches * costs.rest_s[i] + costs.stages[i].optimizer_s for i in own)
        for own in ([spec.stage_id for spec in process] for process in held)
    ]

    def load(stage: int, first: int, end: int) -> float:
        return fixed[stage] + num_micro_batches * sum(costs.layers_s[first:end])

    @cache
    def best(stage: int, first: int) -> tuple[float, int, tuple[int, ...]]:
        if stage == len(present):
            return load(stage, first, num_layers), 0, ()
        least = 0 if stage == 0 and present[0] == 0 else first + 1
        found = []
        for end in range(least, num_layers - (len(present) - stage) + 1):
            busiest, moved, ends = best(stage + 1, end)
            busiest = max(busiest, load(stage, first, end))
            found.append((busiest, moved + abs(end - present[stage]), (end, *ends)))
        return min(found)

    return best(0, 0)[2]


def cut_lines(costs: LayerCosts, config: RunConfig, *, cut: tuple[int, ...]) -> list[str]:
    """Say what was measured, and what the simulator makes of a cut beside the configuration's.

    Args:
        costs: Of the stages of its objective.
        config: Its cut is the one that ``cut`` is compared with.
        cut: For example what ``best_cut`` has found.

    Returns:
        Lines for people.
    """
    whole, last = costs.layers_s[0], costs.layers_s[-1]
    heads = ", ".join(f"{1000 * rest:,.1f}" for rest in costs.rest_s)
    lines = [
        f"  measured layer {1000 * whole:,.1f} ms per micro-batch, forward and backward; the last "
        f"one {1000 * last:,.1f}; beside layers, by stage: {heads}"
    ]
    tokens = config.pipeline.num_micro_batches * config.pipeline.micro_batch_size
    tokens *= config.data.sequence_length
    paces = []
    for each in dict.fromkeys((config.pipeline.cut, cut)):
        stages = costs.with_cut(each)
        step_s = predict(config.pipeline.schedule, stages, config).step_s
        paces.append(tokens / step_s)
        loads = ", ".join(f"{1000 * (s.forward_s + s.backward_s):,.1f}" for s in stages)
        lines.append(
            f"  cut      {str(list(each)):<10} {loads} ms per micro-batch by stage; predicted "
            f"{paces[-1]:,.0f} tokens/s"
        )
    gain = "the best there is" if len(paces) == 1 else f"{paces[1] / paces[0]:.2f} x"
    lines[-1] += f", {gain}"
    return lines
