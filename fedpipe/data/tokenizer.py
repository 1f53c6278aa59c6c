"""What a tokenizer folder says about its vocabulary, read without importing transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.config.half_files import read_json_object
from fedpipe.config.schema import PACKAGED, RunConfig
from fedpipe.data.vocabulary import check_entries, read_entries
from fedpipe.errors import CorpusError

SAMPLES = Path(__file__).parent / "samples"
"""The packaged text and vocabulary."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""The files of a Hugging Face tokenizer folder that an exported model takes along."""

# Names in use where a folder does not say which token plays a part: RoBERTa's, then BERT's.
_USUAL_NAMES = {
    "cls_token": ("<s>", "[CLS]"),
    "sep_token": ("</s>", "[SEP]"),
    "mask_token": ("<mask>", "[MASK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """A vocabulary's size and its special tokens."""

    directory: str
    """Folder that holds tokenizer.json."""
    vocab_size: int
    """Rows that an embedding needs: the largest id + 1."""
    cls_id: int
    """Opens a block."""
    sep_id: int
    """Closes a block and separates documents."""
    mask_id: int
    """Stands for a hidden token."""
    pad_id: int
    """Never occurs in packed blocks; models need it."""
    special_ids: tuple[int, ...]
    """All ids that are no text, ascending."""
    warnings: tuple[str, ...] = ()
    """What is wrong with a small part of the vocabulary."""

    def files(self) -> list[Path]:
        """List the files of the folder that an exported model takes along."""
        paths = (Path(self.directory, name) for name in FILES)
        return [path for path in paths if path.is_file()]


def tokenizer_info(config: RunConfig) -> TokenizerInfo:
    """Read the vocabulary of ``data.tokenizer``.

    Args:
        config: The run.

    Returns:
        Its size and special tokens.

    Raises:
        CorpusError: No readable tokenizer.json, no cls, sep, mask or pad token in it, or a
            vocabulary that does not fit its own rules.
    """
    named = config.data.tokenizer
    folder = SAMPLES / "tokenizer" if named == PACKAGED else Path(named)
    if not (folder / "tokenizer.json").is_file():
        raise CorpusError(
            f"data.tokenizer: expected a folder with a tokenizer.json, got {str(folder)!r}. "
            "Save one with AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR)."
        )
    content = _read_json(folder / "tokenizer.json")
    added = content.get("added_tokens") or []
    ids = read_entries(content, file=folder / "tokenizer.json", key="data.tokenizer")
    names = _special_names(folder)
    found = ((part, _find(part, names, ids)) for part in _USUAL_NAMES)
    parts = {part: token_id for part, token_id in found if token_id is not None}
    for part in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if part not in parts:
            raise CorpusError(
                f"data.tokenizer: expected a {part} in {str(folder)!r}, got none. "
                "Use the tokenizer of a masked language model, or name the token in its "
                "special_tokens_map.json."
            )
    for part in ("mask_token", "pad_token"):
        others = [other for other in parts if other != part and parts[other] == parts[part]]
        if others and others != ["unk_token"]:
            raise CorpusError(
                f"data.tokenizer: expected a {part} of its own in {str(folder)!r}, got the "
                f"{others[0]}. Add one with add_special_tokens, and save the tokenizer again."
            )
    special = {token["id"] for token in added if token.get("special")}
    special.update(parts.values())
    return TokenizerInfo(
        directory=str(folder),
        vocab_size=max(ids.values()) + 1,
        cls_id=parts["cls_token"],
        sep_id=parts["sep_token"],
        mask_id=parts["mask_token"],
        pad_id=parts["pad_token"],
        special_ids=tuple(sorted(special)),
        warnings=check_entries(ids, content, folder=folder, special=special, key="data.tokenizer"),
    )


def _special_names(folder: Path) -> dict[str, str]:
    """Read which token plays which part, from the folder's own files."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        for part, value in _read_json(folder / file).items():
            if part not in _USUAL_NAMES or not value:
                continue
            name = value.get("content") if isinstance(value, dict) else value
            if not isinstance(name, str):
                raise CorpusError(
                    f"data.tokenizer: expected the text of the {part} in {folder / file}, got"
                    f" {value!r}. Save the tokenizer again."
                )
            names[part] = name
    return names


def _find(part: str, names: dict[str, str], ids: dict[str, int]) -> int | None:
    candidates = (names[part],) if part in names else _USUAL_NAMES[part]
    return next((ids[name] for name in candidates if name in ids), None)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, key="data.tokenizer", error=CorpusError)
