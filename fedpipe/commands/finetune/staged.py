"""The replica of a fine-tuning with a cut: the stages of a pre-training, on a labelled task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpipe.commands.finetune.micro_batches import micro_batches, task_messages
from fedpipe.commands.finetune.model import (
    attach_seeded,
    build_tuned,
    load_model_config,
    load_tuning_tokenizer,
)
from fedpipe.commands.finetune.prepared import TuningData
from fedpipe.commands.finetune.turns import batches
from fedpipe.config.deepspeed import engine_config
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.encoding import IGNORED, Encoded
from fedpipe.data.tasks.scoring import statistics
from fedpipe.distributed.comm import Comm
from fedpipe.federation.cohort import Turn
from fedpipe.federation.stages import StageReplica
from fedpipe.models.split import StageRole, StageSpec, stage_specs
from fedpipe.models.stage import StageModule
from fedpipe.models.tuned_stage import TunedStage
from fedpipe.models.weights import stable_seed
from fedpipe.pipeline.stage_engine import MicroBatchSource


class StagedReplica(StageReplica):
    """The stages of a fine-tuning in this process, and the examples of all clients."""

    def __init__(
        self, config: FinetuneConfig, data: TuningData, *, comm: Comm, run_dir: Path
    ) -> None:
        """Build the stages with the same first values as the uncut model has.

        Args:
            config: The run, with a cut.
            data: Examples and their owners.
            comm: Process groups of this process.
            run_dir: Directory in which clients keep parts that are not averaged.

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
        """Number of parameters in the client's stages of this process, which a client sends."""

    def _build(self, spec: StageSpec) -> StageModule:
        config, task = self.config, self.data.task
        model = build_tuned(config, task)
        attach_seeded(model, config, task)
        torch.manual_seed(stable_seed(config.seed, "head", spec.scores))
        return TunedStage(
            spec,
            model,
            task.kind,
            activation_checkpointing=config.pipeline.activation_checkpointing,
        )

    def residual_numel(self, num_clients: int) -> int:
        """Return 0: a client receives no other parameters than those that it sends."""
        return 0

    def turn_source(self, turn: Turn, *, round_id: int, seen: int) -> MicroBatchSource | None:
        """Return the micro-batches of a client's examples, in the order of the round."""
        if not self.reads_text:
            return None
        mine = self.data.train_sequences[turn.client_id]
        order = batches(
            self.config, turn.client_id, round_id=round_id, size=len(mine), steps=turn.num_steps
        )
        return self._micro_batches(self.data.train, [mine[rows] for rows in order])

    def _micro_batches(
        self, split: Encoded, steps: Sequence[NDArray[np.int64]]
    ) -> MicroBatchSource:
        return micro_batches(
            split,
            steps,
            pipeline=self.pipeline,
            task=self.data.task,
            length=self.data.longest,
        )

    def score(self, client_id: int) -> dict[int, NDArray[np.float64]]:
        """Return by stage the statistics of the task's metric for a client's held-out examples."""
        sequences = self.data.test_sequences[client_id]
        num = math.ceil(len(sequences) / self.pipeline.micro_batch_size)
        source = self._test_source(sequences) if self.reads_text else None
        return {
            stage_id: self._statistics(sequences, predicted.flatten(0, 1)[: len(sequences)].numpy())
            for stage_id, predicted in self.engine.evaluate(num, source=source).items()
        }

    def _test_source(self, sequences: NDArray[np.int64]) -> MicroBatchSource:
        size = self.pipeline.micro_batch_size
        chunks = [sequences[first : first + size] for first in range(0, len(sequences), size)]
        source = self._micro_batches(self.data.test, chunks)
        return lambda step, micro_batch: source(micro_batch, 0)

    def _statistics(
        self, sequences: NDArray[np.int64], predicted: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        task, test = self.data.task, self.data.test
        outputs = {}
        for row, values in zip(sequences, predicted, strict=True):
            if task.kind == "ner":
                tags = test.labels[test.starts[row] : test.starts[row + 1]]
                outputs[int(row)] = values[: len(tags)][tags != IGNORED].astype(int).tolist()
            else:
                outputs[int(row)] = values[0] if task.kind == "regression" else int(values[0])
        return statistics(task, test, sequences, outputs)
