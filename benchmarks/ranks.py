"""One process per rank of a configuration, for benchmarks that need the pipeline's inside."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedpipe.commands.pretrain.replica import PretrainingReplica
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData, load_prepared
from fedpipe.data.corpus import prepare
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.env import ProcessEnv, threads_per_process
from fedpipe.distributed.topology import Grid
from fedpipe.models.split import Edge, pipeline_edges

Benchmark = Callable[[RunConfig, PreparedData, Comm], Any]


def run_ranks(config: RunConfig, benchmark: Benchmark) -> list[Any]:
    """Prepare the text, call ``benchmark`` on every rank, and return the results by rank.

    Args:
        config: Its grid is the processes.
        benchmark: A function of a module; gets the groups of its rank.
    """
    directory = prepare(config).directory
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            context.Process(
                target=_rank, args=(rank, config, str(directory), scratch, benchmark, results)
            )
            for rank in range(config.world_size)
        ]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a rank failed; what it said is above")
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def step_s(replica: PretrainingReplica, comm: Comm, num_steps: int) -> float:
    """Return the seconds of a local step in steady state: neither of the first nor of the last.

    Collective: every rank.
    """
    ends: list[float] = []
    comm.barrier()
    replica.engine.train(
        range(num_steps),
        source=replica.training_source(0, start=0),
        lr=lambda step: 1e-5,
        on_step=lambda stage, result: ends.append(time.monotonic()),
    )
    return (ends[-2] - ends[0]) / (num_steps - 2)


def _rank(
    rank: int, config: RunConfig, directory: str, scratch: str, benchmark: Benchmark, results: Any
) -> None:
    pr_set_pdeathsig = 1  # linux/prctl.h: no rank outlives an interrupted benchmark
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    size = config.world_size
    torch.set_num_threads(threads_per_process(size))
    env = ProcessEnv(
        rank=rank, world_size=size, local_rank=rank, local_world_size=size,
        rendezvous=f"file://{Path(scratch) / 'store'}",
    )  # fmt: skip
    value = None
    try:
        edges = [Edge(*edge) for edge in pipeline_edges(config.pipeline)]
        comm = Comm(Grid.from_config(config), env, edges=edges)
        value = benchmark(config, load_prepared(directory), comm)
        comm.close()
    finally:
        results.put((rank, value))
