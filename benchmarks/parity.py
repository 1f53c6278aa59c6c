"""Train masked LMs with local losses and with back-propagation at equal tokens; compare them.

    python benchmarks/parity.py CORPUS_FOLDER --out runs/parity [--text tokens] [--seeds 0,1,2]

CORPUS_FOLDER holds bio_abstracts.{train,valid}.jsonl.gz, and for ``--text tokens``
bio_pmc_fulltext's. One process of one thread is one run, two at a time; runs that are done are
kept, so the command may be stopped and given again. Writes OUT/TEXT/table.md and parity.png.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.commands.evaluate.intervals import student_half_width
from fedpipe.config.load import from_dict
from fedpipe.config.schema import RunConfig

ONE_CLIENT: dict[str, dict[str, Any]] = {
    "federation": {"num_clients": 1, "clients_per_round": 1, "num_replicas": 1},
    "pipeline": {"cut": [2], "micro_batch_size": 32, "num_micro_batches": 1},
}
NO_DROPOUT: dict[str, Any] = {
    "position_init": "sinusoidal", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the methods are compared on."""

    corpus: str
    vocab_size: int
    """0: the packaged vocabulary."""
    num_steps: int
    lr: float
    end_to_end_lr: float
    """Each the best of those tried."""
    sections: dict[str, dict[str, Any]]

    def learning_rate(self, name: str) -> float:
        """Return the peak learning rate of a method."""
        return self.end_to_end_lr if name.startswith("end_to_end") else self.lr


STUDIES = {
    # 256 bytes and 5 special tokens: a small model learns to use the context of letters in minutes.
    "letters": Study(
        corpus="bio_abstracts", vocab_size=261, num_steps=1600, lr=3e-3, end_to_end_lr=3e-3,
        sections={
            "model": {
                "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
                "intermediate_size": 256, "initializer_range": 0.1, **NO_DROPOUT,
            },
            "data": {"partition": "iid", "sequence_length": 16, "mask_probability": 0.3},
            "optimizer": {"warmup_ratio": 0.06},
            "validation": {"max_blocks_per_client": 1024},
            **ONE_CLIENT,
        },
    ),
    "tokens": Study(
        corpus="bio_pmc_fulltext", vocab_size=0, num_steps=800, lr=2e-3, end_to_end_lr=1e-3,
        sections={
            "model": {"family": "roberta", "size": "tiny", "initializer_range": 0.05, **NO_DROPOUT},
            "data": {"partition": "iid", "sequence_length": 64, "mask_probability": 0.15},
            "optimizer": {"warmup_ratio": 0.06, "max_grad_norm": 0.0},
            "validation": {"max_blocks_per_client": 256},
            **ONE_CLIENT, "pipeline": {**ONE_CLIENT["pipeline"], "micro_batch_size": 16},
        },
    ),
}  # fmt: skip
LONG = 4800
"""Steps of the longer runs, which ``--steps`` asks for."""
CURVES = {
    "end_to_end": "#444444", "mlm": "#0072b2", "mlm+layer": "#d55e00", "mlm, K=4": "#56b4e9",
    "mlm+layer, K=4": "#e69f00", "1 token on both sides": "#bbbbbb",
}  # fmt: skip
Run = dict[str, Any]
Runs = dict[str, dict[int, Run]]
"""By label and seed."""


def methods() -> dict[str, Any]:
    """Methods by name, the order of the queue; imports torch."""
    import torch
    from parity_methods import Layers, Linear, Method, Reconstruct

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
        "mlm, heads begin apart": Method(heads_apart=True),
        "mlm, K=4": Method(pipeline={"cut": (1, 2, 3)}),
        "mlm+layer, K=4": Method(pipeline={**layer, "cut": (1, 2, 3)}),
        "linear": Method(auxiliary=Linear),
        "mlm+2 layers": Method(auxiliary=two),
        "AugLocal's later layers": Method(auxiliary=later),
        "AugLocal's later layers, K=4": Method(pipeline={"cut": (1, 2, 3)}, auxiliary=later),
        "EMA of the next layer": Method(
            auxiliary=layers(synced_every=10, momentum=0.9, learnt=False)
        ),
        "reconstruct 0.1": Method(auxiliary=partial(Reconstruct, weight=0.1)),
        "calibrated (SAGE) 10": Method(auxiliary=layers(), calibrated_every=10),
        "1 step in 4 end to end": Method(connected_every=4),
        "tied final decoder": Method(tied_every=1),
        "mlm, K=3": Method(pipeline={"cut": (1, 3)}),
        "mlm+layer, K=3": Method(pipeline={**layer, "cut": (1, 3)}),
        "mlm, 1-3": Method(pipeline={"cut": (1,)}),
        "mlm, 3-1": Method(pipeline={"cut": (3,)}),
        "client lr x 0.5": Method(lr_scale=(0.5, 1.0)),
        "client lr x 2": Method(lr_scale=(2.0, 1.0)),
        "server lr x 2": Method(lr_scale=(1.0, 2.0)),
        "later warm-up 0.2": Method(warmup=0.2),
        "client frozen at 80 %": Method(horizon=0.8),
        "1 token on both sides": Method(pipeline=whole, window=1),
        "no context": Method(pipeline=whole, window=0),
    }


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument("--text", choices=STUDIES, default="letters")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names of methods, separated by ';'")
    parser.add_argument("--lr", type=float, default=0.0, help="0: the study's")
    parser.add_argument("--steps", type=int, default=0, help="0: the study's")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out = args.out / args.text
    args.out.mkdir(parents=True, exist_ok=True)
    study = STUDIES[args.text]
    args.steps = args.steps or study.num_steps
    _prepare(study, _config(study, args, seed=0, lr=study.lr))
    names = args.only.split(";") if args.only else list(methods())
    wanted = [(args, name, int(seed)) for name in names for seed in args.seeds.split(",")]
    # Processes of their own, forked: torch and transformers are imported once.
    with multiprocessing.get_context("fork").Pool(args.workers, maxtasksperchild=1) as pool:
        pool.starmap(_run, wanted, chunksize=1)
    if (args.out / "end_to_end_0.json").is_file():
        _write(study, args.out)


def _run(args: argparse.Namespace, name: str, seed: int) -> None:
    from parity_methods import run

    from fedpipe.data.corpus import prepare

    study = STUDIES[args.text]
    lr = args.lr or study.learning_rate(name)
    label = name + _suffix(study, name, lr, args.steps)
    file = Path(args.out, "".join(c if c.isalnum() else "_" for c in f"{label}_{seed}") + ".json")
    if file.is_file():
        return
    # The prepared text is found by its settings, which the seed of the run is not to change.
    data = prepare(_config(study, args, seed=0, lr=lr))
    config = _config(study, args, seed=seed, lr=lr)
    result = run(config, data, methods()[name], num_steps=args.steps)
    result |= {"name": name, "seed": seed, "lr": lr, "steps": args.steps}
    result |= {"backward": methods()[name].backward}
    half = file.with_suffix(".half")
    half.write_text(json.dumps(result), encoding="utf-8")
    half.rename(file)
    sys.stdout.write(f"{label}, seed {seed}: {result['curve'][-1]}\n")
    sys.stdout.flush()


def _suffix(study: Study, name: str, lr: float, steps: int) -> str:
    """What a run's label says of settings that are not the study's."""
    suffix = "" if lr == study.learning_rate(name) else f", lr {lr:g}"
    return suffix if steps == study.num_steps else f"{suffix}, {steps} steps"


def _config(study: Study, args: argparse.Namespace, *, seed: int, lr: float) -> RunConfig:
    files = {s: [str(args.corpus / f"{study.corpus}.{s}.jsonl.gz")] for s in ("train", "valid")}
    paths: dict[str, Any] = {**files, "cache_dir": str(args.out / "cache")}
    if study.vocab_size:
        paths["tokenizer"] = str(args.out / "tokenizer")
    sections = {
        **study.sections,
        "data": {**study.sections["data"], **paths},
        "optimizer": {**study.sections["optimizer"], "lr": lr},
    }
    return from_dict({**sections, "seed": seed})


def _prepare(study: Study, config: RunConfig) -> None:
    """Train a vocabulary on every fourth text if the study has its own, then pack the text."""
    from fedpipe.data.corpus import prepare
    from fedpipe.data.samples.build import write_tokenizer

    ready = Path(config.data.tokenizer, "special_tokens_map.json").is_file()
    if study.vocab_size and not ready:
        with gzip.open(config.data.train[0], "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 4 == 0]
        write_tokenizer(texts, Path(config.data.tokenizer), vocab_size=study.vocab_size)
    prepare(config)


def _write(study: Study, out: Path) -> None:
    """Write the table and the plot of every run that is done, at whatever learning rate."""
    runs: Runs = {}
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    order = list(methods())
    for run in sorted(found, key=lambda run: (run["steps"], order.index(run["name"]), run["lr"])):
        run["suffix"] = _suffix(study, run["name"], run["lr"], run["steps"])
        runs.setdefault(run["name"] + run["suffix"], {})[run["seed"]] = run
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
    reference = runs.get(to + run["suffix"], {})
    if reference is seeds:
        return []
    return [_final(seeds[s]) - _final(reference[s]) for s in sorted(seeds) if s in reference]


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean; 0 where one value gives none."""
    return student_half_width(values) or 0.0


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
