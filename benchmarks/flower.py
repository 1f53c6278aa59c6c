"""Measure `fedpipe finetune` against Flower's simulation: same model, data, clients, seeds.

    python benchmarks/flower.py --model FOLDER --data FOLDER [--out DIR] [key=value ...]

``--data`` holds ag_news.train.jsonl.gz and ag_news.test.jsonl.gz. Flower is installed into an
environment of its own, OUT/venv, with this one's torch, transformers and adapters. Both systems
have one process per core that trains, with one thread; runs alternate, and the order changes from
pair to pair. Flower comes twice: its workers keep their model, or build it at every message as its
Hugging Face example does. Memory is the sum of the proportional set sizes of all processes, looked
at every half second. Everything is measured anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid
import venv
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from fedpipe.report.writer import read_metrics

FLOWER = "flwr[simulation]==1.41.0"
SAME = ("torch", "transformers", "tokenizers", "adapters", "numpy")
METHODS = ("full", "lora")
MARK = "FEDPIPE_BENCHMARK"
"""Variable in the environment of every process that a run starts."""


class Run(NamedTuple):
    """What one run came to."""

    rounds_per_min: float
    """Training and averaging; of the rounds after the first."""
    wall_s: float
    """The whole command, with its start and one scoring."""
    memory_mib: float
    """Of all processes at its peak."""
    score: float
    losses: tuple[float, ...]
    """Of the rounds, in nats."""


def main() -> None:
    """Measure in pairs, then write table.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/flower"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--models", default="kept,built", help="what Flower's workers do")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    python = _environment(args.out / "venv")
    systems = {"fedpipe": _fedpipe} | {
        f"Flower, model {how}": partial(_flower, how) for how in args.models.split(",")
    }
    lines = [
        "| method | system | rounds per minute | whole command, s | memory, MiB | accuracy, % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for method in args.methods.split(","):
        runs: dict[str, list[Run]] = {name: [] for name in systems}
        for pair in range(args.pairs):
            folder = args.out / f"{method}_{pair}"
            shutil.rmtree(folder, ignore_errors=True)
            for name in list(systems)[:: -1 if pair % 2 else 1]:
                runs[name].append(systems[name](args, method, pair, folder, python))
                sys.stdout.write(f"{method} {name} seed {pair}: {runs[name][-1]}\n")
                sys.stdout.flush()
        for name in systems:
            lines.append(_line(method, name, runs[name]))
            if name != "fedpipe":
                lines.append(_ratios(method, runs["fedpipe"], runs[name]))
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _environment(folder: Path) -> str:
    python = folder / "bin" / "python"
    if not (folder / "bin" / "flwr").is_file():
        venv.create(folder, with_pip=True)
        pins = [f"{name}=={version(name).partition('+')[0]}" for name in SAME]
        subprocess.run([python, "-m", "pip", "install", "-q", FLOWER, *pins], check=True)
    return str(python)


def _fedpipe(args: argparse.Namespace, method: str, seed: int, folder: Path, python: str) -> Run:
    run_dir = folder / "fedpipe"
    wall, memory = _watched([*_command(args, method, seed), "--run-dir", str(run_dir)], folder)
    records = read_metrics(run_dir / "metrics.jsonl")
    rounds = [record for record in records if record["kind"] == "round"]
    score = [record for record in records if record["kind"] == "eval"][-1]["score"]
    return _run([r["seconds"] for r in rounds], [r["loss"] for r in rounds], score, wall, memory)


def _flower(
    how: str, args: argparse.Namespace, method: str, seed: int, folder: Path, python: str
) -> Run:
    run_dir, result = folder / "prepared", folder / f"flower_{how}.json"
    if not run_dir.is_dir():  # configuration and examples; they do not count
        from fedpipe.commands.finetune.setup import set_up_finetune
        from fedpipe.run.run_dir import resolve

        asked = resolve("finetune", None, _overrides(args, method, seed), str(run_dir))
        set_up_finetune(*asked, notify=lambda line: None)
    app = Path(__file__).with_name("flower_app.py")
    cores = len(os.sched_getaffinity(0))
    command = [python, str(app), str(run_dir), str(cores), how, str(result)]
    wall, memory = _watched(command, folder)
    found = json.loads(result.read_text(encoding="utf-8"))
    return _run(found["seconds"], found["losses"], found["score"], wall, memory)


def _run(
    seconds: list[float], losses: list[float], score: float, wall: float, memory: float
) -> Run:
    return Run(60 / statistics.mean(seconds[1:]), wall, memory, score, tuple(losses))


def _command(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    return [sys.executable, "-m", "fedpipe", "finetune", *_overrides(args, method, seed)]


def _overrides(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    return [
        f"model.path={args.model}", f"method.name={method}", "task.name=ag-news",
        f"task.data={args.data}", "task.split=iid", "task.max_length=64",
        "task.max_train_examples=1024", "task.max_test_examples=1000",
        f"federation.num_clients={args.clients}", f"federation.clients_per_round={args.clients}",
        f"federation.num_replicas={len(os.sched_getaffinity(0))}", "federation.num_rounds=6",
        "scoring.every_rounds=6", "checkpoint.every_rounds=6", f"seed={seed}",
        "optimizer.weight_decay=0", "optimizer.max_grad_norm=0", "optimizer.decay=constant",
        "optimizer.warmup_ratio=0", f"optimizer.lr={'1e-3' if method == 'full' else '5e-3'}",
        *args.overrides,
    ]  # fmt: skip


def _watched(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its seconds, and the largest sum of its processes' memory in MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        MARK: mark, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    peak, started = 0, time.monotonic()
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            peak = max(peak, _memory_kib(mark.encode()))
            time.sleep(0.5)
    wall = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{command[0]} failed: see {folder / 'output.txt'}")
    return wall, peak / 1024


def _memory_kib(mark: bytes) -> int:
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (process / "environ").read_bytes():
                continue
            lines = (process / "smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _line(method: str, name: str, runs: Sequence[Run]) -> str:
    cells = [
        _spread([run.rounds_per_min for run in runs], 2),
        _spread([run.wall_s for run in runs], 1),
        _spread([run.memory_mib for run in runs], 0),
        _spread([100 * run.score for run in runs], 2),
    ]
    return f"| {method} | {name} | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _ratios(method: str, ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    pairs = list(zip(ours, theirs, strict=True))
    speed = _spread([a.rounds_per_min / b.rounds_per_min for a, b in pairs], 2)
    wall = _spread([a.wall_s / b.wall_s for a, b in pairs], 2)
    memory = _spread([a.memory_mib / b.memory_mib for a, b in pairs], 2)
    apart = max(abs(x - y) for a, b in pairs for x, y in zip(a.losses, b.losses, strict=True))
    return (
        f"| {method} | fedpipe over it | {speed} | {wall} | {memory} | losses {apart:.1e} apart |"
    )


if __name__ == "__main__":
    main()
