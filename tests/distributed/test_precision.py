"""bf16, ZeRO-1 and data-parallel ranks inside a client change how numbers are kept, not which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def _train_two_turns(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Any:
    """Train, average, and train on from the average; losses by stage, bytes sent, final weights."""
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.federation.cohort import Turn
    from fedpipe.models.split import pipeline_edges

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    replica = PretrainingReplica(config, data, comm=comm)
    losses: list[float] = []
    turn = Turn(
        client_id=0, replica_id=0, num_steps=STEPS, num_examples=1, num_tokens=1, weight=1.0
    )
    averaged_survives = True
    for round_id in range(2):
        replica.begin_turn(turn, round_id=round_id, last_round=None)
        before = {n: p.detach().clone() for n, p in replica.stages[0].stage.named_parameters()}
        replica.engine.train(
            range(STEPS),
            source=replica.training_source(0, start=0),
            lr=lambda step: 1e-3,
            on_step=lambda stage, r: losses.append(r.loss),
        )
        # Adam at lr 1e-3 moves no weight by more than about 1e-3 a step: had the average been
        # overwritten by older master weights, the distance would be the round's whole movement.
        moved = max(
            float((p.detach() - before[n]).abs().max())
            for n, p in replica.stages[0].stage.named_parameters()
        )
        averaged_survives &= moved <= STEPS * 1.5e-3
        for synchronizer in replica.synchronizers.values():
            half = replace(turn, weight=0.5)  # of the weights: a visible change
            synchronizer.take_update(half.client_id, weight=half.weight, round_id=round_id)
            synchronizer.synchronize()
    sent = sum(
        s.links.activations_out.sent_bytes for s in replica.stages if s.links.activations_out
    )
    comm.close()
    return losses, sent, averaged_survives


def _config(tmp_path: Path, deepspeed: dict[str, Any] | Path, **federation: Any) -> RunConfig:
    if isinstance(deepspeed, dict):
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(deepspeed), encoding="utf-8")
        deepspeed = path
    return tiny_config(
        federation={"num_replicas": 1, "clients_per_round": 1, **federation},
        deepspeed={"config": str(deepspeed)},
    )


def test_bf16_halves_the_activations_on_the_wire_and_keeps_the_loss(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    fp32 = run_distributed(
        _train_two_turns, 2, _config(tmp_path, ROOT / "ds_configs/fp32.json"), data
    )
    bf16 = run_distributed(
        _train_two_turns, 2, _config(tmp_path, ROOT / "ds_configs/bf16.json"), data
    )
    targets = 2 * STEPS * 3 * 2 * 2 * 2 * 4
    assert bf16[0][1] - targets == (fp32[0][1] - targets) / 2
    for stage in (0, 1):
        np.testing.assert_allclose(bf16[stage][0], fp32[stage][0], rtol=0.02)
        assert bf16[stage][0] != fp32[stage][0], "bf16 was really used"
        assert bf16[stage][2] and fp32[stage][2], "the averaged weights were trained on"


def test_zero_1_equals_plain_data_parallel_ranks(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    ranks = {"data_parallel_degree": 2}
    plain = run_distributed(
        _train_two_turns, 4, _config(tmp_path, ROOT / "ds_configs/fp32.json", **ranks), data
    )
    zero = run_distributed(
        _train_two_turns,
        4,
        _config(tmp_path, {"zero_optimization": {"stage": 1}}, **ranks),
        data,
    )
    for rank in range(4):
        np.testing.assert_allclose(zero[rank][0], plain[rank][0], atol=1e-5)
        assert zero[rank][2], "the averaged weights were trained on"


@pytest.mark.parametrize("degree", [2])
def test_gradients_are_averaged_over_a_clients_ranks(degree: int, tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    config = _config(tmp_path, {}, data_parallel_degree=degree)
    results = run_distributed(_train_two_turns, 2 * degree, config, data)
    assert results[0][0] != results[2][0], "the first stage's ranks read different blocks"
    assert all(result[2] for result in results)
