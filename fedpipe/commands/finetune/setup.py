"""Set a fine-tuning up before it starts: checks, parameter counts, examples, run directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.commands.finetune.examples import (
    kind_of,
    prepare_examples,
    task_content,
    tuning_task,
)
from fedpipe.commands.finetune.model import UNTRAINED, load_model_config, load_tuning_tokenizer
from fedpipe.commands.finetune.plan import render_plan
from fedpipe.commands.finetune.prepared import DATA, FinetuneSetup, TuningData
from fedpipe.config.deepspeed import engine_config
from fedpipe.config.finetune import QUICKSTART, FinetuneConfig
from fedpipe.config.half_files import check_fetched, check_weights, read_json_object
from fedpipe.config.load import to_yaml
from fedpipe.data.digests import file_digests, model_files, tokenizer_files
from fedpipe.data.lines import shown
from fedpipe.data.tasks.prepare import FORMAT
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.data.tokenizer import FILES, SAMPLES, check_tokenizer
from fedpipe.errors import ConfigError, CorpusError
from fedpipe.files import write_text
from fedpipe.models.lengths import longest_input, num_positions
from fedpipe.models.lower import check_first_layer
from fedpipe.models.peft import Counts, adapter_head, attach, load_adapter, trainable
from fedpipe.models.tuned import build_model, check_family, is_head_of, saved_labels
from fedpipe.models.tuned_stage import check_cut
from fedpipe.run.resume import Inputs
from fedpipe.run.run_dir import RunDir, describe_environment

_QUICKSTART_EXPORT = Path("runs/quickstart/export")


def set_up_finetune(
    run: RunDir, config: FinetuneConfig, *, notify: Callable[[str], None]
) -> FinetuneSetup:
    """Check a fine-tuning, assign the examples to clients, and write the run directory.

    Args:
        run: Directory from ``resolve``.
        config: Configuration from ``resolve``.
        notify: Called with a line for the user.

    Returns:
        The setup.

    Raises:
        FedPipeError: The user can correct the cause; no process of the run has been started.
    """
    started_at = time.monotonic()
    config = _settled(config)
    check_federation(config)
    kind = kind_of(config)
    warnings = check_model_folder(config)
    tokenizer = load_tuning_tokenizer(config)
    model_config = load_model_config(config, tokenizer)
    check_family(model_config.model_type, kind)
    check_first_layer(model_config, config.method.first_layer)
    if config.is_cut:
        check_cut(model_config, config.pipeline.cut[-1])
    run.claim(deepspeed_of(config), partial(tuning_inputs, config))
    data = prepare_examples(config, tokenizer)
    check_lengths(config, data, model_config)
    counts, trained = count_parameters(config, model_config, data)
    plan = render_plan(config, data, counts, trained=trained, model_config=model_config)
    run.write(to_yaml(config), deepspeed=deepspeed_of(config) or None, plan=plan)
    run.record_inputs(tuning_inputs(config), notify=notify)
    write_text(run.path / "env.json", json.dumps(describe_environment(), indent=2) + "\n")
    data.save(run.path / DATA)
    checkpoint = run.checkpoint(notify=notify)
    notify(plan)
    for line in warnings:
        notify(f"warning {line}")
    for line in new_heads(config, data.task):
        notify(line)
    trained_length = longest_input(Path(config.model.path), key="model.path")
    if trained_length and data.longest > trained_length:
        notify(
            f"sequences of up to {data.longest} tokens: {config.model.path} has been trained on up"
            f" to {trained_length}, says its tokenizer; task.max_length={trained_length} may score"
            " better"
        )
    if config.model.path == UNTRAINED and not checkpoint:
        notify(f"no {_QUICKSTART_EXPORT}: random weights; `make pretrain` leaves a model there")
    return FinetuneSetup(
        config=config, run_dir=run.path, checkpoint=checkpoint, started_at=started_at
    )


def tuning_inputs(config: FinetuneConfig) -> Inputs:
    """Compute the digests of all inputs of a fine-tuning: examples, base model, adapter.

    Raises:
        FedPipeError: A file cannot be read.
    """
    path = config.model.path
    base = SAMPLES / "tokenizer" if path == UNTRAINED else Path(path)
    files = {
        **task_content(config),
        "model.path": file_digests(
            [*model_files(base), *tokenizer_files(base)], key="model.path", root=None
        ),
    }
    if config.method.path:
        adapter = sorted(file for file in Path(config.method.path).rglob("*") if file.is_file())
        files["method.path"] = file_digests(adapter, key="method.path", root=None)
    return Inputs(prepared=f"examples-{FORMAT}", files=files)


def _settled(config: FinetuneConfig) -> FinetuneConfig:
    """Fill in the task and the model if the configuration leaves them open."""
    if (task := tuning_task(config)) is not None:
        config = replace(config, task=replace(config.task, name=task.name))
    return replace(config, model=replace(config.model, path=_model_path(config)))


def deepspeed_of(config: FinetuneConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration of the stages; empty without a cut."""
    return engine_config(config.deepspeed.config, config.stages) if config.is_cut else {}


def _model_path(config: FinetuneConfig) -> str:
    if config.model.path != QUICKSTART:
        return config.model.path
    return str(_QUICKSTART_EXPORT) if (_QUICKSTART_EXPORT / "config.json").is_file() else UNTRAINED


def check_federation(config: FinetuneConfig) -> None:
    """Refuse a language-model task whose head is not averaged.

    Raises:
        ConfigError: ``federation.average.final_head`` is false.
    """
    if config.task.name == "causal-lm" and not config.federation.average.final_head:
        raise ConfigError(
            "federation.average.final_head: expected true with task.name=causal-lm, got False."
            " Set it to true: the head of a language model is part of the model."
        )


def check_model_folder(config: FinetuneConfig) -> tuple[str, ...]:
    """Refuse a folder with incomplete files, or with the vocabulary of another tokenizer.

    Returns:
        A warning for every fault that concerns only a few entries of the vocabulary.

    Raises:
        CorpusError: The vocabulary does not fit the rules of the tokenizer.
        ConfigError: A file of the model or of its tokenizer is a pointer, empty or cut short.
    """
    folder = Path(config.model.path)
    if config.model.path == UNTRAINED or not folder.is_dir():
        return ()
    for name in ("config.json", *FILES):
        if (folder / name).is_file():
            check_fetched(folder / name, key="model.path")
    if not config.model.random_weights:
        check_weights(folder, key="model.path")
    return check_tokenizer(folder, key="model.path")


def check_lengths(config: FinetuneConfig, data: TuningData, model_config: Any) -> None:
    """Refuse sequences that are longer than the model's positions, and unknown token ids.

    Raises:
        ConfigError: A sequence is too long.
        CorpusError: A token id is not in the embedding of the model.
    """
    positions = num_positions(model_config.to_dict())
    longest = data.longest
    if 0 < positions < longest:
        raise ConfigError(
            f"task.max_length: expected at most {positions} (the positions of {config.model.path}),"
            f" got sequences of {longest} tokens. Lower it."
        )
    largest = int(max(data.train.ids.max(), data.test.ids.max()))
    if largest >= model_config.vocab_size:
        raise CorpusError(
            f"model.path: expected a tokenizer of the model's {model_config.vocab_size} tokens, got"
            f" id {largest} from the one in {config.model.path}. Use the model's own tokenizer."
        )


def new_heads(config: FinetuneConfig, task: TaskSpec) -> list[str]:
    """Name the heads in the folders of a run that do not fit the task and are replaced."""
    if task.kind == "causal-lm":
        return []
    found = []
    if config.method.path:
        found.append(("method.path", config.method.path, adapter_head(Path(config.method.path))))
    file = Path(config.model.path) / "config.json"
    if config.model.path != UNTRAINED and not config.model.random_weights and not found:
        found.append(("model.path", config.model.path, read_json_object(file, key="model.path")))
    lines = []
    for key, path, saved in found:
        classes = [saved.get("model_class"), *(saved.get("architectures") or ())]
        has_head = any(str(name).endswith("Classification") for name in classes)
        if has_head and not is_head_of(saved, task.kind, task.labels):
            labels = shown(", ".join(saved_labels(saved)[:4]))
            lines.append(
                f"{key}: the head in {path} has other labels, {labels}: it is not used, and the"
                " head of the task starts with random weights"
            )
    return lines


def count_parameters(
    config: FinetuneConfig, model_config: Any, data: TuningData
) -> tuple[Counts, dict[str, int]]:
    """Count the trained parameters, on a model without memory for its weights.

    Returns:
        The counts, and the number of elements of every trained tensor by its full name.

    Raises:
        ConfigError: The family does not support the method.
        CheckpointError: ``method.path`` is not an adapter of this model.
    """
    task, split = data.task, config.is_cut
    model = build_model(model_config, task.kind, num_labels=task.num_outputs, device="meta")
    counts = attach(model, config.method, causal=task.kind == "causal-lm", split=split)
    if config.method.path:
        load_adapter(
            model,
            Path(config.method.path),
            config.method,
            kind=task.kind,
            labels=task.labels,
            split=split,
        )
    return counts, {name: p.numel() for name, p in trainable(model).items()}
