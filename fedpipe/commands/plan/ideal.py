"""Simulate a schedule with measured costs, to predict what it could reach. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedpipe.config.schema import RunConfig
from fedpipe.models.split import stage_specs
from fedpipe.pipeline.timeline import StageCost, Timeline, simulate

SIMULATED = {"streaming": "streaming", "1f1b": "1f1b", "sequential": "sequential", "stock": "1f1b"}
"""Names of the measured schedules, and those of the simulator."""


def scheduled(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration with a schedule of ``SIMULATED`` and its objective."""
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
        name: A key of ``SIMULATED``.
        stages: Costs of every stage, including heads at the client.
        config: The run, with a single replica.
        more_micro_batches: Factor for the number of micro-batches per local step.

    Returns:
        The simulated timeline.
    """
    pipeline = scheduled(config, name).pipeline
    layers = max((1, *(cut + 1 for cut in pipeline.cut)))  # any valid number: costs are given
    return simulate(
        SIMULATED[name],
        stage_specs(pipeline, num_hidden_layers=layers),
        stages,
        num_micro_batches=more_micro_batches * pipeline.num_micro_batches,
        in_flight=pipeline.in_flight,
    )
