"""What each design choice of the stream is worth: take one away at a time, in turns, in one run.

    python benchmarks/steps.py [--config FILE] [--repetitions 5] [--steps 4] [key=value ...]

Every variant is a pipeline of its own in the same processes, one per stage, with the same weights
and text. They take turns within a repetition and the order rotates; ratios are within a repetition.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ranks import run_ranks, step_s
from torch import Tensor
from torch.nn import functional

from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.comm import Comm
from fedpipe.families.family import gather
from fedpipe.pipeline.p2p import DistLink
from fedpipe.pipeline.stage_engine import StageEngine


class BlockingLink(DistLink):
    """A link without overlap: a receive is posted when it is needed, a send waits for it."""

    def begin(self, num_messages: int) -> None:
        """Post nothing yet."""
        self._expected += num_messages

    def send(self, *tensors: Tensor) -> None:
        """Wait until the message has been received."""
        super().send(*tensors)
        self.drain()

    def recv(self) -> tuple[Tensor, ...]:
        """Post the receive of this message only."""
        self._post()
        message = self._receiving.popleft()
        for work, _ in message:
            work.wait()
        return tuple(
            spec.decode(buffer) for (_, buffer), spec in zip(message, self._specs, strict=True)
        )


def as_it_is(engine: StageEngine) -> None:
    """Change nothing."""


def messages_without_overlap(engine: StageEngine) -> None:
    """Stop computing while a message is under way."""
    for link in engine.links.all():
        link.__class__ = BlockingLink


def last_layer_at_every_position(engine: StageEngine) -> None:
    """The whole last layer, of which the head takes the masked rows."""
    stage = engine.stage

    def masked(hidden: Tensor, positions: Tensor) -> Tensor:
        hidden = stage.run_layers(stage._head_layer, hidden, None)
        return gather(hidden, positions)

    stage.masked = masked


def head_at_every_position(engine: StageEngine) -> None:
    """The whole last layer, and logits of all tokens, of which the masked ones are scored."""
    stage = engine.stage

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        hidden = stage.run_layers(stage._head_layer, hidden, None)
        logits = gather(stage._head[0](hidden), targets[0])  # of BERT and RoBERTa: one module
        return functional.cross_entropy(logits.flatten(0, 1), targets[1].long().flatten())

    stage.loss = loss


def optimizer(*, foreach: bool) -> Callable[[StageEngine], None]:
    """Not fused: a call for all tensors of an operation, or one for each tensor."""

    def apply(engine: StageEngine) -> None:
        for group in engine.optimizer.param_groups:
            group.update(fused=False, foreach=foreach)

    return apply


VARIANTS: dict[str, tuple[Callable[[StageEngine], None], dict[str, Any]]] = {
    "as it is": (as_it_is, {}),
    "messages without overlap": (messages_without_overlap, {}),
    "one message in flight instead of two": (as_it_is, {"in_flight": 1}),
    "last layer at every position": (last_layer_at_every_position, {}),
    "last layer and head at every position": (head_at_every_position, {}),
    "optimizer foreach instead of fused": (optimizer(foreach=True), {}),
    "optimizer tensor by tensor": (optimizer(foreach=False), {}),
    "torch.compile of layers and head (`pipeline.compile`)": (as_it_is, {"compile": True}),
}
"""Name -> what is changed in a built stage, and in ``pipeline``."""


def main() -> None:
    """Start one process per stage; print the table that rank 0 makes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="launch/configs/throughput_cpu.yaml")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    benchmark = partial(_measure, repetitions=args.repetitions, num_steps=args.steps)
    parts = run_ranks(config, benchmark)
    slowest = {
        name: [max(values) for values in zip(*(part[name] for part in parts), strict=True)]
        for name in VARIANTS
    }
    tokens = config.blocks_per_step * config.data.sequence_length
    sys.stdout.write(_table(slowest, tokens=tokens))


def _measure(
    config: RunConfig, data: PreparedData, comm: Comm, *, repetitions: int, num_steps: int
) -> dict[str, list[float]]:
    """Seconds per local step of this process, by variant and repetition."""
    replicas = {}
    for name, (change, settings) in VARIANTS.items():
        own = replace(config, pipeline=replace(config.pipeline, **settings))
        replicas[name] = PretrainingReplica(own, data, comm=comm)
        for engine in replicas[name].stages:
            change(engine)
        step_s(replicas[name], comm, 3)  # allocator, moments, compilation
    seconds: dict[str, list[float]] = {name: [] for name in replicas}
    names = list(replicas)
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(step_s(replicas[name], comm, num_steps))
    return seconds


def _table(seconds: dict[str, list[float]], *, tokens: int) -> str:
    base = seconds["as it is"]
    lines = [
        "| variant | tokens/s | time of a step over that of the stream as it is |",
        "|---|---|---|",
    ]
    for name, values in seconds.items():
        ratios = [v / b for v, b in zip(values, base, strict=True)]
        spread = f"{statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f})"
        lines.append(f"| {name} | {tokens / statistics.median(values):,.0f} | {spread} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
