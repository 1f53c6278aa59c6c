"""The simulator as throughput reports use it: what measured stages could reach. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedpipe.config.schema import RunConfig
from fedpipe.models.split import stage_specs
from fedpipe.pipeline.timeline import StageCost, Timeline, simulate

SIMULATED = {"streaming": "streaming", "1f1b": "1f1b", "sequential": "sequential", "stock": "1f1b"}
"""Schedules that are measured, by what the simulator calls them."""


def scheduled(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration with a schedule of ``SIMULATED`` and the objective it trains."""
    pipeline = replace(
        config.pipeline,
        objective="local_loss" if name == "streaming" else "end_to_end",
        schedule=SIMULATED[name],  # type: ignore[arg-type]
    )
    return replace(config, pipeline=pipeline)


def predict(
    name: str, stages: Sequence[StageCost], config: RunConfig, *, more_micro_batches: int = 1
) -> Timeline:
    """Simulate a measured schedule.

    Args:
        name: Of ``SIMULATED``.
        stages: What every stage costs, heads at home included.
        config: Of the single replica.
        more_micro_batches: How many times as many micro-batches a local step has.

    Returns:
        The steady state.
    """
    pipeline = scheduled(config, name).pipeline
    layers = max((1, *(cut + 1 for cut in pipeline.cut)))  # costs count, not layers
    return simulate(
        SIMULATED[name],
        stage_specs(pipeline, num_hidden_layers=layers),
        stages,
        num_micro_batches=more_micro_batches * pipeline.num_micro_batches,
        in_flight=pipeline.in_flight,
    )
