"""Files that are not what their name says: Git LFS pointers, empty files, downloads cut short."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from fedpipe.errors import ConfigError, FedPipeError

_POINTER = b"version https://git-lfs"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SHARDED = "{}.index.json"
WEIGHT_FILES = tuple(name for whole in _WHOLE for name in (whole, _SHARDED.format(whole)))
"""Names under which transformers looks for weights, the first one that is there."""
_SIZES = ("vocab_size", "max_position_embeddings", "n_positions", "pad_token_id")
"""Fields of a config.json that are read whatever the model."""
_AGAIN = "Download or save the model again."


def check_fetched(path: str | Path, *, key: str, error: type[FedPipeError] = ConfigError) -> None:
    """Refuse a file whose content was never fetched.

    Args:
        path: A file.
        key: That named it or its folder.
        error: What to raise.

    Raises:
        FedPipeError: It is a Git LFS pointer, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError as problem:
        raise error(
            f"{key}: expected a readable file, got {str(path)!r}: {problem.strerror}. Check its"
            " permissions."
        ) from problem
    if start == _POINTER:
        raise error(
            f"{key}: expected the content of {str(path)!r}, got a Git LFS pointer to it. Run git"
            f" lfs pull in {str(Path(path).parent)!r}."
        )


def read_json_object(
    path: Path, *, key: str, error: type[FedPipeError] = ConfigError
) -> dict[str, Any]:
    """Read a JSON object of a Hugging Face folder.

    Args:
        path: The file.
        key: That named its folder.
        error: What to raise.

    Raises:
        FedPipeError: It is not there, holds no JSON object, or was never fetched.
    """
    if not path.is_file():
        way_out = _export_of(path.parent) or "Point it at a folder written by save_pretrained."
        raise error(
            f"{key}: expected a readable {path.name} in {str(path.parent)!r}, got none. {way_out}"
        )
    check_fetched(path, key=key, error=error)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(
            f"{key}: expected JSON in {path}, got {problem}. Save the folder again."
        ) from problem
    if not isinstance(content, dict):
        raise error(
            f"{key}: expected a JSON object in {path}, got a {type(content).__name__}. Save the"
            " folder again."
        )
    return content


def _export_of(folder: Path) -> str:
    """Ask for the model of a run where the folder is that of the run; empty where it is not."""
    export = folder / "export"
    return f"Did you mean {str(export)!r}?" if (export / "config.json").is_file() else ""


def read_model_config(
    folder: Path, *, key: str, error: type[FedPipeError] = ConfigError
) -> dict[str, Any]:
    """Read the config.json of any model of transformers, whose sizes must be numbers.

    Args:
        folder: Of Hugging Face.
        key: That named it.
        error: What to raise.

    Raises:
        FedPipeError: It cannot be read, or a size that is asked for later is no whole number.
    """
    content = read_json_object(folder / "config.json", key=key, error=error)
    for name in _SIZES:
        value = content.get(name)
        if value is not None and type(value) is not int:
            raise error(
                f"{key}: expected a whole number as {name} in {folder / 'config.json'}, got"
                f" {value!r}. Correct it there, or use another folder."
            )
    return content


def weight_files(folder: Path, *, key: str) -> list[Path]:
    """List the files of the weights that transformers would read; none where there are none.

    Args:
        folder: Of Hugging Face.
        key: That named it.

    Raises:
        ConfigError: The index of the shards names none.
    """
    for whole in _WHOLE:  # whole before sharded, safetensors before pickled
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / _SHARDED.format(whole)
        if index.is_file():
            shards = read_json_object(index, key=key).get("weight_map")
            named = isinstance(shards, dict) and all(isinstance(s, str) for s in shards.values())
            if not named or not shards:
                raise ConfigError(f"{key}: expected a weight_map in {index}, got none. {_AGAIN}")
            return [folder / shard for shard in sorted(set(shards.values()))]
    return []


def check_weights(folder: Path, *, key: str) -> dict[str, list[int]]:
    """Refuse weights that are not all there, without reading them.

    Args:
        folder: Of Hugging Face.
        key: That named it.

    Returns:
        Shapes of the tensors by name; none of files that only torch can read.

    Raises:
        ConfigError: There are none, a shard is missing, or a file is cut short.
    """
    files = weight_files(folder, key=key)
    if not files:
        way_out = "Download them, or save the model there with save_pretrained."
        raise ConfigError(
            f"{key}: expected weights in {str(folder)!r}, got none of {', '.join(WEIGHT_FILES)}."
            f" {_export_of(folder) or way_out}"
        )
    shapes: dict[str, list[int]] = {}
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"{key}: expected {file.name} (see the index) in {str(folder)!r}, got none."
                f" {_AGAIN}"
            )
        check_fetched(file, key=key)
        if file.suffix == ".safetensors":
            shapes |= _check_safetensors(file, key=key)
        elif _starts_as_zip(file) != zipfile.is_zipfile(file) or not file.stat().st_size:
            raise ConfigError(f"{key}: expected whole weights in {file}, got a part. {_AGAIN}")
    return shapes


def _starts_as_zip(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(2) == b"PK"


def _check_safetensors(file: Path, *, key: str) -> dict[str, list[int]]:
    """Compare the size with what the header says: 8 bytes of length, JSON, then the tensors."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        try:
            header = json.loads(content.read(length) if 8 + length <= size else b"")
            header.pop("__metadata__", None)
            shapes = {n: [int(size) for size in t.get("shape") or []] for n, t in header.items()}
            end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        except (
            ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError,
        ) as problem:  # fmt: skip
            raise ConfigError(
                f"{key}: expected readable weights in {file}, got no safetensors. {_AGAIN}"
            ) from problem
    whole = 8 + length + end
    if size < whole:
        raise ConfigError(
            f"{key}: expected {whole:,} bytes of weights in {file}, got {size:,}. {_AGAIN}"
        )
    return shapes
