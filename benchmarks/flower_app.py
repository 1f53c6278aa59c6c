"""Flower's side of flower.py: the clients and the server of one run, in Flower's simulation.

    python benchmarks/flower_app.py RUN_DIR CORES kept|built RESULT.json

RUN_DIR is a directory of `fedpipe finetune`: its configuration, its tokenised examples and their
owners are read. Model, adapter, first weights, batches, dropout and loss are fedpipe's own
functions with the same seeds; what is sent, scheduled and averaged is Flower's. With ``built`` a
client builds its model at every message, as Flower's Hugging Face example does; with ``kept`` a
process builds it once, which is as good as Flower's interface allows. Examples are always kept.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from fedpipe.commands.finetune.model import attach_seeded, build_tuned
from fedpipe.commands.finetune.prepared import DATA, TuningData
from fedpipe.commands.finetune.turns import batches, num_tuning_steps
from fedpipe.config.finetune import FinetuneConfig, load_finetune
from fedpipe.data.tasks.batches import task_loss
from fedpipe.data.tasks.encoding import Encoded, collate
from fedpipe.models.peft import trainable
from fedpipe.models.weights import stable_seed


class Worker(NamedTuple):
    """What a process keeps between messages."""

    config: FinetuneConfig
    data: TuningData
    model: Any
    trained: dict[str, nn.Parameter]

    def logits(self, split: Encoded, rows: Any) -> tuple[Tensor, Tensor]:
        """Of some sequences, with their labels."""
        task = self.data.task
        inputs, labels = collate(split, rows, pad_id=task.pad_id, kind=task.kind)
        output = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return output.logits, torch.from_numpy(labels)

    def load(self, arrays: ArrayRecord) -> None:
        """Take over the global weights."""
        with torch.no_grad():
            for name, value in arrays.to_torch_state_dict().items():
                self.trained[name].copy_(value)

    def arrays(self) -> ArrayRecord:
        """Give away what is trained."""
        return ArrayRecord({name: p.detach() for name, p in self.trained.items()})


@functools.cache
def prepared(run_dir: str) -> tuple[FinetuneConfig, TuningData]:
    """Read a run's configuration and examples, once per process."""
    config = load_finetune(str(Path(run_dir) / "config.yaml"), [])
    return config, TuningData.load(Path(run_dir) / DATA)


def build(run_dir: str) -> Worker:
    """Build the model with its first values."""
    config, data = prepared(run_dir)
    model = build_tuned(config, data.task)
    attach_seeded(model, config, data.task)
    return Worker(config, data, model, trainable(model))


kept = functools.cache(build)


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's turn, as in ``fedpipe.commands.finetune.whole``."""
    settings = message.content["config"]
    client, round_id = int(context.node_config["partition-id"]), int(settings["server-round"]) - 1
    torch.set_num_threads(1)
    mine = (kept if settings["kept"] else build)(str(settings["run-dir"]))
    config, owned = mine.config, mine.data.train_sequences[client]
    mine.load(message.content["arrays"])
    chosen = config.optimizer
    optimizer = torch.optim.AdamW(
        mine.trained.values(), lr=chosen.lr, betas=chosen.betas, eps=chosen.eps,
        weight_decay=chosen.weight_decay, fused=True,
    )  # fmt: skip
    torch.manual_seed(stable_seed(config.seed, "turn", round_id, client))
    mine.model.train()
    losses, seen = [], 0
    steps = num_tuning_steps(config, len(owned))
    for rows in batches(config, client, round_id=round_id, size=len(owned), steps=steps):
        logits, labels = mine.logits(mine.data.train, owned[rows])
        loss = task_loss(logits, labels, kind=mine.data.task.kind)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        seen += len(rows)
    metrics = MetricRecord({"loss": float(np.mean(losses)), "num-examples": seen})
    content = RecordDict({"arrays": mine.arrays(), "metrics": metrics})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that knows how long a round's training and averaging took."""

    def __init__(self, **arguments: Any) -> None:
        """Take FedAvg's arguments."""
        super().__init__(**arguments)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._started = 0.0

    def configure_train(self, *arguments: Any) -> Iterable[Message]:
        """Begin a round."""
        self._started = time.monotonic()
        return super().configure_train(*arguments)

    def aggregate_train(self, *arguments: Any) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End a round."""
        arrays, metrics = super().aggregate_train(*arguments)
        assert arrays is not None and metrics is not None, "every client failed"
        self.seconds.append(time.monotonic() - self._started)
        self.losses.append(float(metrics["loss"]))
        return arrays, metrics


def main() -> None:
    """Run the rounds, score the last model, write what was measured."""
    run_dir, cores, result = sys.argv[1], int(sys.argv[2]), Path(sys.argv[4])
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        mine = build(run_dir)
        federation = mine.config.federation
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=federation.clients_per_round,
                         min_available_nodes=federation.num_clients)  # fmt: skip
        found = strategy.start(
            grid=grid, initial_arrays=mine.arrays(), num_rounds=federation.num_rounds,
            train_config=ConfigRecord({"run-dir": run_dir, "kept": sys.argv[3] == "kept"}),
        )  # fmt: skip
        mine.load(found.arrays)
        text = {"seconds": strategy.seconds, "losses": strategy.losses, "score": _accuracy(mine)}
        result.write_text(json.dumps(text), encoding="utf-8")

    config = load_finetune(str(Path(run_dir) / "config.yaml"), [])
    run_simulation(
        server_app, client_app, num_supernodes=config.federation.num_clients,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": cores}},
    )  # fmt: skip


@torch.inference_mode()
def _accuracy(mine: Worker) -> float:
    mine.model.eval()
    order = np.argsort(mine.data.test.lengths(), kind="stable")
    size, right = mine.config.scoring.batch_size, 0
    for first in range(0, len(order), size):
        logits, labels = mine.logits(mine.data.test, order[first : first + size])
        right += int((logits.argmax(-1) == labels).sum())
    return right / len(order)


if __name__ == "__main__":
    # Under its name as a module: Flower's workers then import the clients instead of copying them.
    import flower_app

    flower_app.main()
