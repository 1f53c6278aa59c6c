"""Leave out updates that are not finite, name their clients, and weigh the others. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from fedpipe.config.federation import AggregationConfig
from fedpipe.errors import TrainingError
from fedpipe.federation.cohort import Turn
from fedpipe.report.records import RefusedUpdate

NUMBERS = ("loss", "grad_norm", "weights")
"""The numbers of a client that must be finite, in the order in which one spoils the next."""
NO_FAULT = 2**62
"""The code of a turn whose numbers are all finite."""
_MOST_STAGES = 2**16
_SHOWN = 3
_WAY_OUT = (
    "Lower optimizer.lr or set optimizer.max_grad_norm in a new --run-dir; the checkpoints of this"
    " one hold finite weights."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A client whose update is left out of a round, and the first number that was not finite."""

    client: int
    stage: int
    step: int
    """Local step of the turn, from 0."""
    what: str
    """One of ``NUMBERS``."""

    @property
    def code(self) -> int:
        """Stage, step and number as one integer; of two faults of a client the first is less."""
        return (self.step * len(NUMBERS) + NUMBERS.index(self.what)) * _MOST_STAGES + self.stage

    @classmethod
    def from_code(cls, client: int, code: int) -> Self:
        """Read what ``code`` says of a client."""
        rest, stage = divmod(code, _MOST_STAGES)
        step, what = divmod(rest, len(NUMBERS))
        return cls(client=client, stage=stage, step=step, what=NUMBERS[what])

    def record(self) -> RefusedUpdate:
        """Return its entry in the record of the round."""
        return {
            "client": self.client, "stage": self.stage, "step": self.step, "what": self.what
        }  # fmt: skip

    def __str__(self) -> str:
        """Say it to people, who count steps from 1."""
        what = {"grad_norm": "gradient norm"}.get(self.what, self.what)
        return f"{what} of client {self.client} at local step {self.step + 1}, stage {self.stage}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the updates of a round come to."""

    refused: tuple[Refused, ...]
    """In the order of the cohort."""
    left_out: frozenset[int]
    """Their places in the cohort."""
    share: float
    """What the weights of the others sum to; 1 where all are taken."""
    weights: tuple[float, ...]
    """By turn, its share of the average; 0 where it is left out."""
    is_averaged: bool
    """False where fewer clients are left than the rule needs: the weights stay as they were."""


NO_UPDATES = Outcome(refused=(), left_out=frozenset(), share=1.0, weights=(), is_averaged=False)
"""The outcome of a round without turns."""


def weigh_updates(
    turns: Sequence[Turn],
    refused: Iterable[Refused],
    *,
    aggregation: AggregationConfig,
    round_id: int,
) -> Outcome:
    """Leave out bad updates, and give the others their weights in the average.

    Args:
        turns: Of the round, in the order of the cohort.
        refused: Those whose updates are bad, in any order, repeated or not.
        aggregation: The rule.
        round_id: From 0.

    Raises:
        TrainingError: Every update is bad.
    """
    found = {fault.client: fault for fault in refused}
    left_out = frozenset(k for k, turn in enumerate(turns) if turn.client_id in found)
    ordered = tuple(found[turn.client_id] for turn in turns if turn.client_id in found)
    if len(ordered) == len(turns):
        shown = "; ".join(map(str, ordered[:_SHOWN]))
        more = f"; and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
        raise TrainingError(
            f"round {round_id + 1}: expected a finite update of one client at least, got none (not"
            f" finite: {shown}{more}). {_WAY_OUT}"
        )
    share = sum(t.weight for k, t in enumerate(turns) if k not in left_out) if left_out else 1.0
    smallest = aggregation.fewest_clients(num_refused=len(left_out))
    is_averaged = len(turns) - len(left_out) >= smallest
    weights = tuple(
        0.0 if k in left_out or not is_averaged else turn.weight / share
        for k, turn in enumerate(turns)
    )
    return Outcome(
        refused=ordered, left_out=left_out, share=share, weights=weights, is_averaged=is_averaged
    )


def stop_error(fault: Refused, *, round_id: int) -> TrainingError:
    """Return the error with which ``federation.on_bad_update=stop`` ends a run."""
    return TrainingError(
        f"round {round_id + 1}: expected finite numbers with federation.on_bad_update=stop, got"
        f" others (not finite: {fault}). {_WAY_OUT} federation.on_bad_update=refuse goes on without"
        " such a client."
    )


def bad_average_error(stages: Sequence[str], *, round_id: int) -> TrainingError:
    """Return the error where finite updates have made weights that are not finite.

    Args:
        stages: Their names.
        round_id: From 0.
    """
    found = ", ".join(sorted(set(stages)))
    return TrainingError(
        f"round {round_id + 1}: expected finite weights after the average of finite updates, got"
        f" others ({found}). Lower federation.server_optimizer.lr. {_WAY_OUT}"
    )
