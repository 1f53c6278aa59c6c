"""Find and check the Hugging Face folders that an evaluation fine-tunes. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpipe.config.half_files import check_fetched, check_weights, read_model_config
from fedpipe.data.digests import digest, file_digests, model_files, tokenizer_files
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.models.lengths import longest_input, num_positions

DEFAULT = "runs/quickstart"
"""Run directory of ``make pretrain``, the default model."""
_EXPORT = "export"
_FAST = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
"""Files of which one is enough for transformers to make a tokenizer."""
_USUAL_POSITIONS = 512
"""Number of positions of a model whose configuration names none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """A model that can be fine-tuned."""

    name: str
    """Name in tables and folders, unique in an evaluation."""
    path: str
    """Path of the folder."""
    digest: str
    """Digest of configuration, weights and tokenizer."""
    tokenizer_digest: str
    """Digest of the tokenizer."""
    vocab_size: int
    """Number of rows of the embedding."""
    num_positions: int
    """Number of tokens of the longest possible sequence."""
    usual_length: int
    """Number of tokens to which the tokenizer cuts; later positions may be untrained."""


def check_models(paths: Sequence[str]) -> list[Path]:
    """Find the folders that ``--model`` names, without reading the weights.

    Args:
        paths: Hugging Face folders, or run directories with an export; an empty list means the
            quick start.

    Returns:
        A folder for each path.

    Raises:
        ConfigError: No model is named, and the quick start has none.
        CheckpointError: A folder has no model, no weights or no tokenizer.
    """
    if not paths and not os.path.isfile(f"{DEFAULT}/{_EXPORT}/config.json"):
        raise ConfigError(
            "--model: expected a Hugging Face folder to evaluate, got none. Write for example "
            "fedpipe evaluate --model runs/quickstart/export, which make pretrain leaves."
        )
    return [_check(path) for path in paths or (DEFAULT,)]


def read_models(folders: Sequence[Path], *, root: Path) -> tuple[ModelFolder, ...]:
    """Compute the digests of the models.

    Args:
        folders: Folders from ``check_models``.
        root: Cache directory, which stores digests of files.

    Returns:
        A model for each folder.
    """
    names = _names(folders)
    return tuple(_read(f, name, root=root) for f, name in zip(folders, names, strict=True))


def max_length_of(model: ModelFolder, *, wanted: int | None, usual: int) -> int:
    """Choose the longest sequence of a task.

    Args:
        model: The model, whose positions are the limit.
        wanted: ``evaluation.max_length``.
        usual: Length of the task, used if the configuration has none.

    Returns:
        Number of tokens.

    Raises:
        ConfigError: The configuration asks for more tokens than the model has positions.
    """
    if wanted is None:
        return min(usual, model.usual_length)
    if wanted > model.num_positions:
        raise ConfigError(
            f"evaluation.max_length: expected at most {model.num_positions} (the positions of "
            f"{model.path}), got {wanted}. Lower it, or leave it out."
        )
    return wanted


def _check(path: str) -> Path:
    folder = Path(path)
    if os.path.isfile(folder / _EXPORT / "config.json"):
        folder = folder / _EXPORT
    if not os.path.isfile(folder / "config.json"):
        raise CheckpointError(
            f"--model: expected a Hugging Face folder, got {path!r} without a config.json. Name "
            "one that fedpipe export or save_pretrained wrote."
        )
    check_weights(folder, key="--model")
    if not any(path for pattern in _FAST for path in folder.glob(pattern)):
        raise CheckpointError(
            f"--model: expected a tokenizer (tokenizer.json) in {folder}, got none. Save it there "
            "with AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR)."
        )
    for file in tokenizer_files(folder):
        check_fetched(file, key="--model", error=CheckpointError)
    config = read_model_config(folder, key="--model", error=CheckpointError)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"--model: expected a model_type in {folder / 'config.json'}, got none. It must be the "
            "configuration of a transformers model."
        )
    return folder


def _read(folder: Path, name: str, *, root: Path) -> ModelFolder:
    config = read_model_config(folder, key="--model", error=CheckpointError)
    tokenizer = tokenizer_files(folder)
    files = [*model_files(folder), *tokenizer]
    positions = num_positions(config) or _USUAL_POSITIONS
    return ModelFolder(
        name=name,
        path=str(folder),
        digest=digest(file_digests(files, key="--model", root=root)),
        tokenizer_digest=digest(file_digests(tokenizer, key="--model", root=root)),
        vocab_size=int(config.get("vocab_size") or 0),
        num_positions=positions,
        usual_length=min(longest_input(folder, key="--model") or positions, positions),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Name models after their folders, with as many parent folders as make names unique."""
    parts = [_telling(folder) for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(
        f"--model: expected different models, got {folders[0]} and others that are the same "
        "folder. Name each once."
    )


def _telling(folder: Path) -> list[str]:
    """Split the path of a folder, without parts that every export has."""
    words = list(folder.resolve().parts)[1:]
    if words[-1:] == [_EXPORT]:
        words.pop()
    return ["".join(c if c.isalnum() or c in "._+-" else "-" for c in word) for word in words]
