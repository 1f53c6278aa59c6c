"""Run the published systems and fedpipe's own modes at equal tokens; write one table.

    python benchmarks/modes.py [--seeds 0,1] [--out runs/modes] [key=value ...]

Every mode is a preset, scaled down by launch/configs/scaled_down.yaml to one replica: two
processes. Seeds are the outer loop, so that modes which are compared ran next to each other. Runs
that are done are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedpipe.report.writer import read_metrics

MODES = {
    "FedBERT, one after another": ["fedbert"],
    "FedBERT 6-6": ["fedbert-6-6"],
    "FedBERT 6-6, 1F1B": ["fedbert-6-6", "pipeline.schedule=1f1b"],
    "FedBioBERT 2-10": ["fedbiobert-2-10"],
    "FedBioBERT 4-8": ["fedbiobert-4-8"],
    "FedBioBERT 6-6": ["fedbiobert-6-6"],
    "FedBioBERT 6-6, int8 on the wire": ["fedbiobert-6-6", "pipeline.wire=[int8]"],
    "6-6, head on the server": ["fedbiobert-6-6", "pipeline.head_location=server"],
}
"""Preset and overrides of every mode."""
SCALE = [
    "--config", "launch/configs/scaled_down.yaml", "federation.num_replicas=1",
    "federation.num_rounds=3", "federation.num_local_steps=15", "pipeline.num_micro_batches=4",
    "log.to=[]",
]  # fmt: skip


class Run(NamedTuple):
    """What one run of one mode came to."""

    tokens_per_s: float
    """Median over the rounds after the first."""
    forward: float
    """Bytes per token over all edges."""
    backward: float
    loss: float
    """Held-out loss of the final head after the last round, in nats."""


def main() -> None:
    """Run what is missing, then write table.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/modes"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    for seed in args.seeds.split(","):
        for index, (mode, (preset, *overrides)) in enumerate(MODES.items()):
            run_dir = args.out / f"{index:02d}_{preset}_seed{seed}"
            if not (run_dir / "report.html").is_file():
                command = [
                    sys.executable, "-m", "fedpipe", "pretrain", "--preset", preset, *SCALE,
                    "--run-dir", str(run_dir), f"seed={seed}", *overrides, *args.overrides,
                ]  # fmt: skip
                subprocess.run(command, check=True)
            runs[mode].append(_read(run_dir))
    table = _table(runs)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


def _read(run_dir: Path) -> Run:
    records = read_metrics(run_dir / "metrics.jsonl")
    rounds = [r for r in records if r["kind"] == "round"]
    tokens = sum(r["tokens"] for r in rounds)
    edges = [edge for r in records if r["kind"] == "traffic" for edge in r["edges"]]
    return Run(
        tokens_per_s=statistics.median(r["tokens_per_s"] for r in rounds[1:]),
        forward=sum(edge["bytes_forward"] for edge in edges) / tokens,
        backward=sum(edge["bytes_backward"] for edge in edges) / tokens,
        loss=[r for r in records if r["kind"] == "eval"][-1]["stages"][-1]["loss"],
    )


def _table(runs: dict[str, list[Run]]) -> str:
    """One row per mode; speed-ups are seed by seed over FedBERT, means with their range."""
    published = next(iter(runs.values()))
    lines = [
        "| mode | tokens/s | over FedBERT | B/token forward | B/token backward | loss, nats |",
        "|---|---|---|---|---|---|",
    ]
    for mode, seeds in runs.items():
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(seeds, published, strict=True)]
        cells = (
            mode,
            _spread([r.tokens_per_s for r in seeds], "{:,.0f}".format),
            _spread(ratios, "{:.2f}".format),
            f"{seeds[0].forward:,.0f}",
            f"{seeds[0].backward:,.0f}",
            _spread([r.loss for r in seeds], "{:.3f}".format),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    low, high = text(min(values)), text(max(values))
    mean = text(statistics.mean(values))
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
