"""Draw the figures of a report: losses, clients and traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fedpipe.report.drawing import (
    GREY,
    INK,
    PALETTE,
    VERMILLION,
    Draw,
    label_ends,
    thin,
    tokens_unit,
    whole_rounds,
)
from fedpipe.report.format import bytes_text, is_number, scale_bytes
from fedpipe.report.records import TrafficRecord
from fedpipe.report.summary import RunSummary, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_NAMED_CLIENTS = 7


def draw_loss(run: RunSummary) -> Draw | None:
    """Draw the training loss of every stage over tokens, and validation losses as points."""
    curves = {stage: run.training_loss(stage) for stage in range(run.num_stages)}
    curves = {stage: curve for stage, curve in curves.items() if curve[0]}
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(
            xlabel=f"tokens trained, {tokens_unit(run.tokens)[1]}", ylabel="masked-LM loss, nats"
        )
        scale = tokens_unit(run.tokens)[0]
        labels = []
        after = run.tokens_after_round()
        for stage, (tokens, losses) in curves.items():
            color = PALETTE[stage % len(PALETTE)]
            xs = [x / scale for x in tokens]
            axes.plot(*thin(xs, losses), color=color, alpha=0.3, linewidth=0.8)
            smoothed = smooth(losses)
            axes.plot(*thin(xs, smoothed), color=color, linewidth=1.8)
            labels.append((smoothed[-1], f"stage {stage}", color))
            scored = [
                (after[r] / scale, e["loss"])
                for r, e in run.stage_scores(stage)
                if r in after and is_number(e.get("loss"))
            ]
            axes.plot(
                *zip(*scored, strict=True) if scored else ([], []),
                "o",
                color=color,
                markersize=5 if len(scored) <= 30 else 3,
                markeredgecolor=INK,
                markeredgewidth=0.7,
            )
        axes.set_xlim(0, 1.01 * max(tokens[-1] for tokens, _ in curves.values()) / scale)
        label_ends(axes, labels)
        _loss_legend(axes, validated=bool(run.validations))

    return draw


def draw_clients(run: RunSummary) -> Draw | None:
    """Draw the validation loss of every client over rounds, as the last stage scores it."""
    stage = run.last_validated_stage
    series: dict[str, list[tuple[int, float]]] = {}
    mean: list[tuple[int, float]] = []
    for round_id, entry in run.stage_scores(stage) if stage is not None else []:
        for client, loss in (entry.get("clients") or {}).items():
            if is_number(loss):
                series.setdefault(client, []).append((round_id + 1, loss))
        if is_number(loss := entry.get("loss")):
            mean.append((round_id + 1, loss))
    if not series:
        return None
    named = len(series) <= _MAX_NAMED_CLIENTS
    worst = max(series, key=lambda client: series[client][-1][1])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="round", ylabel="validation loss, nats")
        labels = []
        for index, (client, points) in enumerate(sorted(series.items(), key=_client_order)):
            strong = named or client == worst
            color = PALETTE[index % len(PALETTE)] if named else VERMILLION if strong else GREY
            axes.plot(
                *zip(*points, strict=True),
                "o-" if strong else "-",
                color=color,
                markersize=3,
                linewidth=1.6 if strong else 0.8,
                alpha=1 if strong else 0.5,
            )
            if strong:
                name = f"client {client}" if named else f"client {client}, worst"
                labels.append((points[-1][1], name, color))
        if mean:
            axes.plot(*zip(*mean, strict=True), color=INK, linewidth=1.6, linestyle=(0, (4, 2)))
            labels.append((mean[-1][1], f"mean of {len(series)}", INK))
        last = max(points[-1][0] for points in series.values())
        axes.set_xlim(right=last + 0.02 * max(last - 1, 1))
        label_ends(axes, labels)
        whole_rounds(axes)

    return draw


def draw_traffic(run: RunSummary) -> Draw | None:
    """Draw bytes per round of every pipe edge (forward up, backward down) and every collective."""
    records = run.traffic
    if not records:
        return None
    rounds = [(record.get("round") or 0) + 1 for record in records]
    edges: dict[str, dict[str, list[float]]] = {}
    for source, target in run.edges():
        edges[f"stage {source} - {target}"] = {
            "forward": [_edge_bytes(r, source, target, "bytes_forward") for r in records],
            "backward": [_edge_bytes(r, source, target, "bytes_backward") for r in records],
        }
    collectives = {
        name: [(r.get("collectives") or {}).get(name) or 0.0 for r in records]
        for name in run.collectives()
    }

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        forward = {name: sums["forward"] for name, sums in edges.items()}
        backward = {name: sums["backward"] for name, sums in edges.items()}
        _stack(left, rounds, forward, backward=backward)
        left.set_title("between stages: activations up, gradients down", loc="left", fontsize=9.5)
        _stack(right, rounds, {_mean_label(n, v): v for n, v in collectives.items() if any(v)})
        right.set_title("collectives", loc="left", fontsize=9.5)
        for axes in (left, right):
            axes.set_xlabel("round")
            whole_rounds(axes)

    return draw


def _stack(
    axes: Axes,
    rounds: list[int],
    bars: dict[str, list[float]],
    *,
    backward: dict[str, list[float]] | None = None,
) -> None:
    """Stack ``bars`` upwards and ``backward`` downwards, in the same unit of bytes."""
    backward = backward or {}
    tops = [sum(values) for values in zip(*bars.values(), strict=True)] or [0.0]
    bottoms = [sum(values) for values in zip(*backward.values(), strict=True)] or [0.0]
    scale, unit = scale_bytes(max([*tops, *bottoms]))
    axes.set_ylabel(f"{unit} per round")
    width = 0.75 if len(rounds) <= 60 else 1.0
    for sign, group in ((1, bars), (-1, backward)):
        base = [0.0] * len(rounds)
        for index, (name, values) in enumerate(group.items()):
            scaled = [sign * value / scale for value in values]
            axes.bar(
                rounds,
                scaled,
                width,
                bottom=base,
                color=PALETTE[index % len(PALETTE)],
                label=name if sign == 1 else None,
                alpha=1 if sign == 1 else 0.55,
            )
            base = [a + b for a, b in zip(base, scaled, strict=True)]
    high, low = max(tops) / scale, max(bottoms) / scale
    reach = max(high, low, 1e-9)
    axes.set_ylim(-1.08 * low if low else (-0.22 * reach if backward else 0), 1.28 * reach)
    if backward:
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        if not low:
            axes.text(
                0.5,
                -0.11 * reach,
                "backward: 0 B in every round",
                ha="center",
                va="center",
                transform=axes.get_yaxis_transform(),
                color=INK,
            )
    if bars:
        axes.legend(loc="upper left", ncols=3, handlelength=1, columnspacing=1.2)


def _mean_label(name: str, values: list[float]) -> str:
    """Name a series and its mean, because its bars may be too small to see."""
    return f"{name}, {bytes_text(sum(values) / len(values))}"


def _edge_bytes(
    record: TrafficRecord,
    source: int,
    target: int,
    name: Literal["bytes_forward", "bytes_backward"],
) -> float:
    edges = record.get("edges") or []
    return sum(e.get(name) or 0 for e in edges if (e.get("from"), e.get("to")) == (source, target))


def _loss_legend(axes: Axes, *, validated: bool) -> None:
    axes.plot([], [], color=GREY, linewidth=1.8, label="training, smoothed")
    if validated:
        axes.plot([], [], "o", color=GREY, markeredgecolor=INK, markersize=5, label="validation")
    axes.legend(loc="upper right", ncols=2)


def _client_order(entry: tuple[str, Any]) -> tuple[bool, int, str]:
    client = entry[0]
    return (not client.isdigit(), int(client) if client.isdigit() else 0, client)
