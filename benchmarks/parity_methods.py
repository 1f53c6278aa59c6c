"""The methods of the parity study and the loop that trains one of them, in one process.

Stages, losses, optimizers, clipping, blocks and masks are the product's; a test holds the loop
against the engine. Auxiliary networks that the product does not have are here.
"""

# B = blocks, T = tokens per block, M = masked tokens per block, D = hidden size, V = vocabulary

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.data.masking import MaskedReader, Split
from fedpipe.families.family import gather
from fedpipe.models.split import stage_specs
from fedpipe.models.stage import Stage, build_stage
from fedpipe.models.weights import hf_config, initialise, stable_seed
from fedpipe.pipeline.optimizer import build_optimizer, clip_, learning_rate

HELD_OUT_SEED = 20_261_121
"""Of the held-out text's order and masks: the same for every seed of a run."""

Batch = tuple[Tensor, Tensor]


class Auxiliary(nn.Module):
    """The loss of a stage before the last; this one is the head that the stage was built with."""

    def __init__(self, stages: list[Stage], index: int, config: PretrainedConfig) -> None:
        """Look at the stages; a tuple does not register them as parts of this module."""
        super().__init__()
        self.stages, self.index, self.config = tuple(stages), index, config

    def initialise(self, module: nn.Module) -> None:
        """Give a network of this stage's its first weights."""
        family, weight = self.stages[0].family, next(self.stages[0].parameters())
        seed = stable_seed(weight.double().sum().item(), self.index)  # a function of the run's seed
        initialise(module, family=family, config=self.config, seed=seed)

    def forward(self, inputs: Tensor, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """Loss in nats: of the stage's inputs, its outputs, and positions and labels (2, B, M)."""
        return self.stages[self.index].loss(hidden_BTD, targets)

    def score(self, hidden_BMD: Tensor, targets: Tensor) -> Tensor:
        """Loss of the stage's masked-LM head at given rows."""
        stage = self.stages[self.index]
        return stage._score(stage._head, hidden_BMD, targets[1].long(), reduction="mean")

    def after_step(self, step: int) -> None:
        """Do what comes after the optimizers' step."""


class Linear(Auxiliary):
    """The tied decoder and a bias alone."""

    def forward(self, inputs: Tensor, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """See ``Auxiliary``."""
        head = self.stages[self.index]._head[0]
        logits_BMV = head.decoder(gather(hidden_BTD, targets[0]))
        return functional.cross_entropy(logits_BMV.flatten(0, 1), targets[1].long().flatten())


class Layers(Auxiliary):
    """Encoder layers before the head, the last of them at masked positions only."""

    def __init__(
        self, stages: list[Stage], index: int, config: PretrainedConfig, *,
        num_layers: Callable[[int, int], int] = lambda first, later: 1,
        copied: bool = False, synced_every: int = 0,
        momentum: float = 0.0, learnt: bool = True,
    ) -> None:  # fmt: skip
        """Build them.

        Args:
            stages: All.
            index: Whose.
            config: Of the whole model.
            num_layers: From the stage's index and the number of later layers.
            copied: They start as copies of later layers, chosen uniformly in depth.
            synced_every: Steps between copies of the next layers' weights to here; 0 means never.
            momentum: What such a copy keeps of the old weights.
            learnt: This stage's loss trains them too.
        """
        super().__init__(stages, index, config)
        family, end = stages[index].family, stages[index].spec.end_layer
        later = [
            s.get_submodule(f"{family.layers}.{i}")
            for s in stages[index + 1 :]
            for i in range(s.spec.first_layer, s.spec.end_layer)
        ]
        depth = num_layers(index, config.num_hidden_layers - end)
        self.layers = nn.ModuleList(family.make_layer(config, 1) for _ in range(depth))
        self.initialise(self.layers)
        chosen = np.linspace(0, len(later) - 1, depth).round().astype(int) if copied else ()
        for layer, source in zip(self.layers, chosen, strict=False):
            layer.load_state_dict(later[source].state_dict())
        self.requires_grad_(learnt)
        self._run_at = family.run_layer_at
        self._later, self._synced_every, self._momentum = later, synced_every, momentum

    def forward(self, inputs: Tensor, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """See ``Auxiliary``."""
        *first, last = self.layers
        for layer in first:
            output = layer(hidden_BTD)
            hidden_BTD = output[0] if isinstance(output, tuple) else output
        return self.score(self._run_at(last, hidden_BTD, targets[0], None), targets)

    def after_step(self, step: int) -> None:
        """Fetch the next layers' weights when it is time to."""
        if self._synced_every and step % self._synced_every == 0:
            with torch.no_grad():
                for mine, theirs in zip(self.layers, self._later, strict=False):
                    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                        a.lerp_(b, 1.0 - (self._momentum if step else 0.0))


class Reconstruct(Auxiliary):
    """InfoPro's term (Wang et al. 2021): a decoder of two layers finds the word embeddings."""

    def __init__(
        self, stages: list[Stage], index: int, config: PretrainedConfig, *, weight: float
    ) -> None:
        """Build the decoder; ``weight`` is the term's."""
        super().__init__(stages, index, config)
        size = config.hidden_size
        self.decoder = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
        self.initialise(self.decoder)
        self._weight = weight

    def forward(self, inputs: Tensor, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """See ``Auxiliary``; later stages find their inputs."""
        wanted = inputs
        if self.index == 0:
            stage = self.stages[0]
            wanted = functional.embedding(inputs, stage.get_parameter(stage.family.word_embeddings))
        wanted = wanted.detach()
        error = functional.mse_loss(self.decoder(hidden_BTD), wanted) / wanted.var()
        return super().forward(inputs, hidden_BTD, targets) + self._weight * error


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a run does differently from ``mlm``, the default."""

    pipeline: dict[str, Any] = field(default_factory=dict)
    """Fields of ``PipelineConfig``."""
    auxiliary: Callable[[list[Stage], int, PretrainedConfig], Auxiliary] = Auxiliary
    lr_scale: tuple[float, float] = (1.0, 1.0)
    """Factors on the client's and on the later stages' learning rate."""
    horizon: float = 1.0
    """Share of the steps at whose end the client's learning rate is 0; the others' is at 1."""
    warmup: float = 0.0
    """Warm-up of the later stages, as a share of the steps; 0 is the configured one."""
    connected_every: int = 0
    """Every so many steps the gradient of the final loss crosses the cuts, and it alone trains."""
    calibrated_every: int = 0
    """Every so many steps the auxiliary net also learns the final loss' gradient at the cut."""
    tied_every: int = 0
    """Every so many steps the final decoder becomes the client's embedding; it learns nothing
    itself."""
    heads_apart: bool = False
    """The final head has first values of its own instead of those of every other head."""
    window: int = -1
    """The model sees so many tokens on both sides of a masked one; -1 is all of the block."""

    @property
    def period(self) -> int:
        """Steps after which the method repeats what it does."""
        return self.connected_every or self.calibrated_every or 1

    @property
    def backward(self) -> str:
        """What travels from later stages to earlier ones."""
        if self.pipeline.get("objective") == "end_to_end":
            return "gradients"
        if self.period > 1:
            return f"gradients, 1 step in {self.period}"
        period = getattr(self.auxiliary, "keywords", {}).get("synced_every", 0)
        return f"weights of layers, 1 step in {period}" if period else "nothing"


class Trainer:
    """All stages of a method in one process, and their optimizers."""

    def __init__(self, config: RunConfig, data: PreparedData, method: Method) -> None:
        """Build the stages with their first weights."""
        pipeline = dataclasses.replace(config.pipeline, **method.pipeline)
        self.config = dataclasses.replace(config, pipeline=pipeline)
        self.data, self.method = data, method
        shape = resolve(
            config.model,
            vocab_size=data.vocab_size,
            sequence_length=config.data.sequence_length,
            pad_id=data.pad_id,
        )
        hf = hf_config(shape, pad_id=data.pad_id, cls_id=data.cls_id, sep_id=data.sep_id)
        sinusoidal = config.model.position_init == "sinusoidal"
        self.stages = [
            build_stage(spec, hf, seed=config.seed, sinusoidal_positions=sinusoidal)[0]
            for spec in stage_specs(pipeline, num_hidden_layers=shape.num_hidden_layers)
        ]
        self.end_to_end = pipeline.objective == "end_to_end"
        heads = [] if self.end_to_end else self.stages[:-1]
        self.auxiliaries = [method.auxiliary(self.stages, i, hf) for i, _ in enumerate(heads)]
        if method.tied_every:
            self._tie()
        if method.heads_apart:
            self._part_heads()
        self.parts = [
            nn.ModuleList([stage, *self.auxiliaries[i : i + 1]])
            for i, stage in enumerate(self.stages)
        ]
        self.optimizers = [build_optimizer(part, config.optimizer) for part in self.parts]
        self.flops = [0.0] * len(self.stages)
        """By stage, of the first ``Method.period`` steps."""

    def _tie(self) -> None:
        final, first = self.stages[-1]._head[0].decoder, self.stages[0]
        embedding = first.get_parameter(first.family.word_embeddings)
        final.weight.requires_grad_(False).copy_(embedding.detach())

    def _part_heads(self) -> None:
        dense = self.stages[-1]._head[0].dense.weight
        generator = torch.Generator().manual_seed(stable_seed(self.config.seed, "apart"))
        with torch.no_grad():
            dense.normal_(0.0, dense.std().item(), generator=generator)

    def steps(self, total: int) -> Iterator[list[float | None]]:
        """Train; yield every step's losses by stage, None where a stage had none."""
        source = self._source("train", self.config.seed)
        for step in range(total):
            losses: list[list[float]] = [[] for _ in self.stages]
            for micro_batch in range(self.config.pipeline.num_micro_batches):
                self._micro_batch(step, source(step, micro_batch), losses)
            for index, (part, optimizer) in enumerate(
                zip(self.parts, self.optimizers, strict=True)
            ):
                for group in optimizer.param_groups:
                    group["lr"] = self._lr(index, step, total)
                clip_(part, max_norm=self.config.optimizer.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            for auxiliary in self.auxiliaries:
                auxiliary.after_step(step)
            if self.method.tied_every and step % self.method.tied_every == 0:
                self._tie()
            yield [float(np.mean(values)) if values else None for values in losses]

    def _micro_batch(self, step: int, batch: Batch, losses: list[list[float]]) -> None:
        hidden, targets = batch
        method = self.method
        connected = self.end_to_end or _due(method.connected_every, step)
        calibrates = _due(method.calibrated_every, step)
        cuts: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            with self._counted(index, step):
                inputs, hidden = hidden, stage(hidden)
                if stage.spec.is_last:
                    loss = stage.loss(hidden, targets)
                elif connected:
                    continue
                else:
                    loss = self.auxiliaries[index](inputs, hidden, targets)
                losses[index].append(loss.item())
                (loss / self.config.pipeline.num_micro_batches).backward()
            hidden = hidden.detach().requires_grad_(calibrates)
            cuts.append(hidden)
        if calibrates:
            self._calibrate(batch[0], cuts[:-1], targets)

    def _calibrate(self, inputs: Tensor, cuts: list[Tensor], targets: Tensor) -> None:
        """FSL-SAGE: an auxiliary net's gradient at the cut shall be the later stages'."""
        for auxiliary, cut in zip(self.auxiliaries, cuts, strict=True):
            wanted, learners = cut.grad, [p for p in auxiliary.parameters() if p.requires_grad]
            assert wanted is not None
            with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
                loss = auxiliary(inputs, cut, targets)
                (got,) = torch.autograd.grad(loss, cut, create_graph=True)
                error = (got - wanted).square().sum() / wanted.square().sum()
                grads = torch.autograd.grad(error, learners, allow_unused=True)
            for parameter, grad in zip(learners, grads, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def _lr(self, index: int, step: int, total: int) -> float:
        method, config = self.method, self.config.optimizer
        if index == 0:
            return method.lr_scale[0] * learning_rate(
                config, step, total_steps=round(method.horizon * total)
            )
        config = dataclasses.replace(config, warmup_ratio=method.warmup or config.warmup_ratio)
        return method.lr_scale[1] * learning_rate(config, step, total_steps=total)

    def _counted(self, index: int, step: int) -> Any:
        return _Count(self.flops, index, enabled=step < self.method.period)

    @torch.no_grad()
    def evaluate(self, num_blocks: int) -> list[float]:
        """Mean held-out loss of every stage's loss that it trains on, the final head's last."""
        size, source = 256, self._source("valid", HELD_OUT_SEED, size=256)
        sums = [0.0] * len(self.stages)
        for index in range(num_blocks // size):
            hidden, targets = source(0, index)
            for i, stage in enumerate(self.stages):
                inputs, hidden = hidden, stage(hidden)
                if stage.spec.is_last:
                    sums[i] += stage.loss(hidden, targets).item()
                elif self.auxiliaries:
                    sums[i] += self.auxiliaries[i](inputs, hidden, targets).item()
        return [value / (num_blocks // size) for value in sums]

    def _source(
        self, split: Split, seed: int, size: int | None = None
    ) -> Callable[[int, int], Batch]:
        """Masked micro-batches as a replica reads them."""
        config, data = self.config, self.data
        count = size or config.pipeline.micro_batch_size
        reader = MaskedReader(data, 0, split=split, seed=seed, num_masked=config.data.num_masked)

        def source(step: int, micro_batch: int) -> Batch:
            index = step * config.pipeline.num_micro_batches + micro_batch
            masked = reader.batch(index * count, count)
            targets = np.stack([masked.positions, masked.labels]).astype(np.int32)
            ids, targets = torch.from_numpy(masked.input_ids), torch.from_numpy(targets)
            return _windows(ids, targets, self.method.window)

        return source


class _Count:
    """Add the FLOPs of a block to a stage's."""

    def __init__(self, flops: list[float], index: int, *, enabled: bool) -> None:
        self._flops, self._index = flops, index
        self._counter = FlopCounterMode(display=False) if enabled else None

    def __enter__(self) -> None:
        if self._counter:
            self._counter.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._counter:
            self._counter.__exit__(*error)
            self._flops[self._index] += self._counter.get_total_flops()


def _due(period: int, step: int) -> bool:
    return period > 0 and step % period == period - 1


def _windows(ids_BT: Tensor, targets: Tensor, reach: int) -> Batch:
    """Cut out every masked token with ``reach`` tokens on both sides; -1 leaves whole blocks."""
    if reach < 0:
        return ids_BT, targets
    positions_BM, labels_BM = targets
    around = positions_BM.long().unsqueeze(-1) + torch.arange(-reach, reach + 1)
    rows = torch.arange(len(ids_BT)).view(-1, 1, 1)
    windows = ids_BT[rows, around.clamp(0, ids_BT.shape[1] - 1)].flatten(0, 1)
    labels = labels_BM.reshape(-1, 1)
    return windows, torch.stack([torch.full_like(labels, reach), labels])


def run(
    config: RunConfig, data: PreparedData, method: Method, *, num_steps: int, num_points: int = 8
) -> dict[str, Any]:
    """Train and score one run.

    Returns:
        curve: [tokens, held-out loss by stage], the last on four times as many blocks; flops: by
        stage and token; seconds.
    """
    started = time.process_time()
    trainer = Trainer(config, data, method)
    tokens = config.blocks_per_step * config.data.sequence_length
    curve: list[tuple[int, list[float]]] = []
    points = {round(num_steps * (i + 1) / num_points) for i in range(num_points)}
    for step, _ in enumerate(trainer.steps(num_steps), 1):
        if step in points:
            num_blocks = config.validation.max_blocks_per_client * (4 if step == num_steps else 1)
            curve.append((step * tokens, trainer.evaluate(num_blocks)))
    flops = [f / (method.period * tokens) for f in trainer.flops]
    return {"curve": curve, "flops": flops, "cpu_s": time.process_time() - started}
