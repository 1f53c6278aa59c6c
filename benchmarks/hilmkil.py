"""Sweep clients x models x optimizers, as Hilmkil et al. 2021 did; write a table and a figure.

    python benchmarks/hilmkil.py --models FOLDER --data FOLDER [--seeds 0,1] [--out DIR]
        [--tasks ag-news,sst2] [--recipes sgd,adamw,published] [key=value ...]

``--models`` holds bert, albert and distilbert, of small_models.py or published ones; ``--data``
holds textcls/ag_news.*.jsonl.gz and glue/sst2.*.jsonl.gz. Every cell is the preset hilmkil (all
clients in every round, plain mean), scaled down; the examples of all clients together are fixed, so
that only their number changes. Seeds are the outer loop; runs that are done are not repeated, and
the table is written anew after every seed, task and recipe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from fedpipe.commands.finetune.command import finetune
from fedpipe.report.writer import read_metrics

MODELS = ("bert", "albert", "distilbert")
CLIENTS = (1, 2, 4, 8, 16, 32)
TASKS = {
    "ag-news": ["task.data={data}/textcls", "task.max_train_examples=1536"],
    "sst2": ["task.data={data}/glue", "task.max_train_examples=2048"],
}
"""Overrides of every task; SST-2's sentences stand in for IMDB's reviews."""
CHANCE = {"ag-news": 25.0, "sst2": 50.9}
"""Accuracy of the most frequent label of the held-out examples, per cent."""
RECIPES = {
    "sgd": ["optimizer.name=sgd", "optimizer.lr=0.05"],
    "adamw": ["optimizer.name=adamw", "optimizer.lr=1e-3"],
    "published": ["optimizer.name=sgd", "optimizer.lr=2e-5"],
}
"""The published recipe is meant for models that have seen far more text."""
SCALE = [
    "batch_size=8", "federation.num_replicas=1", "federation.num_rounds=6",
    "federation.num_local_epochs=1", "task.max_length=32", "task.max_test_examples=640",
    "scoring.every_rounds=6", "checkpoint.every_rounds=6",
]  # fmt: skip


class Score(NamedTuple):
    """Accuracy of the last averaged model, per cent."""

    mean: float
    """Over all held-out examples."""
    worst: float
    """Of the client whose share of them it scores lowest on."""


Found = dict[tuple[str, str, str, int], list[Score]]
"""By recipe, task, model and clients, one score per seed."""


def main() -> None:
    """Run what is missing, then write table.md and hilmkil.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("runs/hilmkil"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: Found = {}
    lists = (text.split(",") for text in (args.seeds, args.tasks, args.recipes))
    for seed, task, recipe in product(*lists):
        for clients, model in product(CLIENTS, MODELS):
            run_dir = args.out / f"{recipe}_{task}_{model}_{clients}_seed{seed}"
            if not (run_dir / "report.html").is_file():
                overrides = [
                    f"model.path={args.models / model}", f"task.name={task}", f"seed={seed}",
                    f"federation.num_clients={clients}", f"federation.clients_per_round={clients}",
                    *SCALE, *(text.format(data=args.data) for text in TASKS[task]),
                    *RECIPES[recipe], *args.overrides,
                ]  # fmt: skip
                if code := finetune(None, overrides, str(run_dir), preset="hilmkil"):
                    sys.exit(code)
            found.setdefault((recipe, task, model, clients), []).append(_read(run_dir))
        (args.out / "table.md").write_text(_table(found), encoding="utf-8")
        _plot(found, args.out / "hilmkil.png")


def _read(run_dir: Path) -> Score:
    records = read_metrics(run_dir / "metrics.jsonl")
    last = [record for record in records if record["kind"] == "eval"][-1]
    return Score(100 * last["score"], 100 * last["worst"])


def _table(found: Found) -> str:
    titles = " | ".join(f"{c} client{'' if c == 1 else 's'}" for c in CLIENTS)
    lines = [f"| recipe | task | model | {titles} |", "|---" * (3 + len(CLIENTS)) + "|"]
    for recipe, task, model in _rows(found):
        cells = [_cell(found[recipe, task, model, clients]) for clients in CLIENTS]
        lines.append(f"| {recipe} | {task} | {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rows(found: Found) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((recipe, task, model) for recipe, task, model, _ in found))


def _cell(scores: Sequence[Score]) -> str:
    """Mean over the seeds, their range, and the mean of their worst clients."""
    means = [score.mean for score in scores]
    spread = f" ({min(means):.1f}-{max(means):.1f})" if len(means) > 1 else ""
    worst = statistics.mean(score.worst for score in scores)
    return f"{statistics.mean(means):.1f}{spread}, {worst:.0f}"


def _plot(found: Found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    recipes = list(dict.fromkeys(recipe for recipe, *_ in found))
    tasks = list(dict.fromkeys(task for _, task, *_ in found))
    figure, grid = pyplot.subplots(
        len(tasks), len(recipes), figsize=(3.4 * len(recipes), 2.8 * len(tasks)), sharex=True,
        sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for (row, task), (column, recipe) in product(enumerate(tasks), enumerate(recipes)):
        axes = grid[row][column]
        if (recipe, task, MODELS[0], CLIENTS[0]) not in found:  # not run yet
            axes.set_axis_off()
            continue
        for model, color in zip(MODELS, ("#0072b2", "#009e73", "#d55e00"), strict=True):
            cells = [found[recipe, task, model, clients] for clients in CLIENTS]
            means = [[score.mean for score in cell] for cell in cells]
            worst = [statistics.mean(score.worst for score in cell) for cell in cells]
            axes.plot(CLIENTS, [statistics.mean(m) for m in means], "o-", color=color,
                      markersize=3, label=model)  # fmt: skip
            axes.fill_between(CLIENTS, list(map(min, means)), list(map(max, means)), color=color,
                              alpha=0.15, linewidth=0)  # fmt: skip
            axes.plot(CLIENTS, worst, ":", color=color, linewidth=1)
        axes.axhline(CHANCE[task], color="#888888", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(CLIENTS, [str(clients) for clients in CLIENTS])
        axes.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axes.set_title(recipe)
        if column == 0:
            axes.set_ylabel(f"{task}: accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("clients")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
