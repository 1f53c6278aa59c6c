"""Measure memory and rounds per minute of a fine-tuning with more and more clients.

    python benchmarks/clients.py --model FOLDER --data FOLDER [--out DIR] [key=value ...]

``--data`` holds ag_news.train.jsonl.gz and ag_news.test.jsonl.gz. All clients train in every round,
so a round's work is the same for every number of clients: one pass over all examples. Runs that are
done are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from fedpipe.report.writer import read_metrics

CLIENTS = (10, 100, 1000)


def main() -> None:
    """Run what is missing, then write table.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/clients"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    lines = [
        "| clients | examples each | local steps per round | s per round | largest worker, MiB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for clients in CLIENTS:
        run_dir = args.out / f"clients_{clients}"
        if not (run_dir / "report.html").is_file():
            command = [
                sys.executable, "-m", "fedpipe", "finetune", "--run-dir", str(run_dir),
                "method.name=lora", "task.name=ag-news", f"task.data={args.data}",
                "task.split=iid", "task.max_length=64", "task.max_test_examples=2000",
                f"model.path={args.model}", "federation.num_rounds=3",
                f"federation.num_clients={clients}", f"federation.clients_per_round={clients}",
                "scoring.every_rounds=3", *args.overrides,
            ]  # fmt: skip
            subprocess.run(command, check=True)
        lines.append(_row(run_dir, clients))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(run_dir: Path, clients: int) -> str:
    records = read_metrics(run_dir / "metrics.jsonl")
    rounds = [record for record in records if record["kind"] == "round"]
    turns = [record for record in records if record["kind"] == "turn" and record["round"] == 0]
    examples = statistics.median(turn["examples"] for turn in turns)
    steps = sum(turn["steps"] for turn in turns)
    seconds = statistics.median(record["seconds"] for record in rounds)
    memory = max(max(record["memory_bytes"]) for record in rounds) / 2**20
    return f"| {clients:,} | {examples:,.0f} | {steps:,} | {seconds:.1f} | {memory:,.0f} |"


if __name__ == "__main__":
    main()
