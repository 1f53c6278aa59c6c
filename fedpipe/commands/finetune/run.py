"""Federated fine-tuning, as every process of the run executes it. Reads top to bottom."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fedpipe.commands.finetune.examples import DATA, Meaning, TuningData
from fedpipe.commands.finetune.scores import Scores, StageLosses, from_statistics
from fedpipe.commands.finetune.setup import FinetuneSetup
from fedpipe.commands.finetune.staged import StagedTuner
from fedpipe.commands.finetune.tuner import Tuner
from fedpipe.commands.pretrain.records import traffic_record
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Watch
from fedpipe.federation.averaging import average_round
from fedpipe.federation.refusal import NOTHING, Outcome
from fedpipe.federation.turns import (
    Round,
    TuningTurn,
    last_turns,
    num_tuning_steps,
    plan_tuning_round,
)
from fedpipe.models.split import pipeline_edges
from fedpipe.pipeline.optimizer import learning_rate
from fedpipe.report.writer import MetricsWriter
from fedpipe.run.checkpoint import CheckpointWriter, Position

Emit = Callable[[str, Any], None]
"""Tells whoever watches: ("round" | "eval", record), ("training", bool)."""
_BYTES = 4


def finetune(
    setup: FinetuneSetup, *, env: ProcessEnv, emit: Emit, watch: Watch | None = None
) -> Position | None:
    """Train, average, score and save until all rounds are done, or until asked to stop.

    A round that has begun is finished before the run stops.

    Args:
        setup: What ``set_up_finetune`` found, on every rank.
        env: This process' place in the run.
        emit: Told of every round and scoring.
        watch: Running; says when to stop. None makes one that learns it from the other ranks.

    Returns:
        None when all rounds are done; otherwise where the run has stopped, saved.

    Collective: every process of the run.
    """
    if watch is None:
        with Watch() as watch:
            return finetune(setup, env=env, emit=emit, watch=watch)
    federation, pipeline = setup.config.federation, setup.config.stages
    grid = Grid.of(pipeline, federation)
    comm = Comm(grid, env, edges=pipeline_edges(pipeline), board=watch.board)
    try:
        watch.join_run(comm)
        run = Finetuning(setup, comm=comm, emit=emit, watch=watch)
        emit("training", True)
        for round_id in range(run.position.round_id, federation.num_rounds):
            if watch.stop.commit((round_id + 1, 0)) < (round_id + 1, 0):
                run.save(Position(round_id=round_id))
                return run.position
            run.train_round(round_id)
        emit("training", False)
        return None
    finally:
        watch.leave_run()
        comm.close()


class Finetuning:
    """One process' view of the run."""

    def __init__(self, setup: FinetuneSetup, *, comm: Comm, emit: Emit, watch: Watch) -> None:
        """Build the model and resume. Collective: every process."""
        self.setup, self.config, self._comm, self._emit = setup, setup.config, comm, emit
        self._watch = watch
        self.data = TuningData.load(setup.run_dir / DATA)
        self._lengths = self.data.train_lengths()
        sizes = {len(mine) for mine in self._lengths}
        self._steps_per_round = max(num_tuning_steps(self.config, size) for size in sizes)
        kind = StagedTuner if self.config.is_cut else Tuner
        self.tuner: Tuner | StagedTuner = kind(
            self.config, self.data, comm=comm, run_dir=setup.run_dir
        )
        self._sent_before: Counter[str] = Counter()
        self.position = Position()
        """Of the checkpoint that was read or written last."""
        self._checkpoints = CheckpointWriter(
            setup.run_dir, comm=comm, keep_last=self.config.checkpoint.keep_last
        )
        self._writer: MetricsWriter | None = None
        checkpoint = setup.checkpoint
        if comm.is_master():
            self._writer = MetricsWriter(setup.run_dir, sinks=self.config.log.to)
            self._writer.truncate(checkpoint.metrics_offset if checkpoint else 0)
        if checkpoint:
            self.tuner.load_checkpoint(checkpoint)
            self.position = checkpoint.position
        self._last = last_turns(
            self.config, before=self.position.round_id, num_clients=len(self._lengths)
        )
        self._phase, self._client_id = "", -1
        watch.activity = self._activity

    def train_round(self, round_id: int) -> None:
        """Train the clients of a round, average them, score the result, record and save."""
        started = time.monotonic()
        self._sent_before = Counter(self.tuner.sent_over_edges())  # scoring does not count
        self._phase = f"round {round_id + 1}"
        plan = plan_tuning_round(self.config, round_id=round_id, lengths=self._lengths)
        turns = [self._take(turn, round_id) for turn in plan.turns if self._is_mine(turn)]
        self._client_id = -1
        sync_started = time.monotonic()
        outcome, sync_bytes = NOTHING, 0
        if plan.turns:
            outcome, sync_bytes = average_round(
                self.tuner, plan.turns, aggregation=self.config.federation.aggregation,
                round_id=round_id, comm=self._comm,
            )  # fmt: skip
        self._last |= {turn.client_id: round_id for turn in plan.turns}
        self._record(
            plan, round_id, turns,
            outcome=outcome,
            seconds=time.monotonic() - started,
            sync=(time.monotonic() - sync_started, sync_bytes),
        )  # fmt: skip
        last = round_id + 1 == self.config.federation.num_rounds
        if last or (round_id + 1) % self.config.scoring.every_rounds == 0:
            self._phase = f"scoring after round {round_id + 1}"
            self._score(round_id)
        if last or (round_id + 1) % self.config.checkpoint.every_rounds == 0:
            self.save(Position(round_id=round_id + 1))

    def _is_mine(self, turn: TuningTurn) -> bool:
        return turn.replica_id == self._comm.replica

    def _take(self, turn: TuningTurn, round_id: int) -> dict[str, Any]:
        """Train one client; return the record of its turn."""
        self._client_id = turn.client_id
        self._watch.beat()
        started = time.monotonic()
        per_round = self._steps_per_round
        total = per_round * self.config.federation.num_rounds
        losses = self.tuner.train(
            turn,
            round_id=round_id,
            last_round=self._last.get(turn.client_id),
            learning_rate=lambda step: learning_rate(
                self.config.optimizer, round_id * per_round + step, total_steps=total
            ),
            writer=self._checkpoints,
        )
        return {
            "kind": "turn", "round": round_id, "client": turn.client_id,
            "replica": turn.replica_id, "steps": turn.num_steps, "examples": turn.num_examples,
            "tokens": turn.num_tokens, "weight": turn.weight, "losses": losses,
            "seconds": time.monotonic() - started,
        }  # fmt: skip

    def _record(
        self,
        plan: Round,
        round_id: int,
        turns: list[dict[str, Any]],
        *,
        outcome: Outcome,
        seconds: float,
        sync: tuple[float, int],
    ) -> None:
        sent = Counter(self.tuner.sent_over_edges())
        sent.subtract(self._sent_before)
        gathered = self._comm.gather(
            {
                "turns": turns, "sync": sync, "memory": peak_memory_bytes(), "sent": dict(sent),
                "numel": self.tuner.sent_numel if self._comm.replica == 0 else 0,
            }
        )  # fmt: skip
        if gathered is None:
            return
        turns = merge_turns(turn for part in gathered for turn in part["turns"])
        left_out = {fault.client for fault in outcome.refused}
        taken = [turn for turn in turns if turn["client"] not in left_out]
        weights = [turn["weight"] for turn in taken]
        loss = float(np.average([t["loss"] for t in taken], weights=weights)) if taken else None
        record = {
            "kind": "round", "round": round_id, "clients": [t["client"] for t in turns],
            "stragglers": list(plan.stragglers), "dropped": list(plan.dropped),
            "refused": [fault.record() for fault in outcome.refused],
            "averaged": outcome.is_averaged,
            "loss": loss, "examples": sum(t["examples"] for t in turns),
            "tokens": sum(t["tokens"] for t in turns), "seconds": seconds,
            "sync_s": max(part["sync"][0] for part in gathered),
            "sync_bytes": sum(part["sync"][1] for part in gathered),
            "memory_bytes": [part["memory"] for part in gathered],
        }  # fmt: skip
        shares = dict(zip((t.client_id for t in plan.turns), outcome.weights, strict=True))
        for turn in turns:
            turn["weight"] = shares[turn["client"]]
        num_taken = len(taken) if outcome.is_averaged else 0
        self._write([*turns, record, self._traffic(plan, round_id, gathered, num_taken=num_taken)])
        self._emit("round", record)

    def _traffic(
        self, plan: Round, round_id: int, gathered: list[dict[str, Any]], *, num_taken: int
    ) -> dict[str, Any]:
        """What leaves and reaches the clients of a round: the parameters that are averaged.

        Everyone who is drawn receives them; who is lost sends nothing. Of a model that is cut they
        are those of the client's stages, and what passes over every edge comes with them.
        """
        sent = sum(part["numel"] for part in gathered) * _BYTES
        received = sent
        if self.tuner.products is not None and num_taken:
            received += self.tuner.products.residual_numel(num_taken) * _BYTES
        over_edges = traffic_record(
            round_id, [part["sent"] for part in gathered], pipeline=self.config.stages
        )
        return {
            "kind": "traffic", "round": round_id, "edges": over_edges["edges"],
            "client_bytes_up": sent, "client_bytes_down": received,
            "bytes_up": sent * len(plan.turns),
            "bytes_down": received * (len(plan.turns) + len(plan.dropped)),
        }  # fmt: skip

    def _score(self, round_id: int) -> None:
        """Score the averaged model on every client's held-out examples, shared by the workers."""
        held_out = [c for c, rows in enumerate(self.data.test_sequences) if len(rows)]
        mine = held_out[self._comm.replica :: self._comm.grid.num_replicas]
        gathered = self._comm.gather(self.tuner.score(mine, last_rounds=self._last))
        if gathered is None:
            return
        found: Scores = {}
        for part in gathered:
            for stage_id, clients in part.items():
                found.setdefault(stage_id, {}).update(clients)
        record = evaluation(round_id, found, self.data.meaning)
        self._write([record])
        self._emit("eval", record)

    def save(self, position: Position) -> None:
        """Write a checkpoint, unless the run has not gone on since the last one."""
        if position == self.position:
            return
        self.position = position
        offset = 0
        if self._writer is not None:
            self._writer.flush()
            offset = self._writer.offset
        self._checkpoints.save(position, self.tuner.checkpoint_files(), metrics_offset=offset)

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self._writer is not None:
            self._writer.write(records)
            self._writer.flush()

    def _activity(self) -> Activity:
        """What this process does; called in the watch's thread."""
        client_id = self._client_id if self._client_id >= 0 else None
        phase, computes = self._phase or "starting", self.tuner.computes
        if computes is None:
            return Activity(doing=phase, client_id=client_id)
        return Activity(doing=f"{phase}, {computes}", waiting=False, client_id=client_id)


def merge_turns(parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Unite what the processes of a turn say of it, by client; the loss is the last stage's."""
    turns: dict[int, dict[str, Any]] = {}
    losses: dict[int, StageLosses] = defaultdict(dict)
    for part in parts:
        record = {key: value for key, value in part.items() if key != "losses"}
        turn = turns.setdefault(part["client"], record)
        turn["seconds"] = max(turn["seconds"], part["seconds"])
        losses[part["client"]] |= part["losses"]
    for client, turn in turns.items():
        means = {stage: float(np.mean(steps)) for stage, steps in sorted(losses[client].items())}
        last = max(means)
        turn |= {"loss": means[last], "last_loss": losses[client][last][-1]}
        if len(means) > 1:
            turn["stages"] = {str(stage): mean for stage, mean in means.items()}
    return [turns[client] for client in sorted(turns)]


def evaluation(round_id: int, scores: Scores, meaning: Meaning) -> dict[str, Any]:
    """Make the record of a scoring: over all examples, by client, and the worst client.

    It is that of the last stage; of the others' heads the score over all examples.
    """
    found = scores[max(scores)]
    clients = {client: from_statistics(meaning, rows) for client, rows in sorted(found.items())}
    known = {client: score for client, score in clients.items() if np.isfinite(score)}
    choose = max if meaning.metric == "loss" else min
    worst = choose(known, key=known.__getitem__) if known else None
    record = {
        "kind": "eval", "round": round_id, "metric": meaning.metric,
        "score": _over_all(meaning, found),
        "mean": float(np.mean(list(known.values()))) if known else None,
        "worst": known.get(worst) if worst is not None else None, "worst_client": worst,
        "clients": {str(client): score for client, score in clients.items()},
    }  # fmt: skip
    if len(scores) > 1:
        record["stages"] = {str(s): _over_all(meaning, scores[s]) for s in sorted(scores)}
    return record


def _over_all(meaning: Meaning, clients: Mapping[int, np.ndarray[Any, Any]]) -> float:
    return from_statistics(meaning, np.concatenate(list(clients.values())))


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
