"""The replica of a fine-tuning without a cut: a whole model trains and scores every client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.commands.finetune.hidden_states import HiddenStateCache
from fedpipe.commands.finetune.model import attach_seeded, build_tuned
from fedpipe.commands.finetune.prepared import TuningData
from fedpipe.commands.finetune.turns import batches
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.batches import labelled_batch, predict, task_loss
from fedpipe.data.tasks.encoding import Encoded
from fedpipe.data.tasks.scoring import statistics
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.device import autocast, rng_state, set_rng_state
from fedpipe.federation.cohort import Turn
from fedpipe.federation.lora import ProductSynchronizer
from fedpipe.federation.replica import Computation, Replica
from fedpipe.federation.synchronizer import Synchronizer
from fedpipe.models.lower import LowerLayers
from fedpipe.models.peft import lora_updates, trainable
from fedpipe.models.tuned import head_names
from fedpipe.models.weights import stable_seed
from fedpipe.pipeline.optimizer import make_optimizer
from fedpipe.pipeline.stage_engine import StepResult

WEIGHTS_FILE = "weights.safetensors"


class ModelEngine:
    """A whole model and its optimizer: the engine of a replica that is not cut."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the model, and the optimizer of its trained parameters."""
        self.stage, self.optimizer = model, optimizer
        self.faults: dict[str, int] = {}

    def weights_changed(self) -> None:
        """Do nothing: the optimizer has no copy of the parameters."""

    def optimizer_state(self) -> dict[str, Any]:
        """Return the moments and counters of the optimizer."""
        return dict(self.optimizer.state_dict())

    def load_optimizer_state(self, state: dict[str, Any] | None) -> None:
        """Load moments from ``optimizer_state``; None resets them."""
        if state is None:
            self.optimizer.state.clear()
        else:
            self.optimizer.load_state_dict(state)


class WholeReplica(Replica):
    """A whole model, its synchronizer, and the memory-mapped examples of all clients."""

    whole_model = WEIGHTS_FILE

    def __init__(
        self, config: FinetuneConfig, data: TuningData, *, comm: Comm, run_dir: Path
    ) -> None:
        """Build the model with its first values, equal in every process.

        Args:
            config: The run.
            data: Examples and their owners.
            comm: Process groups of this process.
            run_dir: Directory in which clients keep parts that are not averaged.
        """
        self.config, self.data = config, data
        self.model = build_tuned(config, data.task).to(comm.device)
        heads = head_names(self.model)
        self.counts = attach_seeded(self.model, config, data.task)
        self.parameters = trainable(self.model)
        kept = set() if config.federation.average.final_head else heads & set(self.parameters)
        self.products: ProductSynchronizer | None = None
        if config.method.lora_average == "product":
            self.products = ProductSynchronizer(
                self.parameters,
                config.federation,
                updates=lora_updates(self.model),
                seed=config.seed,
                comm=comm,
                kept=kept,
            )
        self.synchronizer = self.products or Synchronizer(
            self.parameters, config.federation, seed=config.seed, comm=comm, kept=kept
        )
        optimizer = make_optimizer(self.parameters.values(), config.optimizer)
        self.engine = ModelEngine(self.model, optimizer)
        super().__init__(
            {0: self.engine},
            {0: self.synchronizer},
            federation=config.federation,
            seed=config.seed,
            comm=comm,
            run_dir=run_dir,
        )
        self._lower: LowerLayers | None = None
        if config.method.first_layer:
            self._lower = LowerLayers(self.model, config.method.first_layer)
            self._train_cache = HiddenStateCache(self._lower, data.train, run_dir)
            self._test_cache = HiddenStateCache(self._lower, data.test, run_dir)
        self._num_batches, self._computing = 0, False
        self.sent_numel = self.synchronizer.averaged_numel
        """Number of parameters that a client sends."""

    def residual_numel(self, num_clients: int) -> int:
        """Return the number of parameters that a client receives beside those that it sends."""
        return self.products.residual_numel(num_clients) if self.products and num_clients else 0

    # -- training ----------------------------------------------------------------------------

    def train(
        self,
        turn: Turn,
        steps: range,
        *,
        round_id: int,
        seen: int,
        lr: Callable[[int], float],
        on_step: Callable[[int, StepResult], None],
        until: Callable[[int], int],
    ) -> None:
        """See ``Replica.train``. Losses and norms are read from the device after the last step."""
        self.model.train()
        mine = self.data.train_sequences[turn.client_id]
        order = list(
            batches(
                self.config,
                turn.client_id,
                round_id=round_id,
                size=len(mine),
                steps=turn.num_steps,
            )
        )
        losses, norms, ended = [], [], [time.monotonic()]
        for step in takewhile(lambda step: until(step) > step, steps):
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr(step)
            loss, norm = self._step(mine[order[step]])
            losses.append(loss)
            norms.append(norm)
            ended.append(time.monotonic())
        self._computing = False
        if not losses:
            return
        numbers = zip(torch.stack(losses).tolist(), torch.stack(norms).tolist(), strict=True)
        for index, (loss, norm) in enumerate(numbers):
            step = steps[index]
            for what, value in (("grad_norm", norm), ("loss", loss)):
                if not math.isfinite(value):
                    self.engine.faults.setdefault(what, step)
            seconds = ended[index + 1] - ended[index]
            on_step(0, StepResult(step, loss, norm, lr(step), seconds))

    def _step(self, sequences: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Run a local step, and return its loss and the norm of its gradients."""
        optimizer = self.engine.optimizer
        logits, labels = self._forward(self.data.train, sequences)
        loss = task_loss(logits, labels, kind=self.data.task.kind)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.synchronizer.before_step()
        limit = self.config.optimizer.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit, foreach=True)
        optimizer.step()
        return loss.detach(), norm

    def seed_dropout(self, client_id: int, *, round_id: int) -> None:
        """Seed the dropout of a turn."""
        torch.manual_seed(stable_seed(self.seed, "turn", round_id, client_id))

    @property
    def dropout_state(self) -> dict[str, Any]:
        """Return the state of the random generators that dropout draws from."""
        return rng_state(self.comm.device)

    @dropout_state.setter
    def dropout_state(self, state: dict[str, Any]) -> None:
        set_rng_state(state, self.comm.device)

    def computation(self) -> Computation | None:
        """Return the batch of a turn or a scoring that is computed now or was computed last."""
        return Computation(what=f"batch {self._num_batches}") if self._computing else None

    def _forward(self, split: Encoded, sequences: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        self._num_batches += 1
        self._computing = True
        device = self.comm.device
        inputs, labels = labelled_batch(split, sequences, spec=self.data.task, device=device)
        with (
            autocast(device, self.config.model.precision),
            self._lower_layers(split, sequences, inputs),
        ):
            logits: Tensor = self.model(**inputs).logits
        return logits.float(), labels

    def _lower_layers(
        self, split: Encoded, sequences: NDArray[np.int64], inputs: dict[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Feed cached hidden states in instead of running the frozen layers again."""
        if self._lower is None:
            return nullcontext()
        cache = self._train_cache if split is self.data.train else self._test_cache
        return self._lower.given(cache.hidden(sequences, inputs))

    # -- scoring -----------------------------------------------------------------------------

    def score(self, client_id: int) -> dict[int, NDArray[np.float64]]:
        """Return the statistics of the task's metric for a client's held-out examples."""
        self.model.eval()
        sequences = self.data.test_sequences[client_id]
        task, test = self.data.task, self.data.test
        outputs = predict(
            test,
            sequences,
            kind=task.kind,
            batch_size=self.config.scoring.batch_size,
            forward=self._forward,
        )
        self._computing = False
        return {0: statistics(task, test, sequences, outputs)}
