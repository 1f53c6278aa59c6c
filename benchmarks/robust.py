"""Run every rule under every attack and write a table of the final held-out loss.

    python benchmarks/robust.py [--seeds 0,1] [--out runs/robust] [key=value ...]

Runs that are done are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from fedpipe.report.writer import read_metrics

RULES = {"mean": 0, "median": 0, "trimmed_mean": 2, "krum": 2}
"""Rule -> federation.aggregation.num_byzantine."""
ATTACKS = {
    "none": "{kind: none}",
    "sign_flip": "{kind: sign_flip, num_attackers: 2, scale: 5}",
    "noise": "{kind: noise, num_attackers: 2, scale: 30}",
}


def main() -> None:
    """Run what is missing, then write table.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/robust"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    lines = ["| rule | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 1) + "|"]
    for rule, num_byzantine in RULES.items():
        cells = []
        for attack, value in ATTACKS.items():
            losses = []
            for seed in seeds:
                run_dir = args.out / f"{rule}_{attack}_seed{seed}"
                if not (run_dir / "report.html").is_file():
                    command = [
                        sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(run_dir),
                        "--config", "launch/configs/robust.yaml", f"seed={seed}",
                        f"federation.aggregation.rule={rule}", f"federation.attack={value}",
                        f"federation.aggregation.num_byzantine={num_byzantine}", *args.overrides,
                    ]  # fmt: skip
                    subprocess.run(command, check=True)
                losses.append(_final_loss(run_dir))
            spread = f"{min(losses):.3f} to {max(losses):.3f}"
            cells.append(f"{statistics.mean(losses):.3f} ({spread})")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _final_loss(run_dir: Path) -> float:
    """Held-out loss of the final head after the last round, in nats."""
    evaluations = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "eval"]
    return float(evaluations[-1]["stages"][-1]["loss"])


if __name__ == "__main__":
    main()
