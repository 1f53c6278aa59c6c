"""Measure how far averaging LoRA's A and B apart is from the mean of the clients' updates.

    python benchmarks/lora_average.py --model DIR --data DIR [--seeds 0,1] [key=value ...]

Every client trains one round from the same start. Printed is, over all adapted matrices,
``|mean(B) mean(A) - mean(B A)| / |mean(B A)|`` in the Frobenius norm, for more and more clients.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from fedpipe.commands.finetune.prepared import DATA, TuningData
from fedpipe.commands.finetune.setup import set_up_finetune
from fedpipe.commands.finetune.turns import plan_tuning_round
from fedpipe.commands.finetune.whole import WholeReplica
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.models.peft import lora_updates
from fedpipe.run.checkpoint import CheckpointWriter
from fedpipe.run.run_dir import resolve

CLIENTS = (2, 8, 32)
ENV = ProcessEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous="")


def main() -> None:
    """Print one row per split and number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    sys.stdout.write("| split | clients | error of averaged factors, % |\n|---|---:|---:|\n")
    comm = Comm(Grid(num_stages=1, num_replicas=1, data_parallel_degree=1), ENV, edges=())
    for split in ("iid", "label_sorted"):
        for clients in CLIENTS:
            errors = [_error(args, comm, split, clients, int(s)) for s in args.seeds.split(",")]
            spread = f"{min(errors):.1f} to {max(errors):.1f}"
            mean = sum(errors) / len(errors)
            sys.stdout.write(f"| {split} | {clients} | {mean:.1f} ({spread}) |\n")
            sys.stdout.flush()
    comm.close()


def _error(args: argparse.Namespace, comm: Comm, split: str, clients: int, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "task.name=ag-news", f"task.data={args.data}", f"model.path={args.model}",
            f"task.split={split}", "task.max_length=64", "federation.num_replicas=1",
            f"federation.num_clients={clients}", f"federation.clients_per_round={clients}",
            f"seed={seed}", *args.overrides,
        ]  # fmt: skip
        asked = resolve("finetune", None, overrides, str(Path(folder) / "run"))
        setup = set_up_finetune(*asked, notify=lambda line: None)
        config, run_dir = setup.config, setup.run_dir
        data = TuningData.load(run_dir / DATA)
        replica = WholeReplica(config, data, comm=comm, run_dir=run_dir)
        writer = CheckpointWriter(run_dir, comm=comm, keep_last=1)
        turns = plan_tuning_round(config, round_id=0, lengths=data.train_lengths()).turns
        updates = lora_updates(replica.model)
        exact = [torch.zeros_like(update.weight) for update in updates]
        for turn in turns:
            replica.begin_turn(turn, round_id=0, last_round=None)
            replica.train(
                turn, range(turn.num_steps), round_id=0, seen=0,
                lr=lambda step: config.optimizer.lr, on_step=lambda stage_id, result: None,
                until=lambda step: step + 1,
            )  # fmt: skip
            replica.end_turn(turn, round_id=0, last_round=None, writer=writer)
            for total, update in zip(exact, updates, strict=True):
                total.add_(update.product(), alpha=turn.weight)
        replica.synchronize(len(turns))
        pairs = [
            (update.product() - total, total) for update, total in zip(updates, exact, strict=True)
        ]
        off = sum(float(error.square().sum()) for error, _ in pairs)
        return 100 * (off / sum(float(total.square().sum()) for _, total in pairs)) ** 0.5


if __name__ == "__main__":
    main()
