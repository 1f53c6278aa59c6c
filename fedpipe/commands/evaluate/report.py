"""The report of an evaluation: the table of tasks and models, the page and the figure. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from fedpipe.commands.evaluate.content import (
    CellFacts,
    CellResult,
    Content,
    Difference,
    Score,
    Settings,
    TableRow,
    TaskFacts,
    Tested,
)
from fedpipe.data.tasks.scoring import METRICS
from fedpipe.report.document import (
    Block,
    Code,
    Figure,
    Heading,
    Paragraph,
    Strong,
    Table,
    aligned,
)
from fedpipe.report.drawing import GREY, INK, PALETTE, Draw
from fedpipe.report.format import MISSING, count, duration, is_number
from fedpipe.report.sections import environment_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

AVERAGE = "macro average"
_LEGEND_WIDTH, _LEGEND_MARK = 105, 7
"""Width of the legend in characters, and the part of it that a mark takes."""


def percent(value: Any, digits: int = 1) -> str:
    """Write a score, which is a share, in percent."""
    return f"{100 * value:.{digits}f}" if is_number(value) else MISSING


def signed(found: Difference | Tested) -> str:
    """Write a difference of scores with its interval; a significant one is emphasized."""
    if not is_number(found["value"]):
        return MISSING
    text = f"{100 * found['value']:+.1f}"
    if found["interval"]:
        low, high = found["interval"]
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return Strong(text) if found["stands_out"] else text


def outcome_text(result: CellResult | CellFacts | None) -> str:
    """Return a short text with the result of a cell."""
    if result is None:
        return "no score"
    scores = [
        f"{METRICS[key.partition(':')[0]].title} {percent(value)}"
        for key, value in result.get("scores", {}).items()
        if key in METRICS
    ]
    diverged_at = result.get("diverged_at")
    diverged = [f"diverged at step {diverged_at}"] if diverged_at else []
    return ", ".join([*scores[:2], *diverged]) or "no score"


def table(content: Content) -> Table:
    """Make the table of scores: a row per task and metric, a column per model.

    Args:
        content: Content of evaluation.json.

    Returns:
        The table; the best model of a row is emphasized.
    """
    names = [model["name"] for model in content["models"]]
    rows: list[tuple[str, ...]] = []
    for row in content["rows"]:
        rows.append(
            (
                row["task"],
                row["title"],
                _count(row["num_test"]),
                _runs(row),
                *_cells([row["models"].get(name) for name in names]),
            )
        )
    if any(content["average"].values()):
        cells = _cells([content["average"].get(name) for name in names])
        rows.append((AVERAGE, "", "", "", *cells))
    columns = ("task", "metric", "test n", "runs", *names)
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, len(columns))))


def _cells(entries: Sequence[Score | None]) -> list[str]:
    means = [entry["mean"] if entry else None for entry in entries]
    known = [mean for mean in means if is_number(mean)]
    best = max(known) if len(set(known)) > 1 else None  # nobody wins a draw
    texts = []
    for entry, mean in zip(entries, means, strict=True):
        text = _score(entry)
        texts.append(Strong(text) if best is not None and mean == best else text)
    return texts


def _score(entry: Score | None) -> str:
    """Write ``82.1 sd 0.6 [80.2, 83.9]``: mean and standard deviation, interval of the mean."""
    if entry is None or not is_number(entry["mean"]):
        return MISSING
    text = percent(entry["mean"])
    if is_number(entry.get("std")):
        text += f" sd {percent(entry['std'])}"
    if interval := entry.get("interval"):
        low, high = interval
        text += f" [{percent(low)}, {percent(high)}]"
    return text


def _count(value: Any) -> str:
    return f"{value:,}" if is_number(value) else MISSING


def _runs(row: TableRow) -> str:
    """Write the number of finished seeds, and the number of all seeds if it is larger."""
    done = [entry["n"] if entry else 0 for entry in row["models"].values()]
    planned = row["cells"]
    if all(number == planned for number in done):
        return str(planned)
    return f"{min(done)} of {planned}"


def notes(content: Content) -> list[str]:
    """Return sentences that explain the table."""
    found = [
        "Scores are times 100. An entry is the mean over the seeds, their standard deviation sd "
        f"(n - 1), and in brackets a 95 % interval of the mean, {content['intervals']}, from "
        f"{content['num_draws']:,} resampled test sets. No class is weighted, as in the reference "
        "evaluations.",
        "Each model is one pre-training: an interval says nothing about other models that the same "
        "method would train.",
    ]
    if len(content["models"]) > 1:
        found.append(
            "The best mean of a row is emphasized, however small its lead is. fedpipe evaluate "
            "--compare tests differences."
        )
    tasks = content["tasks"]
    published = [task["name"] for task in tasks if task["test_split"] == "dev"]
    if published:
        found.append(
            f"{', '.join(published)}: no labelled test split is published, so the dev split is the "
            "test split. The last epoch is scored, because the test split may not choose one."
        )
    last = [t["name"] for t in tasks if t["best_epoch_by"] == "last" and t["test_split"] == "test"]
    if last:
        found.append(f"{', '.join(last)}: there is no dev split, so the last epoch is scored.")
    if any(task["name"] == "ddi" for task in tasks):
        found.append("ddi: micro-F1 over the four positive classes, as in BLURB.")
    if any(task["name"] == "jnlpba" for task in tasks):
        typed = next(iter(_settings(content, "jnlpba").values()))["typed_entities"]
        kept = "five entity types" if typed else "all entity types mapped to one, as BioBERT does"
        found.append(f"jnlpba: {kept}.")
    for task in tasks:
        if task["folder"] == "packaged":
            found.append(
                f"{task['name']} is the packaged slice, which shows that everything works. Its "
                "scores cannot be compared with published ones."
            )
        found += _limits(task)
    diverged = [f"`{cell['name']}`" for cell in content["cells"] if cell.get("diverged_at")]
    if diverged:
        found.append(
            f"The loss of {', '.join(diverged)} is no longer finite: unless an earlier epoch was "
            "chosen, the score means nothing. Lower evaluation.learning_rate."
        )
    return found


def _limits(task: TaskFacts) -> list[str]:
    """Return sentences about the examples that were left out of a task."""
    found = []
    settings = next(iter(task["settings"].values()))
    drawn = [
        f"{count(limit, f'{split} example')} of {task['examples'][split]:,}"
        for split, limit in (
            ("train", settings["max_train_examples"]),
            ("dev", settings["max_test_examples"]),
            ("test", settings["max_test_examples"]),
        )
        if 0 < limit < task["examples"].get(split, 0)
    ]
    if drawn:
        found.append(f"{task['name']}: used {', '.join(drawn)}.")
    found += [
        f"{task['name']}: left out of {split} as unusable: {rows}"
        for split, rows in task["left_out"].items()
    ]
    cut = [
        f"{model} {splits['test']:,}"
        for model, splits in task["truncated"].items()
        if splits["test"]
    ]
    if cut:
        found.append(
            f"{task['name']}: number of test examples that did not fit into max_length: "
            f"{', '.join(cut)}."
        )
    return found


def _settings(content: Content, task: str) -> dict[str, Settings]:
    return next(t["settings"] for t in content["tasks"] if t["name"] == task)


def blocks(content: Content, figures: Sequence[Figure] = ()) -> list[Block]:
    """Make the blocks of the page.

    Args:
        content: Content of evaluation.json.
        figures: Figures of the scores.

    Returns:
        Blocks for ``to_html`` and ``to_markdown``.
    """
    environment = content["environment"]
    missing = [f"`{cell['name']}`" for cell in content["cells"] if not cell["done"]]
    return [
        table(content),
        *([Paragraph(text=f"Not done: {', '.join(missing)}.")] if missing else []),
        *(Paragraph(text=note) for note in notes(content)),
        *figures,
        Heading(text="Models"),
        Table(
            columns=("model", "folder", "content"),
            rows=tuple((m["name"], m["path"], m["digest"][:12]) for m in content["models"]),
        ),
        Heading(text="Tasks and settings"),
        _settings_table(content),
        Heading(text="Runs"),
        _runs_table(content),
        Heading(text="Repeat this evaluation"),
        Code(text=environment["repeat"]),
        Heading(text="Environment"),
        Table(columns=("key", "value"), rows=environment_rows(environment)),
    ]


def _settings_table(content: Content) -> Table:
    rows = []
    for task in content["tasks"]:
        settings = next(iter(task["settings"].values()))
        lengths = {str(own["max_length"]) for own in task["settings"].values()}
        sizes = ", ".join(f"{split} {size:,}" for split, size in task["examples"].items())
        chosen = "last epoch" if task["best_epoch_by"] == "last" else "best epoch on dev"
        rows.append(
            (
                task["name"],
                f"{task['format']}: {sizes}",
                f"{settings['learning_rate']:g}",
                str(settings["batch_size"]),
                str(settings["num_epochs"]),
                "/".join(sorted(lengths)),
                chosen,
                task["cites"],
            )
        )
    columns = ("task", "data", "lr", "batch", "epochs", "max length", "scored", "published in")
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset({2, 3, 4, 5}))


def _runs_table(content: Content) -> Table:
    rows = []
    for cell in content["cells"]:
        done = cell["done"]
        rows.append(
            (
                cell["model"],
                cell["task"],
                str(cell["seed"]),
                outcome_text(cell) if done else "not done",
                str(cell["best_epoch"]) if done else MISSING,
                duration(cell["seconds"]) if done else MISSING,
                f"{cell['device']}, {count(cell['threads'], 'thread')}" if done else MISSING,
            )
        )
    columns = ("model", "task", "seed", "scores", "epoch", "time", "on")
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset({2, 4, 5}))


def terminal_text(content: Content) -> str:
    """Return the text for a terminal: the table and its explanation."""
    return "\n".join(["", *aligned(table(content)), "", *notes(content)])


def draw_scores(content: Content) -> tuple[Draw, float] | None:
    """Draw the score of every task with its interval, in a colour per model.

    Args:
        content: Content of evaluation.json.

    Returns:
        The figure and its height in inches, or None before the first cell is done.
    """
    names = [model["name"] for model in content["models"]]
    rows = [
        (f"{row['task']}, {row['title']}", row["models"])
        for row in content["rows"]
        if any(entry and is_number(entry["mean"]) for entry in row["models"].values())
    ]
    if any(content["average"].values()):
        rows.append((AVERAGE, content["average"]))
    if not rows:
        return None
    columns = max(1, min(4, _LEGEND_WIDTH // (max(map(len, names)) + _LEGEND_MARK)))

    def draw(figure: Canvas) -> None:
        axes = figure.add_subplot(xlabel="score times 100; line: 95 % interval, small dots: seeds")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        step = 0.8 / len(names)
        for y, (_, models) in enumerate(rows):
            for index, name in enumerate(names):
                place = y + (index - (len(names) - 1) / 2) * step
                color = PALETTE[index % len(PALETTE)]
                _point(axes, models.get(name), place, color)
        for y in range(1, len(rows)):
            axes.axhline(y - 0.5, color=GREY, linewidth=0.4, alpha=0.5)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.05)
        for index, name in enumerate(names):
            axes.plot([], [], "o", color=PALETTE[index % len(PALETTE)], label=name, markersize=5)
        if len(names) > 1:
            figure.legend(loc="outside upper left", ncols=columns, handlelength=1)
        else:
            axes.set_title(names[0], loc="left", fontsize=9.5)

    legend = 0.2 * (ceil(len(names) / columns) - 1)
    return draw, 1.1 + legend + len(rows) * max(0.34, 0.2 * len(names))


def _point(axes: Any, entry: Score | None, y: float, color: str) -> None:
    if not entry or not is_number(entry["mean"]):
        return
    if interval := entry.get("interval"):
        low, high = interval
        axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.6, alpha=0.5)
    seeds = [100 * value for value in entry.get("seeds", {}).values() if is_number(value)]
    if len(seeds) > 1:
        axes.plot(seeds, [y] * len(seeds), "o", color=color, markersize=2.5, alpha=0.6)
    axes.plot(
        100 * entry["mean"],
        y,
        "o",
        color=color,
        markersize=5.5,
        markeredgecolor=INK,
        markeredgewidth=0.6,
    )
