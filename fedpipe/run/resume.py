"""What may differ when a run is resumed, and what must not. No torch.

``fedpipe evaluate`` is not here: its cells are known by the content of model and task and by their
settings, so whatever changes is run again and everything else is kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedpipe.config.finetune import QUICKSTART, FinetuneConfig
from fedpipe.config.load import diff, with_cut
from fedpipe.data.digests import FileDigests
from fedpipe.errors import CheckpointError
from fedpipe.run.checkpoint import is_in_mid_round

INPUTS_FILE = "inputs.json"
"""What a run reads, by content."""
DEEPSPEED_FILE = "deepspeed.json"
"""What a run gives to DeepSpeed."""

PATHS = {
    "pretrain": ("data.train", "data.valid", "data.tokenizer", "model.path", "deepspeed.config"),
    "finetune": ("model.path", "method.path", "task.data", "task.file", "deepspeed.config"),
}
"""Keys that say where something lies: it may lie elsewhere, as long as its content is the same."""
MAY_CHANGE = {
    "pretrain": ("pipeline.hang_timeout_s", "data.cache_dir", "outer.folder", *PATHS["pretrain"]),
    "finetune": ("hang_timeout_s", "federation.num_replicas", *PATHS["finetune"]),
}
"""By command, the keys that may have other values when a run is resumed; no result depends on them,
up to the rounding of sums over another number of replicas. A sweep and a reproduction take those of
their pre-trainings, ``throughput`` takes those of ``pretrain``, and ``submit`` those of the command
that the job runs."""

_SHOWN = 60
"""Characters of a value in a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The content that a run reads, wherever its files lie."""

    prepared: str
    """Identifies what is made of the files: text in blocks, examples in tokens."""
    files: dict[str, FileDigests]
    """By key of the configuration."""

    def to_json(self) -> str:
        """Return the content of ``INPUTS_FILE``."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Inputs:
        """Read what ``to_json`` wrote."""
        content = json.loads(text)
        files = {
            key: [(str(name), str(digest)) for name, digest in own]
            for key, own in content["files"].items()
        }
        return cls(prepared=str(content["prepared"]), files=files)


def check_config(
    directory: Path,
    before: Any,
    now: Any,
    *,
    may_change: Collection[str],
    what: str = "configuration of the run",
    way_out: str = "Resume with --run-dir alone, or choose a new --run-dir.",
) -> None:
    """Refuse another configuration than that of the run in a directory.

    Args:
        directory: Of the run.
        before: Its configuration.
        now: The one that it is to be resumed with, of the same class.
        may_change: Keys whose values may differ; one that ends in a dot means a section.
        what: What the error says that it expected.
        way_out: What the error advises.

    Raises:
        CheckpointError: Other values; each is named, with the old and the new one.
    """
    sections = tuple(key for key in may_change if key.endswith("."))
    changed = {
        key: values
        for key, values in diff(before, now).items()
        if not (key in may_change or key.startswith(sections))
    }
    if changed:
        named = ", ".join(
            f"{key} ({_shown(new)} instead of {_shown(old)})" for key, (old, new) in changed.items()
        )
        raise CheckpointError(
            f"{directory}: expected the {what} that is there, got other values of {named}. "
            f"{way_out}"
        )


def resumed_config(directory: Path, before: Any, now: Any, *, may_change: Collection[str]) -> Any:
    """Return the configuration that a run is resumed with.

    A fine-tuning must keep its number of replicas in two cases: in mid-round, because the round's
    clients are spread over the replicas, and with compressed averages, because each replica sends
    in the next round what it has rounded off in this one.

    Args:
        directory: Of the run.
        before: Its configuration.
        now: The one that is asked for, of the same class.
        may_change: Keys whose values may differ.

    Returns:
        ``now``. What it leaves open (the cut, the task, the model that ``quickstart`` meant) is as
        it was settled when the run began.

    Raises:
        CheckpointError: Other values; each is named, with the old and the new one.
    """
    if isinstance(now, FinetuneConfig):
        if now.model.path == QUICKSTART:
            now = replace(now, model=replace(now.model, path=before.model.path))
        if not now.task.name:  # that of the task file, or the default
            now = replace(now, task=replace(now.task, name=before.task.name))
        if before.federation.wire != "fp32" or is_in_mid_round(directory):
            may_change = set(may_change) - {"federation.num_replicas"}
    elif now.pipeline.is_open and len(now.pipeline.cut) == len(before.pipeline.cut):
        now = with_cut(now, before.pipeline.cut)
    check_config(directory, before, now, may_change=may_change)
    return now


def check_inputs(directory: Path, before: Inputs, now: Inputs) -> None:
    """Refuse other content than a run began with.

    Args:
        directory: Of the run.
        before: Read from its ``inputs.json``.
        now: What its configuration names now.

    Raises:
        CheckpointError: The content is another one; keys and files are named.
    """
    changed = {
        key: _differences(before.files.get(key, []), now.files.get(key, []))
        for key in before.files | now.files
    }
    named = [f"{key} ({differences})" for key, differences in changed.items() if differences]
    if named:
        raise CheckpointError(
            f"{directory}: expected the content that the run began with, got another one of "
            f"{', '.join(named)}. Restore it, or choose a new --run-dir."
        )
    if before.prepared != now.prepared:
        raise CheckpointError(
            f"{directory}: expected text and examples prepared as when the run began, got the same "
            "files prepared in another way. Go on with the version of fedpipe that began it (see "
            "env.json there), or choose a new --run-dir."
        )


def check_deepspeed(directory: Path, deepspeed_dict: Mapping[str, Any]) -> None:
    """Refuse another DeepSpeed JSON than that of the run in a directory.

    Raises:
        CheckpointError: Keys with other values; they are named.
    """
    path = directory / DEEPSPEED_FILE
    if not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    keys = sorted({*saved, *deepspeed_dict})
    changed = [key for key in keys if saved.get(key) != deepspeed_dict.get(key)]
    if changed:
        raise CheckpointError(
            f"{directory}: expected the DeepSpeed JSON of the run that is there, got other values "
            f"of {', '.join(changed)} in deepspeed.config. Restore the file, or choose a new "
            "--run-dir."
        )


def _differences(before: FileDigests, now: FileDigests) -> str:
    """Say which files changed, are gone or new, or come in another order; empty for none."""
    if [digest for _, digest in before] == [digest for _, digest in now]:
        return ""
    gone = _names_without(before, now)
    new = _names_without(now, before)
    parts = [
        *(f"{name} has changed" for name in gone if name in new),
        *(f"{name} is gone" for name in gone if name not in new),
        *(f"{name} is new" for name in new if name not in gone),
    ]
    return ", ".join(parts) or "the same files in another order"


def _names_without(some: FileDigests, others: FileDigests) -> list[str]:
    """Names of files whose content is not among the others'."""
    left = Counter(digest for _, digest in others)
    names = []
    for name, digest in some:
        left[digest] -= 1
        if left[digest] < 0:
            names.append(name)
    return list(dict.fromkeys(names))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
