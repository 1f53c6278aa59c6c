"""Run a function on N real processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest import mock

from fedpipe.distributed.env import ProcessEnv

PRELOAD = [
    "fedpipe.models.weights",  # first: see there
    "fedpipe.commands.pretrain.run", "fedpipe.commands.finetune.run", "fedpipe.run.export",
]  # fmt: skip
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 90.0
) -> list[Any]:
    """Call ``fn(env, *args)`` on every rank and return the results by rank.

    Raises:
        AssertionError: With the traceback of the first rank that failed, or with the ranks that
            were still running after ``timeout_s``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, ENVIRONMENT):  # the server's, which its children inherit
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as scratch:
        queue = context.SimpleQueue()
        processes = []
        for rank in range(world_size):
            env = ProcessEnv(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                rendezvous=f"file://{scratch}/store",
            )
            process = context.Process(target=_call, args=(queue, fn, env, args), daemon=True)
            process.start()
            processes.append(process)
        try:
            return _collect(queue, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _call(queue: Any, fn: Callable[..., Any], env: ProcessEnv, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((env.rank, "ok", fn(env, *args)))
    except BaseException:
        queue.put((env.rank, "error", traceback.format_exc()))
        raise


def _collect(queue: Any, processes: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(processes):
        if queue.empty():
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0)]
            assert not dead or not queue.empty() or _wait_for(queue), f"ranks {dead} died silently"
            running = [r for r in range(len(processes)) if r not in results]
            assert time.monotonic() < deadline, f"ranks {running} still run after {timeout_s} s"
            time.sleep(0.01)
            continue
        rank, status, value = queue.get()
        assert status == "ok", f"rank {rank} failed:\n{value}"
        results[rank] = value
    return [results[rank] for rank in range(len(processes))]


def _wait_for(queue: Any) -> bool:
    time.sleep(0.5)
    return not queue.empty()
