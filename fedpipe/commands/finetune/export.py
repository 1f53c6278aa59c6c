"""Export a fine-tuning to folders that the adapters library and transformers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedpipe.commands.finetune.model import attach_seeded, build_tuned, load_tuning_tokenizer
from fedpipe.commands.finetune.prepared import DATA, TuningData
from fedpipe.commands.finetune.whole import WEIGHTS_FILE
from fedpipe.config.finetune import load_finetune
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.errors import CheckpointError
from fedpipe.files import replace_folder
from fedpipe.models.peft import MERGEABLE, frozen_state, plain_state, save_adapter
from fedpipe.models.split import merge
from fedpipe.run.checkpoint import find_latest
from fedpipe.run.export import check_finite
from fedpipe.run.run_dir import RunDir

ADAPTER_DIR, EXPORT_DIR, BASE_DIR = "adapter", "export", "base"


def export_finetuned(run_dir: Path) -> list[Path]:
    """Export the newest checkpoint of a fine-tuning.

    ``RUN_DIR/adapter`` is in the format of the adapters library; the method full has no adapter.
    ``RUN_DIR/export`` is the whole model with its head, if the adapter can be merged into it. If
    averaging the products of LoRA has changed frozen weights, ``RUN_DIR/base`` is the model that
    the adapter belongs to.

    Args:
        run_dir: Run directory with a checkpoint.

    Returns:
        The folders that were written.

    Raises:
        CheckpointError: There is no intact checkpoint.
    """
    config = load_finetune(RunDir.open(run_dir, "finetune").saved, [])
    checkpoint, _ = find_latest(run_dir)
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir}: expected a checkpoint to export, got none. Resume the run first."
        )
    task = TuningData.load(run_dir / DATA).task
    model = build_tuned(config, task)
    attach_seeded(model, config, task)
    _label(model.config, task)
    weights = learnt(checkpoint.path)
    check_finite(weights)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    tokenizer = load_tuning_tokenizer(config)
    written = []
    if config.method.name != "full":
        written.append(run_dir / ADAPTER_DIR)
        replace_folder(written[-1], lambda folder: save_adapter(model, folder))
    if config.method.lora_average == "product":
        written.append(run_dir / BASE_DIR)
        replace_folder(
            written[-1], lambda f: _save(config, task, frozen_state(model), tokenizer, f)
        )
    if config.method.name in MERGEABLE:
        written.append(run_dir / EXPORT_DIR)
        state = plain_state(model, config.method)
        replace_folder(written[-1], lambda folder: _save(config, task, state, tokenizer, folder))
    return written


def learnt(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the trained tensors of a whole model, or of all stages without their local heads."""
    whole = checkpoint / WEIGHTS_FILE
    if whole.is_file():
        return load_file(whole)
    return merge(load_file(file) for file in sorted(checkpoint.glob("stage_*.safetensors")))


def _label(model_config: Any, task: TaskSpec) -> None:
    if task.labels:
        model_config.id2label = dict(enumerate(task.labels))
        model_config.label2id = {name: index for index, name in enumerate(task.labels)}


def _save(config: Any, task: TaskSpec, state: Any, tokenizer: Any, folder: Path) -> None:
    plain = build_tuned(config, task)
    plain.load_state_dict(state, strict=True)
    _label(plain.config, task)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
