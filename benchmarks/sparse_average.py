"""Average 8 clients in float32, int8 and sparse changes at equal tokens; write one table.

    python benchmarks/sparse_average.py [--seeds 0,1] [--out runs/sparse_average] [key=value ...]

The text is the packaged one unless overrides name another (``data.train=[FILE] data.valid=[FILE]
data.partition=iid``). Two replicas host four clients each. Seeds are the outer loop, so that
formats which are compared ran next to each other. Runs that are done are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from fedpipe.report.writer import read_metrics

FORMATS = {
    "float32": ["federation.wire=fp32"],
    "int8": ["federation.wire=int8"],
    "sparse, 3 %": ["federation.wire=sparse", "federation.density=0.03"],
    "sparse, 2 %": ["federation.wire=sparse", "federation.density=0.02"],
    "sparse, 1 %": ["federation.wire=sparse", "federation.density=0.01"],
}
"""Overrides of every format; the first one is what the others are compared with."""
SCALE = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=1",
    "model.intermediate_size=256", "pipeline.cut=[1]", "pipeline.colocate=true",
    "federation.num_clients=8", "federation.clients_per_round=8", "federation.num_replicas=2",
    "federation.num_rounds=60", "federation.num_local_steps=4", "validation.every_rounds=60",
    "checkpoint.every_rounds=60", "log.to=[]",
]  # fmt: skip
"""What differs from the quick start."""


class Run(NamedTuple):
    """What one run of one format came to."""

    sent: float
    """Bytes that a rank sends per round to average."""
    loss: float
    """Held-out loss of the final head after the last round, in nats."""


def main() -> None:
    """Run what is missing, then write table.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_average"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {name: [] for name in FORMATS}
    for seed in args.seeds.split(","):
        for index, (name, overrides) in enumerate(FORMATS.items()):
            run_dir = args.out / f"{index}_seed{seed}"
            if not (run_dir / "report.html").is_file():
                command = [
                    sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(run_dir),
                    *SCALE, f"seed={seed}", *overrides, *args.overrides,
                ]  # fmt: skip
                subprocess.run(command, check=True)
            runs[name].append(_read(run_dir))
    table = _table(runs, args.seeds.split(","))
    (args.out / "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


def _read(run_dir: Path) -> Run:
    records = read_metrics(run_dir / "metrics.jsonl")
    sent = [r["collectives"]["fedavg"] / 2 for r in records if r["kind"] == "traffic"]
    loss = [r for r in records if r["kind"] == "eval"][-1]["stages"][-1]["loss"]
    return Run(sent=statistics.mean(sent), loss=loss)


def _table(runs: dict[str, list[Run]], seeds: list[str]) -> str:
    """One row per format; differences are seed by seed to float32."""
    wide = next(iter(runs.values()))
    columns = ["format", "bytes per rank and round", "less than float32"]
    columns += [f"loss, seed {seed}" for seed in seeds] + ["over float32, nats"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, of_format in runs.items():
        over = [a.loss - b.loss for a, b in zip(of_format, wide, strict=True)]
        cells = (
            name,
            f"{of_format[0].sent:,.0f}",
            f"{wide[0].sent / of_format[0].sent:.3g} x",
            *(f"{run.loss:.3f}" for run in of_format),
            f"{statistics.mean(over):+.3f} ({min(over):+.3f} to {max(over):+.3f})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
