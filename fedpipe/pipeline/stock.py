"""DeepSpeed's own pipeline over the same stages: the 1F1B baseline of every throughput report.

Each layer of the ``PipelineModule`` is a stage of fedpipe; an unchanged ``PipelineEngine`` runs
them with its own schedule and messages. The settings favour it: the last stage gets its targets
from a prepared data iterator, while fedpipe's engine sends them with the activations, and there is
no gradient all-reduce over a single data-parallel rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import schedule as stock_ops
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedpipe.config.deepspeed import stage_precision
from fedpipe.config.schema import RunConfig
from fedpipe.distributed.device import autocast, synchronize
from fedpipe.models.split import StageSpec
from fedpipe.models.stage import Stage, build_stage
from fedpipe.pipeline.optimizer import build_optimizer
from fedpipe.pipeline.stage_engine import MicroBatchSource, StepResult, Trace

_TRACE_NAMES = {
    stock_ops.LoadMicroBatch: "load",
    stock_ops.RecvActivation: "recv_activation",
    stock_ops.ForwardPass: "forward",
    stock_ops.SendActivation: "send_activation",
    stock_ops.RecvGrad: "recv_grad",
    stock_ops.BackwardPass: "backward",
    stock_ops.SendGrad: "send_grad",
    stock_ops.OptimizerStep: "optimizer_step",
}
"""Names of DeepSpeed's instructions, as in ``fedpipe.pipeline.schedule``."""


class StockStage(nn.Module):
    """A stage as a layer of a ``PipelineModule``, with its first weights."""

    def __init__(self, spec: StageSpec, hf_config: PretrainedConfig, config: RunConfig) -> None:
        """Build the stage as ``PretrainingReplica`` does, from the same seed."""
        super().__init__()
        self.stage, _ = build_stage(
            spec,
            hf_config,
            seed=config.seed,
            path=config.model.path,
            activation_checkpointing=config.pipeline.activation_checkpointing,
            sinusoidal_positions=config.model.position_init == "sinusoidal",
            compiled=config.pipeline.compile,
            padded_after=config.data.padded_after,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the stage's part of the encoder."""
        return self.stage(inputs)


class StockPipeline:
    """One stage of DeepSpeed's pipeline, with the members of ``StageEngine`` that are measured."""

    def __init__(
        self,
        specs: Sequence[StageSpec],
        *,
        hf_config: PretrainedConfig,
        config: RunConfig,
        deepspeed_config: dict[str, Any],
        stage_id: int,
        device: torch.device,
    ) -> None:
        """Build the module and its engine.

        Args:
            specs: Stages of the ``end_to_end`` objective, one per process.
            hf_config: Configuration of the whole model.
            config: The run.
            deepspeed_config: As for ``StageEngine``, without clipping.
            stage_id: Stage of this process.
            device: Device of this process.

        Collective: every process of the run; there are as many processes as stages.
        """
        self.spec, self.device, self.trace = specs[stage_id], device, Trace()
        self.num_micro_batches = config.pipeline.num_micro_batches
        self.sent_forward_bytes = self.sent_backward_bytes = 0
        self._precision = stage_precision(deepspeed_config)
        module = PipelineModule(
            [LayerSpec(StockStage, spec, hf_config, config) for spec in specs],
            num_stages=len(specs),
            loss_fn=self._loss,
            partition_method="uniform",
        )
        self.stage: Stage = next(m for m in module.modules() if isinstance(m, Stage))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(self.stage, config.optimizer),
            config=deepspeed_config,
            dist_init_required=False,
        )
        zero = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        self.engine.pipeline_enable_backward_allreduce = zero > 0
        self._step = 0
        self._counts: Counter[str] = Counter()
        self._time_instructions()

    def run_steps(
        self,
        steps: range,
        *,
        source: MicroBatchSource | None,
        targets: Sequence[Tensor],
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
    ) -> None:
        """Run local steps, as ``SplitPipelineEngine.train`` does.

        Args:
            steps: Indices of the steps.
            source: Micro-batches; first stage only.
            targets: Targets of the micro-batches in order; last stage only.
            lr: Learning rate of a step.
            on_step: Called with the stage and the result after each step.

        Collective: every process of the run.
        """
        data = self._batches(steps, source, targets)
        for step in steps:
            started = time.monotonic()
            self._step = step
            self._counts.clear()
            for group in self.optimizer.param_groups:
                group["lr"] = lr(step)
            loss = self.engine.train_batch(data).item()
            seconds = time.monotonic() - started
            on_step(self.spec.stage_id, StepResult(step, loss, 0.0, lr(step), seconds))

    def _batches(
        self, steps: range, source: MicroBatchSource | None, targets: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Yield the engine's data: inputs on the first stage, targets on the last."""
        size = self.num_micro_batches
        for step in steps:
            for micro_batch in range(size):
                if self.spec.is_first:
                    assert source is not None, "the first stage needs a source"
                    yield source(step, micro_batch)
                else:
                    yield None, targets[(step - steps.start) * size + micro_batch]

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.device, self._precision):
            return self.stage.loss(outputs, targets)

    # -- observation -------------------------------------------------------------------------

    def _time_instructions(self) -> None:
        """Wrap the engine's instruction methods with a clock and a byte counter."""
        methods = dict(self.engine._INSTRUCTION_MAP)
        for instruction, name in _TRACE_NAMES.items():
            methods[instruction] = self._timed(methods[instruction], name)
        self.engine._INSTRUCTION_MAP = methods  # set on the instance; the class is unchanged

    def _timed(self, method: Callable[..., None], name: str) -> Callable[..., None]:
        def run(engine: Any, **kwargs: Any) -> None:
            if name.startswith("send"):
                self._count_bytes(name, kwargs["buffer_id"])
            started = time.monotonic()
            MethodType(method, engine)(**kwargs)
            if self._step not in self.trace.steps:
                return
            synchronize(self.device)
            micro_batch = self._counts[name]
            self._counts[name] += 1
            self.trace.events.append((name, micro_batch, self._step, started, time.monotonic()))

        return run

    def _count_bytes(self, name: str, buffer_id: int) -> None:
        buffers = self.engine.pipe_buffers
        if name == "send_activation":
            self.sent_forward_bytes += buffers["outputs"][buffer_id].nbytes
        else:
            self.sent_backward_bytes += buffers["inputs"][buffer_id].grad.nbytes
