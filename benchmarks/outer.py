"""Time a coordinator's work in an outer round, and watch its memory, for a model of some size.

    python benchmarks/outer.py FOLDER [--layers 17] [--sites 3] [--wire fp32]

FOLDER takes the files: the weights, an update per site, and the next weights. A layer of 768 has
28 MB. Every rule runs in a process of its own, which first checks all updates and then makes the
next weights. Memory is the peak of the process over what it has after its imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fedpipe.config.federation import AggregationConfig, ServerOptimizerConfig
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.federation.outer import read_update, write_next_global
from fedpipe.run.outer import GLOBAL, GLOBAL_FACTS, UPDATE, UPDATE_FACTS, VERSION, digest_of
from fedpipe.run.tensor_file import Layouts, TensorFile, write_tensors
from fedpipe.run.update import crossing_layouts, encode, encoded_layout, write_global
from fedpipe.terminal import show

RULES = {
    "mean": (AggregationConfig(), ServerOptimizerConfig()),
    "mean, Nesterov": (
        AggregationConfig(),
        ServerOptimizerConfig(name="fedavgm", lr=0.7, nesterov=True),
    ),
    "median": (AggregationConfig(rule="median", weighting="uniform"), ServerOptimizerConfig()),
}


def main() -> None:
    """Write the files, run every rule, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--wire", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--rule", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rule:
        show(json.dumps(aggregate(args)))
        return
    make_files(args)
    base, update = (
        (args.folder / name).stat().st_size / 2**20 for name in (f"base/{GLOBAL}", f"0/{UPDATE}")
    )
    show(f"weights {base:.0f} MiB, {args.sites} updates of {update:.0f} MiB ({args.wire})\n")
    show("| rule | check, s | next weights, s | memory, MiB |\n|---|---|---|---|")
    for rule in RULES:
        command = [sys.executable, __file__, *sys.argv[1:], "--rule", rule]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        show(f"| {rule} | {found['check']:.1f} | {found['next']:.1f} | {found['mib']:.0f} |")


def make_files(args: argparse.Namespace) -> None:
    """Write weights and updates of random numbers."""
    config = _config(args)
    layouts = crossing_layouts(config)
    rng = np.random.default_rng(0)
    (args.folder / "base").mkdir(parents=True, exist_ok=True)
    tensors = (rng.standard_normal(s.shape, dtype=np.float32) for s in layouts.values())
    base = write_global(args.folder / "base", 0, layouts, tensors, config=config)
    for site in range(args.sites):
        folder = args.folder / str(site)
        folder.mkdir(exist_ok=True)
        write_random_update(
            folder, layouts, base["sha256"], wire=args.wire, tokens=site + 1, rng=rng
        )


def write_random_update(
    folder: Path,
    layouts: Layouts,
    base_sha256: str,
    *,
    wire: str,
    tokens: int,
    rng: np.random.Generator,
) -> None:
    """Write the two files of an update of random numbers."""
    sent = {name: encoded_layout(layout, wire) for name, layout in layouts.items()}
    changes = (
        encode(1e-3 * rng.standard_normal(s.shape, dtype=np.float32), wire)
        for s in layouts.values()
    )
    write_tensors(folder / UPDATE, sent, changes)
    facts = {
        "version": VERSION, "round": 0, "base_sha256": base_sha256, "wire": wire,
        "sha256": digest_of(folder / UPDATE), "tokens": tokens, "train_loss": [],
        "base_valid_loss": [], "valid_loss": [], "valid_tokens": 0, "seconds": 0.0,
        "fedpipe": "",
    }  # fmt: skip
    (folder / UPDATE_FACTS).write_text(json.dumps(facts))


def aggregate(args: argparse.Namespace) -> dict[str, float]:
    """Check all updates and make the next weights, in this process."""
    config = _config(args)
    start = _peak_mib()
    base = json.loads((args.folder / "base" / GLOBAL_FACTS).read_text())
    layouts = TensorFile(args.folder / "base" / GLOBAL).layouts
    begin = time.monotonic()
    updates = [
        read_update(str(site), args.folder / str(site), base, layouts) for site in range(args.sites)
    ]
    checked = time.monotonic()
    (args.folder / "next").mkdir(exist_ok=True)
    rule, optimizer = RULES[args.rule]
    write_next_global(
        args.folder / "next",
        args.folder / "base",
        updates,
        index=0,
        aggregation=rule,
        optimizer=optimizer,
        config=config,
    )
    end = time.monotonic()
    return {"check": checked - begin, "next": end - checked, "mib": _peak_mib() - start}


def _config(args: argparse.Namespace) -> RunConfig:
    layers = args.layers
    return load_config(
        None,
        [
            f"model.num_hidden_layers={layers}",
            "model.size=base",
            f"pipeline.cut=[{layers // 2}]",
        ],
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
