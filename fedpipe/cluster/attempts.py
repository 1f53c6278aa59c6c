"""Where every start of a job of SLURM has begun, so that none is requeued for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedpipe.errors import LaunchError
from fedpipe.run.checkpoint import Checkpoint, Position

ATTEMPTS_FILE = "logs/attempts.jsonl"
"""Where every start of every job of a run left off, below the run directory."""
MAX_IDLE_ATTEMPTS = 3
"""So often in a row a job may be started and stopped without having saved anything new."""


def position_of(checkpoint: Checkpoint | None) -> Position:
    """Return where a run goes on: from its newest checkpoint, or from the start."""
    return checkpoint.position if checkpoint else Position()


def note_attempt(run_dir: Path, position: Position, *, job_id: str) -> None:
    """Write down where a job starts, and refuse to go on for ever without getting anywhere.

    Args:
        run_dir: Directory of the run, before it trains.
        position: Where it goes on.
        job_id: The same for every attempt of a requeued job.

    Raises:
        LaunchError: Its last ``MAX_IDLE_ATTEMPTS`` starts were all from where it stands now.
    """
    here = {"job": job_id, "round": position.round_id, "step": position.step}
    path = run_dir / ATTEMPTS_FILE
    path.parent.mkdir(exist_ok=True)
    last = _attempts(path)[-MAX_IDLE_ATTEMPTS:]
    if len(last) == MAX_IDLE_ATTEMPTS and all(entry == here for entry in last):
        raise LaunchError(
            f"expected progress, got {MAX_IDLE_ATTEMPTS} starts in a row that were "
            f"stopped before anything new was saved (all from {position}). Raise the job's time, "
            "set checkpoint.every_steps in a new run, or see what stops it; then submit again."
        )
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(here) + "\n")


def _attempts(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # a job was killed while it wrote
            entries.append(None)
    return entries
