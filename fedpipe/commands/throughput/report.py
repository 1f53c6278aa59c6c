"""What a throughput measurement means: medians, ratios, and the simulator's ideal. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from fedpipe.commands.plan.ideal import predict
from fedpipe.commands.throughput.advice import advise
from fedpipe.commands.throughput.utilisation import Product, Utilisation, utilisation
from fedpipe.config.schema import RunConfig
from fedpipe.errors import ConfigError
from fedpipe.pipeline.timeline import COMPUTE, StageCost
from fedpipe.report.records import Environment

WAITING = (
    "recv_activation", "send_activation", "recv_grad", "send_grad", "send_home", "recv_home_grad",
)  # fmt: skip
"""Events in which a stage waits for a neighbour."""
TraceEvent = tuple[str, int, int, float, float]
"""(name, micro_batch, step, start_s, end_s), as in ``fedpipe.pipeline.stage_engine.Trace``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputSettings:
    """How long to measure, and on what."""

    repetitions: int = 6
    """Windows of every schedule; their order rotates."""
    num_steps: int = 6
    """Local steps per window, 3 or more; the first and the last are not counted."""
    emulate_ms: float = 0.0
    """Milliseconds that a layer's forward pass sleeps instead of computing; 0 computes."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for flag, value, least in (
            ("--repetitions", self.repetitions, 1),
            ("--steps", self.num_steps, 3),
        ):
            if value < least:
                raise ConfigError(f"{flag}: expected {least} or more, got {value}. 6 is usual.")
        if self.emulate_ms < 0:
            raise ConfigError(
                f"--emulate-ms: expected milliseconds per layer, got {self.emulate_ms:g}. Leave it "
                "out to compute for real."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWindow:
    """One run of one schedule as one stage saw it; seconds are of the host's monotonic clock."""

    stage: int
    ends: tuple[float, ...]
    """When each local step was complete."""
    events: tuple[TraceEvent, ...]
    """Instructions; empty where the window was not traced."""
    forward_bytes: int
    """Sent to the next stage."""
    backward_bytes: int
    """Sent to the previous stage."""

    @property
    def steady_steps(self) -> int:
        """Local steps in steady state."""
        return len(self.ends) - 2

    @property
    def steady_s(self) -> float:
        """Seconds from the end of the first step to the end of the last but one.

        The first step fills the pipeline; during the last one earlier stages are done already.
        """
        return self.ends[-2] - self.ends[0]

    def steady_events(self) -> list[TraceEvent]:
        """Instructions of the steps in steady state."""
        return [e for e in self.events if 0 < e[2] < len(self.ends) - 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What the processes saw: by schedule, then repetition, then stage."""

    windows: dict[str, list[list[StageWindow]]]
    """Timed."""
    traces: dict[str, list[list[StageWindow]]]
    """Traced; the same windows where tracing does not slow a step down (CPU)."""
    peak_memory_bytes: dict[str, list[int]]
    """By schedule, one per process."""
    matmul_flops_per_s: list[list[float]]
    """FLOP/s of a bare matrix product, by process, then repetition; empty for emulated devices."""
    vocab_size: int
    """Of the prepared text."""
    device: str
    threads_per_process: int


class Spread(TypedDict):
    """How a number varies."""

    median: float
    p10: float
    p90: float


class Pace(TypedDict):
    """How fast a schedule is, and what its processes do meanwhile."""

    tokens_per_s: float
    step_s: Spread
    bubble_pct: float
    """Share of the time in which processes wait for a neighbour, their mean."""
    stage_busy_pct: list[float]
    stage_time_pct: list[dict[str, float]]
    """By process, the share of its time by instruction."""
    bytes_forward_per_token: float
    bytes_backward_per_token: float


class Schedule(Pace, Utilisation):
    """What was measured of a schedule."""

    peak_memory_bytes: list[int]
    """By process."""


class StageSeconds(TypedDict):
    """The fields of ``StageCost``."""

    forward_s: float
    backward_s: float
    optimizer_s: float


class Ideal(TypedDict):
    """What the simulator makes of the measured costs of the stages, with free messages."""

    tokens_per_s: float
    step_s: float
    bubble_pct: float
    stage_busy_pct: list[float]
    costs: list[StageSeconds]
    reached_pct: float
    """Ideal over measured step, the median over repetitions."""


class MeasuringEnvironment(Environment):
    """The environment of a measurement, and how it was told to measure."""

    emulate_ms: float
    repetitions: int
    num_steps: int


class Circumstances(MeasuringEnvironment):
    """What was measured, on what; versions and command."""

    device: str
    threads_per_process: int
    num_stages: int
    num_micro_batches: int
    tokens_per_step: int
    matmul: str | None
    """The product of matrices that is the ceiling; None where devices are emulated."""
    matmul_flops_per_s: list[float] | None
    """By process."""


class Report(TypedDict):
    """The content of ``throughput/report.json``."""

    schedules: dict[str, Schedule]
    ratios: dict[str, Spread]
    """By ``streaming_vs_NAME``, how many times streaming is faster."""
    ideal: dict[str, Ideal]
    environment: Circumstances
    advice: list[str]
    """Sentences."""


class MeasuredPoint(TypedDict):
    """A point of a grid, and its report."""

    name: str
    overrides: list[str]
    report: Report


class Comparison(TypedDict):
    """The content of ``throughput/report.json`` of a grid."""

    points: list[MeasuredPoint]
    environment: Environment


def single_replica(config: RunConfig) -> RunConfig:
    """Return the configuration of one replica, each stage on one process.

    Raises:
        ConfigError: There is one stage only, so no pipeline.
    """
    if config.pipeline.num_stages < 2:
        raise ConfigError(
            "pipeline.cut: expected one cut or more, because schedules differ only between stages,"
            f" got {list(config.pipeline.cut)}. Set for example pipeline.cut=[2]."
        )
    federation = replace(
        config.federation, num_replicas=1, clients_per_round=1, data_parallel_degree=1
    )
    return replace(config, federation=federation)


def summarise(
    measurement: Measurement, config: RunConfig, *, environment: MeasuringEnvironment
) -> Report:
    """Make ``throughput/report.json``.

    Args:
        measurement: All windows.
        config: Of the single replica that was measured.
        environment: Versions, host, command, and how it was measured.

    Returns:
        The report; all that its pages say is in it.
    """
    tokens = config.blocks_per_step * config.data.sequence_length
    schedules: dict[str, Schedule] = {}
    ideals: dict[str, Ideal] = {}
    for name, windows in measurement.windows.items():
        traces = measurement.traces[name]
        schedules[name] = {
            **_pace(windows, traces, config=config, tokens=tokens),
            "peak_memory_bytes": measurement.peak_memory_bytes[name],
            **utilisation(
                name,
                windows,
                traces,
                ceiling=measurement.matmul_flops_per_s,
                config=config,
                vocab_size=measurement.vocab_size,
            ),
        }
        ideals[name] = _ideal(name, windows, traces, config=config, tokens=tokens)
    ratios = {
        f"streaming_vs_{name}": _spread(_paired(measurement, "streaming", name))
        for name in measurement.windows
        if name != "streaming"
    }
    return {
        "schedules": schedules,
        "ratios": ratios,
        "ideal": ideals,
        "environment": _circumstances(measurement, config, environment, tokens=tokens),
        "advice": advise(schedules, ideals, config, vocab_size=measurement.vocab_size),
    }


def _circumstances(
    measurement: Measurement, config: RunConfig, environment: MeasuringEnvironment, *, tokens: int
) -> Circumstances:
    ceiling = measurement.matmul_flops_per_s
    product = Product.of(config, vocab_size=measurement.vocab_size)
    return {
        **environment,
        "device": measurement.device,
        "threads_per_process": measurement.threads_per_process,
        "num_stages": config.pipeline.num_stages,
        "num_micro_batches": config.pipeline.num_micro_batches,
        "tokens_per_step": tokens,
        "matmul": str(product) if ceiling else None,
        "matmul_flops_per_s": [statistics.median(own) for own in ceiling] or None,
    }


def costs(traces: Sequence[Sequence[StageWindow]]) -> list[StageCost]:
    """Return what every stage computes, from the medians of its instructions.

    Args:
        traces: Repetitions, then stages.
    """
    result = []
    for repetitions in zip(*traces, strict=True):
        events = [event for window in repetitions for event in window.steady_events()]

        def median(*names: str, events: list[TraceEvent] = events) -> float:
            return statistics.median(e[4] - e[3] for e in events if e[0] in names)

        # The head is inside the backward instruction (stock: inside the forward one).
        result.append(
            StageCost(
                forward_s=median("forward"),
                backward_s=median("backward", "local_backward"),
                optimizer_s=median("optimizer_step"),
            )
        )
    return result


def _pace(
    windows: Sequence[Sequence[StageWindow]],
    traces: Sequence[Sequence[StageWindow]],
    *,
    config: RunConfig,
    tokens: int,
) -> Pace:
    # The last stage completes a step; the periods between completions are the pace.
    steps = [b - a for w in windows for a, b in _periods(w[-1].ends)]
    means = [_step_s(w[-1]) for w in windows]
    shares = _by_process([_shares(stage) for stage in zip(*traces, strict=True)], config)
    waiting = [sum(share[name] for name in WAITING if name in share) for share in shares]
    total = tokens * sum(len(w[-1].ends) for w in windows)
    return {
        "tokens_per_s": tokens / statistics.median(means),
        "step_s": _spread(steps),
        "bubble_pct": statistics.mean(waiting),
        "stage_busy_pct": [sum(s[name] for name in COMPUTE if name in s) for s in shares],
        "stage_time_pct": shares,
        "bytes_forward_per_token": sum(s.forward_bytes for w in windows for s in w) / total,
        "bytes_backward_per_token": sum(s.backward_bytes for w in windows for s in w) / total,
    }


def _by_process(shares: list[dict[str, float]], config: RunConfig) -> list[dict[str, float]]:
    """Add up the stages of a process: the first one and a head that is at home there."""
    first, *others = shares[: config.pipeline.num_stages]
    for head in shares[config.pipeline.num_stages :]:
        first = {name: first.get(name, 0.0) + head.get(name, 0.0) for name in first | head}
        del first["other"]
        first["other"] = max(0.0, 100.0 - sum(first.values()))
    return [first, *others]


def _periods(ends: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(ends[:-2], ends[1:-1], strict=True))


def _shares(windows: Sequence[StageWindow]) -> dict[str, float]:
    """Share of a stage's time by instruction, in percent; "other" is between instructions."""
    duration = sum(window.steady_s for window in windows)
    shares: dict[str, float] = {}
    for window in windows:
        first, last = window.ends[0], window.ends[-2]
        for name, _, _, start, end in window.events:
            # A step is complete within its optimizer's instruction, which thus lies in two steps.
            inside = max(0.0, min(end, last) - max(start, first))
            shares[name] = shares.get(name, 0.0) + 100.0 * inside / duration
    shares["other"] = max(0.0, 100.0 - sum(shares.values()))
    return shares


def _ideal(
    name: str,
    windows: Sequence[Sequence[StageWindow]],
    traces: Sequence[Sequence[StageWindow]],
    *,
    config: RunConfig,
    tokens: int,
) -> Ideal:
    stages = costs(traces)
    timeline = predict(name, stages, config)
    # Repetition by repetition: what slows the machine down slows the ideal down, too.
    reached = [
        predict(name, costs([trace]), config).step_s / _step_s(window[-1])
        for trace, window in zip(traces, windows, strict=True)
    ]
    return {
        "tokens_per_s": tokens / timeline.step_s,
        "step_s": timeline.step_s,
        "bubble_pct": timeline.bubble_pct,
        "stage_busy_pct": timeline.stage_busy_pct,
        "costs": [
            {"forward_s": c.forward_s, "backward_s": c.backward_s, "optimizer_s": c.optimizer_s}
            for c in stages
        ],
        "reached_pct": 100.0 * statistics.median(reached),
    }


def _step_s(window: StageWindow) -> float:
    return window.steady_s / window.steady_steps


def _paired(measurement: Measurement, fast: str, slow: str) -> list[float]:
    """How many times ``fast`` is faster, repetition by repetition."""
    pairs = zip(measurement.windows[fast], measurement.windows[slow], strict=True)
    return [b[-1].steady_s / a[-1].steady_s for a, b in pairs]


def _spread(values: Sequence[float]) -> Spread:
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else []
    return {
        "median": statistics.median(values),
        "p10": tenths[0] if tenths else values[0],
        "p90": tenths[-1] if tenths else values[0],
    }
