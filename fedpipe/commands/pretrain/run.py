"""Federated pre-training, as every process of the run executes it. Reads top to bottom."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from fedpipe.commands.pretrain.records import (
    evaluation_record,
    round_record,
    traffic_record,
    write_timeline,
)
from fedpipe.commands.pretrain.replica import Replica
from fedpipe.data.blocks import PreparedData, load_prepared
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Moment, Watch
from fedpipe.federation.averaging import average_round
from fedpipe.federation.cohort import (
    Turn,
    after_round,
    client_history,
    plan_round,
    steps_per_round,
)
from fedpipe.federation.refusal import Outcome
from fedpipe.models.split import pipeline_edges
from fedpipe.pipeline.optimizer import learning_rate
from fedpipe.pipeline.stage_engine import StepResult
from fedpipe.report.writer import METRICS_FILE, MetricsWriter, read_metrics
from fedpipe.run.checkpoint import CheckpointWriter, Position
from fedpipe.run.run_dir import RunSetup

Emit = Callable[[str, Any], None]
"""Tells whoever watches: ("step" | "round" | "eval" | "note", record), ("training", bool)."""

TRACED_STEPS = range(2, 6)
"""Local steps of the first round whose instructions are timed for the timeline."""


def pretrain(
    setup: RunSetup,
    *,
    env: ProcessEnv,
    emit: Emit,
    watch: Watch | None = None,
) -> Position | None:
    """Train, average, validate and save until all rounds are done, or until asked to stop.

    Args:
        setup: What ``set_up`` found, on every rank.
        env: This process' place in the run.
        emit: Told of every step, round and validation.
        watch: Running; says when to stop. None makes one that learns it from the other ranks.

    Returns:
        None when all rounds are done; otherwise where the run has stopped, saved.

    Collective: every process of the run.
    """
    if watch is None:
        with Watch() as watch:
            return pretrain(setup, env=env, emit=emit, watch=watch)
    config = setup.config
    comm = Comm(
        Grid.from_config(config), env, edges=pipeline_edges(config.pipeline), board=watch.board
    )
    try:
        watch.join_run(comm)
        run = Pretraining(setup, comm=comm, emit=emit, watch=watch)
        emit("training", True)
        for round_id in range(run.position.round_id, config.federation.num_rounds):
            if not run.train_round(round_id):
                return run.position
        emit("training", False)
        return None
    finally:
        watch.leave_run()
        comm.close()


class Pretraining:
    """One process' view of the run."""

    def __init__(self, setup: RunSetup, *, comm: Comm, emit: Emit, watch: Watch) -> None:
        """Build the replica and resume. Collective: every process."""
        self.setup, self.config, self.comm, self._emit = setup, setup.config, comm, emit
        self._watch = watch
        self.data: PreparedData = load_prepared(setup.data_dir)
        self.replica = Replica(self.config, self.data, comm=comm, run_dir=setup.run_dir)
        self.blocks = [shard.num_blocks for shard in self.data.train]
        self.position = Position()
        """Of the checkpoint that was read or written last."""
        self._checkpoints = CheckpointWriter(
            setup.run_dir, comm=comm, keep_last=self.config.checkpoint.keep_last
        )
        self._writer = None
        if comm.is_master():
            self._writer = MetricsWriter(setup.run_dir, sinks=self.config.log.to)
            self._writer.truncate(setup.checkpoint.metrics_offset if setup.checkpoint else 0)
        self._records: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        """On rank 0, the step records of the round under way."""
        self._sent_before = Counter(self._sent())
        if setup.checkpoint:
            self._sent_before.subtract(self.replica.load_checkpoint(setup.checkpoint))
            self.position = setup.checkpoint.position
            if self.position.step and comm.is_master():
                self._steps = self._steps_of(self.position.round_id)
        self._history = client_history(
            self.config, before=self.position.round_id, blocks_per_client=self.blocks
        )
        self._resumed_at = self.position
        self._first_step_after: float | None = None
        self._round_started = time.monotonic()
        self._phase = ""
        self._client_id: int | None = None
        watch.activity = self._activity
        if self.replica.missing and self.comm.data == 0 and self.comm.replica == 0:
            names = ", ".join(self.replica.missing)
            emit("note", f"model.path has no {names}: they start with first values of their own")

    def train_round(self, round_id: int) -> bool:
        """Train a cohort, average it, validate the result, record and save.

        Returns:
            Whether to go on; False when the run was asked to stop, and ``position`` is saved.
        """
        config = self.config
        if round_id != self._resumed_at.round_id:
            self._sent_before = Counter(self._sent())  # validation is not part of the ledger
        self._round_started = time.monotonic()
        if round_id == self._resumed_at.round_id and self.setup.checkpoint:
            self._round_started -= self.setup.checkpoint.seconds
        turns = plan_round(config, round_id=round_id, blocks_per_client=self.blocks)
        first = self._resumed_at.step if round_id == self._resumed_at.round_id else 0
        self._phase = f"round {round_id + 1}"
        if not self._train_cohort(turns, round_id=round_id, first=first):
            return False

        sync_started = time.monotonic()
        outcome, sync_bytes = average_round(
            self.replica, turns, aggregation=config.federation.aggregation,
            round_id=round_id, comm=self.comm,
        )  # fmt: skip
        sync_s = time.monotonic() - sync_started
        self._history = after_round(self._history, turns, round_id=round_id, config=config)
        self._record_round(turns, round_id, outcome=outcome, sync=(sync_s, sync_bytes))

        last = round_id + 1 == config.federation.num_rounds
        if last or (round_id + 1) % config.validation.every_rounds == 0:
            self._phase = f"validation after round {round_id + 1}"
            self._validate(round_id)
        if last or (round_id + 1) % config.checkpoint.every_rounds == 0:
            self._save(Position(round_id=round_id + 1))
        return True

    # -- one cohort --------------------------------------------------------------------------

    def _train_cohort(self, turns: tuple[Turn, ...], *, round_id: int, first: int) -> bool:
        """Run this replica's turns; save together with the others on the way, or to stop.

        Returns:
            Whether to go on.
        """
        mine = [t for t in turns if t.replica_id == self.comm.replica]
        per_replica: Counter[int] = Counter()
        for turn in turns:
            per_replica[turn.replica_id] += turn.num_steps
        longest = max(per_replica.values())
        every = self.config.checkpoint.every_steps or longest
        while first < longest:
            end = min(first - first % every + every, longest)
            self._advance(mine, first, end, round_id=round_id)
            self._collect_steps()
            beyond = (round_id, end + 1) if end < longest else (round_id + 1, 0)
            stop = self._watch.stop.commit(beyond)
            if stop < beyond:
                stop = max(stop, (round_id, first))
                self._save(Position(round_id=round_id, step=stop[1]))
                return False
            if end < longest:
                self._save(Position(round_id=round_id, step=end))
            first = end
        return True

    def _advance(self, mine: list[Turn], first: int, end: int, *, round_id: int) -> None:
        """Make this replica's local steps ``first..end``, counted over its turns of the round."""
        offset = 0
        for turn in mine:
            low, high = max(first - offset, 0), min(end - offset, turn.num_steps)
            until = partial(self._until, start=(round_id, offset), high=high)
            offset += turn.num_steps
            if low >= high:
                continue
            if until(low) == low:
                break
            self._client_id = turn.client_id
            self._watch.beat()
            last_round = self._history.last_round[turn.client_id]
            if low == 0:
                self.replica.begin_turn(turn, round_id=round_id, last_round=last_round)
            self._train(turn, range(low, high), round_id=round_id, until=until)
            if until(high - 1) < high:
                break
            if high == turn.num_steps:
                self.replica.end_turn(
                    turn, round_id=round_id, last_round=last_round, writer=self._checkpoints
                )
        self._client_id = None

    def _until(self, step: int, *, start: Moment, high: int) -> int:
        """End of the local steps that are certain to be run: ``step`` itself to stop before it.

        Args:
            step: Of the client's turn, as the result.
            start: When the turn began.
            high: The steps from here on are not asked for.
        """
        round_id, offset = start
        certain = min(step + self.replica.engine.lookahead, high)
        stop = self._watch.stop.commit((round_id, offset + certain))
        return max(step, stop[1] - offset) if stop[0] == round_id else step

    def _train(
        self, turn: Turn, steps: range, *, round_id: int, until: Callable[[int], int]
    ) -> None:
        per_round = steps_per_round(self.config, self.blocks)
        total = per_round * self.config.federation.num_rounds
        start = self._history.blocks_seen[turn.client_id]
        for stage in self.replica.stages:  # the timeline shows the run's first turn
            first = round_id == 0 and not stage.trace.events
            stage.trace.steps = TRACED_STEPS if first else range(0)

        def on_step(stage_id: int, result: StepResult) -> None:
            self._on_step(turn, stage_id, result, round_id=round_id)

        self.replica.engine.train(
            steps,
            source=self.replica.training_source(turn.client_id, start=start),
            lr=lambda step: learning_rate(
                self.config.optimizer, round_id * per_round + step, total_steps=total
            ),
            on_step=on_step,
            until=until,
        )

    def _on_step(self, turn: Turn, stage_id: int, result: StepResult, *, round_id: int) -> None:
        if self._first_step_after is None:
            self._first_step_after = time.monotonic() - self.setup.started_at
        record = {
            "kind": "step",
            "round": round_id,
            "step": result.step,
            "client": turn.client_id,
            "replica": turn.replica_id,
            "stage": stage_id,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": self.config.blocks_per_step * self.config.data.sequence_length,
            "seconds": result.seconds,
        }
        self._records.append(record | {"data": self.comm.data})
        if self.comm.data == 0:
            self._emit("step", record)

    def _collect_steps(self) -> None:
        """Bring every rank's step records to rank 0, in the order of the steps."""
        gathered = self.comm.gather(self._records)
        self._records = []
        if gathered is None or self._writer is None:
            return
        steps = _merge_data_ranks(record for records in gathered for record in records)
        self._steps += steps
        self._write(steps)

    def _steps_of(self, round_id: int) -> list[dict[str, Any]]:
        """Read the step records of a round that a resumed run goes on with."""
        return [
            record
            for record in read_metrics(self.setup.run_dir / METRICS_FILE)
            if record["kind"] == "step" and record["round"] == round_id
        ]

    # -- after a cohort ----------------------------------------------------------------------

    def _record_round(
        self,
        turns: tuple[Turn, ...],
        round_id: int,
        *,
        outcome: Outcome,
        sync: tuple[float, int],
    ) -> None:
        gathered = self.comm.gather(
            {
                "sync": sync,
                "sent": self._sent_in_round(),
                "trace": self._traces() if round_id == 0 else [],
                "first_step_s": self._first_step_after,
            }
        )
        if gathered is None or self._writer is None:
            return
        if round_id == 0:
            write_timeline(self.setup.run_dir, [e for g in gathered for e in g["trace"]])
        if self._first_step_after is not None and round_id == self._resumed_at.round_id:
            slowest = max(g["first_step_s"] or 0.0 for g in gathered)
            self._write([
                {"kind": "system", "event": "start", "world_size": self.comm.env.world_size,
                 "seconds_to_first_step": slowest}
            ])  # fmt: skip
        record = round_record(
            round_id,
            turns=turns,
            outcome=outcome,
            steps=self._steps,
            num_stages=self.config.pipeline.num_virtual_stages,
            seconds=time.monotonic() - self._round_started,
            sync=[g["sync"] for g in gathered],
        )
        sent = [g["sent"] for g in gathered]
        traffic = traffic_record(round_id, sent, pipeline=self.config.pipeline)
        self._steps.clear()
        self._write([record, traffic])
        self._emit("round", record)

    def _validate(self, round_id: int) -> None:
        """Score the averaged model on every client's held-out text, shared by the replicas."""
        if not self.data.valid:
            return
        replicas = self.config.federation.num_replicas
        mine = range(self.comm.replica, len(self.data.valid), replicas)
        clients = [c for c in mine if self.data.valid[c].num_blocks]
        scores = self.replica.evaluate(clients, last_rounds=self._history.last_round)
        gathered = self.comm.gather(scores)
        if gathered is None:
            return
        merged: dict[int, dict[int, tuple[float, int]]] = defaultdict(dict)
        for part in gathered:
            for stage_id, clients_scores in part.items():
                merged[stage_id] |= clients_scores
        record = evaluation_record(round_id, merged)
        self._write([record])
        self._emit("eval", record)

    def _save(self, position: Position) -> None:
        """Write a checkpoint, unless the run has not gone on since the last one."""
        if position == self.position:
            return
        self.position = position
        offset = 0
        if self._writer is not None:
            self._writer.flush()
            offset = self._writer.offset
        self._checkpoints.save(
            position,
            self.replica.checkpoint_files(sent=self._sent_in_round() if position.step else None),
            metrics_offset=offset,
            seconds=time.monotonic() - self._round_started if position.step else 0.0,
        )

    # ----------------------------------------------------------------------------------------

    def _activity(self) -> Activity:
        """What this process does; called in the watch's thread."""
        under_way = [engine.doing for engine in self.replica.stages if engine.doing is not None]
        if not under_way:
            return Activity(doing=self._phase or "starting", client_id=self._client_id)
        # One that computes may be to blame; one that waits is not.
        step, instruction = min(under_way, key=lambda doing: doing[1].waits)
        what = f"{instruction.trace_name} of micro-batch {getattr(instruction, 'micro_batch', 0)}"
        where = f"local step {step + 1}, " if self._client_id is not None else ""
        return Activity(
            doing=f"{self._phase}, {where}{what}",
            waiting=instruction.waits,
            client_id=self._client_id,
        )

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self._writer is not None:
            self._writer.write(records)
            self._writer.flush()

    def _sent_in_round(self) -> dict[str, int]:
        sent = Counter(self._sent())
        names = sent.keys() | self._sent_before.keys()  # after a resumption some come no more
        return {name: sent[name] - self._sent_before[name] for name in sorted(names)}

    def _sent(self) -> dict[str, int]:
        """What this process has sent since it started, by ledger entry."""
        sent = dict(self.comm.sent_bytes)
        sent["gradients"] = sum(engine.gradient_bytes for engine in self.replica.stages)
        sent |= self.replica.sent_over_edges()
        return sent

    def _traces(self) -> list[tuple[int, int, tuple[str, int, int, float, float]]]:
        if self.comm.data > 0:
            return []
        return [
            (self.comm.replica, engine.spec.stage_id, event)
            for engine in self.replica.stages
            for event in engine.trace.events
        ]


def _merge_data_ranks(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record per stage and step: the loss is the mean over the data-parallel ranks."""
    groups: dict[tuple[int, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        key = tuple(record[k] for k in ("round", "step", "replica", "client", "stage"))
        groups[key].append(record)
    merged = []
    for _, group in sorted(groups.items()):
        losses = [r["loss"] for r in group if r["loss"] is not None]
        record = {k: v for k, v in group[0].items() if k != "data"}
        merged.append(record | {"loss": sum(losses) / len(losses) if losses else None})
    return merged
