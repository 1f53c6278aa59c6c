"""DeepSpeed's own PipelineEngine over the same stages, with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

STEPS = 5
ATOL = 2e-6
"""float32: DeepSpeed divides the loss by the micro-batches elsewhere; sums round differently."""


def _losses(env: ProcessEnv, config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """Losses of the last stage, step by step, and bytes sent, of both pipelines."""
    from fedpipe.commands.throughput.measure import build_peers, edges_of_all_peers
    from fedpipe.commands.throughput.report import ThroughputSettings
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid

    comm = Comm(Grid.from_config(config), env, edges=edges_of_all_peers(config))
    peers = build_peers(config, data, comm=comm, settings=ThroughputSettings(num_steps=STEPS))
    results: dict[str, Any] = {}
    for name in ("1f1b", "stock"):
        losses: list[float | None] = []
        peers[name].run(range(STEPS), lambda stage, r, seen=losses: seen.append(r.loss))
        results[name] = (losses, peers[name].sent_bytes()[env.rank])
    comm.close()
    return results


@pytest.mark.parametrize("cut", [[2], [1, 2, 3]], ids=str)
def test_end_to_end_equals_deepspeeds_own_pipeline(cut: list[int], tmp_path: Path) -> None:
    config = tiny_config(
        pipeline={"cut": cut},
        federation={"num_replicas": 1, "clients_per_round": 1},
        optimizer={"max_grad_norm": 0.0},
    )
    results = run_distributed(_losses, len(cut) + 1, config, tiny_data(tmp_path))
    ours, stock = (results[-1][name][0] for name in ("1f1b", "stock"))
    assert len(ours) == len(stock) == STEPS
    for step in range(STEPS):
        assert abs(ours[step] - stock[step]) <= ATOL, (step, ours, stock)
    assert len(set(ours)) == STEPS, "the steps differ, so weights and data advance"


def test_both_send_one_gradient_per_activation(tmp_path: Path) -> None:
    config = tiny_config(federation={"num_replicas": 1, "clients_per_round": 1})
    first, last = run_distributed(_losses, 2, config, tiny_data(tmp_path))
    hidden = STEPS * 3 * 2 * 16 * 32 * 4
    assert first["stock"][1] == (hidden, 0)
    assert last["stock"][1] == (0, hidden) == last["1f1b"][1]
