"""The weights that cross between sites, tensor by tensor: first ones, updates, and their formats.

What crosses has full names: those of the Hugging Face model, and ``aux_heads.STAGE...`` for the
heads of local losses. What stays with a client (see ``federation.average``) is not among it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpipe import __version__
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.distributed.sparse_row import SPARSE_BLOCK
from fedpipe.distributed.wire import TensorSpec
from fedpipe.files import sync, write_atomically, write_text
from fedpipe.models.split import StageSpec, model_stages, part_of
from fedpipe.models.stage import Stage, build_stages, trainable
from fedpipe.models.weights import hf_config
from fedpipe.report.writer import METRICS_FILE, read_metrics
from fedpipe.run.checkpoint import STAGE, find_round
from fedpipe.run.outer import (
    GLOBAL,
    GLOBAL_FACTS,
    UPDATE,
    UPDATE_FACTS,
    VERSION,
    GlobalFacts,
    OuterRound,
    UpdateFacts,
    vocabulary_digest,
)
from fedpipe.run.tensor_file import Array, Layout, Layouts, TensorFile, write_tensors

BLOCK = 1024
"""Elements of an int8 update that share a scale."""
_PACKED = ("int8", "sparse")
"""Formats whose tensors are bytes."""
_RESIDUAL = "outer_residual_"
"""Begins the name of what an outer round has rounded off, in the run directory of a site."""


def first_weights(config: RunConfig) -> tuple[Layouts, Iterator[Tensor]]:
    """Return the first weights of a model, as a site would make them: what crosses between sites.

    Args:
        config: Of every site; text and place of the data do not matter.

    Returns:
        What there is, and the tensors in the same order, made stage by stage.
    """
    stages = build_stages(*described(config), config)
    return _layouts(config, stages), (
        parameter.detach() for stage in stages for _, parameter in _crossing(config, stage)
    )


def crossing_layouts(config: RunConfig) -> Layouts:
    """Return name, dtype and shape of all that crosses between sites, without making any weight."""
    return _layouts(config, _empty_stages(config))


def crosses_whole(config: RunConfig) -> bool:
    """Whether all of the model crosses between sites, but for the heads of local losses."""
    average = config.federation.average
    kept = {
        part
        for stage in _empty_stages(config)
        for name, _ in stage.named_parameters()
        if not getattr(average, part := part_of(name, stage.spec))
    }
    return not kept - {"aux_head"}


def _empty_stages(config: RunConfig) -> list[Stage]:
    """Build all stages without making their weights."""
    specs, hf = described(config)
    stages: list[Stage] = []
    with torch.device("meta"):
        for spec in specs:
            word_embedding = stages[0].word_embedding if stages else None
            stages.append(Stage(spec, hf, word_embedding=word_embedding))
    return stages


def described(config: RunConfig) -> tuple[tuple[StageSpec, ...], Any]:
    """Return the stages of a run, and the transformers configuration of its whole model."""
    info = tokenizer_info(config)
    shape = model_shape(config, vocab_size=info.vocab_size, pad_id=info.pad_id)
    hf = hf_config(shape, pad_id=info.pad_id, cls_id=info.cls_id, sep_id=info.sep_id)
    return model_stages(config, shape), hf


def _crossing(config: RunConfig, stage: Stage) -> list[tuple[str, Tensor]]:
    """The parameters of a stage that neither stay with a client nor are copies of others."""
    average = config.federation.average
    return [
        (name, parameter)
        for name, parameter in trainable(stage).items()
        if name not in stage.copied and getattr(average, part_of(name, stage.spec))
    ]


def _layouts(config: RunConfig, stages: list[Stage]) -> Layouts:
    return {
        name: Layout("F32", tuple(parameter.shape))
        for stage in stages
        for name, parameter in _crossing(config, stage)
    }


def write_global(
    folder: Path,
    index: int,
    layouts: Layouts,
    tensors: Iterator[Array],
    *,
    config: RunConfig,
) -> GlobalFacts:
    """Write the weights that all sites start an outer round from, and then what they are.

    Args:
        folder: Of the outer round; exists.
        index: The outer round, from 0.
        layouts: What there is.
        tensors: float32, in the order of ``layouts``.
        config: Of every site.
    """
    write = partial(write_tensors, layouts=layouts, tensors=tensors)
    _, sha256 = write_atomically(folder / GLOBAL, write)
    facts: GlobalFacts = {
        "version": VERSION,
        "round": index,
        "sha256": sha256,
        "vocabulary": vocabulary_digest(config),
        "cut": list(config.pipeline.cut),
        "num_inner_rounds": config.outer.num_inner_rounds,
    }
    sync(folder)
    write_text(folder / GLOBAL_FACTS, json.dumps(facts, indent=1) + "\n")
    return facts


def write_update(outer: OuterRound, run_dir: Path, config: RunConfig) -> None:
    """Write what a site has learnt in an outer round: the difference to what came in.

    With a narrow ``outer.wire`` it is the difference and what earlier outer rounds have rounded
    off. Written again, for a job that was killed on the way, it is the same bit for bit.

    Args:
        outer: The outer round, whose inner rounds are done.
        run_dir: Of the site's run.
        config: Of the site's run.

    Raises:
        CheckpointError: The weights after the last inner round are gone or damaged.
    """
    checkpoint = find_round(run_dir, outer.end_round)
    base, wire, density = outer.read_base(), config.outer.wire, config.federation.density
    files = [TensorFile(path) for path in sorted(checkpoint.path.glob(f"{STAGE}*.safetensors"))]
    trained = {name: file for file in files for name in file.layouts}
    owed = _newest_residual(run_dir, before=outer.index)

    def change(name: str) -> Array:
        difference: Array = trained[name].read(name) - base.read(name)
        return difference if owed is None else difference + owed.read(name)

    sent = {n: encoded_layout(layout, wire, density) for n, layout in base.layouts.items()}
    changes = (encode(change(name), wire, density) for name in base.layouts)
    _, sha256 = write_atomically(
        outer.path / UPDATE, partial(write_tensors, layouts=sent, tensors=changes)
    )
    if wire != "fp32":
        update = TensorFile(outer.path / UPDATE)
        rest = (
            change(name) - decode(update.read(name), layout, wire, density)
            for name, layout in base.layouts.items()
        )
        residual = run_dir / f"{_RESIDUAL}{outer.index:06d}.safetensors"
        write_atomically(residual, partial(write_tensors, layouts=base.layouts, tensors=rest))
        sync(run_dir)
    sync(outer.path)
    facts = _update_facts(outer, run_dir, sha256=sha256, wire=wire)
    write_text(outer.path / UPDATE_FACTS, json.dumps(facts, indent=1) + "\n")
    for path in _residuals(run_dir, before=outer.index)[:-1]:
        path.unlink(missing_ok=True)


def _residuals(run_dir: Path, *, before: int) -> list[Path]:
    """What earlier outer rounds have rounded off, oldest first."""
    paths = sorted(run_dir.glob(f"{_RESIDUAL}*.safetensors"))
    return [path for path in paths if int(path.stem.removeprefix(_RESIDUAL)) < before]


def _newest_residual(run_dir: Path, *, before: int) -> TensorFile | None:
    paths = _residuals(run_dir, before=before)
    return TensorFile(paths[-1]) if paths else None


def _update_facts(outer: OuterRound, run_dir: Path, *, sha256: str, wire: str) -> UpdateFacts:
    """Say what an update is, from the record of the run."""
    records = read_metrics(run_dir / METRICS_FILE)

    def of(kind: str, first: int) -> list[dict[str, Any]]:
        return [r for r in records if r["kind"] == kind and first <= r["round"] < outer.end_round]

    rounds = of("round", outer.first_round)
    base, last = (
        of(*what)[-1:] for what in (("outer", outer.first_round), ("eval", outer.end_round - 1))
    )
    return {
        "version": VERSION,
        "round": outer.index,
        "base_sha256": outer.sha256,
        "sha256": sha256,
        "wire": wire,
        "tokens": sum(record["tokens"] for record in rounds),
        "train_loss": rounds[-1]["loss"],
        "base_valid_loss": [stage["loss"] for record in base for stage in record["stages"]],
        "valid_loss": [stage["loss"] for record in last for stage in record["stages"]],
        "valid_tokens": sum(record["tokens"] for record in last),
        "seconds": sum(record["seconds"] for record in rounds),
        "fedpipe": __version__,
    }


# -- formats ---------------------------------------------------------------------------------------


def encoded_layout(layout: Layout, wire: str, density: float = 1.0) -> Layout:
    """Return what a float32 tensor is in an update of a format; ``density`` is of a sparse one."""
    if wire in _PACKED:
        return Layout("U8", (_spec(prod(layout.shape), wire, density).nbytes,))
    return layout._replace(dtype="BF16") if wire == "bf16" else layout


def encode(change: Array, wire: str, density: float = 1.0) -> Array:
    """Return a float32 tensor as it leaves a site."""
    if wire == "fp32":
        return change
    flat = torch.from_numpy(np.ascontiguousarray(change)).flatten()
    spec = _spec(flat.numel(), wire, density)
    padded = torch.zeros(spec.shape)
    padded.view(-1)[: flat.numel()] = flat
    encoded = spec.encode(padded)
    if wire in _PACKED:
        return np.asarray(encoded.numpy())
    bits = encoded.flatten()[: flat.numel()].view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(change.shape)


def decode(sent: Array, layout: Layout, wire: str, density: float = 1.0) -> Array:
    """Return the float32 tensor of an encoded one.

    Args:
        sent: As ``encode`` has returned it.
        layout: Of the float32 tensor.
        wire: The format.
        density: Share of the values that a sparse one holds.

    Raises:
        RuntimeError: The positions of a sparse one are not within the tensor.
    """
    if wire == "fp32":
        return sent
    numel = prod(layout.shape)
    if wire == "bf16":
        decoded = torch.from_numpy(sent.view(np.int16)).view(torch.bfloat16).float()
    else:
        decoded = _spec(numel, wire, density).decode(torch.from_numpy(sent)).flatten()[:numel]
    return np.asarray(decoded.numpy()).reshape(layout.shape)


def _spec(numel: int, wire: str, density: float) -> TensorSpec:
    """Whole blocks that hold so many elements; one that fits for a tensor of fewer than a block."""
    block = min(SPARSE_BLOCK if wire == "sparse" else BLOCK, numel)
    return TensorSpec((-(-numel // block), block), torch.float32, wire=wire, density=density)
