"""Train masked LMs with local losses and with back-propagation at equal tokens; compare them.

    python docs/benchmarks/parity.py CORPUS_FOLDER --out runs/parity [--seeds 0,1,2]

CORPUS_FOLDER holds bio_abstracts.{train,valid}.jsonl.gz. One process of one thread is one run,
two at a time; runs that are done are kept, so the command may be stopped and given again. Writes
table.md and parity.png.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.config.load import from_dict
from fedpipe.config.schema import RunConfig

VOCAB_SIZE = 261
"""256 bytes and 5 special tokens: a small model learns to use the context of letters in minutes."""
NUM_STEPS = 1600
LONG = 4800
"""Steps of the longer runs, which ``--steps`` asks for."""
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 256, "initializer_range": 0.1, "position_init": "sinusoidal",
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "data": {"partition": "iid", "sequence_length": 16, "mask_probability": 0.3},
    "pipeline": {"cut": [2], "micro_batch_size": 32, "num_micro_batches": 1},
    "federation": {"num_clients": 1, "clients_per_round": 1, "num_replicas": 1},
    "optimizer": {"lr": 3e-3, "warmup_ratio": 0.06},
    "validation": {"max_blocks_per_client": 1024},
}  # fmt: skip
CURVES = {
    "end_to_end": "#444444", "mlm": "#0072b2", "mlm+layer": "#d55e00", "mlm, K=4": "#56b4e9",
    "mlm+layer, K=4": "#e69f00", "1 token on both sides": "#bbbbbb",
}  # fmt: skip
Run = dict[str, Any]
Runs = dict[str, dict[int, Run]]
"""By label and seed."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5 % for n - 1 degrees of freedom."""


def methods() -> dict[str, Any]:
    """Methods by name, the order of the queue; imports torch."""
    import torch
    from parity_methods import Layers, Linear, Method, Recall, Reconstruct

    torch.set_num_threads(1)
    whole = {"objective": "end_to_end", "schedule": "1f1b"}
    layer = {"local_head": "mlm+layer"}

    def layers(**options: Any) -> Any:
        return partial(Layers, **options)

    two = layers(num_layers=lambda index, later: min(2, later))
    later = layers(num_layers=lambda index, later: min(2, later), copied=True)
    return {
        "end_to_end": Method(pipeline=whole),
        "mlm": Method(),
        "mlm+layer": Method(pipeline=layer),
        "mlm, K=4": Method(pipeline={"cut": (1, 2, 3)}),
        "mlm+layer, K=4": Method(pipeline={**layer, "cut": (1, 2, 3)}),
        "tied": Method(tied_every=20),
        "end_to_end, tied": Method(pipeline={**whole, "cut": ()}, tied_every=1),
        "end_to_end and local": Method(connected_every=1, supervised=True),
        "mlm+attention": Method(auxiliary=layers(attention_only=True)),
        "mlm+2 layers": Method(auxiliary=two),
        "recall 0.1": Method(auxiliary=partial(Recall, weight=0.1)),
        "linear": Method(auxiliary=Linear),
        "EMA of the next layer": Method(
            auxiliary=layers(synced_every=10, momentum=0.9, learnt=False)
        ),
        "reconstruct 0.1": Method(auxiliary=partial(Reconstruct, weight=0.1)),
        "1 step in 4 end to end": Method(connected_every=4),
        "calibrated (SAGE) 10": Method(auxiliary=layers(), calibrated_every=10),
        "mlm, K=3": Method(pipeline={"cut": (1, 3)}),
        "mlm+layer, K=3": Method(pipeline={**layer, "cut": (1, 3)}),
        "mlm, 1-3": Method(pipeline={"cut": (1,)}),
        "mlm, 3-1": Method(pipeline={"cut": (3,)}),
        "client lr x 0.5": Method(lr_scale=(0.5, 1.0)),
        "client lr x 2": Method(lr_scale=(2.0, 1.0)),
        "later warm-up 0.2": Method(warmup=0.2),
        "client frozen at 80 %": Method(horizon=0.8),
        "1 token on both sides": Method(pipeline=whole, window=1),
        "no context": Method(pipeline=whole, window=0),
        "mlm+2 layers, copied": Method(auxiliary=later),
        "next layer, learnt, synced": Method(auxiliary=layers(synced_every=20)),
        "mlm+2 layers, K=4": Method(pipeline={"cut": (1, 2, 3)}, auxiliary=two),
        "mlm+layer, 1-3": Method(pipeline={**layer, "cut": (1,)}),
        "mlm+layer, 3-1": Method(pipeline={**layer, "cut": (3,)}),
        "server lr x 2": Method(lr_scale=(1.0, 2.0)),
        "1 step in 10 end to end": Method(connected_every=10),
    }


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of methods, separated by ';'")
    parser.add_argument("--lr", type=float, default=SECTIONS["optimizer"]["lr"])
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    _prepare(_config(args.corpus, args.out, seed=0, lr=args.lr))
    names = args.only.split(";") if args.only else list(methods())
    wanted = [(args, name, int(seed)) for name in names for seed in args.seeds.split(",")]
    # Processes of their own, forked: torch and transformers are imported once.
    with multiprocessing.get_context("fork").Pool(args.workers, maxtasksperchild=1) as pool:
        pool.starmap(_run, wanted, chunksize=1)
    if (args.out / "end_to_end_0.json").is_file():
        _write(args.out)


def _run(args: argparse.Namespace, name: str, seed: int) -> None:
    from parity_methods import run

    from fedpipe.data.corpus import prepare

    label = name + _suffix(args.lr, args.steps)
    file = Path(args.out, "".join(c if c.isalnum() else "_" for c in f"{label}_{seed}") + ".json")
    if file.is_file():
        return
    # The prepared text is found by its settings, which the seed of the run is not to change.
    data = prepare(_config(args.corpus, args.out, seed=0, lr=args.lr))
    config = _config(args.corpus, args.out, seed=seed, lr=args.lr)
    result = run(config, data, methods()[name], num_steps=args.steps)
    result |= {"name": name, "seed": seed, "lr": args.lr, "steps": args.steps}
    result |= {"backward": methods()[name].backward}
    half = file.with_suffix(".half")
    half.write_text(json.dumps(result), encoding="utf-8")
    half.rename(file)
    sys.stdout.write(f"{label}, seed {seed}: {result['curve'][-1]}\n")
    sys.stdout.flush()


def _suffix(lr: float, steps: int) -> str:
    """What a run's label says of settings that are not the study's."""
    suffix = "" if lr == SECTIONS["optimizer"]["lr"] else f", lr {lr:g}"
    return suffix if steps == NUM_STEPS else f"{suffix}, {steps} steps"


def _config(corpus: Path, out: Path, *, seed: int, lr: float) -> RunConfig:
    sections = {**SECTIONS, "optimizer": {**SECTIONS["optimizer"], "lr": lr}}
    files = {s: [str(corpus / f"bio_abstracts.{s}.jsonl.gz")] for s in ("train", "valid")}
    paths = {**files, "tokenizer": str(out / "tokenizer"), "cache_dir": str(out / "cache")}
    sections["data"] = {**SECTIONS["data"], **paths}
    return from_dict({**sections, "seed": seed})


def _prepare(config: RunConfig) -> None:
    """Train the vocabulary on every fourth abstract, then pack the text."""
    from fedpipe.data.corpus import prepare
    from fedpipe.data.samples.build import write_tokenizer

    if not Path(config.data.tokenizer, "special_tokens_map.json").is_file():
        with gzip.open(config.data.train[0], "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 4 == 0]
        write_tokenizer(texts, Path(config.data.tokenizer), vocab_size=VOCAB_SIZE)
    prepare(config)


def _write(out: Path) -> None:
    """Write the table and the plot of every run that is done, at whatever learning rate."""
    runs: Runs = {}
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    order = list(methods())
    for run in sorted(found, key=lambda run: (run["steps"], order.index(run["name"]), run["lr"])):
        runs.setdefault(run["name"] + _suffix(run["lr"], run["steps"]), {})[run["seed"]] = run
    text = _table(runs)
    (out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    _plot(runs, out / "parity.png")


def _table(runs: Runs) -> str:
    lines = [
        "| method | seeds | held-out loss, nats: mean, sd (min to max) | gap to end_to_end, 95 % |"
        " gap to mlm | client's head | FLOPs | client's FLOPs | backwards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole = sum(next(iter(runs["end_to_end"].values()))["flops"])
    for name, seeds in runs.items():
        losses = [_final(run) for run in seeds.values()]
        run = next(iter(seeds.values()))
        stages = [run["curve"][-1][1][0] for run in seeds.values()]
        scored = len(run["flops"]) > 1 and run["backward"] != "gradients"
        cells = (
            name,
            str(len(seeds)),
            _spread(losses),
            _gap(_gaps(seeds, runs)),
            _gap(_gaps(seeds, runs, to="mlm")),
            f"{statistics.mean(stages):.3f}" if scored else "",
            f"{sum(run['flops']) / whole:.2f}",
            f"{run['flops'][0] / whole:.2f}" if scored else "",
            run["backward"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(losses: list[float]) -> str:
    if len(losses) == 1:
        return f"{losses[0]:.3f}"
    return (
        f"{statistics.mean(losses):.3f}, {_sd(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
    )


def _final(run: Run) -> float:
    return float(run["curve"][-1][1][-1])


def _gaps(seeds: dict[int, Run], runs: Runs, *, to: str = "end_to_end") -> list[float]:
    """Differences to a method with the same seeds, learning rate and tokens."""
    run = next(iter(seeds.values()))
    reference = runs.get(to + _suffix(run["lr"], run["steps"]), {})
    if reference is seeds:
        return []
    return [_final(seeds[s]) - _final(reference[s]) for s in sorted(seeds) if s in reference]


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean; 0 where one value gives none."""
    return T_95[len(values)] * _sd(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _gap(gaps: list[float]) -> str:
    if not gaps:
        return ""
    around = f" +- {_half_width(gaps):.3f}" if len(gaps) > 1 else " (one seed)"
    return f"{statistics.mean(gaps):+.3f}{around}"


def _plot(runs: Runs, path: Path) -> None:
    """Left: curves of some methods. Right: every method's gap, seed by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(12, max(4.5, 0.24 * len(runs) + 1.2)),
        layout="constrained",
        width_ratios=(1, 1.2),
    )
    for name, color in CURVES.items():
        for label, style in ((name, "-"), (f"{name}, {LONG} steps", "--")):
            curves = [run["curve"] for run in runs.get(label, {}).values()]
            if not curves:
                continue
            losses = [[by[-1] for _, by in curve] for curve in curves]
            tokens = [count / 1e6 for count, _ in curves[0]]
            means = [statistics.mean(point) for point in zip(*losses, strict=True)]
            left.plot(tokens, means, style, color=color, label=label)
            low, high = ([pick(p) for p in zip(*losses, strict=True)] for pick in (min, max))
            left.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    left.set_xlabel("million tokens")
    left.set_ylabel("final head's held-out loss, nats: mean and range")
    left.legend(frameon=False)
    rows = [n for n, seeds in runs.items() if _gaps(seeds, runs)]
    rows = [n for n in rows if not n.startswith(("no context", "1 token"))]
    for y, name in enumerate(reversed(rows)):
        gaps = _gaps(runs[name], runs)
        right.errorbar(
            statistics.mean(gaps), y, xerr=_half_width(gaps), color="#444444", fmt="|", capsize=2
        )
        right.plot(gaps, [y] * len(gaps), "o", color="#0072b2", markersize=4, alpha=0.7)
    right.set_yticks(range(len(rows)), list(reversed(rows)))
    right.axvspan(-0.02, 0.02, color="#009e73", alpha=0.15)
    right.axvline(0.0, color="#888888", linewidth=0.8)
    right.set_xlabel("gap to end_to_end, nats: seeds, mean, 95 % (band: the aim, 0.02)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
