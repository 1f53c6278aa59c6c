"""Run local losses and back-propagation at equal tokens and draw their held-out losses.

    python docs/benchmarks/parity.py CORPUS_FOLDER [--seeds 0,1] [--out runs/parity] [key=value ...]

CORPUS_FOLDER holds bio_pmc_fulltext.{train,valid}.jsonl.gz. Runs that are done are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from fedpipe.metrics.writer import read_metrics

VARIANTS = {
    "end_to_end": ["pipeline.objective=end_to_end", "pipeline.schedule=1f1b"],
    "local_loss mlm": ["pipeline.local_head=mlm"],
    "local_loss mlm+layer": ["pipeline.local_head=mlm+layer"],
}


def main() -> None:
    """Run what is missing, then write table.md and parity.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    corpus = args.corpus / "bio_pmc_fulltext"
    curves: dict[str, list[list[tuple[int, float]]]] = {v: [] for v in VARIANTS}
    for seed in seeds:
        for variant, overrides in VARIANTS.items():
            run_dir = args.out / f"{variant.replace(' ', '_')}_seed{seed}"
            if not (run_dir / "report.html").is_file():
                command = [
                    sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(run_dir),
                    "--config", "launch/configs/parity.yaml", f"seed={seed}",
                    f"data.train=[{corpus}.train.jsonl.gz]",
                    f"data.valid=[{corpus}.valid.jsonl.gz]", *overrides, *args.overrides,
                ]  # fmt: skip
                subprocess.run(command, check=True)
            curves[variant].append(_curve(run_dir))
    (args.out / "table.md").write_text(_table(curves), encoding="utf-8")
    _plot(curves, args.out / "parity.png")


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    """(tokens, final head's held-out loss in nats) after each round."""
    tokens, curve = 0, []
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if record["kind"] == "round":
            tokens += record["tokens"]
        if record["kind"] == "eval":
            curve.append((tokens, record["stages"][-1]["loss"]))
    return curve


def _table(curves: dict[str, list[list[tuple[int, float]]]]) -> str:
    tokens = [t for t, _ in curves["end_to_end"][0]]
    lines = ["| tokens | " + " | ".join(curves) + " |", "|---" * (len(curves) + 1) + "|"]
    for i, count in enumerate(tokens):
        cells = []
        for runs in curves.values():
            values = [run[i][1] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {count:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (variant, runs), color in zip(
        curves.items(), ("#444444", "#0072b2", "#d55e00"), strict=True
    ):
        for i, run in enumerate(runs):
            x, y = zip(*run, strict=True)
            axes.plot(
                x, y, color=color, marker="o", markersize=3, alpha=0.8, label="" if i else variant
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out masked-LM loss of the final head, nats")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
