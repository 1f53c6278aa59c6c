"""The pipeline engine: one DeepSpeed engine per stage, driven by instruction streams.

``StageEngine`` executes the instructions of ``fedpipe.pipeline.schedule`` for one stage, through
the DeepSpeed engine of that stage (precision, accumulation, gradient averaging inside the client,
ZeRO-1, profiler). ``SplitPipelineEngine`` is the part of a replica's pipeline that lives in this
process: one stage, or all of them as threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor

from fedpipe.config.schema import PipelineConfig
from fedpipe.models.stage import Stage
from fedpipe.pipeline import schedule as ops
from fedpipe.pipeline.optimizer import clip_
from fedpipe.pipeline.p2p import Link, QueueLink

MicroBatchSource = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, micro_batch) -> token ids (B, T) int64 and targets (2, B, M) int32, on the CPU."""


@dataclass(slots=True)
class Links:
    """The ends of a stage's edges; None where there is no neighbour or no backward traffic."""

    activations_in: Link | None = None
    activations_out: Link | None = None
    gradients_in: Link | None = None
    gradients_out: Link | None = None

    def all(self) -> list[Link]:
        """Those that exist."""
        ends = (
            self.activations_in, self.activations_out, self.gradients_in, self.gradients_out,
        )  # fmt: skip
        return [link for link in ends if link is not None]


@dataclass(slots=True)
class MicroBatch:
    """What a stage keeps of a micro-batch between its instructions."""

    inputs: Tensor | None = None
    targets: Tensor | None = None
    outputs: Tensor | None = None
    output_grad: Tensor | None = None


@dataclass(slots=True)
class StepResult:
    """What one local step of one stage was."""

    step: int
    loss: float | None
    grad_norm: float
    lr: float
    seconds: float


@dataclass(slots=True)
class Trace:
    """Events of the instructions of some steps: (name, micro_batch, step, start_s, end_s)."""

    steps: range = range(0)
    events: list[tuple[str, int, int, float, float]] = field(default_factory=list)


class StageEngine:
    """One stage of one replica: DeepSpeed engine, links and the methods behind the instructions."""

    def __init__(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        *,
        deepspeed_config: dict[str, Any],
        mpu: Any,
        pipeline: PipelineConfig,
        max_grad_norm: float,
        links: Links,
        device: torch.device,
    ) -> None:
        """Wrap a stage.

        Args:
            stage: With its first weights, on the CPU.
            optimizer: torch optimizer over the stage's parameters.
            deepspeed_config: What ``fedpipe.config.deepspeed`` made of the JSON.
            mpu: Answers DeepSpeed's questions about this stage's groups.
            pipeline: Schedule and micro-batches.
            max_grad_norm: Clipping, this stage alone; 0 means none.
            links: Ends of its edges.
            device: Where it computes.

        Collective: every data-parallel rank of the stage constructs it.
        """
        self.stage, self.links, self.device = stage.to(device), links, device
        self.spec = stage.spec
        self._pipeline = pipeline
        self.schedule: str = pipeline.schedule
        """A name in ``SCHEDULES``; may change between calls, within the stage's objective."""
        zero = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        self._max_grad_norm = max_grad_norm
        self._zero = zero > 0
        if self._zero:  # ZeRO shards gradients over the client's ranks and so must clip itself
            deepspeed_config = deepspeed_config | {"gradient_clipping": max_grad_norm}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.stage,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=mpu,
            dist_init_required=False,
        )
        self.engine.enable_backward_allreduce = mpu.get_data_parallel_world_size() > 1 or self._zero
        self._autocast = deepspeed_config.get("torch_autocast", {})
        self._end_to_end = pipeline.objective == "end_to_end"
        self._batches: dict[int, MicroBatch] = {}
        self._losses: list[Tensor] = []
        self._source: MicroBatchSource | None = None
        self._step = 0
        self._lr = 0.0
        self._grad_norm = 0.0
        self.trace = Trace()

    def run_steps(
        self,
        steps: range,
        *,
        source: MicroBatchSource | None,
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
    ) -> None:
        """Run local steps and drain the links.

        Args:
            steps: Indices of the steps inside the client's turn.
            source: Micro-batches; first stage only.
            lr: Learning rate of a step.
            on_step: Called with the stage and the result after each.

        Raises:
            Whatever a message or the model raises; the links are then unusable.
        """
        self._begin(len(steps) * self._pipeline.num_micro_batches, source, train=True)
        stream = list(
            ops.SCHEDULES[self.schedule](
                self.spec.stage_id,
                num_stages=self.spec.num_stages,
                num_micro_batches=self._pipeline.num_micro_batches,
            )
        )
        for step in steps:
            started = time.monotonic()
            self._step, self._lr = step, lr(step)
            self._execute(stream)
            loss = torch.stack(self._losses).mean().item() if self._losses else None
            self._losses.clear()
            seconds = time.monotonic() - started
            on_step(self.spec.stage_id, StepResult(step, loss, self._grad_norm, self._lr, seconds))
        self._drain()

    def run_evaluation(
        self, num_micro_batches: int, *, source: MicroBatchSource | None
    ) -> Tensor | None:
        """Score micro-batches without training.

        Returns:
            (num_micro_batches, B, M) float32 losses of the masked tokens in nats, on the CPU; None
            for a stage without a head.
        """
        self._begin(num_micro_batches, source, train=False)
        self._step = 0
        with torch.no_grad():
            self._execute(
                ops.evaluation(
                    self.spec.stage_id,
                    num_stages=self.spec.num_stages,
                    num_micro_batches=num_micro_batches,
                )
            )
        self._drain()
        losses = torch.stack(self._losses).cpu() if self._losses else None
        self._losses.clear()
        return losses

    def weights_changed(self) -> None:
        """Tell the optimizer that the stage's parameters were written from outside."""
        if self._zero:
            self.optimizer.refresh_fp32_params()

    @property
    def gradient_bytes(self) -> int:
        """Bytes this rank has sent to average gradients over the client's own ranks.

        ``2 (d - 1) / d`` of the float32 gradients per step: a ring all-reduce, or ZeRO-1's
        reduce-scatter and all-gather. DeepSpeed sends them, so they are computed, not counted.
        """
        ranks = self.engine.dp_world_size
        numel = sum(p.numel() for p in self.stage.parameters())
        return int(self.engine.global_steps) * 2 * (ranks - 1) * numel * 4 // ranks

    def optimizer_state(self) -> dict[str, Any]:
        """Moments and counters of this rank's optimizer."""
        return dict(self._torch_optimizer.state_dict())

    def load_optimizer_state(self, state: dict[str, Any] | None) -> None:
        """Take moments over from ``optimizer_state``; None starts afresh."""
        if state is None:
            self._torch_optimizer.state.clear()
        else:
            self._torch_optimizer.load_state_dict(state)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self._zero else self.optimizer

    def _begin(self, messages: int, source: MicroBatchSource | None, *, train: bool) -> None:
        self._source = source
        self.engine.train(train)
        if self.links.activations_in:
            self.links.activations_in.begin(messages)
        if self.links.gradients_in and train:
            self.links.gradients_in.begin(messages)

    def _drain(self) -> None:
        for link in self.links.all():
            link.drain()
        assert not self._batches, "a micro-batch was left in the stage"

    def _execute(self, stream: Iterable[ops.Instruction]) -> None:
        tracing = self._step in self.trace.steps and torch.is_grad_enabled()
        for instruction in stream:
            started = time.monotonic()
            self._INSTRUCTION_MAP[type(instruction)](self, instruction)
            if tracing:
                if self.device.type == "cuda":  # kernels run on after their launch
                    torch.cuda.synchronize(self.device)
                micro_batch = getattr(instruction, "micro_batch", 0)
                self.trace.events.append(
                    (instruction.trace_name, micro_batch, self._step, started, time.monotonic())
                )

    # -- instructions ------------------------------------------------------------------------

    def _load_micro_batch(self, cmd: ops.LoadMicroBatch) -> None:
        assert self._source is not None, "the first stage needs a source"
        inputs, targets = self._source(self._step, cmd.micro_batch)
        self._batches[cmd.micro_batch] = MicroBatch(
            inputs=inputs.to(self.device, non_blocking=True),
            targets=targets.to(self.device, non_blocking=True),
        )

    def _recv_activation(self, cmd: ops.RecvActivation) -> None:
        assert self.links.activations_in is not None
        inputs, targets = self.links.activations_in.recv()
        inputs.requires_grad_(self._end_to_end and torch.is_grad_enabled())
        self._batches[cmd.micro_batch] = MicroBatch(inputs=inputs, targets=targets)

    def _forward_pass(self, cmd: ops.ForwardPass) -> None:
        batch = self._batches[cmd.micro_batch]
        batch.outputs = self.engine(batch.inputs)

    def _send_activation(self, cmd: ops.SendActivation) -> None:
        batch = self._batches[cmd.micro_batch]
        assert batch.outputs is not None and self.links.activations_out is not None
        self.links.activations_out.send(batch.outputs.detach(), batch.targets)

    def _local_backward_pass(self, cmd: ops.LocalBackwardPass) -> None:
        batch = self._batches.pop(cmd.micro_batch)
        loss = self._loss(batch)
        self._losses.append(loss.detach())
        self._set_boundary(cmd.micro_batch)
        self.engine.backward(loss)

    def _recv_grad(self, cmd: ops.RecvGrad) -> None:
        assert self.links.gradients_in is not None
        (self._batches[cmd.micro_batch].output_grad,) = self.links.gradients_in.recv()

    def _backward_pass(self, cmd: ops.BackwardPass) -> None:
        batch = self._batches[cmd.micro_batch]
        self._set_boundary(cmd.micro_batch)
        if self.spec.is_last:
            loss = self._loss(batch)
            self._losses.append(loss.detach())
            self.engine.backward(loss)
        else:
            assert batch.outputs is not None and batch.output_grad is not None
            # d/dh sum(h * g) = g: DeepSpeed's backward wants a scalar. The gradient was divided by
            # the number of micro-batches on the last stage already.
            scalar = (batch.outputs * batch.output_grad).sum()
            self.engine.backward(scalar, scale_wrt_gas=False)
        batch.outputs = batch.output_grad = None
        if self.spec.is_first:
            del self._batches[cmd.micro_batch]

    def _send_grad(self, cmd: ops.SendGrad) -> None:
        batch = self._batches.pop(cmd.micro_batch)
        assert batch.inputs is not None and self.links.gradients_out is not None
        self.links.gradients_out.send(batch.inputs.grad)

    def _optimizer_step(self, cmd: ops.OptimizerStep) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        if not self._zero:
            self._grad_norm = clip_(self.stage, max_norm=self._max_grad_norm)
        self.engine.step()
        if self._zero:
            self._grad_norm = float(self.engine.get_global_grad_norm() or 0.0)

    def _evaluate_loss(self, cmd: ops.EvaluateLoss) -> None:
        batch = self._batches.pop(cmd.micro_batch)
        if self.spec.has_head:
            self._losses.append(self._loss(batch, reduction="none"))

    _INSTRUCTION_MAP: dict[type[ops.Instruction], Callable[..., None]] = {
        ops.LoadMicroBatch: _load_micro_batch,
        ops.RecvActivation: _recv_activation,
        ops.ForwardPass: _forward_pass,
        ops.SendActivation: _send_activation,
        ops.LocalBackwardPass: _local_backward_pass,
        ops.RecvGrad: _recv_grad,
        ops.BackwardPass: _backward_pass,
        ops.SendGrad: _send_grad,
        ops.OptimizerStep: _optimizer_step,
        ops.EvaluateLoss: _evaluate_loss,
    }

    # ----------------------------------------------------------------------------------------

    def _loss(self, batch: MicroBatch, *, reduction: str = "mean") -> Tensor:
        with self._precision():
            return self.stage.loss(batch.outputs, batch.targets, reduction=reduction)

    def _precision(self) -> Any:
        """The head's precision: DeepSpeed applies autocast around ``forward`` only."""
        if not self._autocast.get("enabled"):
            return nullcontext()
        dtype = getattr(torch, self._autocast.get("dtype", "bfloat16"))
        return torch.autocast(self.device.type, dtype=dtype)

    def _set_boundary(self, micro_batch: int) -> None:
        last = micro_batch == self._pipeline.num_micro_batches - 1
        self.engine.set_gradient_accumulation_boundary(last)


class SplitPipelineEngine:
    """The stages of one replica that live in this process."""

    def __init__(self, stages: list[StageEngine]) -> None:
        """Take one stage, or all stages of a replica to run them as threads."""
        self.stages = stages

    def train(
        self,
        steps: range,
        *,
        source: MicroBatchSource | None,
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
    ) -> None:
        """Run local steps of one client on every stage of this process (see ``run_steps``).

        Collective: every process of the replica, with the same ``steps``.
        """
        self._run(
            lambda s: s.run_steps(
                steps, source=source if s.spec.is_first else None, lr=lr, on_step=on_step
            )
        )

    def evaluate(
        self, num_micro_batches: int, *, source: MicroBatchSource | None
    ) -> dict[int, Tensor]:
        """Score micro-batches (see ``StageEngine.run_evaluation``); stages with a head only.

        Collective: every process of the replica, with the same number.
        """
        losses: dict[int, Tensor] = {}

        def run(stage: StageEngine) -> None:
            first = stage.spec.is_first
            result = stage.run_evaluation(num_micro_batches, source=source if first else None)
            if result is not None:
                losses[stage.spec.stage_id] = result

        self._run(run)
        return losses

    def _run(self, action: Callable[[StageEngine], None]) -> None:
        if len(self.stages) == 1:
            action(self.stages[0])
            return
        failures: list[BaseException] = []

        def guarded(stage: StageEngine) -> None:
            try:
                action(stage)
            except BaseException as failure:
                failures.append(failure)
                for link in (link for s in self.stages for link in s.links.all()):
                    if isinstance(link, QueueLink):
                        link.close()

        threads = [threading.Thread(target=guarded, args=(s,)) for s in self.stages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
