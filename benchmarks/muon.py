"""What a local step costs with Muon: beside AdamW, batched over matrices and one by one.

    python benchmarks/muon.py [--widths 128,384,768] [--torch 128]

A stage of embeddings, 4 layers and a head trains on the micro-batch of the quick start, on one
thread. The variants take turns within a repetition, and ratios are within a repetition. Times are
of the processor, so other processes disturb them less than those of a clock. It takes 2 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedpipe.config.load import load_config
from fedpipe.config.model_shape import model_shape
from fedpipe.models.split import model_stages
from fedpipe.models.stage import Stage, build_stage, trainable
from fedpipe.models.weights import hf_config
from fedpipe.pipeline import muon
from fedpipe.pipeline.optimizer import build_optimizer

VOCABULARY = 8192
REPETITIONS = {128: 9, 384: 5, 768: 3}

Times = dict[str, list[float]]
"""By variant, CPU seconds of every repetition."""


def stage_of(width: int, *overrides: str) -> tuple[Stage, torch.optim.Optimizer]:
    """Return a stage of 4 layers and its optimizer."""
    config = load_config(
        None,
        [
            "model.num_hidden_layers=8", "pipeline.cut=[4]", f"model.hidden_size={width}",
            f"model.intermediate_size={4 * width}", f"model.num_attention_heads={width // 32}",
            *overrides,
        ],
    )  # fmt: skip
    shape = model_shape(config, vocab_size=VOCABULARY)
    spec = model_stages(config, shape)[0]
    stage, _ = build_stage(spec, hf_config(shape, pad_id=1, cls_id=0, sep_id=2), seed=0)
    return stage, build_optimizer(stage, config.optimizer)


def of_torch(stage: Stage, ours: torch.optim.Optimizer) -> Callable[[], None]:
    """Return the step of torch's own Muon and AdamW for the parameters of ours."""
    group, *others = ours.param_groups
    theirs = torch.optim.Muon(group["params"], lr=1e-3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": g["params"]} for g in others], fused=True)

    def step() -> None:
        theirs.step()
        adamw.step()

    return step


def one_by_one(matrices: Sequence[Tensor], *, num_iterations: int) -> list[Tensor]:
    """Do what ``muon.orthogonal`` does, matrix by matrix."""
    return [batched([m], num_iterations=num_iterations)[0] for m in matrices]


batched = muon.orthogonal


def measure(width: int, *, with_torch: bool) -> Times:
    """Time the forward and backward pass, and every optimizer's step, in turns."""
    stage, adamw = stage_of(width)
    other, ours = stage_of(width, "optimizer.name=muon")
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randint(5, VOCABULARY, (32, 32), generator=draw)
    positions = torch.arange(10).expand(32, -1)
    targets = torch.stack([positions, inputs[:, :10]]).int()

    def passes() -> None:
        stage.loss(stage(inputs), targets).backward()
        for p, q in zip(trainable(stage).values(), trainable(other).values(), strict=True):
            q.grad = p.grad

    def stepping(orthogonal: Callable[..., list[Tensor]]) -> Callable[[], None]:
        def step() -> None:
            muon.orthogonal = orthogonal
            ours.step()

        return step

    variants = {
        "passes": passes,
        "adamw": adamw.step,
        "batched": stepping(batched),
        "one by one": stepping(one_by_one),
    }
    if with_torch:
        variants["torch"] = of_torch(other, ours)
    times: Times = {name: [] for name in variants}
    for repetition in range(REPETITIONS.get(width, 3) + 1):
        for name, run in variants.items():
            started = time.process_time()
            run()
            if repetition:
                times[name].append(time.process_time() - started)
    return times


def spread(values: Sequence[float], digits: int) -> str:
    """Write the median, and the least and the most."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="128,384,768")
    parser.add_argument("--torch", default="128", help="widths at which torch's own is timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    say("| width | optimizer | its step, CPU s | whole step over that of AdamW |")
    say("|---|---|---|---|")
    for width in map(int, args.widths.split(",")):
        times = measure(width, with_torch=str(width) in args.torch.split(","))
        passes = times.pop("passes")
        whole = [a + b for a, b in zip(passes, times["adamw"], strict=True)]
        for name, own in times.items():
            ratios = [(p + o) / w for p, o, w in zip(passes, own, whole, strict=True)]
            say(f"| {width} | {name} | {spread(own, 4)} | {spread(ratios, 2)} |")
        ratios = [a / b for a, b in zip(times["batched"], times["one by one"], strict=True)]
        say(f"batched over one by one: {spread(ratios, 2)}; passes: {spread(passes, 4)} CPU s")


if __name__ == "__main__":
    main()
