"""Federated pre-training, as every process of the run executes it: its clients and its records."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedpipe.commands.pretrain.records import evaluation_record, round_record, write_timeline
from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.data.blocks import PreparedData, load_prepared
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.watch import Watch
from fedpipe.federation.cohort import RoundPlan, Turn, plan_round, steps_per_round
from fedpipe.federation.loop import Facts, FederatedRun
from fedpipe.federation.refusal import Outcome
from fedpipe.federation.traffic import traffic_record
from fedpipe.pipeline.stage_engine import StepResult
from fedpipe.report.records import Emit, EvalRecord, Record, StepRecord
from fedpipe.run.outer import GLOBAL, OuterRound
from fedpipe.run.run_dir import RunSetup
from fedpipe.run.tensor_file import first_difference
from fedpipe.run.update import crossing_layouts


class Pretraining(FederatedRun):
    """A pre-training in one process."""

    shows_steps = True
    validation = "validation"

    def __init__(self, setup: RunSetup, emit: Emit, comm: Comm, watch: Watch) -> None:
        """Build the replica and resume. Collective: every process."""
        self.config, self._started_at = setup.config, setup.started_at
        self.data: PreparedData = load_prepared(setup.data_dir)
        self.blocks = [shard.num_blocks for shard in self.data.train]
        self._first_step_after: float | None = None
        replica = PretrainingReplica(self.config, self.data, comm=comm, run_dir=setup.run_dir)
        self._stages = replica.stages
        valid, num_replicas = self.data.valid, self.config.federation.num_replicas
        mine = [c for c in range(comm.replica, len(valid), num_replicas) if valid[c].num_blocks]
        super().__init__(
            setup,
            replica,
            num_clients=len(self.blocks),
            steps_per_round=steps_per_round(self.config, self.blocks),
            held_out=mine if valid else None,
            validate_every=self.config.validation.every_rounds,
            comm=comm,
            emit=emit,
            watch=watch,
            outer=setup.outer,
        )
        if replica.missing and comm.data == 0 and comm.replica == 0:
            names = ", ".join(replica.missing)
            emit("note", f"model.path has no {names}: they start with first values of their own")

    def plan_round(self, round_id: int) -> RoundPlan:
        """See ``FederatedRun``."""
        turns = plan_round(self.config, round_id=round_id, blocks_per_client=self.blocks)
        return RoundPlan(turns=turns)

    def on_step(self, turn: Turn, round_id: int, stage_id: int, result: StepResult) -> None:
        """See ``FederatedRun``."""
        if self._first_step_after is None:
            self._first_step_after = time.monotonic() - self._started_at
        super().on_step(turn, round_id, stage_id, result)

    def base_fault(self, outer: OuterRound) -> str:
        """See ``FederatedRun``."""
        if not self.comm.is_master():
            return ""
        found = first_difference(crossing_layouts(self.config), outer.read_base().layouts)
        if not found:
            return ""
        return (
            f"{outer.path / GLOBAL}: expected the tensors of this site's model, got {found}. All"
            " sites of a consortium have the same model and federation.average: ask its"
            " coordinator."
        )

    def round_facts(self, round_id: int) -> Facts:
        """Return the time of the first step, and the trace of the first turn of the run."""
        traces = [
            (self.comm.replica, engine.spec.stage_id, event)
            for engine in (self._stages if self.comm.data == round_id == 0 else ())
            for event in engine.trace.events
        ]
        return {"first_step_s": self._first_step_after, "trace": traces}

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
        """See ``FederatedRun``."""
        if round_id == 0:
            write_timeline(self.setup.run_dir, [event for f in facts for event in f["trace"]])
        records: list[Record] = []
        if self._first_step_after is not None and round_id == self._resumed_at.round_id:
            slowest = max(f["first_step_s"] or 0.0 for f in facts)
            records.append(
                {
                    "kind": "system",
                    "event": "start",
                    "world_size": self.comm.env.world_size,
                    "seconds_to_first_step": slowest,
                }
            )
        record = round_record(
            round_id,
            turns=plan.turns,
            outcome=outcome,
            steps=steps,
            num_stages=self.config.pipeline.num_virtual_stages,
            seconds=seconds,
            sync=[f["sync"] for f in facts],
        )
        sent = [f["sent"] for f in facts]
        return [*records, record, traffic_record(round_id, sent, pipeline=self.config.pipeline)]

    def validation_record(
        self, round_id: int, scores: dict[int, dict[int, tuple[float, int]]]
    ) -> EvalRecord:
        """See ``FederatedRun``."""
        return evaluation_record(round_id, scores)
