"""A tiny model, configuration and corpus: seconds on two cores, nothing mocked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedpipe.config.load import from_dict
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.data.blocks import PreparedData, Shard
from fedpipe.models.split import StageSpec, stage_specs

VOCAB, LENGTH = 97, 16


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """4 layers x 32, two stages, two replicas, no dropout; ``sections`` override keys."""
    base: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 64, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 20,
        },
        "data": {"sequence_length": LENGTH, "partition": "iid"},
        "pipeline": {"cut": [2], "micro_batch_size": 2, "num_micro_batches": 3},
        "federation": {
            "num_clients": 3, "num_replicas": 2, "clients_per_round": 2, "num_rounds": 2,
            "num_local_steps": 3,
        },
        "log": {"to": []},
    }  # fmt: skip
    for section, values in sections.items():
        base[section] = base.get(section, {}) | values
    return from_dict(base)


def tiny_data(
    folder: Path, *, num_clients: int = 3, identical: bool = False, length: int = LENGTH
) -> PreparedData:
    """Random blocks for every client; ``identical`` gives all clients the same ones."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[Shard]] = {"train": [], "valid": []}
    for split, num_blocks in (("train", 40), ("valid", 5)):
        blocks = _blocks(rng, num_blocks, length)
        for client_id in range(num_clients):
            blocks = blocks if identical else _blocks(rng, num_blocks + client_id, length)
            path = folder / f"{split}_{client_id}.bin"
            blocks.astype("<u2").tofile(path)
            shards[split].append(
                Shard(
                    client_id=client_id,
                    path=str(path),
                    num_blocks=len(blocks),
                    num_left_out=0,
                    num_documents=1,
                    num_tokens=blocks.size,
                    sequence_length=length,
                    dtype="<u2",
                    values=(),
                )
            )
    return PreparedData(
        directory=str(folder),
        train=tuple(shards["train"]),
        valid=tuple(shards["valid"]),
        vocab_size=VOCAB,
        cls_id=0,
        sep_id=2,
        mask_id=4,
        pad_id=1,
        special_ids=(0, 1, 2, 3, 4),
        tokenizer_dir="",
        sequence_length=length,
        num_ignored_documents=0,
        num_masked=1,
        num_held_out=0,
        num_overlapping=0,
    )


def _blocks(rng: np.random.Generator, num_blocks: int, length: int) -> np.ndarray:
    # A skewed distribution, so that a few steps already lower the loss.
    words = 5 + (rng.pareto(1.0, size=(num_blocks, length)) * 4).astype(np.int64) % (VOCAB - 5)
    words[:, 0], words[:, -1] = 0, 2
    return words


def stage_chain(
    schedule: str, num_stages: int, *, head_location: str = "server"
) -> tuple[StageSpec, ...]:
    """Stages of one layer each, of the objective that a schedule trains."""
    local = schedule in ("streaming", "evaluation")
    pipeline = PipelineConfig(
        objective="local_loss" if local else "end_to_end",
        schedule="streaming" if local else schedule,  # type: ignore[arg-type]
        cut=tuple(range(1, num_stages)),
        head_location=head_location,  # type: ignore[arg-type]
    )
    return stage_specs(pipeline, num_hidden_layers=num_stages)
