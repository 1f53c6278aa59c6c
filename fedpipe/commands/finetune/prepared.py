"""A fine-tuning that is ready to start, as its processes read it: setup, examples, their owners."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.encoding import Encoded
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.distributed.topology import Grid
from fedpipe.files import replace_folder
from fedpipe.run.checkpoint import Checkpoint

DATA = "data"
"""Folder of the tokenised examples, in the directory of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSetup:
    """The setup of a fine-tuning; see ``Setup``."""

    config: FinetuneConfig
    run_dir: Path
    checkpoint: Checkpoint | None
    """Checkpoint to resume from, or None."""
    started_at: float
    """``time.monotonic()`` when the user's command began."""

    @property
    def grid(self) -> Grid:
        """See ``Setup``."""
        return Grid.of(self.config.stages, self.config.federation)

    @property
    def hang_timeout_s(self) -> float:
        """See ``Setup``."""
        return self.config.hang_timeout_s

    def to_message(self) -> dict[str, Any]:
        """Return the setup as JSON; the configuration is read from the run directory."""
        checkpoint = self.checkpoint and self.checkpoint.to_message()
        return {"run_dir": str(self.run_dir), "checkpoint": checkpoint}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientFacts:
    """One row of the table of clients."""

    client_id: int
    num_examples: int
    """Number of training examples."""
    num_test_examples: int
    entropy_bits: float
    """Entropy of the labels of its training examples."""
    missing: tuple[str, ...]
    """Labels that none of its training examples has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningData:
    """The tokenised examples of a task and their owners."""

    task: TaskSpec
    train: Encoded
    test: Encoded
    train_sequences: list[NDArray[np.int64]]
    """By client."""
    test_sequences: list[NDArray[np.int64]]
    """By client."""
    facts: tuple[ClientFacts, ...]
    """By client."""
    left_out: tuple[str, ...] = ()
    """By split with rows that cannot be used: their number and the first of them."""

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return int(max(self.train.lengths().max(), self.test.lengths().max()))

    def train_lengths(self) -> list[NDArray[np.int64]]:
        """Return, by client, the number of tokens of each of its training sequences."""
        lengths = self.train.lengths()
        return [lengths[mine] for mine in self.train_sequences]

    def save(self, folder: Path) -> None:
        """Write the examples into a folder; ``load`` reads them."""
        replace_folder(folder, self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        self.train.save(folder / "train.npz")
        self.test.save(folder / "test.npz")
        owners = {}
        for name, owned in (("train", self.train_sequences), ("test", self.test_sequences)):
            owners[name] = np.concatenate(owned)
            owners[f"{name}_sizes"] = np.array([len(mine) for mine in owned])
        np.savez(folder / "clients.npz", allow_pickle=False, **owners)
        text = {"task": asdict(self.task), "facts": [asdict(fact) for fact in self.facts]}
        text["left_out"] = list(self.left_out)
        (folder / "data.json").write_text(json.dumps(text), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TuningData:
        """Read what ``save`` wrote."""
        text = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        with np.load(folder / "clients.npz") as owners:
            owned = {
                name: np.split(owners[name], np.cumsum(owners[f"{name}_sizes"])[:-1])
                for name in ("train", "test")
            }
        return cls(
            task=TaskSpec.from_dict(text["task"]),
            train=Encoded.load(folder / "train.npz"),
            test=Encoded.load(folder / "test.npz"),
            train_sequences=owned["train"],
            test_sequences=owned["test"],
            facts=tuple(
                ClientFacts(**fact | {"missing": tuple(fact["missing"])}) for fact in text["facts"]
            ),
            left_out=tuple(text.get("left_out", ())),
        )
