"""The federated loop, as every process of a run executes it; ``train_round`` is a round."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.schema import RunConfig
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.watch import Moment, Watch
from fedpipe.errors import FederationError
from fedpipe.federation.cohort import RoundPlan, Turn, client_history
from fedpipe.federation.refusal import (
    NO_UPDATES,
    Outcome,
    Refused,
    bad_average_error,
    weigh_updates,
)
from fedpipe.federation.replica import Replica
from fedpipe.models.split import pipeline_edges
from fedpipe.pipeline.optimizer import learning_rate
from fedpipe.pipeline.stage_engine import StepResult
from fedpipe.report.records import Emit, OuterRecord, Record, StepRecord
from fedpipe.report.writer import METRICS_FILE, MetricsWriter, read_metrics
from fedpipe.run.checkpoint import CheckpointWriter, Position, last_rounds
from fedpipe.run.outer import OuterRound
from fedpipe.run.run_dir import Setup

Facts = dict[str, Any]
"""What rank 0 learns of a process for the record of a round."""


def run_rounds(
    kind: Callable[[Any, Emit, Comm, Watch], FederatedRun],
    setup: Setup,
    *,
    env: ProcessEnv,
    emit: Emit,
    watch: Watch | None = None,
) -> Position | None:
    """Train, average, validate and save until all rounds are done, or until asked to stop.

    Args:
        kind: The class of the run; made of the setup, it resumes or begins.
        setup: The same on every rank.
        env: This process' place in the run.
        emit: Told of every step, round and validation.
        watch: Running; says when to stop. None makes one that learns it from the other ranks.

    Returns:
        None when all rounds are done; otherwise where the run has stopped, saved.

    Collective: every process of the run.
    """
    if watch is None:
        with Watch() as watch:
            return run_rounds(kind, setup, env=env, emit=emit, watch=watch)
    config: RunConfig | FinetuneConfig = setup.config
    pipeline = config.pipeline if isinstance(config, RunConfig) else config.stages
    comm = Comm(setup.grid, env, edges=pipeline_edges(pipeline), board=watch.board)
    try:
        watch.join_run(comm)
        run = kind(setup, emit, comm, watch)
        emit("training", True)
        for round_id in range(run.position.round_id, run.end_round):
            if not run.train_round(round_id):
                return run.position
        emit("training", False)
        return None
    finally:
        watch.leave_run()
        comm.close()


class FederatedRun(ABC):
    """One process' view of a run: trains its replica's clients, and keeps the record of all.

    A subclass says who trains in a round and what is written down of it.
    """

    shows_steps: ClassVar[bool]
    """Every local step is a record of its own, and shown."""
    validation: ClassVar[str]
    """What people call a validation of the run."""

    def __init__(
        self,
        setup: Setup,
        replica: Replica,
        *,
        num_clients: int,
        steps_per_round: int,
        held_out: Sequence[int] | None,
        validate_every: int,
        comm: Comm,
        emit: Emit,
        watch: Watch,
        outer: OuterRound | None = None,
    ) -> None:
        """Resume, or begin.

        Args:
            setup: Configuration, directory and checkpoint.
            replica: With the first weights.
            num_clients: Data owners.
            steps_per_round: By how much the learning rate's schedule advances in a round.
            held_out: Clients that this replica scores; None where nobody has held-out examples.
            validate_every: Rounds between validations.
            comm: Of this process.
            emit: Told of every step, round and validation.
            watch: Running.
            outer: What to train for, where the clients are those of one of several sites.

        Collective: every process.
        """
        self.setup, self.replica, self.comm, self._emit = setup, replica, comm, emit
        config: RunConfig | FinetuneConfig = setup.config
        self._settings, self._watch = config, watch
        self._steps_per_round = steps_per_round
        self._held_out, self._validate_every = held_out, validate_every
        checkpoint = setup.checkpoint
        self.position = checkpoint.position if checkpoint else Position()
        """Position of the checkpoint that was read or written last."""
        self._outer = outer
        self.end_round = outer.end_round if outer else config.federation.num_rounds
        """The round before which the run ends."""
        self._skipped = checkpoint.skipped if checkpoint else ()
        if outer and self.position.round_id < outer.first_round:  # it has missed the rest
            self._skipped += ((self.position.round_id, outer.first_round),)
            self.position = Position(round_id=outer.first_round)
        self._resumed_at = self.position
        self._checkpoints = CheckpointWriter(
            setup.run_dir, comm=comm, keep_last=config.checkpoint.keep_last
        )
        self._writer: MetricsWriter | None = None
        if comm.is_master():
            self._writer = MetricsWriter(setup.run_dir, sinks=config.log.to)
            self._writer.truncate(checkpoint.metrics_offset if checkpoint else 0)
        self._new_steps: list[StepRecord] = []
        """Steps of this process that rank 0 does not know of."""
        self._steps: list[StepRecord] = []
        """On rank 0, the steps of the round under way."""
        self._sent_before = Counter(replica.sent())
        if checkpoint:
            unfinished = replica.load_checkpoint(checkpoint, in_mid_round=self.position.step > 0)
            self._sent_before.subtract(unfinished.get("sent", {}))
            self._steps = unfinished.get("steps", [])
            if self.shows_steps and self.position.step and comm.is_master():
                self._steps = self._steps_of(self.position.round_id)
        self._history = client_history(
            lambda round_id: self.plan_round(round_id).turns,
            before=self.position.round_id,
            num_clients=num_clients,
            skipped=self._skipped,
        )
        if checkpoint and self._skipped:
            self._history = self._history.kept_in(last_rounds(checkpoint))
        self._round_started = time.monotonic()
        self._phase = ""
        self._client_id: int | None = None
        watch.activity = self._activity
        if outer and self.position == Position(round_id=outer.first_round):
            self._begin_outer_round(outer)

    # -- what a subclass says ----------------------------------------------------------------

    @abstractmethod
    def plan_round(self, round_id: int) -> RoundPlan:
        """Draw the cohort of a round; the same on every rank."""

    def round_facts(self, round_id: int) -> Facts:
        """Return what rank 0 is to know of this process for ``round_records``."""
        return {}

    @abstractmethod
    def round_records(
        self,
        plan: RoundPlan,
        round_id: int,
        *,
        outcome: Outcome,
        steps: Sequence[StepRecord],
        facts: Sequence[Facts],
        seconds: float,
    ) -> list[Record]:
        """Return what rank 0 writes down after a round; one of the records is of kind "round".

        Args:
            plan: Of the round.
            round_id: From 0.
            outcome: What the updates came to.
            steps: Local steps of all stages and replicas.
            facts: By rank, ``round_facts`` with "sync", seconds and bytes of averaging, and "sent",
                the ledger of the round.
            seconds: Duration of the round.
        """

    @abstractmethod
    def validation_record(self, round_id: int, scores: dict[int, dict[int, Any]]) -> Record:
        """Return the record of a validation, from scores by stage and client."""

    # -- a round -----------------------------------------------------------------------------

    def train_round(self, round_id: int) -> bool:
        """Draw a cohort, train its turns, average them, record, validate and save.

        Returns:
            Whether to go on; False when the run was asked to stop, and ``position`` is saved.
        """
        config = self._settings
        self._begin_round(round_id)
        plan = self.plan_round(round_id)
        if not self._train_turns(plan.turns, round_id):
            return False
        outcome, sync = self._average(plan.turns, round_id)
        self._history = self._history.after(plan.turns, round_id=round_id)
        self._record(plan, round_id, outcome=outcome, sync=sync)
        last = round_id + 1 == self.end_round
        if last or (round_id + 1) % self._validate_every == 0:
            self._validate(round_id)
        if last or (round_id + 1) % config.checkpoint.every_rounds == 0:
            self._save(Position(round_id=round_id + 1))
        return True

    def _begin_outer_round(self, outer: OuterRound) -> None:
        """Take over the weights that come from the other sites, and score them.

        Raises:
            FederationError: They are of another model.

        Collective: every process.
        """
        told = self.comm.agree(not (fault := self.base_fault(outer)), message=fault)
        if told:
            raise FederationError(told[0])
        self.replica.load_averaged(outer.read_base())
        spoilt = self.replica.stages_not_finite()
        told = self.comm.agree(not spoilt, message=", ".join(spoilt))
        if told:
            raise FederationError(
                f"{outer.folder}: expected finite weights, got NaN or infinity in"
                f" {', '.join(sorted(set(told)))}. Ask the coordinator for others."
            )
        record = self._score(outer.first_round)
        if record is not None:
            of_others = cast(OuterRecord, {**record, "kind": "outer"})
            self._write([of_others])
            self._emit("outer", of_others)

    def base_fault(self, outer: OuterRound) -> str:
        """Say, on rank 0, why weights that came in cannot be this model's; "" if they can."""
        return ""

    def _begin_round(self, round_id: int) -> None:
        self._phase = f"round {round_id + 1}"
        self._round_started = time.monotonic()
        if round_id != self._resumed_at.round_id:
            self._sent_before = Counter(self.replica.sent())  # validation is not in the ledger
        elif self.setup.checkpoint:
            self._round_started -= self.setup.checkpoint.seconds

    # -- train -------------------------------------------------------------------------------

    def _train_turns(self, turns: Sequence[Turn], round_id: int) -> bool:
        """Run this replica's turns; save together with the others on the way, or to stop.

        Returns:
            Whether to go on.
        """
        mine = [t for t in turns if t.replica_id == self.comm.replica]
        per_replica: Counter[int] = Counter()
        for turn in turns:
            per_replica[turn.replica_id] += turn.num_steps
        longest = max(per_replica.values(), default=0)
        every = self._settings.checkpoint.every_steps or max(1, longest)
        first = self._resumed_at.step if round_id == self._resumed_at.round_id else 0
        while True:
            end = min(first - first % every + every, longest)
            self._advance(mine, first, end, round_id=round_id)
            self._collect_steps()
            beyond = (round_id, end + 1) if end < longest else (round_id + 1, 0)
            stop = self._watch.stop.commit(beyond)
            if stop < beyond:
                stop = max(stop, (round_id, first))
                self._save(Position(round_id=round_id, step=stop[1]))
                return False
            if end == longest:
                return True
            self._save(Position(round_id=round_id, step=end))
            first = end

    def _advance(self, mine: Sequence[Turn], first: int, end: int, *, round_id: int) -> None:
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
        """Return the end of the steps that are certain to run; ``step`` itself: stop before it.

        Args:
            step: A local step of the client's turn, counted as the result is.
            start: Round, and the replica's local steps before the turn.
            high: End of the steps in question.
        """
        round_id, offset = start
        certain = min(step + self.replica.lookahead, high)
        stop = self._watch.stop.commit((round_id, offset + certain))
        return max(step, stop[1] - offset) if stop[0] == round_id else step

    def _train(
        self, turn: Turn, steps: range, *, round_id: int, until: Callable[[int], int]
    ) -> None:
        per_round = self._steps_per_round
        total = per_round * self._settings.federation.num_rounds
        self.replica.train(
            turn,
            steps,
            round_id=round_id,
            seen=self._history.examples_seen[turn.client_id],
            lr=lambda step: learning_rate(
                self._settings.optimizer, round_id * per_round + step, total_steps=total
            ),
            on_step=partial(self.on_step, turn, round_id),
            until=until,
        )

    def on_step(self, turn: Turn, round_id: int, stage_id: int, result: StepResult) -> None:
        """Take note of a local step of a stage."""
        record: StepRecord = {
            "kind": "step",
            "round": round_id,
            "step": result.step,
            "client": turn.client_id,
            "replica": turn.replica_id,
            "stage": stage_id,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": turn.num_tokens // turn.num_steps,
            "seconds": result.seconds,
        }
        self._new_steps.append(record)
        if self.shows_steps and self.comm.data == 0:
            self._emit("step", record)

    def _collect_steps(self) -> None:
        """Bring every rank's steps to rank 0, in the order of the steps."""
        gathered = self.comm.gather(self._new_steps)
        self._new_steps = []
        if gathered is not None:
            steps = _merge_data_ranks(step for steps in gathered for step in steps)
            self._steps += steps
            if self.shows_steps:
                self._write(steps)

    def _steps_of(self, round_id: int) -> list[StepRecord]:
        """Read the step records of a round that a resumed run goes on with."""
        return [
            record
            for record in read_metrics(self.setup.run_dir / METRICS_FILE)
            if record["kind"] == "step" and record["round"] == round_id
        ]

    # -- average -----------------------------------------------------------------------------

    def _average(self, turns: Sequence[Turn], round_id: int) -> tuple[Outcome, tuple[float, int]]:
        """Agree which updates are left out, average the others, and see that the result is finite.

        Returns:
            What the updates came to; seconds that it took, and bytes that this rank sent.

        Raises:
            TrainingError: No update is finite, or the average is not.

        Collective: every rank.
        """
        if not turns:
            return NO_UPDATES, (0.0, 0)
        started, sent, replica = time.monotonic(), 0, self.replica
        own = json.dumps([fault.record() for fault in replica.refused])
        told = self.comm.agree(not replica.refused, message=own)
        refused = [Refused(**fault) for text in told for fault in json.loads(text)]
        aggregation = self._settings.federation.aggregation
        outcome = weigh_updates(turns, refused, aggregation=aggregation, round_id=round_id)
        replica.refused.clear()
        if outcome.is_averaged:
            sent = replica.synchronize(len(turns), left_out=outcome.left_out, share=outcome.share)
        else:
            replica.forget_round()
        spoilt = replica.stages_not_finite()
        told = self.comm.agree(not spoilt, message=", ".join(spoilt))
        if told:
            raise bad_average_error(told, round_id=round_id)
        return outcome, (time.monotonic() - started, sent)

    # -- record, validate, save --------------------------------------------------------------

    def _record(
        self, plan: RoundPlan, round_id: int, *, outcome: Outcome, sync: tuple[float, int]
    ) -> None:
        own = {"sync": sync, "sent": self._sent_in_round()} | self.round_facts(round_id)
        facts = self.comm.gather(own)
        if facts is None:
            return
        seconds = time.monotonic() - self._round_started
        records = self.round_records(
            plan, round_id, outcome=outcome, steps=self._steps, facts=facts, seconds=seconds
        )
        self._steps = []
        self._write(records)
        self._emit("round", next(r for r in records if r["kind"] == "round"))

    def _validate(self, round_id: int) -> None:
        """Write down how the averaged model scores."""
        record = self._score(round_id)
        if record is not None:
            self._write([record])
            self._emit("eval", record)

    def _score(self, round_id: int) -> Record | None:
        """Score the averaged model on every client's held-out examples, shared by the replicas.

        Returns:
            The record, on rank 0; None elsewhere, or where nobody has held-out examples.
        """
        if self._held_out is None:
            return None
        self._phase = f"{self.validation} after round {round_id + 1}"
        scores = self.replica.evaluate(self._held_out, last_rounds=self._history.last_round)
        gathered = self.comm.gather(scores)
        if gathered is None:
            return None
        merged: dict[int, dict[int, Any]] = defaultdict(dict)
        for part in gathered:
            for stage_id, of_clients in part.items():
                merged[stage_id] |= of_clients
        return self.validation_record(round_id, merged)

    def _save(self, position: Position) -> None:
        """Write a checkpoint, unless the run has not gone on since the last one."""
        if position == self.position:
            return
        self.position = position
        unfinished: dict[str, Any] | None = None
        seconds, offset = 0.0, 0
        if position.step:
            unfinished = {"sent": self._sent_in_round()}
            seconds = time.monotonic() - self._round_started
            if self.comm.is_master() and not self.shows_steps:
                unfinished["steps"] = self._steps
        if self._writer is not None:
            self._writer.flush()
            offset = self._writer.offset
        files = self.replica.checkpoint_files(unfinished)
        self._checkpoints.save(
            position,
            files,
            metrics_offset=offset,
            seconds=seconds,
            skipped=self._skipped,
            base_sha256=self._outer.sha256 if self._outer else "",
        )

    # ----------------------------------------------------------------------------------------

    def _activity(self) -> Activity:
        """What this process does; called in the watch's thread."""
        doing = self.replica.computation()
        if doing is None:
            return Activity(doing=self._phase or "starting", client_id=self._client_id)
        where = ""
        if self._client_id is not None and doing.step is not None:
            where = f"local step {doing.step + 1}, "
        return Activity(
            doing=f"{self._phase}, {where}{doing.what}",
            waiting=doing.waits,
            client_id=self._client_id,
        )

    def _write(self, records: Sequence[Record]) -> None:
        if self._writer is not None:
            self._writer.write(records)
            self._writer.flush()

    def _sent_in_round(self) -> dict[str, int]:
        sent = Counter(self.replica.sent())
        names = sent.keys() | self._sent_before.keys()  # after a resumption some come no more
        return {name: sent[name] - self._sent_before[name] for name in sorted(names)}


def _merge_data_ranks(steps: Iterable[StepRecord]) -> list[StepRecord]:
    """One record per stage and step: the loss is the mean over the data-parallel ranks."""
    groups: dict[tuple[int, ...], list[StepRecord]] = defaultdict(list)
    for step in steps:
        key = step["round"], step["step"], step["replica"], step["client"], step["stage"]
        groups[key].append(step)
    merged: list[StepRecord] = []
    for _, group in sorted(groups.items()):
        losses = [step["loss"] for step in group if step["loss"] is not None]
        merged.append({**group[0], "loss": sum(losses) / len(losses) if losses else None})
    return merged
