"""Set an evaluation up: a fine-tuning per model, task and seed, all checked first. No torch.

A cell is done when its ``result.json`` has the key that its settings and the content of its model
and task give. A cell with a changed key runs again, and all others are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedpipe.commands.evaluate.content import CELL_FILE, CellFile, Settings
from fedpipe.commands.evaluate.evaluation import Evaluation, ScoredCell
from fedpipe.commands.evaluate.model_folder import (
    ModelFolder,
    check_models,
    max_length_of,
    read_models,
)
from fedpipe.config import load
from fedpipe.config.evaluation import EvaluationConfig
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node, dump
from fedpipe.data.cache import cache_root
from fedpipe.data.digests import digest
from fedpipe.data.tasks.files import TaskFiles, find_files
from fedpipe.data.tasks.prepare import PreparedTask, prepare_task, task_digest
from fedpipe.data.tasks.registry import Task, TaskSpec
from fedpipe.data.tasks.task_file import choose_tasks
from fedpipe.data.tokenizer import check_tokenizer
from fedpipe.errors import CheckpointError
from fedpipe.files import write_text
from fedpipe.printable import printable
from fedpipe.report.format import count
from fedpipe.run.run_dir import RunDir, locked

FORMAT = 1
"""Version of training and scoring; results of an earlier version are not kept."""
Progress = Callable[[str, int, int], None]


def read_evaluation(
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    chosen: dict[str, Any] | None = None,
) -> tuple[RunConfig, Path]:
    """Find the configuration and the directory; write nothing.

    Args:
        config_path: Path of a YAML file, or None for that of the evaluation in the directory.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory, or None for ``runs/NAME-evaluation``.
        chosen: Fields of ``EvaluationConfig`` that options set.

    Raises:
        FedPipeError: The configuration is wrong, or the directory has other files.
    """
    run = RunDir.at(run_dir, "evaluation") if run_dir else None
    config = load.load_config(config_path or (run.saved if run else None), overrides)
    if chosen:
        config = replace(config, evaluation=replace(config.evaluation, **chosen))
    run = run or RunDir.at(f"runs/{config.name}-evaluation", "evaluation")
    return config, run.path


def set_up_evaluation(
    config: RunConfig,
    directory: Path,
    *,
    notify: Callable[[str], None],
    progress: Progress = lambda label, done, total: None,
    on_checked: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Check models and tasks, tokenise tasks that are not cached, and write the directory.

    Args:
        config: Configuration from ``read_evaluation``.
        directory: Directory from ``read_evaluation``.
        notify: Called with a line for the user.
        progress: Called while tasks are tokenised.
        on_checked: Called when all quick checks have passed.

    Returns:
        The evaluation; no cell has been started.

    Raises:
        FedPipeError: The user can correct the cause; no process of the run has been started.
    """
    evaluation = config.evaluation
    tasks = choose_tasks(evaluation.tasks, evaluation.task_files, evaluation.data)
    folders = check_models(evaluation.models)
    files = tuple(find_files(task, evaluation.data, alone=len(tasks) == 1) for task in tasks)
    run = RunDir.at(directory, "evaluation").make()
    with locked(directory):  # nobody else may be at work on its cells
        pass
    for line in dict.fromkeys(w for f in folders for w in check_tokenizer(f, key="--model")):
        notify(f"warning {line}")
    on_checked()
    root = cache_root(config)
    models = read_models(folders, root=root)
    cells: list[ScoredCell] = []
    total = len(files) * len(models)
    for done, place in enumerate(files):
        content = task_digest(config, place)
        for index, model in enumerate(models):
            progress("reading and tokenising tasks", done * len(models) + index, total)
            settings = settings_of(evaluation, place.task, model)
            prepared = prepare_task(
                config,
                place,
                folder=model.path,
                tokenizer_digest=model.tokenizer_digest,
                content=content,
                max_length=settings["max_length"],
            )
            _check_vocabulary(model, prepared)
            if model is models[0]:
                notify(_found(place, prepared))
            usual, is_ner = place.task.defaults.max_length, place.task.kind == "ner"
            if evaluation.max_length is None and model.usual_length < usual:
                cut = "sentences are split into windows of" if is_ner else "texts are cut to"
                notify(
                    f"length  {place.task.name}: {cut} {settings['max_length']} tokens, the longest"
                    f" that {model.name} was trained on (usual {usual})"
                )
            cells += [
                _cell(run, config, model, place, seed, content, settings, prepared)
                for seed in evaluation.seeds
            ]
    progress("reading and tokenising tasks", total, total)
    _write(run, config, cells)
    return Evaluation(
        directory=directory, config=config, models=models, files=files, cells=tuple(cells)
    )


def settings_of(evaluation: EvaluationConfig, task: Task, model: ModelFolder) -> Settings:
    """Fill in the published values for fields that the configuration leaves open."""
    usual = task.defaults
    return {
        "learning_rate": evaluation.learning_rate or usual.learning_rate,
        "batch_size": evaluation.batch_size or usual.batch_size,
        "num_epochs": evaluation.num_epochs or usual.num_epochs,
        "max_length": max_length_of(model, wanted=evaluation.max_length, usual=usual.max_length),
        "weight_decay": evaluation.weight_decay,
        "warmup_ratio": evaluation.warmup_ratio,
        "max_grad_norm": evaluation.max_grad_norm,
        "max_train_examples": evaluation.max_train_examples,
        "max_test_examples": evaluation.max_test_examples,
        "typed_entities": evaluation.typed_entities,
        "precision": evaluation.precision,
    }


def _check_vocabulary(model: ModelFolder, prepared: PreparedTask) -> None:
    if prepared.largest_id >= model.vocab_size > 0:
        raise CheckpointError(
            f"--model: expected tokens below {model.vocab_size} (the vocabulary of {model.path}), "
            f"got {prepared.largest_id} from its tokenizer. Save the model's own tokenizer there."
        )


def _found(place: TaskFiles, prepared: PreparedTask) -> str:
    sizes = [f"{split} {size:,}" for split, size in prepared.examples.items()]
    text = f"task    {place.task.name}: {place.format_name}, {', '.join(sizes)} ({place.folder})"
    if prepared.test_split == "dev":
        text += "; no labelled test split: the dev split is the test, after the last epoch"
    for split, rows in prepared.left_out.items():
        text += f"; left out of {split}: {printable(rows)}"
    lost = prepared.truncated["test"]
    return text + (f"; {count(lost, 'test example')} cut" if lost else "")


def _cell(
    run: RunDir,
    config: RunConfig,
    model: ModelFolder,
    place: TaskFiles,
    seed: int,
    content: str,
    settings: Settings,
    prepared: PreparedTask,
) -> ScoredCell:
    identity = [FORMAT, model.digest, content, settings, seed]
    name = f"{model.name}_{place.task.name}_seed={seed}"
    return ScoredCell(
        name=name,
        run_dir=run.path / "cells" / name,
        config=config,
        model=model,
        task=place.task,
        seed=seed,
        key=digest(identity),
        settings=settings,
        prepared=prepared,
    )


def _write(run: RunDir, config: RunConfig, cells: Sequence[ScoredCell]) -> None:
    """Write the configuration of the evaluation, and cell.json of every cell."""
    whole = load.to_dict(config)
    shared = {"name": config.name, "data": {"cache_dir": config.data.cache_dir}}
    run.write(dump(shared | {"evaluation": whole["evaluation"]}))
    for cell in cells:
        own = whole["evaluation"] | cell.settings
        own |= {
            "models": [cell.model.path],
            "tasks": [cell.task.name],
            "seeds": [cell.seed],
            "task_files": [cell.task.file] if cell.task.file else [],
        }
        spec = TaskSpec.of(cell.task, typed=cell.settings["typed_entities"])
        content: CellFile = {
            "key": cell.key,
            "name": cell.name,
            "model": cell.model.name,
            "model_path": os.path.abspath(cell.model.path),
            "task": cell.task.name,
            "spec": asdict(spec),
            "seed": cell.seed,
            "settings": cell.settings,
            "data_dir": cell.prepared.directory,
            "test_split": cell.prepared.test_split,
        }
        cell.run.make().write(dump(shared | {"evaluation": own}))
        write_text(cell.run_dir / CELL_FILE, json.dumps(content, indent=1) + "\n")
