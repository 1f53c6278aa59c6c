"""Derive advice from a throughput measurement: what limits the schedules, and what would help.

Every sentence follows from measured numbers. Results of the simulator are called predictions. No
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedpipe.commands.plan.cut import LayerCosts, best_cut
from fedpipe.commands.plan.flops import layer_flops, masked_layer_flops, stage_flops
from fedpipe.commands.plan.ideal import predict, scheduled
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.models.split import placement, stage_specs
from fedpipe.pipeline.timeline import StageCost
from fedpipe.report.format import count

if TYPE_CHECKING:
    from fedpipe.commands.throughput.report import Ideal, Schedule

WORTH = 1.02
"""Smallest predicted gain that is mentioned; repetitions differ by less."""
_VISIBLE_PCT = 5.0
"""Smallest share of the time that is mentioned."""


def advise(
    schedules: dict[str, Schedule], ideals: dict[str, Ideal], config: RunConfig, *, vocab_size: int
) -> list[str]:
    """Name what limits the schedules, and changes that are predicted to help.

    Args:
        schedules: Measurements by schedule.
        ideals: Simulations with the measured costs, by schedule.
        config: The run, with the single replica that was measured.
        vocab_size: Size of the vocabulary.

    Returns:
        Sentences, the most important first.
    """
    costs = {name: [StageCost(**cost) for cost in ideal["costs"]] for name, ideal in ideals.items()}
    if config.pipeline.colocate:
        first = [
            "The stages share one process (`pipeline.colocate`), so which of them waits says "
            "nothing about a pipeline of processes. Measure without it before you move a cut."
        ]
    else:
        first = [
            _bottleneck(costs["streaming"], config),
            _other_cut(costs["streaming"], config, vocab_size=vocab_size),
        ]
    sentences = [
        *first,
        _waiting({name: schedule["bubble_pct"] for name, schedule in schedules.items()}),
        _batches_1f1b(costs, config),
        _optimizer(schedules["streaming"], costs["streaming"], config),
        _gap(schedules["streaming"], reached_pct=ideals["streaming"]["reached_pct"]),
    ]
    return [sentence for sentence in sentences if sentence]


# ----------------------------------------------------------------------------------------- the cut


def take_apart(stages: Sequence[StageCost], config: RunConfig, *, vocab_size: int) -> LayerCosts:
    """Divide the measured time of streaming's stages among their layers and heads, by FLOPs.

    Args:
        stages: Measured costs; ``backward_s`` includes the head.
        config: The measured run.
        vocab_size: Size of the vocabulary.

    Returns:
        Costs of the layers. The last one is cheaper, because it runs at masked positions only.
    """
    config = scheduled(config, "streaming")
    shape = model_shape(config, vocab_size=vocab_size)
    passes = 4.0 if config.pipeline.activation_checkpointing else 3.0
    last = passes * masked_layer_flops(config, shape, shape.num_hidden_layers - 1)
    layers, rest = [], []
    specs = stage_specs(config.pipeline, num_hidden_layers=shape.num_hidden_layers)
    for spec, stage in zip(specs, stages, strict=True):
        flops = stage_flops(spec, config, shape)
        total = flops.forward_s + flops.backward_s + flops.head_s
        measured = stage.forward_s + stage.backward_s
        indices = range(spec.first_layer, spec.end_layer)
        own = [passes * layer_flops(config, shape, index) for index in indices]
        own[-1:] = [last] if spec.ends_encoder else own[-1:]
        layers += [measured * amount / total for amount in own]
        rest.append(measured * (1.0 - sum(own) / total))
    return LayerCosts(layers_s=tuple(layers), rest_s=tuple(rest), stages=tuple(stages))


def _loads(stages: Sequence[StageCost], config: RunConfig) -> list[float]:
    """Return the seconds that every process computes in a local step of streaming."""
    held = placement(stage_specs(scheduled(config, "streaming").pipeline, num_hidden_layers=1))
    steps = [
        config.pipeline.num_micro_batches * (s.forward_s + s.backward_s) + s.optimizer_s
        for s in stages
    ]
    return [sum(steps[spec.stage_id] for spec in process) for process in held]


def _bottleneck(stages: Sequence[StageCost], config: RunConfig) -> str:
    loads = _loads(stages, config)
    order = sorted(range(len(loads)), key=lambda index: -loads[index])
    slowest, following = order[:2]
    heads = " with the heads at home" if slowest == 0 and len(stages) > len(loads) else ""
    more = loads[slowest] / loads[following]
    if more < WORTH:
        return (
            f"Streaming's stages are balanced: the two busiest, {slowest} and {following}, differ "
            f"by {100 * (more - 1):.1f} %."
        )
    return (
        f"Stage {slowest}{heads} is the bottleneck of streaming: it computes "
        f"{1000 * loads[slowest]:,.1f} ms per local step, {100 * (more - 1):.0f} % more than stage "
        f"{following}, the next."
    )


def _other_cut(stages: Sequence[StageCost], config: RunConfig, *, vocab_size: int) -> str:
    costs = take_apart(stages, config, vocab_size=vocab_size)
    cut = best_cut(costs, scheduled(config, "streaming"))
    # Predicting the present cut from its parts gives what was measured.
    now_s, then_s = (
        predict("streaming", costs.with_cut(c), config).step_s for c in (config.pipeline.cut, cut)
    )
    if now_s < WORTH * then_s:
        return (
            f"No other cut into {len(cut) + 1} stages is predicted to make streaming more than "
            f"{100 * (WORTH - 1):.0f} % faster."
        )
    return (
        f"Prediction, not measured: `pipeline.cut={_cut(cut)}` instead of "
        f"`{_cut(config.pipeline.cut)}` ({_moves(config.pipeline.cut, cut)}) would make streaming "
        f"{now_s / then_s:.2f} x as fast. It divides each stage's measured time between its layers "
        "and its head by FLOPs."
    )


def _cut(cut: Sequence[int]) -> str:
    return f"[{','.join(map(str, cut))}]"


def _moves(before: Sequence[int], after: Sequence[int]) -> str:
    moves = []
    for stage, (a, b) in enumerate(zip(before, after, strict=True)):
        if a != b:
            ends = (stage, stage + 1) if b < a else (stage + 1, stage)
            moves.append(f"{count(abs(b - a), 'layer')} from stage {ends[0]} to {ends[1]}")
    return ", ".join(moves)


# ------------------------------------------------------------------------------- the other reasons


def _waiting(waits: dict[str, float]) -> str:
    most = {name: pct for name, pct in waits.items() if pct > 50.0}
    if most:
        named = ", ".join(f"{name} ({pct:.0f} %)" for name, pct in most.items())
        return f"Processes wait for more than half of the time in {named}."
    if waits["streaming"] < _VISIBLE_PCT:
        return f"In streaming, processes wait for {waits['streaming']:.1f} % of the time."
    return ""


def _batches_1f1b(costs: dict[str, list[StageCost]], config: RunConfig) -> str:
    stages = costs["1f1b"]
    now, then = (predict("1f1b", stages, config, more_micro_batches=k) for k in (1, 2))
    gain = 2 * now.step_s / then.step_s
    if gain < WORTH:
        return "1f1b is predicted to gain nothing from more micro-batches per local step."
    streaming_s = predict("streaming", costs["streaming"], config, more_micro_batches=2).step_s
    return (
        f"Prediction: with {2 * config.pipeline.num_micro_batches} micro-batches per local step, a "
        f"batch twice as large, 1f1b makes {gain:.2f} x the tokens/s (bubble {now.bubble_pct:.0f} "
        f"% to {then.bubble_pct:.0f} %), and streaming {then.step_s / streaming_s:.2f} x that."
    )


def _optimizer(streaming: Schedule, stages: Sequence[StageCost], config: RunConfig) -> str:
    share = max(stage.get("optimizer_step", 0.0) for stage in streaming["stage_time_pct"])
    if share < _VISIBLE_PCT:
        return ""
    now, then = (predict("streaming", stages, config, more_micro_batches=k) for k in (1, 2))
    return (
        f"The optimizer takes up to {share:.0f} % of a process' time in streaming. Prediction: "
        f"{2 * config.pipeline.num_micro_batches} micro-batches per local step make "
        f"{2 * now.step_s / then.step_s:.2f} x the tokens/s."
    )


def _gap(streaming: Schedule, *, reached_pct: float) -> str:
    gap = 100.0 - reached_pct
    if gap < _VISIBLE_PCT:
        return ""
    others = [shares["other"] + shares.get("load", 0.0) for shares in streaming["stage_time_pct"]]
    stage = max(range(len(others)), key=others.__getitem__)
    text = f"Streaming misses its ideal by {gap:.0f} %: "
    if others[stage] > gap / 2:
        return (
            f"{text}stage {stage} spends {others[stage]:.0f} % of its time on text and between "
            "instructions."
        )
    step = streaming["step_s"]
    uneven = step["p90"] / step["p10"]
    text += "it waits more than in the simulation, in which messages take no time and every stage "
    text += "always takes its median time."
    if uneven > 1.1:
        text += f" A step took {uneven:.2f} x as long at p90 as at p10: was the machine idle?"
    return text
