"""One worker of a fine-tuning: holds one model, becomes one client after another, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from fedpipe.commands.evaluate.labelled import labelled_batch, task_loss
from fedpipe.commands.finetune.examples import Meaning, TuningData
from fedpipe.commands.finetune.recall import Recall
from fedpipe.commands.finetune.scores import Scores, StageLosses, statistics
from fedpipe.commands.finetune.setup import UNTRAINED, load_model_config, load_tuning_tokenizer
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.encoding import IGNORED, Encoded
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.device import autocast
from fedpipe.federation.lora import ProductAverage
from fedpipe.federation.refusal import Refused, stopped
from fedpipe.federation.synchronizer import Synchronizer, all_finite, restore
from fedpipe.federation.turns import TuningTurn, batches
from fedpipe.models.families import stable_seed
from fedpipe.models.lower import LowerLayers
from fedpipe.models.peft import attach, load_adapter, lora_updates, trainable
from fedpipe.models.tuned import build_model, head_names
from fedpipe.pipeline.optimizer import make_optimizer
from fedpipe.run.checkpoint import CLIENTS, Checkpoint, CheckpointWriter, client_file

WEIGHTS_FILE = "weights.safetensors"
SERVER_FILE = "server.pt"
_KEPT_STAGE = 0


class Tuner:
    """A model, its synchronizer, and the examples of all clients, which lie on the disk's cache."""

    def __init__(
        self, config: FinetuneConfig, data: TuningData, *, comm: Comm, run_dir: Path
    ) -> None:
        """Build the model with its first values, equal in every process.

        Args:
            config: The run.
            data: Examples and their owners.
            comm: Of this process.
            run_dir: Where clients keep what is theirs.
        """
        self.config, self.data, self._comm, self._run_dir = config, data, comm, run_dir
        self.model = build_tuned(config, data.meaning).to(comm.device)
        heads = head_names(self.model)
        self.counts = attach_seeded(self.model, config, data.meaning)
        self.parameters = trainable(self.model)
        kept = set() if config.federation.average.final_head else heads & set(self.parameters)
        self.synchronizer = Synchronizer(
            self.parameters, config.federation, seed=config.seed, comm=comm, kept=kept
        )
        self.products: ProductAverage | None = None
        if config.method.lora_average == "product":
            self.products = ProductAverage(lora_updates(self.model), comm=comm)
        self._lower: LowerLayers | None = None
        if config.method.first_layer:
            self._lower = LowerLayers(self.model, config.method.first_layer)
            self._recall_train = Recall(self._lower, data.train, run_dir)
            self._recall_test = Recall(self._lower, data.test, run_dir)
        self._num_batches, self._computing = 0, False
        self.sent_numel = sum(p.numel() for n, p in self.parameters.items() if n not in kept)
        self.refused: list[Refused] = []
        """Clients of the round under way whose updates this worker has left out."""

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
        """Become a client, train, and leave its update in the round.

        Args:
            turn: Whose, and how long.
            round_id: Of the round.
            last_round: The round from which the client came back last; None at its first.
            learning_rate: Of a local step.
            writer: Takes what stays with the client.

        Returns:
            The loss of every step.
        """
        state = self._client_state(turn.client_id, last_round)
        self.synchronizer.begin_turn(state.get("kept"))
        optimizer = make_optimizer(self.parameters.values(), self.config.optimizer)
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(stable_seed(self.config.seed, "turn", round_id, turn.client_id))
        self.model.train()
        mine = self.data.train_sequences[turn.client_id]
        losses, norms = [], []
        order = batches(
            self.config, turn.client_id, round_id=round_id, size=len(mine), steps=turn.num_steps
        )
        for step, rows in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            loss, norm = self._step(mine[rows], optimizer)
            losses.append(loss)
            norms.append(norm)
        self._computing = False
        numbers = {"loss": torch.stack(losses).tolist(), "grad_norm": torch.stack(norms).tolist()}
        fault = self._first_fault(turn, numbers, round_id=round_id)
        if fault is not None:
            if self.config.federation.on_bad_update == "stop":
                raise stopped(fault, round_id=round_id)
            self.refused.append(fault)
            self.synchronizer.refuse_turn()
            state = self._client_state(turn.client_id, last_round)  # training has written into it
        else:
            self.synchronizer.end_turn(turn.client_id, weight=turn.weight, round_id=round_id)
            if self.products is not None:
                self.products.end_turn(weight=turn.weight)
            state = {"kept": self.synchronizer.kept_state()}
            if self.config.federation.optimizer_state == "keep":
                state["optimizer"] = optimizer.state_dict()
        if self._keeps_state:  # who is refused keeps what it began with
            name = client_file(turn.client_id, _KEPT_STAGE, 0, round_id=round_id)
            writer.save_client(name, partial(torch.save, state))
        return {0: numbers["loss"]}

    def _first_fault(
        self, turn: TuningTurn, numbers: Mapping[str, list[float]], *, round_id: int
    ) -> Refused | None:
        """The first number of a turn that is not finite; None without one."""
        faults = [
            Refused(client=turn.client_id, stage=_KEPT_STAGE, step=step, what=what)
            for what, values in numbers.items()
            for step, value in enumerate(values)
            if not math.isfinite(value)
        ]
        if not self.synchronizer.is_finite(turn.client_id, round_id=round_id):
            last = turn.num_steps - 1
            faults.append(
                Refused(client=turn.client_id, stage=_KEPT_STAGE, step=last, what="weights")
            )
        return min(faults, key=lambda fault: fault.code, default=None)

    def _step(
        self, sequences: NDArray[np.int64], optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor]:
        """Make a local step; return its loss and the norm of its gradients."""
        logits, labels = self._forward(self.data.train, sequences)
        loss = task_loss(logits, labels, kind=self.data.meaning.kind)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.synchronizer.before_step()
        limit = self.config.optimizer.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit, foreach=True)
        optimizer.step()
        return loss.detach(), norm

    @property
    def computes(self) -> str | None:
        """The batch that it computes now, or computed last of a turn or a scoring; None between."""
        return f"batch {self._num_batches}" if self._computing else None

    def _forward(self, split: Encoded, sequences: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        self._num_batches += 1
        self._computing = True
        meaning = self.data.meaning
        device = self._comm.device
        inputs, labels = labelled_batch(
            split, sequences, kind=meaning.kind, pad_id=meaning.pad_id, device=device
        )
        with (
            autocast(device, self.config.model.precision),
            self._lower_layers(split, sequences, inputs),
        ):
            logits: Tensor = self.model(**inputs).logits
        return logits.float(), labels

    def _lower_layers(
        self, split: Encoded, sequences: NDArray[np.int64], inputs: dict[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Spare the model's forward pass what is known of its frozen layers."""
        if self._lower is None:
            return nullcontext()
        recall = self._recall_train if split is self.data.train else self._recall_test
        return self._lower.given(recall.hidden(sequences, inputs))

    @property
    def _keeps_state(self) -> bool:
        keeps_optimizer = self.config.federation.optimizer_state == "keep"
        return self.synchronizer.keeps_parts or keeps_optimizer

    def _client_state(self, client_id: int, last_round: int | None) -> dict[str, Any]:
        if last_round is None or not self._keeps_state:
            return {}
        name = client_file(client_id, _KEPT_STAGE, 0, round_id=last_round)
        path = self._run_dir / CLIENTS / name
        return dict(torch.load(path, map_location=self._comm.device, weights_only=True))

    # -- between rounds ----------------------------------------------------------------------

    def synchronize(
        self, num_clients: int, *, left_out: Collection[int] = (), share: float = 1.0
    ) -> int:
        """Average the round's clients; return the bytes that this rank sent.

        Arguments are those of ``Synchronizer.synchronize``.

        Collective: every rank.
        """
        sent = self.synchronizer.synchronize(num_clients, left_out=left_out, share=share)
        if self.products is not None:
            sent += self.products.synchronize(share=share)
        return sent

    def forget_round(self) -> None:
        """Leave the model as it was, whatever the round's clients have sent."""
        self.synchronizer.forget_round()
        if self.products is not None:
            self.products.forget_round()

    def stages_not_finite(self) -> list[str]:
        """Name the model where it is not finite."""
        finite = self.synchronizer.is_global_finite
        if self.products is not None:
            finite = finite and all_finite(self.products.weights.values())
        return [] if finite else ["the model"]

    def score(self, client_ids: Sequence[int], *, last_rounds: Mapping[int, int]) -> Scores:
        """Score the averaged model on held-out examples of some clients, with what they keep.

        Args:
            client_ids: Whose.
            last_rounds: By client, the round from which it came back last.

        Returns:
            What the task's metric needs to know.
        """
        self.model.eval()
        found = {}
        self.synchronizer.begin_turn(None)
        for client_id in client_ids:
            if self.synchronizer.keeps_parts:
                state = self._client_state(client_id, last_rounds.get(client_id))
                self.synchronizer.begin_turn(state.get("kept"))
            found[client_id] = self._score(self.data.test_sequences[client_id])
        return {0: found}

    @torch.inference_mode()
    def _score(self, sequences: NDArray[np.int64]) -> NDArray[np.float64]:
        meaning, test = self.data.meaning, self.data.test
        order = sequences[np.argsort(test.lengths()[sequences], kind="stable")]
        outputs: dict[int, Any] = {}
        size = self.config.scoring.batch_size
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            logits, labels = self._forward(test, rows)
            for row, value in zip(rows, _predictions(logits, labels, meaning), strict=True):
                outputs[int(row)] = value
        self._computing = False
        return statistics(meaning, test, sequences, outputs)

    def sent_over_edges(self) -> dict[str, int]:
        """Bytes that this process has sent over edges: there are none."""
        return {}

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint_files(self) -> dict[str, Callable[[Path], None]]:
        """What this rank writes: the first one, what all share; each, what it owes."""
        files: dict[str, Callable[[Path], None]] = {}
        if self._comm.is_master():
            weights = dict(self.synchronizer.global_state())
            if self.products is not None:
                weights |= self.products.weights
            files[WEIGHTS_FILE] = partial(
                save_file, {n: t.contiguous().clone() for n, t in weights.items()}
            )
            files[SERVER_FILE] = partial(torch.save, dict(self.synchronizer.moments))
        if self.synchronizer.residuals:
            files[self._own_file] = partial(torch.save, dict(self.synchronizer.residuals))
        return files

    @property
    def _own_file(self) -> str:
        return f"replica_{self._comm.replica:04d}.pt"

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take over what ``checkpoint_files`` wrote."""
        device = self._comm.device
        weights = load_file(checkpoint.path / WEIGHTS_FILE, device=str(device))
        self.synchronizer.load_global_state(weights)
        if self.products is not None:
            self.products.load_weights(weights)
        moments = torch.load(checkpoint.path / SERVER_FILE, map_location=device, weights_only=True)
        restore(self.synchronizer.moments, moments)
        own = checkpoint.path / self._own_file
        if self.synchronizer.residuals and own.is_file():
            residuals = torch.load(own, map_location=device, weights_only=True)
            restore(self.synchronizer.residuals, residuals)


def build_tuned(config: FinetuneConfig, meaning: Meaning) -> Any:
    """Build the model of a run with its head, before an adapter is attached."""
    tokenizer = load_tuning_tokenizer(config)
    torch.manual_seed(stable_seed(config.seed, "head"))
    path = config.model.path
    return build_model(
        load_model_config(config, tokenizer),
        meaning.kind,
        num_labels=meaning.num_outputs,
        labels=meaning.labels,
        path="" if path == UNTRAINED or config.model.random_weights else path,
    )


def attach_seeded(model: Any, config: FinetuneConfig, meaning: Meaning) -> Any:
    """Attach the run's adapter with its first values."""
    torch.manual_seed(stable_seed(config.seed, "adapter"))
    split, causal = config.is_cut, meaning.kind == "causal-lm"
    counts = attach(model, config.method, causal=causal, split=split)
    if config.method.path:
        load_adapter(
            model, Path(config.method.path), config.method,
            kind=meaning.kind, labels=meaning.labels, split=split,
        )  # fmt: skip
    return counts


def _predictions(logits: Tensor, labels: Tensor, meaning: Meaning) -> list[Any]:
    """Per sequence: a number, a class, the tags of its words, or summed loss and tokens."""
    if meaning.kind == "regression":
        return list(logits[:, 0].tolist())
    if meaning.kind == "classification":
        return list(logits.argmax(-1).tolist())
    if meaning.kind == "ner":
        tags, labels = logits.argmax(-1).cpu(), labels.cpu()
        return [row[known != IGNORED].tolist() for row, known in zip(tags, labels, strict=True)]
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return list(zip(losses.sum(1).tolist(), (targets != IGNORED).sum(1).tolist(), strict=True))
