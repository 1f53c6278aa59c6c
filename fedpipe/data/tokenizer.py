"""A tokenizer folder: its vocabulary, its special tokens, and entries that no text can become.

Reads the JSON files of the folder; imports neither transformers nor, at the top, tokenizers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.config.half_files import check_fetched, read_json_object
from fedpipe.config.schema import PACKAGED, RunConfig
from fedpipe.errors import CorpusError

SAMPLES = Path(__file__).parent / "samples"
"""Folder of the packaged text and tokenizer."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""The files of a Hugging Face tokenizer folder that an exported model takes along."""

_TOO_MANY = 0.1
"""Share of faulty entries above which the vocabulary is refused, not only warned about."""
_SPACES = (" ", "\u2581")
"""A space, and the character that SentencePiece writes for it."""

# Usual names of special tokens, for a folder that does not name its own: RoBERTa's, then BERT's.
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
    """Rows that the word embedding needs: the largest id + 1."""
    cls_id: int
    """Opens a block."""
    sep_id: int
    """Closes a block and separates documents."""
    mask_id: int
    """Replaces a masked token."""
    pad_id: int
    """Required by the models; never occurs in packed blocks."""
    special_ids: tuple[int, ...]
    """Ids of all special tokens, ascending."""
    warnings: tuple[str, ...] = ()
    """Faults of a small part of the vocabulary."""

    def files(self) -> list[Path]:
        """List the files of the folder that an exported model takes along."""
        paths = (Path(self.directory, name) for name in FILES)
        return [path for path in paths if path.is_file()]


def tokenizer_info(config: RunConfig) -> TokenizerInfo:
    """Read the vocabulary of ``data.tokenizer``.

    Args:
        config: The run.

    Returns:
        The size of the vocabulary and its special tokens.

    Raises:
        CorpusError: There is no readable tokenizer.json, it has no cls, sep, mask or pad token, or
            the tokenizer's own normaliser contradicts its vocabulary.
    """
    named = config.data.tokenizer
    folder = SAMPLES / "tokenizer" if named == PACKAGED else Path(named)
    if not (folder / "tokenizer.json").is_file():
        needs = " after pip install sentencepiece" if any(folder.glob("*.model")) else ""
        raise CorpusError(
            f"data.tokenizer: expected a folder with a tokenizer.json, got {str(folder)!r}. "
            f"Save one with AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR){needs}."
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
    """Read the names of the special tokens from the folder's own files."""
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


def check_tokenizer(folder: Path, *, key: str) -> tuple[str, ...]:
    """Check the tokenizer.json of a model folder with ``check_entries``, if there is one.

    Args:
        folder: A Hugging Face folder.
        key: The configuration key that names the folder, for errors.

    Returns:
        A warning for every fault that few entries have.

    Raises:
        CorpusError: The file cannot be read, or a large part of the vocabulary is at fault.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ()
    content = read_json_object(file, key=key, error=CorpusError)
    ids = read_entries(content, file=file, key=key)
    added = content.get("added_tokens") or []
    special = {token["id"] for token in added if token.get("special")}
    return check_entries(ids, content, folder=folder, special=special, key=key)


def read_entries(content: Mapping[str, Any], *, file: Path, key: str) -> dict[str, int]:
    """Read the id of every entry of a vocabulary, added tokens included.

    Args:
        content: The content of tokenizer.json.
        file: Its path, for errors.
        key: The configuration key that names the folder, for errors.

    Returns:
        Ids by entry; every id occurs once.

    Raises:
        CorpusError: There are no entries, an id is not a whole number or occurs twice, or the entry
            for unknown words is missing.
    """
    model, added = content.get("model") or {}, content.get("added_tokens") or []
    again = "Save the tokenizer again with transformers or tokenizers."
    try:
        vocab = model.get("vocab") or {}
        if not isinstance(vocab, dict):  # Unigram keeps a list, all others a map
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        ids = {**vocab, **{token["content"]: token["id"] for token in added}}
        unknown = model.get("unk_token")
        needs_unknown = model.get("type") in ("WordPiece", "WordLevel") and unknown not in ids
    except (AttributeError, IndexError, KeyError, TypeError) as problem:
        raise CorpusError(
            f"{key}: expected the model and the added tokens of a tokenizer in {file}, got"
            f" others. {again}"
        ) from problem
    if not ids:
        raise CorpusError(f"{key}: expected a vocabulary in {file}, got none. {again}")
    for entry, token_id in ids.items():
        if type(token_id) is not int or token_id < 0:
            raise CorpusError(
                f"{key}: expected whole numbers, 0 or more, as ids in {file}, got"
                f" {token_id!r} for {entry!r}. {again}"
            )
    (token_id, times), *_ = Counter(ids.values()).most_common(1)
    if times > 1:
        shared = [repr(entry) for entry, other in ids.items() if other == token_id]
        raise CorpusError(
            f"{key}: expected an id of its own for every entry in {file}, got {token_id}"
            f" for {' and '.join(shared[:3])}. {again}"
        )
    if needs_unknown:
        raise CorpusError(
            f"{key}: expected the entry {unknown!r}, which stands for unknown words, in"
            f" {file}, got none. {again}"
        )
    return ids


def check_entries(
    ids: Mapping[str, int],
    content: Mapping[str, Any],
    *,
    folder: Path,
    special: Collection[int],
    key: str,
) -> tuple[str, ...]:
    """Check that every id has an entry, that text can become each entry, and that vocab.txt agrees.

    Args:
        ids: The result of ``read_entries``.
        content: The content of tokenizer.json.
        folder: The folder of tokenizer.json.
        special: Ids of the special tokens.
        key: The configuration key that names the folder, for errors.

    Returns:
        A warning for every fault that few entries have.

    Raises:
        CorpusError: A large part of the vocabulary is at fault.
    """
    text = [entry for entry, token_id in ids.items() if token_id not in special]
    warnings = []

    def judge(num: int, size: int, found: str, expected: str, way_out: str) -> None:
        got = f"{num:,} of {size:,} {found}"
        if num > _TOO_MANY * size:
            raise CorpusError(
                f"{key}: expected {expected} in {str(folder)!r}, got {got}. {way_out}"
            )
        if num:
            warnings.append(f"{key}: {got}")

    size = max(ids.values()) + 1
    known = set(ids.values())
    first = next((i for i in range(len(known)) if i not in known), None)
    judge(
        size - len(ids),
        size,
        f"ids without an entry, such as {first}",
        "an entry for every id",
        "Remove equal lines from the vocabulary, and make the tokenizer again.",
    )
    changed = _changed(text, content)
    judge(
        len(changed),
        len(text),
        f"entries that can never occur, such as {next(iter(changed.items()), None)!r}",
        "entries that the tokenizer's normaliser leaves as they are",
        "Save the tokenizer with its own normaliser: do_lower_case=False of a cased vocabulary.",
    )
    others, lines = _other_lines(ids, folder / "vocab.txt", key=key)
    judge(
        len(others),
        lines,
        f"lines of vocab.txt with other ids, such as {others[:1]}",
        "the vocabulary of tokenizer.json also in vocab.txt",
        "Make the tokenizer again from a vocab.txt without equal lines, or remove vocab.txt.",
    )
    return tuple(warnings)


def _changed(entries: Collection[str], content: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries that the normaliser changes, and what it turns each of them into."""
    normaliser = content.get("normalizer")
    if not normaliser:
        return {}
    from tokenizers import Tokenizer

    alone = {"model": {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}}
    try:
        tokenizer: Any = Tokenizer.from_str(json.dumps(alone | {"normalizer": normaliser}))
        normalise: Callable[[str], str] = tokenizer.normalizer.normalize_str
    except Exception:  # noqa: BLE001 - loading the tokenizer to encode text reports the error
        return {}
    changed = {}
    for entry, surface in _surfaces(entries, content):
        if surface.isascii() and surface == surface.lower():
            continue  # no common normaliser changes lower-case ASCII, which most entries are
        written, wanted = normalise(surface), surface
        for space in _SPACES:
            written, wanted = written.replace(space, ""), wanted.replace(space, "")
        if written != wanted:
            changed[entry] = written
    return changed


def _surfaces(entries: Collection[str], content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every entry and the text that it stands for."""
    model = content.get("model") or {}
    mark = model.get("continuing_subword_prefix") or "" if model.get("type") == "WordPiece" else ""
    if "ByteLevel" not in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
        return [(entry, entry.removeprefix(mark)) for entry in entries]
    to_byte = {character: byte for byte, character in _byte_characters().items()}
    return [
        (entry, bytes(to_byte.get(c, 0) for c in entry).decode("utf-8", "ignore"))
        for entry in entries
    ]


def _byte_characters() -> dict[int, str]:
    """Return the character that byte-level BPE writes for each byte.

    A printable byte is written as itself, any other as a character from U+0100 on.

    Source: GPT-2's encoder, Radford et al. 2019.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def _other_lines(ids: Mapping[str, int], file: Path, *, key: str) -> tuple[list[str], int]:
    """Return the lines of vocab.txt whose line number is not their id, and the number of lines."""
    if not file.is_file():
        return [], 0
    check_fetched(file, key=key, error=CorpusError)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for number, line in enumerate(lines) if ids.get(line) != number], len(lines)
