"""The replica of a pre-training: its stages, and the text that the first stage reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.data.masking import (
    IGNORED,
    MaskedBatch,
    MaskedReader,
    document_starts,
    pad,
    validation_batch,
)
from fedpipe.distributed.comm import Comm
from fedpipe.federation.cohort import Turn
from fedpipe.federation.stages import StageReplica
from fedpipe.models.split import StageSpec, model_stages
from fedpipe.models.stage import MaskedTargets, Stage, build_stage
from fedpipe.models.weights import hf_config
from fedpipe.pipeline.messages import edge_messages
from fedpipe.pipeline.stage_engine import MicroBatchSource

EMBEDDING_LEDGER = "embedding"
"""Entry of the traffic ledger for the word embedding that the final decoder starts from."""
TRACED_STEPS = range(2, 6)
"""Local steps of the first round whose instructions are timed for the timeline."""


class PretrainingReplica(StageReplica):
    """The stages of a pre-training in this process, and the text that the first stage reads."""

    def __init__(
        self, config: RunConfig, data: PreparedData, *, comm: Comm, run_dir: Path | None = None
    ) -> None:
        """Build the stages with their first weights and connect them.

        Args:
            config: The run.
            data: Prepared text; only the first stage opens it.
            comm: Process groups of this process.
            run_dir: Directory in which clients keep parts that are not averaged; None for a
                measurement, which has no clients.

        Collective: every rank.
        """
        self.config, self.data = config, data
        self._masking = config
        """The configuration whose share of masked tokens the messages are made for."""
        shape = model_shape(config, vocab_size=data.vocab_size, pad_id=data.pad_id)
        self.hf_config = hf_config(
            shape, pad_id=data.pad_id, cls_id=data.cls_id, sep_id=data.sep_id
        )
        self.missing: list[str] = []
        self._word_embedding: nn.Parameter | None = None
        specs = model_stages(config, shape)
        super().__init__(
            config,
            pipeline=config.pipeline,
            specs=specs,
            build=self._build_stage,
            messages=edge_messages(config, specs, hidden_size=shape.hidden_size),
            deepspeed=deepspeed_config(config),
            comm=comm,
            run_dir=run_dir,
        )

    def _build_stage(self, spec: StageSpec) -> Stage:
        config = self.config
        stage, missing = build_stage(
            spec,
            self.hf_config,
            seed=config.seed,
            path=config.model.path,
            activation_checkpointing=config.pipeline.activation_checkpointing,
            sinusoidal_positions=config.model.position_init == "sinusoidal",
            compiled=config.pipeline.compile,
            padded_after=config.data.padded_after,
            start_words=config.data.start_words,
            word_embedding=self._word_embedding,
        )
        self.missing += missing
        if spec.is_first:
            self._word_embedding = stage.word_embedding
        return stage

    # -- training ----------------------------------------------------------------------------

    def begin_turn(self, turn: Turn, *, round_id: int, last_round: int | None) -> None:
        """See ``Replica.begin_turn``. The first turn of the run is timed for the timeline."""
        super().begin_turn(turn, round_id=round_id, last_round=last_round)
        for stage in self.stages:
            first = round_id == 0 and not stage.trace.events
            stage.trace.steps = TRACED_STEPS if first else range(0)

    def set_weights(self, client_id: int, last_round: int | None) -> dict[int, dict[str, Any]]:
        """See ``Replica.set_weights``. A decoder that starts as a copy gets the word embedding."""
        states = super().set_weights(client_id, last_round)
        self._copy_embedding()
        return states

    @torch.no_grad()
    def _copy_embedding(self) -> None:
        """Set the final decoder to the word embedding, if it starts every turn as a copy of it.

        Collective: every process of the replica, with the stream drained.
        """
        final = self.specs[-1]
        if final.decoder != "copied":
            return
        engines = {engine.spec.stage_id: engine for engine in self.stages}
        if 0 in engines:
            embedding_VD = engines[0].stage.word_embedding.detach()
        else:
            size = (self.hf_config.vocab_size, self.hf_config.hidden_size)
            embedding_VD = torch.empty(size, device=self.comm.device)
        if not final.is_home_head:
            self.comm.send_down_pipe(embedding_VD, label=EMBEDDING_LEDGER)
        if final.stage_id in engines:
            for decoder_VD in engines[final.stage_id].stage.copied.values():
                decoder_VD.copy_(embedding_VD)
            engines[final.stage_id].weights_changed()

    def _mask_as(self, config: RunConfig) -> None:
        """Mask as many tokens as a configuration says from now on; the stream is drained."""
        if config.data.num_masked != self._masking.data.num_masked:
            hidden = self.hf_config.hidden_size
            self.resize_links(edge_messages(config, self.specs, hidden_size=hidden))
        self._masking = config

    def turn_source(self, turn: Turn, *, round_id: int, seen: int) -> MicroBatchSource | None:
        """Return the masked micro-batches of a turn; they continue the client's blocks.

        Messages have the round's number of masked tokens from now on.
        """
        self._mask_as(self.config.in_round(round_id))
        return self.training_source(turn.client_id, start=seen)

    def training_source(self, client_id: int, *, start: int) -> MicroBatchSource | None:
        """Return a client's masked micro-batches from block ``start`` on; None on later stages."""
        if not self.reads_text:
            return None
        config = self.config
        size = config.pipeline.micro_batch_size
        reader = MaskedReader(
            self.data,
            client_id,
            split="train",
            seed=config.seed,
            num_masked=self._masking.data.num_masked,
        )

        def source(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
            index = step * config.pipeline.num_micro_batches + micro_batch
            ranks = config.federation.data_parallel_degree
            position = start + (index * ranks + self.comm.data) * size
            return self._feed(reader.batch(position, size))

        return source

    def _feed(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Return the tensors of a micro-batch, as a ``MicroBatchSource`` does."""
        length = self.config.data.padded_length
        if length:
            batch = pad(batch, length=length, pad_id=self.data.pad_id)
        targets = np.stack(MaskedTargets(positions=batch.positions, labels=batch.labels))
        if self.config.data.start_words:
            starts = document_starts(batch.input_ids, sep_id=self.data.sep_id)
            starts = np.stack([starts, np.full_like(starts, IGNORED)])
            targets = np.concatenate([targets, starts], axis=-1)
        return torch.from_numpy(batch.input_ids), torch.from_numpy(targets.astype(np.int32))

    # -- validation --------------------------------------------------------------------------

    def score(self, client_id: int) -> dict[int, tuple[float, int]]:
        """Score a client's held-out text.

        Returns:
            By stage with a head, the summed loss in nats and the number of masked tokens.

        Collective: every process of the replica.
        """
        self._mask_as(self.config.in_last_round)
        num_blocks = self.num_valid_blocks(client_id)
        batches = math.ceil(num_blocks / self.config.pipeline.micro_batch_size)
        source = self._validation_source(client_id) if self.reads_text else None
        num_tokens = num_blocks * self._masking.data.num_masked
        return {
            stage_id: (float(losses.flatten(0, 1)[:num_blocks].double().sum()), num_tokens)
            for stage_id, losses in self.engine.evaluate(batches, source=source).items()
        }

    def num_valid_blocks(self, client_id: int) -> int:
        """Return the number of held-out blocks of a client that are scored."""
        limit = self.config.validation.max_blocks_per_client
        available = self.data.valid[client_id].num_blocks
        return min(available, limit) if limit else available

    def _validation_source(self, client_id: int) -> MicroBatchSource:
        size = self.config.pipeline.micro_batch_size

        def source(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
            first = micro_batch * size
            return self._feed(
                validation_batch(self.data, self._masking, client_id, first=first, count=size)
            )

        return source
