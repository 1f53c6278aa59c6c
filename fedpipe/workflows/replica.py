"""One replica of the pipeline as one process sees it: build it, hand it a client, score it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpipe.checkpoint import CLIENTS, Checkpoint, CheckpointWriter, client_file
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import BlockReader, PreparedData, Shard
from fedpipe.data.masking import MaskedBatch, mask_blocks, mask_rng, pad
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.wire import TensorSpec
from fedpipe.federation.cohort import Turn
from fedpipe.federation.synchronizer import Synchronizer, restore
from fedpipe.models.families import hf_config, stable_seed
from fedpipe.models.split import StageSpec, edges, stage_specs
from fedpipe.models.stage import build_stage
from fedpipe.pipeline.engine import SplitPipelineEngine
from fedpipe.pipeline.messages import WireTensor, edge_messages
from fedpipe.pipeline.optimizer import build_optimizer
from fedpipe.pipeline.p2p import DistLink, Link, QueueLink
from fedpipe.pipeline.stage_engine import Links, MicroBatchSource, StageEngine


class Replica:
    """This process' stages, their synchronizers and the data that the first stage reads."""

    def __init__(
        self, config: RunConfig, data: PreparedData, *, comm: Comm, run_dir: Path | None = None
    ) -> None:
        """Build the stages with their first weights and connect them.

        Args:
            config: The run.
            data: Prepared text; opened by the first stage only.
            comm: This process' groups.
            run_dir: Where clients keep what is not averaged; None for a run without clients.

        Collective: every rank.
        """
        self.config, self.data, self.comm, self._run_dir = config, data, comm, run_dir
        shape = resolve(
            config.model,
            vocab_size=data.vocab_size,
            sequence_length=config.data.num_positions,
        )
        self.hf_config = hf_config(
            shape, pad_id=data.pad_id, cls_id=data.cls_id, sep_id=data.sep_id,
            path=config.model.path,
        )  # fmt: skip
        self.specs = stage_specs(config.pipeline, num_hidden_layers=shape.num_hidden_layers)
        self._deepspeed = deepspeed_config(config)
        self.missing: list[str] = []
        # Of several objectives measured side by side, one may have fewer heads at home.
        self._stage_ids = [s for s in comm.stages if s < len(self.specs)]
        self.synchronizers: dict[int, Synchronizer] = {}
        links = self._build_links()
        self.stages = [self._build_stage(self.specs[s], links[s]) for s in self._stage_ids]
        self.engine = SplitPipelineEngine(self.stages, config.pipeline)

    @property
    def reads_text(self) -> bool:
        """This process holds the first stage."""
        return 0 in self.comm.stages

    def _build_stage(self, spec: StageSpec, links: Links) -> StageEngine:
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
        )
        self.missing += missing
        synchronizer = Synchronizer.of_stage(stage.to(self.comm.device), config, comm=self.comm)
        self.synchronizers[spec.stage_id] = synchronizer
        return StageEngine(
            stage,
            build_optimizer(stage, config.optimizer),
            deepspeed_config=self._deepspeed,
            mpu=self.comm.stage_mpu(spec.stage_id),
            pipeline=config.pipeline,
            max_grad_norm=config.optimizer.max_grad_norm,
            links=links,
            device=self.comm.device,
            before_step=synchronizer.before_step,
        )

    def _build_links(self) -> dict[int, Links]:
        """One link per edge and direction that has an end in this process."""
        links = {stage: Links() for stage in self._stage_ids}
        size = self.hf_config.hidden_size
        for messages in edge_messages(self.config, self.specs, hidden_size=size):
            source, target, _ = messages.edge
            if not {source, target} & set(links):
                continue
            forward = self._link(source, target, messages.forward)
            back = messages.backward
            backward = self._link(target, source, back) if back else None
            if source in links and target == self.specs[source].home_head:
                links[source].home_out, links[source].home_grads_in = forward, backward
            elif source in links:
                links[source].activations_out, links[source].gradients_in = forward, backward
            if target in links:
                links[target].activations_in, links[target].gradients_out = forward, backward
        if self.reads_text:
            for head in (spec.stage_id for spec in self.specs if spec.is_home_head):
                labels: deque[Tensor] = deque()
                links[head].labels_in = labels
                links[0].labels_out.append(labels)
        return links

    def _link(self, source: int, target: int, message: tuple[WireTensor, ...]) -> Link:
        specs = tuple(TensorSpec(t.shape, getattr(torch, t.dtype), t.wire) for t in message)
        window = self.config.pipeline.in_flight
        if self.comm.grid.colocate:
            return QueueLink(specs, window=window)
        channel = self.comm.channel(source, target)
        return DistLink(channel, specs, window=window, device=self.comm.device)

    def sent_over_edges(self) -> dict[str, int]:
        """Bytes and messages that this process has sent, by direction and index of the edge."""
        sent = {}
        for index, (source, target, _) in enumerate(edges(self.specs)):
            for engine in self.stages:
                links, stage_id = engine.links, engine.spec.stage_id
                link = None
                if stage_id == source:
                    home = target == engine.spec.home_head
                    direction, link = "forward", links.home_out if home else links.activations_out
                elif stage_id == target:
                    direction, link = "backward", links.gradients_out
                if link is not None:
                    sent[f"{direction}/bytes/{index}"] = link.sent_bytes
                    sent[f"{direction}/messages/{index}"] = link.sent_messages
        return sent

    # -- training ----------------------------------------------------------------------------

    def begin_turn(self, turn: Turn, *, round_id: int, last_round: int | None) -> None:
        """Become a client: global weights, the client's kept parts, optimizer state and seed.

        Args:
            turn: Whose.
            round_id: Of the round.
            last_round: The round in which the client trained last; None at its first.
        """
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            state = self._client_state(turn.client_id, stage_id, last_round)
            synchronizer.begin_turn(state.get("kept"))
            engine.weights_changed()
            if not synchronizer.optimizer_goes_on:
                engine.load_optimizer_state(state.get("optimizer"))
        # Dropout; nothing else draws from torch's generator.
        stages = tuple(self._stage_ids)
        torch.manual_seed(
            stable_seed(self.config.seed, round_id, turn.client_id, stages, self.comm.data)
        )

    def end_turn(self, turn: Turn, *, round_id: int, writer: CheckpointWriter) -> None:
        """Take the client's weights into the round and put away what stays with the client."""
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            synchronizer.end_turn(turn.client_id, weight=turn.weight, round_id=round_id)
            if not self._keeps_state(stage_id):
                continue
            state: dict[str, Any] = {"kept": synchronizer.kept_state()}
            if self._keeps_optimizer(stage_id):
                state["optimizer"] = engine.optimizer_state()
            name = client_file(turn.client_id, stage_id, self.comm.data, round_id=round_id)
            writer.save_client(name, partial(torch.save, state))

    def _client_state(
        self, client_id: int, stage_id: int, last_round: int | None
    ) -> dict[str, Any]:
        if last_round is None or not self._keeps_state(stage_id):
            return {}
        assert self._run_dir is not None, "a run with kept state has a directory"
        name = client_file(client_id, stage_id, self.comm.data, round_id=last_round)
        path = self._run_dir / CLIENTS / name
        return dict(torch.load(path, map_location=self.comm.device, weights_only=True))

    def _keeps_state(self, stage_id: int) -> bool:
        """Whether a client has a file of its own for a stage."""
        return self.synchronizers[stage_id].keeps_parts or self._keeps_optimizer(stage_id)

    def _keeps_optimizer(self, stage_id: int) -> bool:
        goes_on = self.synchronizers[stage_id].optimizer_goes_on
        return self.config.federation.optimizer_state == "keep" and not goes_on

    def training_source(self, client_id: int, *, start: int) -> MicroBatchSource | None:
        """Masked micro-batches of a client from block ``start`` of its stream; first stage only."""
        if not self.reads_text:
            return None
        config = self.config
        size = config.pipeline.micro_batch_size
        reader = BlockReader(self.data.train[client_id], seed=config.seed)

        def source(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
            index = step * config.pipeline.num_micro_batches + micro_batch
            ranks = config.federation.data_parallel_degree
            position = start + (index * ranks + self.comm.data) * size
            rng = mask_rng(config.seed, client_id=client_id, position=position, split="train")
            return self._feed(self._mask(reader.batch(position, size), rng))

        return source

    def _mask(self, blocks: np.ndarray, rng: np.random.Generator) -> MaskedBatch:
        return mask_blocks(
            blocks,
            rng=rng,
            num_masked=self.config.data.num_masked,
            mask_id=self.data.mask_id,
            special_ids=self.data.special_ids,
            vocab_size=self.data.vocab_size,
        )

    def _feed(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """What a ``MicroBatchSource`` returns."""
        length = self.config.data.padded_length
        if length:
            batch = pad(batch, length=length, pad_id=self.data.pad_id)
        targets = np.stack([batch.positions, batch.labels]).astype(np.int32)
        return torch.from_numpy(batch.input_ids), torch.from_numpy(targets)

    # -- validation --------------------------------------------------------------------------

    def evaluate(
        self, client_ids: Sequence[int], *, last_rounds: Sequence[int | None]
    ) -> dict[int, dict[int, tuple[float, int]]]:
        """Score the global weights on held-out text of some clients, with their kept parts.

        Args:
            client_ids: Clients that this replica scores.
            last_rounds: By client id, the round in which it trained last.

        Returns:
            stage -> client -> (summed loss in nats, masked tokens); stages with a head only. Data
            index 0 computes, the others return nothing.

        Collective: every process of the replica.
        """
        scores: dict[int, dict[int, tuple[float, int]]] = {s.spec.stage_id: {} for s in self.stages}
        if self.comm.data > 0:
            return {}
        for client_id in client_ids:
            for stage_id, synchronizer in self.synchronizers.items():
                state = self._client_state(client_id, stage_id, last_rounds[client_id])
                synchronizer.begin_turn(state.get("kept"))
            num_blocks = self.num_valid_blocks(client_id)
            batches = math.ceil(num_blocks / self.config.pipeline.micro_batch_size)
            source = self._validation_source(client_id) if self.reads_text else None
            for stage_id, losses in self.engine.evaluate(batches, source=source).items():
                scored = losses.flatten(0, 1)[:num_blocks].double()
                num_tokens = num_blocks * self.config.data.num_masked
                scores[stage_id][client_id] = (float(scored.sum()), num_tokens)
        return scores

    def num_valid_blocks(self, client_id: int) -> int:
        """Held-out blocks of a client that are scored."""
        limit = self.config.validation.max_blocks_per_client
        available = self.data.valid[client_id].num_blocks
        return min(available, limit) if limit else available

    def _validation_source(self, client_id: int) -> MicroBatchSource:
        size = self.config.pipeline.micro_batch_size

        def source(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
            first = micro_batch * size
            return self._feed(
                validation_batch(self.data, self.config, client_id, first=first, count=size)
            )

        return source

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint_files(
        self, *, sent: Mapping[str, int] | None
    ) -> dict[str, Callable[[Path], None]]:
        """What this rank writes: what all replicas share once per stage, then its own state.

        Args:
            sent: In mid-round, the ledger of the round so far; None between rounds.
        """
        files: dict[str, Callable[[Path], None]] = {}
        for engine in self.stages if self.comm.replica == 0 else ():
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            if self.comm.data == 0:
                weights = {n: t.contiguous() for n, t in synchronizer.global_state().items()}
                files[stage_file(stage_id)] = partial(save_file, weights)
            server: dict[str, Any] = {"moments": dict(synchronizer.moments)}
            if synchronizer.optimizer_goes_on and sent is None:
                server["optimizer"] = engine.optimizer_state()
            if any(server.values()):
                files[server_file(stage_id, self.comm.data)] = partial(torch.save, server)
        residuals = {s: dict(sync.residuals) for s, sync in self.synchronizers.items()}
        own: dict[str, Any] = {"residuals": residuals}
        if sent is not None:
            own |= {"sent": dict(sent), "rng": _rng_state(self.comm.device)}
            own["stages"] = {
                engine.spec.stage_id: {
                    "parameters": dict(engine.stage.named_parameters()),
                    "optimizer": engine.optimizer_state(),
                    "partial": dict(self.synchronizers[engine.spec.stage_id].partial),
                }
                for engine in self.stages
            }
        if sent is not None or any(residuals.values()):
            files[self._own_file] = partial(torch.save, own)
        return files

    @property
    def _own_file(self) -> str:
        return own_file(self.comm.stages[0], self.comm.replica, self.comm.data)

    def load_checkpoint(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Take over what all replicas share and this rank's own state, the unfinished round's too.

        Returns:
            The ledger of the unfinished round; empty between rounds.
        """
        device = self.comm.device
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            synchronizer = self.synchronizers[stage_id]
            weights = load_file(checkpoint.path / stage_file(stage_id), device=str(device))
            synchronizer.load_global_state(weights)
            path = checkpoint.path / server_file(stage_id, self.comm.data)
            if path.is_file():  # the manifest lists it where this configuration needs it
                server = torch.load(path, map_location=device, weights_only=True)
                restore(synchronizer.moments, server["moments"])
                if "optimizer" in server:
                    engine.load_optimizer_state(server["optimizer"])
        path = checkpoint.path / self._own_file
        if not path.is_file():
            return {}
        own = torch.load(path, map_location=device, weights_only=True)
        for stage_id, synchronizer in self.synchronizers.items():
            restore(synchronizer.residuals, own["residuals"][stage_id])
        return self._load_unfinished(own) if checkpoint.position.step else {}

    def _load_unfinished(self, own: Mapping[str, Any]) -> dict[str, int]:
        """Continue in mid-round; return the ledger of the round so far."""
        for engine in self.stages:
            stage_id = engine.spec.stage_id
            state = own["stages"][stage_id]
            with torch.no_grad():
                restore(dict(engine.stage.named_parameters()), state["parameters"])
            engine.weights_changed()
            engine.load_optimizer_state(state["optimizer"])
            restore(self.synchronizers[stage_id].partial, state["partial"])
        _set_rng_state(own["rng"], self.comm.device)
        return dict(own["sent"])


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def stage_file(stage_id: int) -> str:
    """File of a stage's global weights in a checkpoint."""
    return f"stage_{stage_id:02d}.safetensors"


def server_file(stage_id: int, data: int) -> str:
    """File of what a stage carries from round to round beside its weights, in a checkpoint."""
    return f"server_{stage_id:02d}_data_{data:02d}.pt"


def own_file(stage_id: int, replica: int, data: int) -> str:
    """File of a process' own state in a checkpoint, by the first stage that it holds."""
    return f"replica_{replica:04d}_stage_{stage_id:02d}_data_{data:02d}.pt"


def validation_batch(
    data: PreparedData, config: RunConfig, client_id: int, *, first: int, count: int
) -> MaskedBatch:
    """Held-out blocks of a client with their fixed masks.

    Each block is masked from its own seed, so the masks depend neither on the batch size nor on the
    round. Blocks beyond the last one repeat earlier ones; they fill the batch and are not scored.

    Args:
        data: Prepared text.
        config: Seed and mask settings.
        client_id: Whose.
        first: Index of the first block.
        count: Blocks.

    Returns:
        The masked blocks.
    """
    shard: Shard = data.valid[client_id]
    blocks = BlockReader(shard, seed=config.seed).batch(first, count)
    rows = [
        mask_blocks(
            blocks[i : i + 1],
            rng=mask_rng(config.seed, client_id=client_id, position=first + i, split="valid"),
            num_masked=config.data.num_masked,
            mask_id=data.mask_id,
            special_ids=data.special_ids,
            vocab_size=data.vocab_size,
        )
        for i in range(count)
    ]
    return MaskedBatch(
        input_ids=np.concatenate([row.input_ids for row in rows]),
        positions=np.concatenate([row.positions for row in rows]),
        labels=np.concatenate([row.labels for row in rows]),
    )
