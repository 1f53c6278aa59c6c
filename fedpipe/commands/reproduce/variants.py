"""The systems that the experiment of FedBioBERT compares, as runs of fedpipe. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from fedpipe.commands.reproduce.config import ReproductionConfig
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import OptimizerConfig, PipelineConfig, RunConfig
from fedpipe.data.tokenizer import tokenizer_info

Kind = Literal["published", "fedbert", "fedpipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A system, which is a line in the figures."""

    name: str
    """Name in folders."""
    title: str
    """Name in tables and figures."""
    kind: Kind
    """published is FedBERT as its published code computes; fedbert is FedBERT with our kernels."""
    config: RunConfig
    """Configuration of its run with the first seed."""
    twin: str = ""
    """Name of the variant that trains the same weights, up to rounding: of this one the first
    rounds may do. "" where there is none."""

    def with_seed(self, seed: int) -> RunConfig:
        """Return the configuration with another seed."""
        return replace(self.config, seed=seed)


def make_variants(config: ReproductionConfig) -> tuple[Variant, ...]:
    """Return the variants: FedBERT cut at 0 and n/2, published and with our kernels, and fedpipe.

    Text, clients, cohorts, masks, first weights, sequences per step and learning rates are the same
    in all variants. FedBERT has one micro-batch per step, because it has one in flight. The place
    of a head changes neither back-propagation nor a local loss, and padding is hidden from both.
    """
    base = _plain(config)
    layers, cuts = config.num_layers, config.reproduce.cuts
    found = []
    for kind in ("published", "fedbert"):
        for cut in (0, layers // 2):
            split = f"{cut}-{layers - cut}"
            published = kind == "published"
            own = _fedbert(
                base, cut, published_length=published * config.reproduce.published_length
            )
            found.append(
                Variant(
                    name=f"fedbert-{split}{'-published' if published else ''}",
                    title=f"FedBERT {split}{', as published' if published else ''}",
                    kind="published" if published else "fedbert",
                    config=own,
                    twin=f"fedbert-0-{layers}" if published or cut else "",
                )
            )
    middle = min(cuts, key=lambda cut: abs(cut - layers / 2))
    for cut, at_home in [*((cut, True) for cut in cuts), (middle, False)]:
        split = f"{cut}-{layers - cut}"
        found.append(
            Variant(
                name=f"fedpipe-{split}{'' if at_home else '-server'}",
                title=f"fedpipe {split}{'' if at_home else ', head on the server'}",
                kind="fedpipe",
                config=replace(base, pipeline=_split(base.pipeline, cut, at_home=at_home)),
                twin="" if at_home else f"fedpipe-{split}",
            )
        )
    timed = config.reproduce.timed_rounds
    return tuple(
        replace(v, config=replace(_first_rounds(v.config, timed if v.twin else 0), name=v.name))
        for v in found
    )


def _plain(config: ReproductionConfig) -> RunConfig:
    """Return the configuration of a pre-training that is saved and validated after every round."""
    whole = RunConfig(**{f.name: getattr(config, f.name) for f in fields(RunConfig)})
    tokenizer = tokenizer_info(whole)
    shape = resolve(
        config.model,
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.reproduce.published_length,
        pad_id=tokenizer.pad_id,
    )
    return replace(
        whole,
        # the longest sequences decide, so that all have the same first weights
        model=replace(config.model, max_position_embeddings=shape.max_position_embeddings),
        seed=config.reproduce.seeds[0],
        checkpoint=replace(
            config.checkpoint, every_rounds=1, keep_last=config.federation.num_rounds
        ),
        validation=replace(config.validation, every_rounds=1),
        evaluation=type(config.evaluation)(),  # of no meaning to pre-training
    )


def _split(pipeline: PipelineConfig, cut: int, *, at_home: bool) -> PipelineConfig:
    return replace(
        pipeline,
        objective="local_loss",
        schedule="streaming",
        cut=(cut,),
        head_location="client" if at_home else "server",
    )


def _fedbert(base: RunConfig, cut: int, *, published_length: int) -> RunConfig:
    own = replace(
        base.pipeline,
        objective="end_to_end",
        schedule="sequential",
        cut=(cut,),
        head_location="client",
        num_micro_batches=1,
        micro_batch_size=base.pipeline.micro_batch_size * base.pipeline.num_micro_batches,
    )
    if not published_length:
        return replace(base, pipeline=own)
    return replace(
        base,
        data=replace(base.data, padded_length=published_length),
        pipeline=replace(own, wire=("fp32",)),
    )


def _first_rounds(base: RunConfig, num_rounds: int) -> RunConfig:
    """Return the first rounds of a run, with the learning rates that they have in the whole run.

    Warm-up and decay are linear, so the schedule of the first rounds is linear, too.
    """
    all_rounds = base.federation.num_rounds
    if num_rounds in (0, all_rounds):
        return base
    return replace(
        base,
        federation=replace(base.federation, num_rounds=num_rounds),
        optimizer=_first_part(base.optimizer, num_rounds / all_rounds),
    )


def _first_part(optimizer: OptimizerConfig, share: float) -> OptimizerConfig:
    if share <= optimizer.warmup_ratio:
        reached = optimizer.lr * share / optimizer.warmup_ratio
        return replace(optimizer, lr=reached, warmup_ratio=1.0)
    done = (share - optimizer.warmup_ratio) / (1 - optimizer.warmup_ratio)
    linear = optimizer.decay == "linear"
    reached = optimizer.lr + done * (optimizer.end_lr - optimizer.lr)
    return replace(
        optimizer,
        warmup_ratio=optimizer.warmup_ratio / share,
        end_lr=reached if linear else optimizer.end_lr,
    )
