"""Records of a fine-tuning for metrics.jsonl: turns, rounds, traffic and scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.data.tasks.scoring import from_statistics
from fedpipe.federation.cohort import RoundPlan, Turn
from fedpipe.federation.refusal import Outcome
from fedpipe.report.records import (
    EdgeTraffic,
    StepRecord,
    TuningEvalRecord,
    TuningRoundRecord,
    TuningTrafficRecord,
    TurnRecord,
)

_BYTES = 4
"""Bytes of a float32 that is sent."""
Scores = Mapping[int, Mapping[int, NDArray[np.float64]]]
"""By stage and client, the statistics of the task's metric for its E examples, (E, K)."""


def turn_records(
    plan: RoundPlan, round_id: int, *, steps: Sequence[StepRecord]
) -> list[TurnRecord]:
    """Summarise the turn of every client; its loss is that of the last stage.

    Args:
        plan: Plan of the round.
        round_id: Index of the round, from 0.
        steps: Step records of all clients and stages, in order.
    """
    by_client: dict[int, list[StepRecord]] = defaultdict(list)
    for step in steps:
        by_client[step["client"]].append(step)
    turns = sorted(plan.turns, key=lambda turn: turn.client_id)
    return [_turn_record(turn, round_id, by_client[turn.client_id]) for turn in turns]


def _turn_record(turn: Turn, round_id: int, steps: list[StepRecord]) -> TurnRecord:
    losses: dict[int, list[float]] = defaultdict(list)
    seconds: dict[int, float] = defaultdict(float)
    for step in steps:
        seconds[step["stage"]] += step["seconds"]
        if step["loss"] is not None:
            losses[step["stage"]].append(step["loss"])
    means = {stage: float(np.mean(own)) for stage, own in sorted(losses.items())}
    last = max(means)
    record: TurnRecord = {
        "kind": "turn",
        "round": round_id,
        "client": turn.client_id,
        "replica": turn.replica_id,
        "steps": turn.num_steps,
        "examples": turn.num_examples,
        "tokens": turn.num_tokens,
        "weight": turn.weight,
        "seconds": max(seconds.values()),
        "loss": means[last],
        "last_loss": losses[last][-1],
    }
    if len(means) > 1:
        record["stages"] = {str(stage): mean for stage, mean in means.items()}
    return record


def round_record(
    plan: RoundPlan,
    round_id: int,
    *,
    turns: Sequence[TurnRecord],
    outcome: Outcome,
    facts: Sequence[Mapping[str, Any]],
    seconds: float,
) -> TuningRoundRecord:
    """Summarise a round.

    A client whose update is refused is listed, but its loss does not count.

    Args:
        plan: Plan of the round.
        round_id: Index of the round, from 0.
        turns: Records from ``turn_records``.
        outcome: Weights of the clients, and the refused updates.
        facts: By rank, "sync" (seconds and bytes of averaging) and "memory" (bytes).
        seconds: Duration of the round.
    """
    left_out = {fault.client for fault in outcome.refused}
    taken = [turn for turn in turns if turn["client"] not in left_out]
    weights = [turn["weight"] for turn in taken]
    loss = float(np.average([t["loss"] for t in taken], weights=weights)) if taken else None
    return {
        "kind": "round",
        "round": round_id,
        "clients": [turn["client"] for turn in turns],
        "stragglers": list(plan.stragglers),
        "dropped": list(plan.dropped),
        "refused": [fault.record() for fault in outcome.refused],
        "averaged": outcome.is_averaged,
        "loss": loss,
        "examples": sum(turn["examples"] for turn in turns),
        "tokens": sum(turn["tokens"] for turn in turns),
        "seconds": seconds,
        "sync_s": max(own["sync"][0] for own in facts),
        "sync_bytes": sum(own["sync"][1] for own in facts),
        "memory_bytes": [own["memory"] for own in facts],
    }


def client_traffic(
    plan: RoundPlan,
    round_id: int,
    *,
    edges: list[EdgeTraffic],
    sent_numel: int,
    received_numel: int,
) -> TuningTrafficRecord:
    """Record the averaged parameters that the clients of a round send and receive.

    Every client of the cohort receives them; a client that is lost sends nothing. If the model is
    cut, they are the parameters of the client's stages, and the record also lists the messages over
    every edge.

    Args:
        plan: Plan of the round.
        round_id: Index of the round, from 0.
        edges: Edges from ``traffic_record``.
        sent_numel: Number of parameters that a client sends.
        received_numel: Number of parameters that a client receives.
    """
    up, down = sent_numel * _BYTES, received_numel * _BYTES
    return {
        "kind": "traffic",
        "round": round_id,
        "edges": edges,
        "client_bytes_up": up,
        "client_bytes_down": down,
        "bytes_up": up * len(plan.turns),
        "bytes_down": down * (len(plan.turns) + len(plan.dropped)),
    }


def score_record(round_id: int, scores: Scores, task: TaskSpec) -> TuningEvalRecord:
    """Summarise a scoring: the score of all examples, the score by client, and the worst client.

    These are scores of the last stage. For the heads of the other stages, the record has the score
    of all examples.
    """
    found = scores[max(scores)]
    clients = {client: from_statistics(task, rows) for client, rows in sorted(found.items())}
    known = {client: score for client, score in clients.items() if np.isfinite(score)}
    choose = max if task.metric == "loss" else min
    worst = choose(known, key=known.__getitem__) if known else None
    record: TuningEvalRecord = {
        "kind": "eval",
        "round": round_id,
        "metric": task.metric,
        "score": _over_all(task, found),
        "mean": float(np.mean(list(known.values()))) if known else None,
        "worst": known.get(worst) if worst is not None else None,
        "worst_client": worst,
        "clients": {str(client): score for client, score in clients.items()},
    }
    if len(scores) > 1:
        record["stages"] = {str(s): _over_all(task, scores[s]) for s in sorted(scores)}
    return record


def _over_all(task: TaskSpec, clients: Mapping[int, NDArray[np.float64]]) -> float:
    return from_statistics(task, np.concatenate(list(clients.values())))
