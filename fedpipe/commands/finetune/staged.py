"""One process of a fine-tuning that is cut into stages: the engine of pre-training, on a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpipe.commands.finetune.examples import TuningData
from fedpipe.commands.finetune.micro_batches import micro_batches, task_messages
from fedpipe.commands.finetune.scores import Scores, StageLosses, statistics
from fedpipe.commands.finetune.setup import load_model_config, load_tuning_tokenizer
from fedpipe.commands.finetune.tuner import attach_seeded, build_tuned
from fedpipe.config.deepspeed import engine_config
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.encoding import IGNORED, Encoded
from fedpipe.distributed.comm import Comm
from fedpipe.federation.hosting import HostedStages
from fedpipe.federation.turns import TuningTurn, batches
from fedpipe.models.families import stable_seed
from fedpipe.models.split import StageRole, StageSpec, stage_specs
from fedpipe.models.stage import StageModule
from fedpipe.models.tuned_stage import TunedStage
from fedpipe.pipeline.stage_engine import MicroBatchSource, StepResult
from fedpipe.run.checkpoint import CheckpointWriter


class StagedTuner(HostedStages):
    """The stages in this process, and the examples of all clients."""

    products = None
    """LoRA's products are averaged in whole models only."""

    def __init__(
        self, config: FinetuneConfig, data: TuningData, *, comm: Comm, run_dir: Path
    ) -> None:
        """Build the stages with their first values, those of the model that is not cut.

        Args:
            config: The run, with a cut.
            data: Examples and their owners.
            comm: Of this process.
            run_dir: Where clients keep what is theirs.

        Collective: every rank.
        """
        self.config, self.data = config, data
        model_config = load_model_config(config, load_tuning_tokenizer(config))
        specs = stage_specs(config.stages, num_hidden_layers=model_config.num_hidden_layers)
        super().__init__(
            config,
            pipeline=config.stages,
            specs=specs,
            build=self._build,
            messages=task_messages(config, specs, data, hidden_size=model_config.hidden_size),
            deepspeed=engine_config(config.deepspeed.config, config.stages),
            comm=comm,
            run_dir=run_dir,
        )
        self.sent_numel = sum(
            synchronizer.averaged_numel
            for stage_id, synchronizer in self.synchronizers.items()
            if specs[stage_id].role is StageRole.CLIENT
        )

    def _build(self, spec: StageSpec) -> StageModule:
        config, meaning = self.config, self.data.meaning
        model = build_tuned(config, meaning)
        attach_seeded(model, config, meaning)
        torch.manual_seed(stable_seed(config.seed, "head", spec.scores))
        return TunedStage(
            spec, model, meaning.kind,
            activation_checkpointing=config.pipeline.activation_checkpointing,
        )  # fmt: skip

    # -- a turn ------------------------------------------------------------------------------

    def train(
        self,
        turn: TuningTurn,
        *,
        round_id: int,
        last_round: int | None,
        learning_rate: Callable[[int], float],
        writer: CheckpointWriter,
    ) -> StageLosses:
        """As ``Tuner.train``, on the stages of this process. Collective: all of the replica."""
        losses: StageLosses = {
            engine.spec.stage_id: [] for engine in self.stages if engine.spec.has_head
        }

        def on_step(stage_id: int, result: StepResult) -> None:
            if result.loss is not None:
                losses[stage_id].append(result.loss)

        self.begin_turn(turn, round_id=round_id, last_round=last_round)
        self.engine.train(
            range(turn.num_steps),
            source=self._training_source(turn, round_id=round_id),
            lr=learning_rate,
            on_step=on_step,
        )
        self.end_turn(turn, round_id=round_id, last_round=last_round, writer=writer)
        return losses

    @property
    def computes(self) -> str | None:
        """What a stage of this process computes now; None where all of them wait."""
        under_way = [engine.doing for engine in self.stages if engine.doing is not None]
        for step, instruction in under_way:
            if not instruction.waits:
                micro_batch = getattr(instruction, "micro_batch", 0)
                what = f"{instruction.trace_name} of micro-batch {micro_batch}"
                return f"local step {step + 1}, {what}"
        return None

    def _training_source(self, turn: TuningTurn, *, round_id: int) -> MicroBatchSource | None:
        if not self.reads_text:
            return None
        mine = self.data.train_sequences[turn.client_id]
        order = list(
            batches(
                self.config, turn.client_id, round_id=round_id, size=len(mine),
                steps=turn.num_steps,
            )
        )  # fmt: skip
        return self._micro_batches(self.data.train, [mine[rows] for rows in order])

    def _micro_batches(
        self, split: Encoded, steps: Sequence[NDArray[np.int64]]
    ) -> MicroBatchSource:
        return micro_batches(
            split, steps, pipeline=self.pipeline, meaning=self.data.meaning,
            length=self.data.longest,
        )  # fmt: skip

    # -- between rounds ----------------------------------------------------------------------

    def score(self, client_ids: Sequence[int], *, last_rounds: Mapping[int, int]) -> Scores:
        """As ``Tuner.score``, of every stage of this process with a head.

        Collective: every process of the replica.
        """
        found: Scores = {e.spec.stage_id: {} for e in self.stages if e.spec.has_head}
        size = self.pipeline.micro_batch_size
        for client_id in client_ids:
            for stage_id, synchronizer in self.synchronizers.items():
                state = self._client_state(client_id, stage_id, last_rounds.get(client_id))
                synchronizer.begin_turn(state.get("kept"))
            sequences = self.data.test_sequences[client_id]
            num = math.ceil(len(sequences) / size)
            source = self._test_source(sequences) if self.reads_text else None
            for stage_id, predicted in self.engine.evaluate(num, source=source).items():
                rows = predicted.flatten(0, 1)[: len(sequences)].numpy()
                found[stage_id][client_id] = self._statistics(sequences, rows)
        return found

    def _test_source(self, sequences: NDArray[np.int64]) -> MicroBatchSource:
        size = self.pipeline.micro_batch_size
        chunks = [sequences[first : first + size] for first in range(0, len(sequences), size)]
        source = self._micro_batches(self.data.test, chunks)
        return lambda step, micro_batch: source(micro_batch, 0)

    def _statistics(
        self, sequences: NDArray[np.int64], predicted: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        meaning, test = self.data.meaning, self.data.test
        outputs = {}
        for row, values in zip(sequences, predicted, strict=True):
            if meaning.kind == "ner":
                tags = test.labels[test.starts[row] : test.starts[row + 1]]
                outputs[int(row)] = values[: len(tags)][tags != IGNORED].astype(int).tolist()
            else:
                outputs[int(row)] = values[0] if meaning.kind == "regression" else int(values[0])
        return statistics(meaning, test, sequences, outputs)
