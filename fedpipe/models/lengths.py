"""The longest sequence that a model can read, and the longest that it was trained on. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpipe.config.half_files import read_json_object
from fedpipe.errors import CheckpointError
from fedpipe.families import FAMILIES

OFFSET_FAMILIES = frozenset(
    ("xlm-roberta-xl", "mpnet", "longformer")
    + tuple(name for name, family in FAMILIES.items() if family.positions == "after padding")
)
"""Families that count positions from ``pad_token_id + 1``."""
_PADDING = 1
"""``pad_token_id`` of all of them where config.json leaves it out."""

_NO_LIMIT = 1_000_000
"""Values from here on mean no limit; transformers writes 1e30."""


def num_positions(model_config: dict[str, Any]) -> int:
    """Return the length in tokens of the longest sequence that a model has positions for.

    Args:
        model_config: Content of config.json.

    Returns:
        The length; 0 if config.json has none, as for a model with relative positions only.
    """
    positions = int(
        model_config.get("max_position_embeddings") or model_config.get("n_positions") or 0
    )
    if positions and model_config["model_type"] in OFFSET_FAMILIES:
        padding = model_config.get("pad_token_id")
        positions -= (_PADDING if padding is None else int(padding)) + 1
    return positions


def longest_input(folder: Path, *, key: str) -> int | None:
    """Return the length in tokens to which a folder's tokenizer cuts texts; None for no limit.

    This is ``model_max_length``: positions beyond it have not been trained.

    Args:
        folder: A Hugging Face folder with model and tokenizer.
        key: The configuration key that names the folder, for errors.

    Raises:
        CheckpointError: tokenizer_config.json cannot be read.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    content = read_json_object(path, key=key, error=CheckpointError)
    value = content.get("model_max_length")
    return value if isinstance(value, int) and 0 < value < _NO_LIMIT else None
