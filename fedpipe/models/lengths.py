"""How long a sequence a model can read, and how long ones it has been trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpipe.config.half_files import read_json_object
from fedpipe.errors import CheckpointError

OFFSET_FAMILIES = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")
"""Their positions begin after that of the padding."""

_NO_LIMIT = 1_000_000
"""transformers writes 1e30 where there is none."""


def num_positions(model_config: dict[str, Any]) -> int:
    """Return the tokens of the longest sequence that a model has positions for.

    Args:
        model_config: Content of its config.json.

    Returns:
        0 where it says nothing, as of a model with relative positions alone.
    """
    positions = int(
        model_config.get("max_position_embeddings") or model_config.get("n_positions") or 0
    )
    if positions and model_config["model_type"] in OFFSET_FAMILIES:
        positions -= int(model_config.get("pad_token_id") or 0) + 1
    return positions


def longest_input(folder: Path, *, key: str) -> int | None:
    """Return the tokens to which a folder's tokenizer cuts texts; None where it cuts nothing.

    This is ``model_max_length``, by which a model says up to where its positions have been trained.

    Args:
        folder: Of Hugging Face, with model and tokenizer.
        key: That named it, for the error.

    Raises:
        CheckpointError: tokenizer_config.json cannot be read.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    content = read_json_object(path, key=key, error=CheckpointError)
    value = content.get("model_max_length")
    return value if isinstance(value, int) and 0 < value < _NO_LIMIT else None
