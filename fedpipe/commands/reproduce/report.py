"""The report of a reproduction: tables, two figures, and the published numbers. No torch.

Source of the numbers that are marked as published: FedBioBERT, the abstract's speed-ups, and its
chart base_performance.png (github.com/wzw1105/FedBioBERT at 612ae65), read off the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedpipe.commands.evaluate.content import Tested
from fedpipe.commands.evaluate.report import percent, signed
from fedpipe.commands.reproduce.results import Content, SpeedUpFacts, VariantFacts
from fedpipe.report.document import (
    Block,
    Code,
    Facts,
    Figure,
    Heading,
    Paragraph,
    Table,
    aligned,
)
from fedpipe.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Draw,
)
from fedpipe.report.format import MISSING, count, duration, is_number, number
from fedpipe.report.sections import environment_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PUBLISHED_MEAN, PUBLISHED_PEAK = 2.03, 3.44
_PUBLISHED_ROUNDS = (
    ("FedBERT 0-12", 81_250, "1"),
    ("FedBioBERT 2-10", 35_350, "2.30"),
    ("FedBioBERT 4-8", 29_550, "2.75"),
    ("FedBioBERT 6-6", 23_750, "3.42"),
)
"""Seconds per round of 20,000 steps of 4 x 16 sequences of 512 tokens, base size, 5 nodes."""
_PUBLISHED_TIMES = (
    ("bc2gm", "3.25", "2.04", "1.40"),
    ("bc5cdr-chemical", "3.25", "1.41", "1.14"),
    ("bc5cdr-disease", "3.25", "2.89", "1.41"),
    ("ncbi-disease", "3.25", "0.84", "0.70"),
    ("jnlpba", "3.25", "1.61", "1.11"),
    ("ddi", "2.44", "0.78", "0.47"),
    ("gad", "4.90", "1.39", "1.49"),
    ("pubmedqa", "1.63", "0.59", "never"),
)
"""10^5 seconds to FedBERT's best score: FedBERT 0-12, FedBioBERT 4-8, 6-6; base size."""
_COLORS = {
    "published": (VERMILLION, ORANGE), "fedbert": (INK, GREY),
    "fedpipe": (GREEN, BLUE, SKY, PURPLE),
}  # fmt: skip


def speed_table(content: Content) -> Table:
    """Make the table of mean and peak speed-up of every run of fedpipe over every baseline."""
    baselines = [v for v in content["variants"] if v["kind"] != "fedpipe"]
    rows: list[tuple[str, ...]] = []
    for own in (v for v in content["variants"] if v["kind"] == "fedpipe"):
        pairs = [_pair(content, own, baseline) for baseline in baselines]
        rows.append((own["title"], *(_speed(pair, len(content["tasks"])) for pair in pairs)))
    columns = ("time to its best score, over", *(v["title"] for v in baselines))
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(1, len(columns))))


def _pair(content: Content, own: VariantFacts, baseline: VariantFacts) -> SpeedUpFacts:
    return next(
        pair
        for pair in content["speed_ups"]
        if (pair["variant"], pair["baseline"]) == (own["name"], baseline["name"])
    )


def _speed(pair: SpeedUpFacts, num_tasks: int) -> str:
    if pair["mean"] is None:
        return f"- (0 of {num_tasks})"
    mean, peak = number(pair["mean"], 2), number(pair["peak"], 2)
    return f"{mean} x, peak {peak} x ({pair['reached']} of {num_tasks})"


def variants_table(content: Content) -> Table:
    """Make the table of pre-training runs: speed at equal tokens, and losses."""
    first = content["variants"][0]["seconds_per_round"]
    ours = next(v for v in content["variants"] if v["kind"] == "fedbert")["seconds_per_round"]
    rows = []
    for v in content["variants"]:
        seconds, (low, high) = v["seconds_per_round"], v["seconds_range"]
        whole = v["measured_rounds"] == content["num_rounds"]
        rows.append(
            (
                v["title"],
                f"{v['measured_rounds']} of {content['num_rounds']}",
                f"{number(seconds, 1)} ({number(low, 1)} to {number(high, 1)})",
                number(v["tokens_per_round"] / seconds, 0),
                number(first / seconds, 2),
                number(ours / seconds, 2),
                number(v["losses"][-1] if whole else None, 3),
                number(v["held_out"][-1] if whole else None, 3),
                "-" if v["loss_difference"] is None else f"{v['loss_difference']:.1e}",
            )
        )
    columns = (
        "system",
        "rounds measured",
        "s per round (range)",
        "tokens/s",
        f"over {content['variants'][0]['title']}",
        "over FedBERT, our kernels",
        "training loss",
        "held-out loss",
        "losses differ by",
    )
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(1, 9)))


def times_table(content: Content, baseline: VariantFacts) -> Table:
    """Make the table of times to the best score of a baseline, per task and run of fedpipe."""
    own = [v for v in content["variants"] if v["kind"] == "fedpipe"]
    pairs = [_pair(content, v, baseline) for v in own]
    rows: list[tuple[str, ...]] = []
    for index, task in enumerate(content["tasks"]):
        races = [pair["races"][index] for pair in pairs]
        rows.append(
            (
                task["name"],
                f"{task['title']} {percent(races[0]['target'])}",
                percent(task["untrained"]),
                duration(races[0]["baseline_s"]),
                *(
                    _time(race["own_s"], race["ratio"]) if race["learnt"] else "not learnt"
                    for race in races
                ),
            )
        )
    lost = [pair["held_out"] for pair in pairs]
    rows.append(
        (
            "held-out text",
            f"loss {number(lost[0]['loss'], 3)}",
            "",
            duration(lost[0]["baseline_s"]),
            *(_time(each["own_s"], each["ratio"]) for each in lost),
        )
    )
    columns = ("task", "its best", "untrained", "its time", *(v["title"] for v in own))
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(1, len(columns))))


def _time(seconds: float | None, ratio: float | None) -> str:
    return "never" if seconds is None else f"{duration(seconds)}, {number(ratio, 2)} x"


def differences_table(content: Content) -> Table:
    """Make the table of fedpipe's scores minus FedBERT's after the same tokens."""
    found = {(d["variant"], d["task"]): d for d in content["differences"]}
    compared = {variant for variant, _ in found}
    own = [v for v in content["variants"] if v["name"] in compared]
    rows = []
    for task in content["tasks"]:
        cells = [found[v["name"], task["name"]] for v in own]
        rows.append((task["name"], "last", *(signed(cell["last"]) for cell in cells)))
        rows.append(("", "all", *(signed(cell["all"]) for cell in cells)))
    columns = ("task", "rounds", *(v["title"] for v in own))
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, len(columns))))


def scores_table(content: Content) -> Table:
    """Make the table of every score after every round."""
    titles = {v["name"]: v["title"] for v in content["variants"]}
    rows = []
    for task in content["tasks"]:
        for name, scores in task["scores"].items():
            after = [percent(score) for score in scores]
            after += [MISSING] * (content["num_rounds"] - len(after))
            rows.append((task["name"], titles[name], percent(task["untrained"]), *after))
    columns = ("task", "system", "0", *(str(r + 1) for r in range(content["num_rounds"])))
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, len(columns))))


def settings_table(content: Content) -> Table:
    """Make the table of tasks and of the settings of their fine-tunings."""
    rows = []
    for task in content["tasks"]:
        own = task["settings"]
        rows.append(
            (
                task["name"],
                task["title"],
                f"{task['num_train']:,}",
                f"{task['num_test']:,}",
                f"{own['learning_rate']:g}",
                str(own["batch_size"]),
                str(own["num_epochs"]),
                str(own["max_length"]),
            )
        )
    columns = ("task", "metric", "train n", "test n", "lr", "batch", "epochs", "max length")
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, 8)))


def notes(content: Content) -> list[str]:
    """Return sentences that explain the tables."""
    variants = content["variants"]
    short = [v for v in variants if v["measured_rounds"] < content["num_rounds"]]
    titles = {v["name"]: v["title"] for v in variants}
    shared: dict[str, list[str]] = {}
    for v in variants:
        if v["scored_as"] != v["name"]:
            shared.setdefault(titles[v["scored_as"]], []).append(v["title"])
    found = [
        "Times are training times of each system: local steps and averaging, without start-up, "
        "validation and checkpoints. Runs were made one at a time, on the same text, clients, "
        "cohorts, masks, first weights and learning rates.",
        "A speed-up is FedBERT's time to its best score, divided by the time in which fedpipe "
        "reaches that score. This time is interpolated between two rounds, and the earliest is the "
        "end of the first round. Mean and peak are over the tasks on which fedpipe reaches the "
        "score (their number is in brackets). The word never means: not within the same tokens. "
        "The words not learnt mean: the 95 % interval of FedBERT's mean score over all rounds, "
        "minus the score of the untrained model, does not lie above 0.",
    ]
    if shared:
        who = "; ".join(f"{', '.join(names)} as {title}" for title, names in shared.items())
        found.append(
            f"Systems with identical weights are scored once ({who}). Their weights are identical "
            "because back-propagation does not depend on the cut, a head not on its place, and a "
            "score not on padding. The table holds the largest relative difference between the "
            "training or held-out losses of a round; above 1e-3 a system is scored by itself."
        )
    if short:
        names = ", ".join(v["title"] for v in short)
        rounds = short[0]["measured_rounds"]
        found.append(
            f"{names}: trained for {rounds} of {count(content['num_rounds'], 'round')}. Every "
            "round is the same work, so the others take the mean time of these rounds."
        )
    if content["tasks_from"] == "packaged":
        found.append("The task is the packaged slice, which shows that everything works.")
    return found


def below(content: Content) -> str:
    """Return sentences on the tasks whose scores differ from FedBERT's at equal tokens."""
    titles = {v["name"]: v["title"] for v in content["variants"]}
    differences = content["differences"]
    last, over_all = ([(d, d["last"]) for d in differences], [(d, d["all"]) for d in differences])
    tested = sum(each["p_value"] is not None for _, each in (*last, *over_all))
    text = (
        "fedpipe minus FedBERT after the same tokens, scores times 100; in brackets its own 95 % "
        f"interval, {content['intervals']}. Units are the {count(len(content['seeds']), 'seed')} "
        "of pre-training, each the mean over its fine-tunings, in pairs. "
    )
    if tested:
        text += (
            f"Emphasized differences are not 0 after Holm's correction over the {tested} "
            "differences of the table."
        )
    else:
        text += (
            "There are too few seeds for a test: the intervals cover the test examples only, and "
            "hold for these models only."
        )
    for when, found in (("After the last round", last), ("Over all rounds", over_all)):
        parts = []
        for name, sign in (("above", 1), ("below", -1)):
            sided = [(d, each) for d, each in found if _leaves_out_0(each, sign)]
            strong = [d for d, each in sided if each["stands_out"]]
            listed = ", ".join(f"{titles[d['variant']]} on {d['task']}" for d in strong) or "none"
            parts.append(
                (f"{name} after correction: {listed}; " if tested else "")
                + f"{len(sided)} of {len(differences)} whole intervals {name} 0"
            )
        text += f" {when}: {'; '.join(parts)}."
    return text


def _leaves_out_0(found: Tested, sign: int) -> bool:
    interval = found["interval"]
    return interval is not None and min(sign * end for end in interval) > 0


def facts(content: Content) -> Facts:
    """Return the speed-ups of the fastest cut, beside the published ones."""
    items = []
    for kind, title in (("published", "as published"), ("fedbert", "our kernels")):
        names = {v["name"]: v["title"] for v in content["variants"] if v["kind"] == kind}
        pairs = [p for p in content["speed_ups"] if p["baseline"] == next(iter(names))]
        best = max(pairs, key=lambda pair: (pair["reached"], pair["mean"] or 0.0))
        own = next(v["title"] for v in content["variants"] if v["name"] == best["variant"])
        text = f"{number(best['mean'], 2)} x, peak {number(best['peak'], 2)} x"
        note = f"{own}, {best['reached']} of {len(content['tasks'])} tasks reached"
        items.append((f"over {names[best['baseline']].partition(',')[0]}, {title}", text, note))
    published = f"{PUBLISHED_MEAN} x, peak {PUBLISHED_PEAK} x"
    items.append(("FedBioBERT over FedBERT", published, "published, base size, 5 nodes"))
    return Facts(items=tuple(items))


def blocks(content: Content, figures: Sequence[Figure]) -> list[Block]:
    """Make the blocks of the page.

    Args:
        content: Content of reproduce.json.
        figures: Figures of scores and losses.

    Returns:
        Blocks for ``to_html`` and ``to_markdown``.
    """
    environment = content["environment"]
    first = [
        next(v for v in content["variants"] if v["kind"] == kind)
        for kind in ("published", "fedbert")
    ]
    timed: list[Block] = []
    for baseline in first:
        timed += [
            Heading(text=f"Time to the best score of {baseline['title']}"),
            times_table(content, baseline),
        ]
    return [
        facts(content),
        speed_table(content),
        *(Paragraph(text=note) for note in notes(content)),
        *figures,
        Heading(text="Pre-training"),
        variants_table(content),
        *timed,
        Heading(text="Scores at equal tokens"),
        Paragraph(text=below(content)),
        differences_table(content),
        Heading(text="Scores after every round"),
        scores_table(content),
        Paragraph(text=_data(content)),
        settings_table(content),
        Heading(text="Published"),
        *_published(),
        Heading(text="Repeat this"),
        Code(text=environment["repeat"]),
        Heading(text="Environment"),
        Table(columns=("key", "value"), rows=environment_rows(environment)),
    ]


def _data(content: Content) -> str:
    text = ", ".join(path.rpartition("/")[2] for path in content["text"])
    seeds = ", ".join(map(str, content["seeds"]))
    tuning = ", ".join(map(str, content["evaluation_seeds"]))
    return f"Pre-trained on {text}, seeds {seeds}; fine-tuned with seeds {tuning}."


def _published() -> list[Block]:
    rounds = tuple((name, f"{s:,}", ratio) for name, s, ratio in _PUBLISHED_ROUNDS)
    return [
        Paragraph(
            text=f"FedBioBERT's abstract: {PUBLISHED_MEAN} x faster than FedBERT on average, "
            f"{PUBLISHED_PEAK} x at best, over the same eight tasks. The tables are read off "
            "base_performance.png in wzw1105/FedBioBERT at 612ae65 (base size, 5 nodes, one "
            "run without intervals); nothing in them was measured here."
        ),
        Table(
            columns=("published", "s per round", "speed-up"), rows=rounds, numeric=frozenset({1, 2})
        ),
        Table(
            columns=("published, 10^5 s to FedBERT's best", "FedBERT 0-12", "4-8", "6-6"),
            rows=_PUBLISHED_TIMES,
            numeric=frozenset({1, 2, 3}),
        ),
    ]


def terminal_text(content: Content) -> str:
    """Return the text for a terminal."""
    lines = ["", *aligned(variants_table(content)), "", *aligned(speed_table(content)), ""]
    return "\n".join([*lines, below(content)])


def draw_scores(content: Content) -> tuple[Draw, float]:
    """Draw score against training time, with a panel per task; return the height in inches, too."""
    tasks = content["tasks"]
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    unit, name = _unit(content)

    def draw(figure: Canvas) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for index, (task, axes) in enumerate(zip(tasks, panels, strict=False)):
            for variant, style in _styles(content):
                scores = task["scores"][variant["scored_as"]]
                xs = [0.0, *(second / unit for second in variant["clock"][: len(scores)])]
                ys = [100 * score for score in (task["untrained"], *scores)]
                label = variant["title"] if index == 0 else None
                axes.plot([], [], label=label, **style)
                _rounds(axes, xs, ys, variant["measured_rounds"] + 1, style)
            axes.set_title(f"{task['name']}, {task['title']}", loc="left", fontsize=9.5)
            axes.set_xlim(left=0)
            if index >= len(tasks) - columns:
                axes.set_xlabel(f"training time, {name}")
        for axes in panels:
            axes.set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, fontsize=8.5)

    return draw, 0.9 + 2.1 * rows


def draw_losses(content: Content) -> Draw:
    """Draw training loss and held-out loss of the final head against training time."""
    unit, name = _unit(content)
    by_name = {v["name"]: v for v in content["variants"]}

    def draw(figure: Canvas) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for variant, style in _styles(content):
            seconds = [second / unit for second, _ in variant["steps"]]
            losses = [loss for _, loss in variant["steps"]]
            left.plot(seconds, losses, linewidth=1.1, label=variant["title"], **style)
            known = by_name[variant["scored_as"]]["held_out"]
            clock = [second / unit for second in variant["clock"][: len(known)]]
            _rounds(right, clock, known, variant["measured_rounds"], style)
        _label(left, f"training time, {name}", "training loss of the final head, nats")
        _label(right, f"training time, {name}", "held-out text, after each round")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8.5)

    return draw


def _rounds(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], measured: int, style: dict[str, Any]
) -> None:
    """Draw a mark at the end of every round; it is hollow for a round that was not trained."""
    axes.plot(xs, ys, linewidth=1.3, **style)
    dots = {"color": style["color"], "markersize": 3}
    axes.plot(xs[:measured], ys[:measured], "o", **dots)
    axes.plot(xs[measured:], ys[measured:], "o", markerfacecolor="white", **dots)


def _label(axes: Axes, x: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", fontsize=9.5)


def _styles(content: Content) -> list[tuple[VariantFacts, dict[str, Any]]]:
    seen: dict[str, int] = {}
    found = []
    for variant in content["variants"]:
        kind = variant["kind"]
        index = seen[kind] = seen.get(kind, -1) + 1
        colors = _COLORS[kind]
        line = "-" if kind == "fedpipe" else (0, (4, 2))
        found.append((variant, {"color": colors[index % len(colors)], "linestyle": line}))
    return found


def _unit(content: Content) -> tuple[float, str]:
    longest = max(v["clock"][-1] for v in content["variants"] if is_number(v["clock"][-1]))
    return next(
        u for u in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if longest >= 2 * u[0] or u[0] == 1
    )
