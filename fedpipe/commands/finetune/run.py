"""Federated fine-tuning, as every process of the run executes it: its clients and its records."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence

from fedpipe.commands.finetune.prepared import DATA, FinetuneSetup, TuningData
from fedpipe.commands.finetune.records import (
    Scores,
    client_traffic,
    round_record,
    score_record,
    turn_records,
)
from fedpipe.commands.finetune.staged import StagedReplica
from fedpipe.commands.finetune.turns import num_tuning_steps, plan_tuning_round
from fedpipe.commands.finetune.whole import WholeReplica
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.watch import Watch
from fedpipe.federation.cohort import RoundPlan
from fedpipe.federation.loop import Facts, FederatedRun
from fedpipe.federation.refusal import Outcome
from fedpipe.federation.traffic import traffic_record
from fedpipe.report.records import Emit, Record, StepRecord, TuningEvalRecord


class Finetuning(FederatedRun):
    """A fine-tuning in one process."""

    shows_steps = False
    validation = "scoring"

    def __init__(self, setup: FinetuneSetup, emit: Emit, comm: Comm, watch: Watch) -> None:
        """Build the model and resume. Collective: every process."""
        self.config = setup.config
        self.data = TuningData.load(setup.run_dir / DATA)
        self._lengths = self.data.train_lengths()
        kind = StagedReplica if self.config.is_cut else WholeReplica
        self._tuned: StagedReplica | WholeReplica = kind(
            self.config, self.data, comm=comm, run_dir=setup.run_dir
        )
        sizes = {len(mine) for mine in self._lengths}
        held_out = [c for c, rows in enumerate(self.data.test_sequences) if len(rows)]
        super().__init__(
            setup,
            self._tuned,
            num_clients=len(self._lengths),
            steps_per_round=max(num_tuning_steps(self.config, size) for size in sizes),
            held_out=held_out[comm.replica :: comm.grid.num_replicas],
            validate_every=self.config.scoring.every_rounds,
            comm=comm,
            emit=emit,
            watch=watch,
        )

    def plan_round(self, round_id: int) -> RoundPlan:
        """See ``FederatedRun``."""
        return plan_tuning_round(self.config, round_id=round_id, lengths=self._lengths)

    def round_facts(self, round_id: int) -> Facts:
        """Return the peak memory, and the number of parameters that a client sends and receives."""
        numel = self._tuned.sent_numel if self.comm.replica == 0 else 0
        return {"memory": peak_memory_bytes(), "numel": numel}

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
        turns = turn_records(plan, round_id, steps=steps)
        record = round_record(
            plan, round_id, turns=turns, outcome=outcome, facts=facts, seconds=seconds
        )
        shares = dict(zip((t.client_id for t in plan.turns), outcome.weights, strict=True))
        for turn in turns:
            turn["weight"] = shares[turn["client"]]
        num_taken = len(plan.turns) - len(outcome.refused) if outcome.is_averaged else 0
        sent = sum(own["numel"] for own in facts)
        of_edges = traffic_record(
            round_id, [own["sent"] for own in facts], pipeline=self.config.stages
        )
        traffic = client_traffic(
            plan,
            round_id,
            edges=of_edges["edges"],
            sent_numel=sent,
            received_numel=sent + self._tuned.residual_numel(num_taken),
        )
        return [*turns, record, traffic]

    def validation_record(self, round_id: int, scores: Scores) -> TuningEvalRecord:
        """See ``FederatedRun``."""
        return score_record(round_id, scores, self.data.task)


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
