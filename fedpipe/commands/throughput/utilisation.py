"""Compare the FLOP/s of a schedule with those of a bare matrix product. No torch.

In every repetition all processes at once multiply matrices of the model's own shape, and the FLOP/s
of the schedules in that repetition are divided by those of the product. Only FLOPs of the model
count, not those of recomputed activations.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

from fedpipe.commands.plan.flops import stage_flops
from fedpipe.commands.plan.ideal import scheduled
from fedpipe.config.deepspeed import autocast_dtype, deepspeed_config
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.models.split import StageSpec, placement, stage_specs
from fedpipe.pipeline.timeline import COMPUTE

if TYPE_CHECKING:
    from fedpipe.commands.throughput.report import StageWindow

Windows = Sequence[Sequence["StageWindow"]]
"""Measured windows by repetition, then by stage."""


class Utilisation(TypedDict):
    """What a schedule computes, beside what its processes could; all None for emulated devices."""

    flops_per_s: float | None
    """Of all processes."""
    mfu_pct: float | None
    """Model FLOPs utilisation: of the ceiling of all processes."""
    busy_mfu_pct: list[float] | None
    """By process, while it computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The matrix product whose speed is the ceiling: the first one of a feed-forward layer."""

    rows: int
    """Positions of a micro-batch."""
    inner: int
    columns: int
    dtype: str
    """Name of the torch dtype."""

    @classmethod
    def of(cls, config: RunConfig, *, vocab_size: int) -> Product:
        """Return the product for the sizes of a configuration."""
        shape = model_shape(config, vocab_size=vocab_size)
        return cls(
            rows=config.pipeline.micro_batch_size * config.data.num_positions,
            inner=shape.hidden_size,
            columns=shape.intermediate_size,
            dtype=autocast_dtype(deepspeed_config(config)) or "float32",
        )

    def __str__(self) -> str:
        """Write sizes and dtype for people."""
        return f"{self.rows} x {self.inner} by {self.inner} x {self.columns}, {self.dtype}"


def utilisation(
    name: str,
    windows: Windows,
    traces: Windows,
    *,
    ceiling: Sequence[Sequence[float]],
    config: RunConfig,
    vocab_size: int,
) -> Utilisation:
    """Compare the FLOP/s of a schedule with the ceiling of its processes.

    Args:
        name: The schedule.
        windows: Timed windows.
        traces: Traced windows of the same repetitions.
        ceiling: FLOP/s of the product by process, then by repetition; empty for emulated devices.
        config: The run, with a single replica.
        vocab_size: Size of the vocabulary.
    """
    if not ceiling:
        return {"flops_per_s": None, "mfu_pct": None, "busy_mfu_pct": None}
    flops = step_flops(name, config, vocab_size=vocab_size)
    processes = _processes(name, config)
    ceilings = list(zip(*ceiling, strict=True))  # by repetition, then process
    steps = [repetition[-1].steady_s / repetition[-1].steady_steps for repetition in windows]
    busy = []
    for index, held in enumerate(processes):
        own = sum(flops[spec.stage_id] for spec in held)
        place = 0 if config.pipeline.colocate else index
        busy.append(
            statistics.median(
                100.0 * own / _busy_s(repetition, held) / limits[place]
                for repetition, limits in zip(traces, ceilings, strict=True)
            )
        )
    return {
        "flops_per_s": sum(flops) / statistics.median(steps),
        "mfu_pct": statistics.median(
            100.0 * sum(flops) / step / sum(limits)
            for step, limits in zip(steps, ceilings, strict=True)
        ),
        "busy_mfu_pct": busy,
    }


def step_flops(name: str, config: RunConfig, *, vocab_size: int) -> list[float]:
    """Return the FLOPs of a local step by stage, without those of recomputed activations."""
    config = scheduled(config, name)
    pipeline = replace(config.pipeline, activation_checkpointing=False)
    config = replace(config, pipeline=pipeline)
    shape = model_shape(config, vocab_size=vocab_size)
    costs = [
        stage_flops(spec, config, shape)
        for spec in stage_specs(pipeline, num_hidden_layers=shape.num_hidden_layers)
    ]
    return [pipeline.num_micro_batches * (c.forward_s + c.backward_s + c.head_s) for c in costs]


def _processes(name: str, config: RunConfig) -> tuple[tuple[StageSpec, ...], ...]:
    pipeline = scheduled(config, name).pipeline
    return placement(stage_specs(pipeline, num_hidden_layers=pipeline.cut[-1] + 1))


def _busy_s(repetition: Sequence[StageWindow], held: Sequence[StageSpec]) -> float:
    """Return the seconds per local step in which a process computes."""
    windows = [repetition[spec.stage_id] for spec in held]
    events = [event for window in windows for event in window.steady_events()]
    return sum(e[4] - e[3] for e in events if e[0] in COMPUTE) / windows[0].steady_steps
