"""An outer round at a site: a folder that weights come into, and that an update goes out of.

Sites that share no cluster train one model. ``round_000003/global.safetensors`` brings the weights
that all sites start the outer round from, and ``global.json`` says what they are: it is written
last, so without it nothing has arrived. The run of the site goes on with these weights for
``outer.num_inner_rounds`` rounds of its own and leaves ``update.safetensors``, the difference, and
``update.json``, again the last one. Whatever moves the four files can drive a consortium. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from fedpipe.config.schema import RunConfig
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.errors import FederationError
from fedpipe.run.checkpoint import Checkpoint, Position
from fedpipe.run.tensor_file import TensorFile

GLOBAL, GLOBAL_FACTS = "global.safetensors", "global.json"
UPDATE, UPDATE_FACTS = "update.safetensors", "update.json"
VERSION = 1
"""Of the two JSON files; raised where an older fedpipe could not read what a newer one writes."""
_MOST_FACTS = 2**20
"""Characters of a JSON file; a longer one is not ours."""
_NAME = re.compile(r"round_(\d{6})")


class GlobalFacts(TypedDict):
    """The content of ``global.json``."""

    version: int
    round: int
    """The outer round, from 0."""
    sha256: str
    """Of ``global.safetensors``."""
    vocabulary: str
    """SHA-256 of the tokenizer.json whose ids the word embedding has rows for."""
    cut: list[int]
    """``pipeline.cut``: an auxiliary head belongs to the layer that it reads."""
    num_inner_rounds: int
    """Rounds of a site in an outer round."""


class UpdateFacts(TypedDict):
    """The content of ``update.json``."""

    version: int
    round: int
    base_sha256: str
    """Of the weights that the site has started from."""
    sha256: str
    """Of ``update.safetensors``."""
    wire: str
    """Format of its tensors: fp32, bf16, int8 or sparse."""
    tokens: int
    """Trained in the inner rounds, by all clients of the site."""
    train_loss: list[float | None]
    """Nats by stage with a head, the mean of the last inner round."""
    base_valid_loss: list[float | None]
    """Nats by stage with a head of the weights that came in, on held-out text of the site; empty
    where it has none."""
    valid_loss: list[float | None]
    """The same of the site's weights after the inner rounds."""
    valid_tokens: int
    """Masked tokens that were scored."""
    seconds: float
    """Of the inner rounds, without waiting in a queue."""
    fedpipe: str
    """Version that has written it."""


def round_name(index: int) -> str:
    """Name of the folder of an outer round."""
    return f"round_{index:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterRound:
    """An outer round that has arrived; JSON can hold it for other ranks."""

    folder: str
    index: int
    num_inner_rounds: int
    sha256: str
    """Of the weights that came in."""

    @property
    def first_round(self) -> int:
        """The first of its rounds, in the count of the site's run."""
        return self.index * self.num_inner_rounds

    @property
    def end_round(self) -> int:
        """The round after its last one."""
        return self.first_round + self.num_inner_rounds

    @property
    def path(self) -> Path:
        """Its folder."""
        return Path(self.folder)

    @property
    def is_done(self) -> bool:
        """Whether its update has been written."""
        return (self.path / UPDATE_FACTS).exists()

    def to_message(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        return asdict(self)

    def read_base(self) -> TensorFile:
        """Return the weights that came in."""
        return TensorFile(self.path / GLOBAL)


def newest_round(config: RunConfig) -> OuterRound:
    """Find the newest outer round that has arrived, and check what came.

    Args:
        config: Of a run with ``outer.folder``.

    Raises:
        FederationError: None has arrived, or its files are damaged or of another consortium.
    """
    folder = Path(config.outer.folder)
    arrived = {
        int(found[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (found := _NAME.fullmatch(path.name)) and (path / GLOBAL_FACTS).is_file()
    }
    if not arrived:
        raise FederationError(
            f"outer.folder: expected the weights of an outer round, {round_name(0)}/{GLOBAL} and"
            f" then {GLOBAL_FACTS}, got none in {folder}. Wait for the coordinator, or have them"
            " copied there."
        )
    index = max(arrived)
    facts = read_facts(arrived[index] / GLOBAL_FACTS, GlobalFacts)
    check_global(arrived[index], facts, index=index, config=config)
    return OuterRound(
        folder=str(arrived[index]),
        index=index,
        num_inner_rounds=config.outer.num_inner_rounds,
        sha256=facts["sha256"],
    )


def check_global(folder: Path, facts: Any, *, index: int, config: RunConfig) -> None:
    """Refuse weights that are not those of the run's own consortium and outer round.

    Args:
        folder: Holds the weights.
        facts: Of ``global.json``.
        index: The outer round.
        config: Of the run.

    Raises:
        FederationError: They are not.
    """
    file, outer = folder / GLOBAL_FACTS, config.outer
    last = config.federation.num_rounds // outer.num_inner_rounds
    if index >= last:
        raise FederationError(
            f"{folder}: expected at most {last} outer rounds (federation.num_rounds over"
            f" outer.num_inner_rounds), got {round_name(index)}. Raise federation.num_rounds at all"
            " sites, in a new --run-dir."
        )
    settings: dict[str, tuple[object, object]] = {
        "round": (index, facts["round"]),
        "outer.num_inner_rounds": (outer.num_inner_rounds, facts["num_inner_rounds"]),
        "pipeline.cut": (list(config.pipeline.cut), facts["cut"]),
        "data.tokenizer": (vocabulary_digest(config), facts["vocabulary"]),
    }
    for key, (own, theirs) in settings.items():
        if own != theirs:
            raise FederationError(
                f"{file}: expected {key} {_short(own)}, which this site has, got {_short(theirs)}."
                " All sites of a consortium have the same: ask its coordinator."
            )
    check_digest(folder / GLOBAL, facts["sha256"])


def check_position(checkpoint: Checkpoint | None, outer: OuterRound, *, run_dir: Path) -> None:
    """Refuse to go back, or to go on from other weights than an outer round began with.

    Args:
        checkpoint: Of the site's run; None before its first.
        outer: The newest outer round.
        run_dir: Of the run.

    Raises:
        FederationError: The run is of another consortium.
    """
    if checkpoint is None:
        return
    first, end = Position(round_id=outer.first_round), Position(round_id=outer.end_round)
    if checkpoint.position.name > end.name:
        raise FederationError(
            f"{outer.folder}: expected an outer round that {run_dir} has not left behind, got"
            f" {round_name(outer.index)} for a run after {checkpoint.position}. Name the folder of"
            " its own consortium, or choose a new --run-dir."
        )
    if checkpoint.position.name > first.name and checkpoint.base_sha256 != outer.sha256:
        raise FederationError(
            f"{outer.folder}: expected the weights that {run_dir} has begun this outer round with"
            f" (SHA-256 {_short(checkpoint.base_sha256)}), got others ({_short(outer.sha256)})."
            " Restore them, or choose a new --run-dir."
        )


def read_facts(path: Path, kind: type) -> Any:
    """Read ``global.json`` or ``update.json``.

    Args:
        path: The file.
        kind: ``GlobalFacts`` or ``UpdateFacts``.

    Raises:
        FederationError: It is damaged, or of another version.
    """
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.loads(file.read(_MOST_FACTS))
    except (OSError, ValueError, RecursionError):
        facts = None
    check_facts(facts, kind, source=path)
    return facts


def check_facts(facts: Any, kind: type, *, source: Path) -> None:
    """Refuse what is not the content of ``global.json`` or ``update.json``.

    Args:
        facts: What was found.
        kind: ``GlobalFacts`` or ``UpdateFacts``.
        source: The file.

    Raises:
        FederationError: It is another one, or of another version.
    """
    try:
        version, keys = int(facts["version"]), set(facts)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise FederationError(
            f"{source}: expected what the weights beside it are, got no JSON that says so. Copy"
            " both files again."
        ) from None
    if version != VERSION:
        raise FederationError(
            f"{source}: expected version {VERSION}, got {version}. Use the same version of fedpipe"
            " as the coordinator."
        )
    missing = sorted(set(kind.__annotations__) - keys)
    if missing:
        raise FederationError(
            f"{source}: expected the key {missing[0]}, got a file without it. Copy it again."
        )


def has_arrived(folder: Path) -> bool:
    """Whether an update is there, and its file is the one that its facts name.

    Links are not followed: they may lead out of the folder of a site.
    """
    file, facts = folder / UPDATE, folder / UPDATE_FACTS
    if any(path.is_symlink() for path in (folder, file, facts)) or not (
        file.is_file() and facts.is_file()
    ):
        return False
    try:
        check_digest(file, str(read_facts(facts, UpdateFacts)["sha256"]))
    except FederationError:
        return False
    return True


def check_digest(path: Path, expected: str) -> None:
    """Refuse a file with another content than was announced.

    Raises:
        FederationError: It is missing, or its SHA-256 is another one.
    """
    try:
        found = digest_of(path)
    except OSError as error:
        raise FederationError(
            f"{path}: expected a file that can be read, got {error.strerror}. Copy it again."
        ) from None
    if found != expected:
        raise FederationError(
            f"{path}: expected SHA-256 {_short(expected)}, as the file beside it says, got"
            f" {_short(found)}. Copy both again."
        )


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vocabulary_digest(config: RunConfig) -> str:
    """Return the SHA-256 of the run's tokenizer.json."""
    return digest_of(Path(tokenizer_info(config).directory) / "tokenizer.json")


def _short(value: object) -> str:
    """Say a digest to people by its beginning."""
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text
