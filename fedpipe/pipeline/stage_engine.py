"""Execute the instructions of a schedule on one stage, through the stage's own DeepSpeed engine.

``StageEngine`` maps every instruction of ``fedpipe.pipeline.schedule`` to a method. DeepSpeed does
precision, accumulation, gradient averaging inside the client, ZeRO-1 and profiling.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor

from fedpipe.config.deepspeed import stage_precision
from fedpipe.config.schema import PipelineConfig
from fedpipe.distributed.device import Readout, ThreadRandom, autocast, synchronize, to_device
from fedpipe.models.stage import StageModule, trainable
from fedpipe.pipeline import schedule as ops
from fedpipe.pipeline.optimizer import clip_
from fedpipe.pipeline.p2p import Link

MicroBatchSource = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, micro_batch) -> inputs of the first stage and targets (P, B, M) int32, on the CPU."""


@dataclass(slots=True)
class Links:
    """The links of a stage; None if there is no neighbour or nothing is sent in that direction."""

    activations_in: Link | None = None
    activations_out: Link | None = None
    gradients_in: Link | None = None
    gradients_out: Link | None = None
    home_out: Link | None = None
    home_grads_in: Link | None = None
    labels_out: list[deque[Tensor]] = field(default_factory=list)
    """Queues of targets from the first stage to the heads in its process; never sent."""
    labels_in: deque[Tensor] | None = None
    """The queue from which a head at the client takes its targets."""

    def all(self) -> list[Link]:
        """Return the links that exist."""
        ends = (
            self.activations_in,
            self.activations_out,
            self.gradients_in,
            self.gradients_out,
            self.home_out,
            self.home_grads_in,
        )
        return [link for link in ends if link is not None]


@dataclass(slots=True)
class MicroBatch:
    """Tensors of a micro-batch that a stage keeps between its instructions."""

    inputs: Tensor | None = None
    targets: Tensor | None = None
    outputs: Tensor | None = None
    output_grad: Tensor | None = None
    head_inputs: Tensor | None = None
    """Hidden states that were sent to a head at the client."""
    head_inputs_grad: Tensor | None = None


@dataclass(slots=True)
class StepResult:
    """Numbers of one local step of one stage."""

    step: int
    loss: float | None
    grad_norm: float
    lr: float
    seconds: float


@dataclass(slots=True)
class _FinishedStep:
    """A finished step whose numbers may still be on the device."""

    step: int
    lr: float
    numbers: Readout
    """Gradient norm, and the loss if the stage has a head."""


@dataclass(slots=True)
class Trace:
    """Events of the instructions of chosen steps: (name, micro_batch, step, start_s, end_s)."""

    steps: range = range(0)
    events: list[tuple[str, int, int, float, float]] = field(default_factory=list)


class StageEngine:
    """One stage of one replica: its DeepSpeed engine, its links, and a method per instruction."""

    def __init__(
        self,
        stage: StageModule,
        optimizer: torch.optim.Optimizer,
        *,
        deepspeed_config: dict[str, Any],
        mpu: Any,
        pipeline: PipelineConfig,
        max_grad_norm: float,
        links: Links,
        device: torch.device,
        before_step: Callable[[], None] | None = None,
    ) -> None:
        """Wrap a stage.

        Args:
            stage: The stage with its first weights, on the CPU.
            optimizer: torch optimizer of the stage's trained parameters.
            deepspeed_config: DeepSpeed's configuration, as ``fedpipe.config.deepspeed`` completes
                it.
            mpu: Tells DeepSpeed the process groups of this stage.
            pipeline: Schedule and micro-batches.
            max_grad_norm: Norm to which this stage's gradients are clipped; 0 means no clipping.
            links: Links to the neighbouring stages.
            device: Device of the stage.
            before_step: Called before the gradients are clipped and applied.

        Collective: every data-parallel rank of the stage constructs it.
        """
        self.stage, self.links, self.device = stage.to(device), links, device
        self.draws = ThreadRandom(device, shared=False)
        """Random numbers of the thread that computes this stage."""
        self.spec = stage.spec
        self._pipeline = pipeline
        self.schedule: str = pipeline.schedule
        """A key of ``SCHEDULES`` for the stage's objective; may be changed between two calls."""
        zero = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        self._max_grad_norm = max_grad_norm
        self._zero = zero > 0
        if self._zero:  # ZeRO shards the gradients, so only DeepSpeed can clip them
            deepspeed_config = deepspeed_config | {"gradient_clipping": max_grad_norm}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.stage,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=mpu,
            dist_init_required=False,
        )
        # Without ZeRO, DeepSpeed averages gradients over the group of the engine that was built
        # last in the process. For a pipeline it uses the group of the engine's own mpu.
        self.engine.pipeline_parallelism = not self._zero
        self.engine.enable_backward_allreduce = mpu.get_data_parallel_world_size() > 1 or self._zero
        self._precision = stage_precision(deepspeed_config)
        self._before_step = before_step
        self._batches: dict[int, MicroBatch] = {}
        self._losses: list[Tensor] = []
        self._source: MicroBatchSource | None = None
        self._step = 0
        self._lr: Callable[[int], float] = float
        self._on_step: Callable[[int, StepResult], None] | None = None
        self.results_behind = 1 if device.type == "cuda" else 0
        """Later steps that may be queued before the host waits for the numbers of a step."""
        self._unreported: deque[_FinishedStep] = deque()
        self._started_at = 0.0
        self._until: Callable[[int], int] = int
        self._announced = 0
        self.trace = Trace()
        self.faults: dict[str, int] = {}
        """First step of the present turn at which "loss" or "grad_norm" was not finite. The caller
        clears it at the start of a turn."""
        self.doing: tuple[int, ops.Instruction] | None = None
        """Step and instruction that are being executed, for the watch; None between two calls."""

    def begin_training(
        self,
        first: int,
        *,
        source: MicroBatchSource | None,
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
        until: Callable[[int], int],
    ) -> None:
        """Prepare for local steps (see ``SplitPipelineEngine.train``)."""
        self._step, self._lr, self._on_step = first, lr, on_step
        self._until, self._announced = until, first
        self._begin(source, train=True)
        self._announce_steps()

    def begin_evaluation(self, num_micro_batches: int, *, source: MicroBatchSource | None) -> None:
        """Prepare to score micro-batches (see ``SplitPipelineEngine.evaluate``)."""
        self._step = 0
        self._begin(source, train=False)
        if self.links.activations_in:
            self.links.activations_in.begin(num_micro_batches)

    def execute(self, instruction: ops.Instruction) -> None:
        """Execute one instruction.

        Any exception of a link or of the model is raised; the links are then unusable.
        """
        self.doing = self._step, instruction
        tracing = self._step in self.trace.steps and torch.is_grad_enabled()
        if not tracing:
            self._INSTRUCTION_MAP[type(instruction)](self, instruction)
            return
        step, started = self._step, time.monotonic()
        self._INSTRUCTION_MAP[type(instruction)](self, instruction)
        synchronize(self.device)
        micro_batch = getattr(instruction, "micro_batch", 0)
        self.trace.events.append(
            (instruction.trace_name, micro_batch, step, started, time.monotonic())
        )

    def drain(self) -> None:
        """Report every step, and wait until all sent messages have been received."""
        if self._unreported:
            self._report(behind=0)
        self.doing = None
        for link in self.links.all():
            link.drain()
        assert not self._batches, "a micro-batch was left in the stage"

    def take_losses(self) -> Tensor | None:
        """Return the losses since the last call, and forget them.

        Returns:
            (num_micro_batches,) float32 in training; in an evaluation the results of the stage's
            ``score``, (num_micro_batches, B, M). None for a stage without a head.
        """
        losses = torch.stack(self._losses) if self._losses else None
        self._losses.clear()
        return losses

    def weights_changed(self) -> None:
        """Tell the optimizer that the caller has written the stage's parameters."""
        if self._zero:
            self.optimizer.refresh_fp32_params()

    @property
    def gradient_bytes(self) -> int:
        """Bytes that this rank has sent to average gradients over the client's data-parallel ranks.

        ``2 (d - 1) / d`` of the float32 gradients per step: a ring all-reduce, or ZeRO-1's
        reduce-scatter and all-gather. They are computed, because DeepSpeed sends them.
        """
        ranks = self.engine.dp_world_size
        numel = sum(p.numel() for p in trainable(self.stage).values())
        return int(self.engine.global_steps) * 2 * (ranks - 1) * numel * 4 // ranks

    def optimizer_state(self) -> dict[str, Any]:
        """Return the moments and counters of this rank's optimizer."""
        return dict(self._torch_optimizer.state_dict())

    def load_optimizer_state(self, state: dict[str, Any] | None) -> None:
        """Load a state from ``optimizer_state``; None resets the optimizer."""
        if state is None:
            self._torch_optimizer.state.clear()
        else:
            self._torch_optimizer.load_state_dict(state)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self._zero else self.optimizer

    def _begin(self, source: MicroBatchSource | None, *, train: bool) -> None:
        self._source = source
        self._started_at = time.monotonic()
        self.engine.train(train)

    def _announce_steps(self) -> None:
        """Allow receives to be posted for the steps that are certain to be run, and no others."""
        end = self._until(self._step)
        messages = (end - self._announced) * self._pipeline.num_micro_batches
        self._announced = end
        links = self.links
        for link in (links.activations_in, links.gradients_in, links.home_grads_in):
            if link is not None:
                link.begin(messages)

    # -- instructions ------------------------------------------------------------------------

    def _load_micro_batch(self, cmd: ops.LoadMicroBatch) -> None:
        assert self._source is not None, "the first stage needs a source"
        inputs, targets = self._source(self._step, cmd.micro_batch)
        batch = MicroBatch(
            inputs=to_device(inputs, self.device),
            targets=to_device(targets, self.device),
        )
        self._batches[cmd.micro_batch] = batch
        for labels in self.links.labels_out:
            labels.append(batch.targets)

    def _recv_activation(self, cmd: ops.RecvActivation) -> None:
        assert self.links.activations_in is not None
        inputs, *rest = self.links.activations_in.recv()
        if self.spec.is_home_head:
            assert self.links.labels_in is not None, "labels do not come with the message"
            rest = [self.links.labels_in.popleft()]
        inputs.requires_grad_(self.spec.sends_grad and torch.is_grad_enabled())
        self._batches[cmd.micro_batch] = MicroBatch(inputs=inputs, targets=rest[0])

    def _forward_pass(self, cmd: ops.ForwardPass) -> None:
        batch = self._batches[cmd.micro_batch]
        assert batch.targets is not None
        with self.draws.drawing():
            batch.outputs = self.engine(batch.inputs, batch.targets[0])
            if self.links.home_out is not None:
                assert batch.outputs is not None
                with autocast(self.device, self._precision):
                    batch.head_inputs = self.stage.head_inputs(batch.outputs, batch.targets[0])

    def _send_activation(self, cmd: ops.SendActivation) -> None:
        batch = self._batches[cmd.micro_batch]
        assert batch.outputs is not None and batch.targets is not None
        assert self.links.activations_out is not None
        targets = batch.targets if self.spec.sends_labels else batch.targets[:1]
        self.links.activations_out.send(batch.outputs.detach(), targets)

    def _send_home(self, cmd: ops.SendHome) -> None:
        batch = self._batches[cmd.micro_batch]
        assert batch.head_inputs is not None and self.links.home_out is not None
        self.links.home_out.send(batch.head_inputs.detach())

    def _local_backward_pass(self, cmd: ops.LocalBackwardPass) -> None:
        batch = self._batches.pop(cmd.micro_batch)
        loss = self._loss(batch)
        self._losses.append(loss.detach())
        self._set_boundary(cmd.micro_batch)
        self.engine.backward(loss)

    def _recv_grad(self, cmd: ops.RecvGrad) -> None:
        assert self.links.gradients_in is not None
        (self._batches[cmd.micro_batch].output_grad,) = self.links.gradients_in.recv()

    def _recv_home_grad(self, cmd: ops.RecvHomeGrad) -> None:
        assert self.links.home_grads_in is not None
        (self._batches[cmd.micro_batch].head_inputs_grad,) = self.links.home_grads_in.recv()

    def _backward_pass(self, cmd: ops.BackwardPass) -> None:
        batch = self._batches[cmd.micro_batch]
        self._set_boundary(cmd.micro_batch)
        if self.spec.has_head:
            loss = self._loss(batch)
            self._losses.append(loss.detach())
            self.engine.backward(loss)
        else:
            # DeepSpeed's backward needs a scalar, and d/dh sum(h * g) = g. The stage that computed
            # the loss has already divided by the number of micro-batches.
            hidden, grad = (
                (batch.head_inputs, batch.head_inputs_grad)
                if self.spec.home_head is not None
                else (batch.outputs, batch.output_grad)
            )
            assert hidden is not None and grad is not None
            self.engine.backward((hidden * grad).sum(), scale_wrt_gas=False)
        batch.outputs = batch.output_grad = batch.head_inputs = batch.head_inputs_grad = None
        if not self.spec.sends_grad:
            del self._batches[cmd.micro_batch]

    def _send_grad(self, cmd: ops.SendGrad) -> None:
        batch = self._batches.pop(cmd.micro_batch)
        assert batch.inputs is not None and self.links.gradients_out is not None
        self.links.gradients_out.send(batch.inputs.grad)

    def _optimizer_step(self, cmd: ops.OptimizerStep) -> None:
        lr = self._lr(self._step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._before_step is not None:
            self._before_step()
        if self._zero:
            self.engine.step()
            norm = torch.as_tensor(self.engine.get_global_grad_norm() or 0.0, device=self.device)
        else:
            norm = clip_(self.stage, max_norm=self._max_grad_norm)
            self.engine.step()
        losses = self.take_losses()
        numbers = (norm,) if losses is None else (norm, losses.mean())
        self._unreported.append(_FinishedStep(self._step, lr, Readout(*numbers)))
        self._step += 1
        self._report(behind=self.results_behind)
        self._announce_steps()

    def _report(self, *, behind: int) -> None:
        """Report the numbers of all finished steps except the latest ``behind``."""
        assert self._on_step is not None
        while len(self._unreported) > behind:
            finished = self._unreported.popleft()
            norm, *loss = finished.numbers.read()
            for what, value in zip(("grad_norm", "loss"), (norm, *loss), strict=False):
                if not math.isfinite(value):
                    self.faults.setdefault(what, finished.step)
            now = time.monotonic()
            seconds, self._started_at = now - self._started_at, now
            self._on_step(
                self.spec.stage_id,
                StepResult(finished.step, loss[0] if loss else None, norm, finished.lr, seconds),
            )

    def _evaluate_loss(self, cmd: ops.EvaluateLoss) -> None:
        batch = self._batches.pop(cmd.micro_batch)
        if self.spec.has_head:
            assert batch.outputs is not None and batch.targets is not None
            with autocast(self.device, self._precision):
                self._losses.append(self.stage.score(batch.outputs, batch.targets))

    _INSTRUCTION_MAP: dict[type[ops.Instruction], Callable[..., None]] = {
        ops.LoadMicroBatch: _load_micro_batch,
        ops.RecvActivation: _recv_activation,
        ops.ForwardPass: _forward_pass,
        ops.SendActivation: _send_activation,
        ops.LocalBackwardPass: _local_backward_pass,
        ops.SendHome: _send_home,
        ops.RecvGrad: _recv_grad,
        ops.RecvHomeGrad: _recv_home_grad,
        ops.BackwardPass: _backward_pass,
        ops.SendGrad: _send_grad,
        ops.OptimizerStep: _optimizer_step,
        ops.EvaluateLoss: _evaluate_loss,
    }

    # ----------------------------------------------------------------------------------------

    def _loss(self, batch: MicroBatch) -> Tensor:
        assert batch.outputs is not None and batch.targets is not None
        with self.draws.drawing(), autocast(self.device, self._precision):
            return self.stage.loss(batch.outputs, batch.targets)

    def _set_boundary(self, micro_batch: int) -> None:
        last = micro_batch == self._pipeline.num_micro_batches - 1
        self.engine.set_gradient_accumulation_boundary(last)
