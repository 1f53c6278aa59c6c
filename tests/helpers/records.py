"""Records of a run that never happened, but looks like one: for the writer, console and report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

NUM_STAGES, NUM_REPLICAS, NUM_CLIENTS, NUM_LOCAL_STEPS = 2, 2, 6, 20
TOKENS_PER_STEP = 4096
ACTIVATION_BYTES = 4 * TOKENS_PER_STEP * 128
PLAN = """\
fedpipe 0.2.0  quickstart  4 processes = 2 replicas x 2 stages x 1 data
  stage 0  client   embeddings, layers 0-1, aux_head       2.6 M parameters
  stage 1  server   layers 2-3, lm_head                    1.5 M parameters
  batch    32 sequences = 4 micro-batches x 8 x 1 data     128 tokens per sequence
  round    6 clients, 2 per round, 20 local steps
  traffic  2.00 MiB forward, 0 B backward                  per local step and replica, float32
  ideal    bubble 0.24 %                                   1F1B: 11.1 %
"""


def make_records(
    *, num_rounds: int = 6, end_to_end: bool = False, num_stages: int = NUM_STAGES, seed: int = 0
) -> list[dict[str, Any]]:
    """Make the records of a run, in the order in which rank 0 writes them."""
    draw = random.Random(seed)
    records: list[dict[str, Any]] = [
        {"kind": "system", "event": "start", "seconds_to_first_step": 11.2, "world_size": 4}
    ]
    for round_id in range(num_rounds):
        cohort = draw.sample(range(NUM_CLIENTS), NUM_REPLICAS)
        for step in range(NUM_LOCAL_STEPS):
            position = round_id * NUM_LOCAL_STEPS + step
            for replica, client in enumerate(cohort):
                for stage in range(num_stages):
                    headless = end_to_end and stage < num_stages - 1
                    loss = train_loss(position, stage, draw.gauss(0, 0.12))
                    records.append(
                        {
                            "kind": "step",
                            "round": round_id,
                            "step": step,
                            "client": client,
                            "replica": replica,
                            "stage": stage,
                            "loss": None if headless else loss,
                            "lr": 1e-3 * min(1, (position + 1) / 12),
                            "tokens": TOKENS_PER_STEP,
                            "grad_norm": 0.8 + 0.1 * draw.random(),
                            "seconds": 0.41 + 0.02 * draw.random(),
                        }
                    )
        records += _round_records(round_id, cohort, draw, num_stages, end_to_end)
    records.append({"kind": "system", "event": "end", "seconds": 9.3 * num_rounds + 14})
    return records


def train_loss(position: int, stage: int, noise: float) -> float:
    """Fall from about ln(8000) the way masked-LM losses do; a later stage is lower."""
    return (
        5.9 + 3.1 * math.exp(-position / 30) - 0.25 * stage * (1 - math.exp(-position / 40)) + noise
    )


def _round_records(
    round_id: int, cohort: list[int], draw: random.Random, num_stages: int, end_to_end: bool
) -> list[dict[str, Any]]:
    end = (round_id + 1) * NUM_LOCAL_STEPS
    heads = [s for s in range(num_stages) if not end_to_end or s == num_stages - 1]
    losses = [train_loss(end - 10, s, 0) if s in heads else None for s in range(num_stages)]
    tokens = TOKENS_PER_STEP * NUM_LOCAL_STEPS * len(cohort)
    stages = []
    for stage in heads:
        clients = {
            str(c): train_loss(end, stage, 0.12 * (c - 2.5) + draw.gauss(0, 0.03))
            for c in range(NUM_CLIENTS)
        }
        worst = max(clients, key=lambda c: clients[c])
        loss = sum(clients.values()) / len(clients)
        stages.append(
            {
                "stage": stage,
                "loss": loss,
                "perplexity": math.exp(loss),
                "clients": clients,
                "worst_loss": clients[worst],
                "worst_client": int(worst),
            }
        )
    sent = ACTIVATION_BYTES * NUM_LOCAL_STEPS * len(cohort)
    messages = 4 * NUM_LOCAL_STEPS * len(cohort)
    edges = [
        {
            "from": s,
            "to": s + 1,
            "bytes_forward": sent,
            "messages_forward": messages,
            "bytes_backward": sent if end_to_end else 0,
            "messages_backward": messages if end_to_end else 0,
        }
        for s in range(num_stages - 1)
    ]
    return [
        {
            "kind": "round",
            "round": round_id,
            "clients": cohort,
            "weights": [0.5, 0.5],
            "loss": losses,
            "tokens": tokens,
            "seconds": 9.4,
            "tokens_per_s": tokens / 9.4,
            "sync_s": 0.05,
            "sync_bytes": 33_000_000,
        },
        {
            "kind": "traffic",
            "round": round_id,
            "edges": edges,
            "collectives": {"fedavg": 33_000_000, "gradients": 0, "control": 2_304},
        },
        {"kind": "eval", "round": round_id, "stages": stages, "tokens": 9_000},
    ]


def make_events(
    *, num_steps: int = 8, end_to_end: bool = False, num_stages: int = NUM_STAGES
) -> list[dict[str, Any]]:
    """Make the trace events of a pipeline, in microseconds."""
    events: list[dict[str, Any]] = []

    def add(
        name: str, replica: int, stage: int, start: float, duration: float, **args: int
    ) -> float:
        kind = "comm" if name.startswith(("send", "recv")) else "compute"
        events.append(
            {
                "name": name,
                "cat": kind,
                "ph": "X",
                "ts": start,
                "dur": duration,
                "pid": replica,
                "tid": stage,
                "args": args,
            }
        )
        return start + duration

    for replica in range(NUM_REPLICAS):
        clock = [5_000.0 * replica] * num_stages
        for step in range(num_steps):
            for micro_batch in range(4):
                arrived = 0.0
                for stage in range(num_stages):
                    at = {"micro_batch": micro_batch, "step": step}
                    now = clock[stage]
                    if stage == 0:
                        now = add("load", replica, stage, now, 1_500, **at)
                    else:
                        end = max(arrived, now + 600)
                        now = add("recv_activation", replica, stage, now, end - now, **at)
                    now = add("forward", replica, stage, now, 28_000 + 900 * replica, **at)
                    if stage < num_stages - 1:
                        now = add("send_activation", replica, stage, now, 900, **at)
                        arrived = now
                    name = "backward" if end_to_end else "local_backward"
                    clock[stage] = add(name, replica, stage, now, 55_000 + 700 * replica, **at)
            for stage in range(num_stages):
                clock[stage] = add("optimizer_step", replica, stage, clock[stage], 9_000, step=step)
    return events


def make_run_dir(run_dir: Path, *, end_to_end: bool = False, complete: bool = True) -> Path:
    """Write a run directory; without ``complete`` it holds nothing but ``metrics.jsonl``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in make_records(end_to_end=end_to_end))
    (run_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if not complete:
        return run_dir
    objective = "end_to_end" if end_to_end else "local_loss"
    (run_dir / "run.json").write_text('{"kind": "pretrain", "version": 1}', encoding="utf-8")
    (run_dir / "config.yaml").write_text(
        f"name: quickstart\nseed: 0\npipeline:\n  objective: {objective}\n  cut: [2]\n"
        "  num_client_stages: 1\nfederation:\n  num_clients: 6\n",
        encoding="utf-8",
    )
    (run_dir / "plan.txt").write_text(PLAN, encoding="utf-8")
    environment = {
        "versions": {
            "fedpipe": "0.2.0",
            "python": "3.11.4",
            "torch": "2.13.0",
            "deepspeed": "0.19.8",
        },
        "host": "node-17",
        "cores": 2,
        "accelerator": "cpu",
        "command": ["fedpipe", "pretrain"],
    }
    (run_dir / "env.json").write_text(json.dumps(environment), encoding="utf-8")
    (run_dir / "samples.json").write_text(json.dumps(make_samples()), encoding="utf-8")
    trace = {"traceEvents": make_events(end_to_end=end_to_end)}
    (run_dir / "timeline.json").write_text(json.dumps(trace), encoding="utf-8")
    return run_dir


def make_samples() -> dict[str, Any]:
    """Make masked words of held-out text, one of which looks like a tag."""
    unigram = [["the", 0.051], ["of", 0.043], ["and", 0.037]]
    return {
        "unigram_loss": 6.61,
        "examples": [
            {
                "text": "The [MASK] were randomised to receive the drug or a placebo for 12 weeks.",
                "truth": "patients",
                "model": [["patients", 0.31], ["subjects", 0.12], ["the", 0.05]],
                "unigram": unigram,
            },
            {
                "text": "There was no significant [MASK] between the two groups (P = 0.43).",
                "truth": "difference",
                "model": [["difference", 0.64], ["change", 0.08], ["effect", 0.03]],
                "unigram": unigram,
            },
            {
                "text": "Expression of the <i>gene</i> was measured by [MASK] & western blot.",
                "truth": "<b>",
                "model": [["PCR", 0.22], ["<b>", 0.05], ["the", 0.04]],
                "unigram": unigram,
            },
        ],
    }
