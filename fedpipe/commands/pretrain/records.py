"""Records of metrics.jsonl and timeline.json that combine numbers of several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedpipe.federation.cohort import Turn
from fedpipe.federation.refusal import Outcome
from fedpipe.files import write_text
from fedpipe.report.records import EvalRecord, RoundRecord, StageScore, StepRecord


def round_record(
    round_id: int,
    *,
    turns: Sequence[Turn],
    outcome: Outcome,
    steps: Sequence[StepRecord],
    num_stages: int,
    seconds: float,
    sync: Sequence[tuple[float, int]],
) -> RoundRecord:
    """Summarise a round: its clients, mean loss per stage, time, and the cost of averaging.

    A client whose update is refused is listed with weight 0, and its losses do not count.

    Args:
        round_id: Index of the round, from 0.
        turns: Turns of all replicas.
        outcome: Weights of the clients, and the refused updates.
        steps: Step records of all replicas and stages.
        num_stages: Number of stages with a loss.
        seconds: Duration of the round, without validation.
        sync: By rank, the seconds and the bytes that averaging took.
    """
    left_out = {fault.client for fault in outcome.refused}
    steps = [s for s in steps if s["client"] not in left_out]
    tokens = sum(t.num_tokens for t in turns)
    loss: list[float | None] = []
    for stage in range(num_stages):
        losses = [s["loss"] for s in steps if s["stage"] == stage and s["loss"] is not None]
        loss.append(math.fsum(losses) / len(losses) if losses else None)
    return {
        "kind": "round",
        "round": round_id,
        "clients": [t.client_id for t in turns],
        "weights": list(outcome.weights),
        "refused": [fault.record() for fault in outcome.refused],
        "averaged": outcome.is_averaged,
        "tokens": tokens,
        "loss": loss,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "sync_s": max(s for s, _ in sync),
        "sync_bytes": sum(b for _, b in sync),
    }


def evaluation_record(
    round_id: int, scores: Mapping[int, Mapping[int, tuple[float, int]]]
) -> EvalRecord:
    """Summarise a validation: per stage the mean loss of all masked tokens, and the worst client.

    Args:
        round_id: Index of the round, from 0.
        scores: By stage and client, the summed loss in nats and the number of masked tokens.
    """
    stages: list[StageScore] = []
    tokens = 0
    for stage in sorted(s for s in scores if scores[s]):
        clients = {c: total / count for c, (total, count) in sorted(scores[stage].items())}
        tokens = sum(count for _, count in scores[stage].values())
        loss = sum(total for total, _ in scores[stage].values()) / tokens
        worst = max(clients, key=lambda c: clients[c])
        stages.append(
            {
                "stage": stage,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),  # exp overflows above
                "worst_loss": clients[worst],
                "worst_client": worst,
                "clients": {str(c): value for c, value in clients.items()},
            }
        )
    return {"kind": "eval", "round": round_id, "stages": stages, "tokens": tokens}


def write_timeline(
    run_dir: Path, events: Sequence[tuple[int, int, tuple[str, int, int, float, float]]]
) -> None:
    """Write timeline.json, a Chrome trace with a process per replica and a thread per stage.

    Args:
        run_dir: Directory of the run.
        events: Replica, stage and event: (name, micro_batch, step, start_s, end_s).
    """
    if not events:
        return
    origin = min(event[3] for _, _, event in events)
    trace = [
        {
            "name": name,
            "cat": "message" if name.startswith(("send", "recv")) else "compute",
            "ph": "X",
            "ts": (start - origin) * 1e6,
            "dur": (end - start) * 1e6,
            "pid": replica,
            "tid": stage,
            "args": {"micro_batch": micro_batch, "step": step},
        }
        for replica, stage, (name, micro_batch, step, start, end) in events
    ]
    write_text(run_dir / "timeline.json", json.dumps({"traceEvents": trace}))
