"""A pre-training in plain PyTorch: one process, one loop over clients, ranks, steps and stages.

Model parts, order of the text, learning rate, wire formats and the rules of averaging are the
project's own functions. Everything between them is written down again here: no DeepSpeed, no
process group, link, schedule, thread, synchronizer, aggregator or checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe.config.deepspeed import deepspeed_config, stage_precision
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.data.masking import IGNORED, MaskedReader, document_starts, pad
from fedpipe.distributed.device import autocast
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.sparse_row import SPARSE_BLOCK
from fedpipe.distributed.wire import TensorSpec
from fedpipe.federation.cohort import Turn, client_history, plan_round, steps_per_round
from fedpipe.federation.rules import (
    ServerOptimizer,
    krum_select,
    median,
    squared_distances,
    trimmed_mean,
)
from fedpipe.federation.synchronizer import falsify
from fedpipe.federation.traffic import BLOCK, padded_numel
from fedpipe.models.split import StageRole, model_stages, part_of, placement
from fedpipe.models.stage import Stage, build_stage, trainable
from fedpipe.models.weights import hf_config, stable_seed
from fedpipe.pipeline.messages import WireTensor, edge_messages
from fedpipe.pipeline.optimizer import build_optimizer, learning_rate

CPU = torch.device("cpu")
Step = tuple[int, int, int, int]
"""Round, local step, client, stage."""
Result = dict[Step, tuple[float | None, float]]
"""Loss (None without a head) and norm of the gradients before they are clipped."""


def train_plainly(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Result:
    """Return what every local step of every stage is."""
    return Reference(config, data).run()


@dataclass
class _Worker:
    """A client at a replica."""

    turn: Turn
    stages: list[Stage]
    optimizers: list[torch.optim.Optimizer]
    batch: Callable[[int, int, int], tuple[Tensor, Tensor]]
    """(local step, micro-batch, data rank) -> tokens and targets."""
    rng: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By data rank and place: each process has a generator of its own."""


class _Travel(torch.autograd.Function):
    """An edge: what comes out at its other end, and the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, there: TensorSpec, back: TensorSpec) -> Tensor:
        ctx.back = back
        return there.decode(there.encode(hidden)).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back.decode(ctx.back.encode(grad)).float(), None, None


class Reference:
    """The whole run; ``weights`` are the global ones and may be set between rounds."""

    def __init__(self, config: RunConfig, data: PreparedData) -> None:
        self.config, self.data = config, data
        sizes = {"vocab_size": data.vocab_size, "sequence_length": config.data.num_positions}
        shape = resolve(config.model, **sizes)
        hf = hf_config(shape, pad_id=data.pad_id, cls_id=data.cls_id, sep_id=data.sep_id)
        self.specs = model_stages(config, shape)
        self.stages: list[Stage] = []
        for spec in self.specs:
            stage, _ = build_stage(
                spec,
                hf,
                seed=config.seed,
                sinusoidal_positions=config.model.position_init == "sinusoidal",
                padded_after=config.data.padded_after,
                start_words=config.data.start_words,
                word_embedding=self.stages[0].word_embedding if self.stages else None,
            )
            self.stages.append(stage)
        self.place = {s.stage_id: i for i, p in enumerate(placement(self.specs)) for s in p}
        self.held = [tuple(s.stage_id for s in place) for place in placement(self.specs)]
        self.hidden_size = shape.hidden_size
        self.edges = self._edges(config)
        self.precision = stage_precision(deepspeed_config(config))
        self.blocks = [shard.num_blocks for shard in data.train]
        self.weights = [
            {n: p.detach().clone() for n, p in trainable(s).items()} for s in self.stages
        ]
        """Global ones, by stage; what stays with a client has its first values."""
        flat = [self._flat(i, self.weights[i]) for i in range(len(self.stages))]
        self.servers = [ServerOptimizer(config.federation.server_optimizer, like=f) for f in flat]
        self.owed = [self._nothing_owed(f.numel()) for f in flat]
        self.kept: dict[int, list[dict[str, Tensor]]] = {}
        self.moments: dict[tuple[int, int], Any] = {}
        self.going_on: dict[tuple[int, int], Any] = {}
        self.result: Result = {}

    # -- what is whose -----------------------------------------------------------------------

    def _edges(self, config: RunConfig) -> dict[tuple[int, int], tuple[TensorSpec, TensorSpec]]:
        messages = edge_messages(config, self.specs, hidden_size=self.hidden_size)
        return {
            m.edge[:2]: (_spec(m.forward[0]), _spec((m.backward or m.forward)[0])) for m in messages
        }

    def _is_kept(self, stage: int, name: str) -> bool:
        average = self.config.federation.average
        copied = name in self.stages[stage].copied
        return not copied and not getattr(average, part_of(name, self.specs[stage]))

    def _averaged(self, stage: int) -> list[str]:
        copied = self.stages[stage].copied
        return [n for n in self.weights[stage] if n not in copied and not self._is_kept(stage, n)]

    def _is_server(self, stage: int) -> bool:
        return self.specs[stage].role is StageRole.SERVER

    def _is_shared(self, stage: int) -> bool:
        return self.config.federation.server == "shared" and self._is_server(stage)

    def _is_handed_on(self, stage: int) -> bool:
        return self._is_shared(stage) or self.config.federation.server == "sequential"

    def _goes_on(self, stage: int) -> bool:
        """Its optimizer belongs to the server."""
        return self._is_server(stage) and self._is_handed_on(stage)

    def _flat(self, stage: int, tensors: dict[str, Any]) -> Tensor:
        pieces = [tensors[n].detach().flatten().float() for n in self._averaged(stage)]
        return torch.cat(pieces) if pieces else torch.empty(0)

    # -- rounds ------------------------------------------------------------------------------

    def run(self, rounds: range | None = None) -> Result:
        for round_id in rounds or range(self.config.federation.num_rounds):
            turns = self.turns(round_id)
            self.edges = self._edges(self._masked_in(round_id))
            replicas = self.config.federation.num_replicas
            updates: list[list[Tensor]] = []
            for first in range(0, len(turns), replicas):
                workers = [self._worker(turn, round_id) for turn in turns[first : first + replicas]]
                for step in range(max(worker.turn.num_steps for worker in workers)):
                    self._step(workers, round_id, step)
                updates += [self._end(worker, round_id) for worker in workers]
            for stage in range(len(self.stages)):
                if self._averaged(stage) and not self._is_handed_on(stage):
                    self._average(stage, turns, [update[stage] for update in updates])
        return self.result

    def _masked_in(self, round_id: int) -> RunConfig:
        """The second share of masked tokens holds from the first round that begins after it."""
        data, rounds = self.config.data, self.config.federation.num_rounds
        shares = data.mask_probability
        if isinstance(shares, tuple):
            share = shares[round_id / rounds >= data.mask_switch]
            data = dataclasses.replace(data, mask_probability=share)
        return dataclasses.replace(self.config, data=data)

    def turns(self, round_id: int) -> tuple[Turn, ...]:
        return plan_round(self.config, round_id=round_id, blocks_per_client=self.blocks)

    def _worker(self, turn: Turn, round_id: int) -> _Worker:
        stages = copy.deepcopy(self.stages)
        kept = self.kept.get(turn.client_id)
        optimizers = []
        with torch.no_grad():
            for i, stage in enumerate(stages):
                for name, parameter in trainable(stage).items():
                    own = kept[i] if kept and self._is_kept(i, name) else self.weights[i]
                    parameter.copy_(own[name])
            for decoder in stages[-1].copied.values():
                decoder.copy_(stages[0].word_embedding)
        for i, stage in enumerate(stages):
            optimizer = build_optimizer(stage, self.config.optimizer)
            state = self.moments.get((turn.client_id, i))
            if self._goes_on(i):
                state = self.going_on.get((turn.replica_id, i))
            if state is not None:
                optimizer.load_state_dict(state)
            optimizers.append(optimizer)
        worker = _Worker(turn, stages, optimizers, self._source(turn, round_id))
        for rank in range(self.config.federation.data_parallel_degree):
            for place, held in enumerate(self.held):
                seed = stable_seed(self.config.seed, round_id, turn.client_id, held, rank)
                worker.rng[rank, place] = torch.Generator().manual_seed(seed).get_state()
        return worker

    def _source(self, turn: Turn, round_id: int) -> Callable[[int, int, int], Any]:
        config = self.config
        size, count = config.pipeline.micro_batch_size, config.pipeline.num_micro_batches
        ranks = config.federation.data_parallel_degree
        history = client_history(self.turns, before=round_id, num_clients=len(self.blocks))
        start = history.examples_seen[turn.client_id]
        reader = MaskedReader(
            self.data, turn.client_id, split="train", seed=config.seed,
            num_masked=self._masked_in(round_id).data.num_masked,
        )  # fmt: skip

        def batch(step: int, micro_batch: int, rank: int) -> tuple[Tensor, Tensor]:
            index = step * count + micro_batch
            masked = reader.batch(start + (index * ranks + rank) * size, size)
            if config.data.padded_length:
                masked = pad(masked, length=config.data.padded_length, pad_id=self.data.pad_id)
            targets = torch.stack(
                [torch.from_numpy(masked.positions.copy()), torch.from_numpy(masked.labels)]
            )
            if config.data.attention == "document":
                words = document_starts(masked.input_ids, sep_id=self.data.sep_id)
                starts = torch.from_numpy(words)
                starts = torch.stack([starts, torch.full_like(starts, IGNORED)])
                targets = torch.cat([targets, starts], -1)
            return torch.from_numpy(masked.input_ids), targets.int()

        return batch

    # -- a local step ------------------------------------------------------------------------

    def _step(self, workers: list[_Worker], round_id: int, step: int) -> None:
        workers = [worker for worker in workers if step < worker.turn.num_steps]
        losses = [self._gradients(worker, step) for worker in workers]
        for i in range(len(self.stages)):
            if self._is_shared(i):
                for shared in zip(*(trainable(w.stages[i]).values() for w in workers), strict=True):
                    mean = torch.stack([p.grad for p in shared]).sum(0) / len(workers)
                    for parameter in shared:
                        parameter.grad = mean.clone()
        per_round = steps_per_round(self.config, self.blocks)
        total = per_round * self.config.federation.num_rounds
        lr = learning_rate(self.config.optimizer, round_id * per_round + step, total_steps=total)
        limit = self.config.optimizer.max_grad_norm or float("inf")
        for worker, by_stage in zip(workers, losses, strict=True):
            for i, (stage, optimizer) in enumerate(
                zip(worker.stages, worker.optimizers, strict=True)
            ):
                parameters = trainable(stage)
                if not self._is_shared(i):
                    self._pull(i, parameters)
                norm = nn.utils.clip_grad_norm_(parameters.values(), limit)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
                of_stage = by_stage.get(i)
                loss = sum(of_stage) / len(of_stage) if of_stage else None
                key = round_id, step, worker.turn.client_id, i
                self.result[key] = loss, float(norm)

    def _pull(self, stage: int, parameters: dict[str, nn.Parameter]) -> None:
        mu = self.config.federation.fedprox_mu
        for name in self._averaged(stage) if mu else ():
            change = parameters[name].detach() - self.weights[stage][name]
            parameters[name].grad.add_(change, alpha=mu)  # type: ignore[union-attr]

    def _gradients(self, worker: _Worker, step: int) -> dict[int, list[float]]:
        """Leave the mean gradient of the data ranks; return losses by stage."""
        ranks = self.config.federation.data_parallel_degree
        parameters = [p for stage in worker.stages for p in trainable(stage).values()]
        total: list[Tensor] = []
        losses: dict[int, list[float]] = {}
        for rank in range(ranks):
            for parameter in parameters:
                parameter.grad = None
            for micro_batch in range(self.config.pipeline.num_micro_batches):
                inputs, targets = worker.batch(step, micro_batch, rank)
                for stage, loss in self._through(worker, rank, inputs, targets):
                    (loss / self.config.pipeline.num_micro_batches).backward()
                    losses.setdefault(stage, []).append(float(loss.detach()))
            grads = [p.grad for p in parameters]
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads  # type: ignore[assignment]
        for parameter, grad in zip(parameters, total, strict=True):
            parameter.grad = grad / ranks
        return losses

    def _through(
        self, worker: _Worker, rank: int, inputs: Tensor, targets: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Run a micro-batch through all stages; yield every stage's loss as it is there."""
        end_to_end = self.config.pipeline.objective == "end_to_end"
        hidden = inputs
        for spec in self.specs:
            if spec.is_home_head:
                continue
            stage, place = worker.stages[spec.stage_id], self.place[spec.stage_id]
            torch.set_rng_state(worker.rng[rank, place])
            with autocast(CPU, self.precision):
                output = stage(hidden, targets[0])
                masked = None
                if spec.home_head is not None:
                    masked = stage.head_inputs(output, targets[0])
                loss = stage.loss(output, targets) if spec.has_head else None
            worker.rng[rank, place] = torch.get_rng_state()
            if masked is not None:
                head = worker.stages[spec.home_head]  # type: ignore[index]
                at_home = self._travel(masked, spec.stage_id, spec.home_head)
                with autocast(CPU, self.precision):
                    loss = head.loss(head(at_home, targets[0]), targets)
                yield spec.home_head, loss  # type: ignore[misc]
            elif loss is not None:
                yield spec.stage_id, loss
            if spec.next_stage is not None:
                kept = output if end_to_end else output.detach()
                hidden = self._travel(kept, spec.stage_id, spec.next_stage)

    def _travel(self, hidden: Tensor, source: int, target: int | None) -> Tensor:
        return _Travel.apply(hidden, *self.edges[source, target])  # type: ignore[no-any-return]

    # -- the end of a turn and of a round ------------------------------------------------------

    def _end(self, worker: _Worker, round_id: int) -> list[Tensor]:
        """Put away what is the client's or handed on; return its updates by stage."""
        federation, turn = self.config.federation, worker.turn
        self.kept[turn.client_id] = [
            {n: p.detach().clone() for n, p in trainable(s).items() if self._is_kept(i, n)}
            for i, s in enumerate(worker.stages)
        ]
        updates = []
        for i, stage in enumerate(worker.stages):
            state = copy.deepcopy(worker.optimizers[i].state_dict())
            if self._goes_on(i):
                self.going_on[turn.replica_id, i] = state
            elif federation.optimizer_state == "keep":
                self.moments[turn.client_id, i] = state
            parameters: dict[str, Any] = trainable(stage)
            if self._is_handed_on(i):
                for name in self._averaged(i):
                    self.weights[i][name] = parameters[name].detach().clone()
            update, attack = self._flat(i, parameters), federation.attack
            if attack.kind != "none" and turn.client_id < attack.num_attackers:
                start = self._flat(i, self.weights[i])
                seed = stable_seed(self.config.seed, "attack", round_id, turn.client_id, i)
                update = falsify(update - start, attack, seed=seed) + start
            updates.append(update)
        return updates

    def _average(self, stage: int, turns: tuple[Turn, ...], updates: list[Tensor]) -> None:
        federation = self.config.federation
        rule, byzantine = federation.aggregation.rule, federation.aggregation.num_byzantine
        weights = self._flat(stage, self.weights[stage])
        rows = torch.stack(updates)
        if rule == "median":
            aggregate = median(rows)
        elif rule == "trimmed_mean":
            aggregate = trimmed_mean(rows, num_byzantine=byzantine)
        elif rule == "krum":
            chosen = krum_select(squared_distances(rows), num_byzantine=byzantine)
            aggregate = rows[chosen].mean(0)
        elif federation.wire != "fp32" and federation.num_replicas > 1:
            aggregate = self._compressed_mean(stage, turns, updates, weights)
        else:
            aggregate = sum(turn.weight * row for turn, row in zip(turns, rows, strict=True))  # type: ignore[assignment]
        self.servers[stage].step_(weights, aggregate)
        for name, part in zip(
            self._averaged(stage),
            weights.split([self.weights[stage][n].numel() for n in self._averaged(stage)]),
            strict=True,
        ):
            self.weights[stage][name] = part.view_as(self.weights[stage][name]).clone()

    def _nothing_owed(self, numel: int) -> tuple[Tensor, Tensor]:
        federation = self.config.federation
        size = padded_numel(numel, federation=federation)
        return torch.zeros(federation.num_replicas, size), torch.zeros(size)

    def _compressed_mean(
        self, stage: int, turns: tuple[Turn, ...], updates: list[Tensor], start: Tensor
    ) -> Tensor:
        """Mean of what the replicas send; what rounding leaves is owed, at both ends."""
        changes, total = self.owed[stage]
        for turn, update in zip(turns, updates, strict=True):
            changes[turn.replica_id, : len(start)] += turn.weight * (update - start)
        if self.config.federation.wire == "sparse":  # the sum is not rounded
            return sum(self._rounded(change) for change in changes)[: len(start)] + start  # type: ignore[index]
        for change in changes:
            total += self._rounded(change)
        return self._rounded(total)[: len(start)] + start

    def _rounded(self, owed: Tensor) -> Tensor:
        """Return what a format makes of a vector, and keep the rest in it."""
        wire, density = self.config.federation.wire, self.config.federation.density
        blocks = owed.view(-1, SPARSE_BLOCK if wire == "sparse" else BLOCK)
        spec = TensorSpec(tuple(blocks.shape), torch.float32, wire=wire, density=density)
        rounded = spec.decode(spec.encode(blocks.clone())).clone()
        blocks -= rounded
        return rounded.flatten()


def _spec(tensor: WireTensor) -> TensorSpec:
    return TensorSpec(tensor.shape, getattr(torch, tensor.dtype), tensor.wire)
