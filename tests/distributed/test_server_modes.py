"""Shared and sequential servers and FedProx: whole runs against the same in plain PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from fedpipe.run.checkpoint import client_files, find_latest
from tests.distributed.test_pretrain import _pretrain, _records, _run, _setup, _StopAfter
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

OPTIMIZER = {"lr": 5e-3, "warmup_ratio": 0.1, "max_grad_norm": 0.5}
FOUR = {"num_clients": 4, "clients_per_round": 4, "num_rounds": 2, "num_local_steps": 2}


def _by_hand(env: ProcessEnv, config: RunConfig, data: PreparedData) -> dict[str, np.ndarray]:
    """Train all rounds client by client, with torch alone; return the global weights."""
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.federation.cohort import client_history, plan_round
    from fedpipe.pipeline.optimizer import build_optimizer

    one = tiny_config(pipeline={"colocate": True}, federation=FOUR | {"num_replicas": 1})
    comm = Comm(Grid.from_config(one), env, edges=())
    replica = PretrainingReplica(one, data, comm=comm)
    federation, blocks = config.federation, [shard.num_blocks for shard in data.train]
    weights = [copy.deepcopy(engine.stage) for engine in replica.stages]  # the global ones
    going_on: dict[int, Any] = {}
    if federation.server != "replicated":
        going_on[1] = build_optimizer(weights[1], config.optimizer)

    def plan(round_id: int) -> Any:
        return plan_round(config, round_id=round_id, blocks_per_client=blocks)

    for round_id in range(federation.num_rounds):
        turns = plan(round_id)
        seen = client_history(plan, before=round_id, num_clients=len(blocks)).examples_seen
        trained = []
        for first in range(0, len(turns), federation.num_replicas):
            group = turns[first : first + federation.num_replicas]
            workers = []
            for turn in group:
                stages, optimizers = [], []
                for index, stage in enumerate(weights):
                    handed_on = federation.server == "sequential" or index in going_on
                    stages.append(stage if handed_on else copy.deepcopy(stage))
                    fresh = build_optimizer(stages[-1], config.optimizer)
                    optimizers.append(going_on.get(index, fresh))
                source = replica.training_source(turn.client_id, start=seen[turn.client_id])
                workers.append((stages, optimizers, source))
            _lend([stages for stages, *_ in workers])
            for step in range(federation.num_local_steps):
                _local_step(workers, weights, step, round_id=round_id, config=config)
            trained += [(turn.weight, stages) for turn, (stages, *_) in zip(group, workers)]  # noqa: B905
        if federation.server != "sequential":
            weights = [_mean([(w, stages[i]) for w, stages in trained]) for i in range(2)]
            if federation.server == "shared":
                weights[1] = trained[0][1][1]
    comm.close()
    return {
        n: p.detach().numpy()
        for stage in weights
        for n, p in stage.named_parameters()
        if n not in stage.copied
    }


def _lend(workers: list[Any]) -> None:
    """Let every final decoder begin as the word embedding."""
    with torch.no_grad():
        for first, last in workers:
            for decoder in last.copied.values():
                decoder.copy_(first.word_embedding)


def _local_step(
    workers: list[Any], weights: list[Any], step: int, *, round_id: int, config: RunConfig
) -> None:
    """One step of some clients at the same time, each on its own stages or on common ones."""
    from fedpipe.pipeline.optimizer import learning_rate

    federation, count = config.federation, config.pipeline.num_micro_batches
    stepped: dict[int, Any] = {}
    for stages, optimizers, source in workers:
        for micro_batch in range(count):
            hidden, targets = source(step, micro_batch)
            for index, stage in enumerate(stages):
                joint = len(workers) if federation.server == "shared" and index == 1 else 1
                output = stage(hidden)
                (stage.loss(output, targets) / (count * joint)).backward()
                hidden = output.detach()
        for index, (stage, optimizer) in enumerate(zip(stages, optimizers, strict=True)):
            stepped[id(stage)] = (stage, optimizer, weights[index])
    lr = learning_rate(
        config.optimizer,
        round_id * federation.num_local_steps + step,
        total_steps=federation.num_rounds * federation.num_local_steps,
    )
    for stage, optimizer, start in stepped.values():
        origins = dict(start.named_parameters())
        for name, parameter in stage.named_parameters():
            if name not in stage.copied:
                away = parameter.detach() - origins[name].detach()
                parameter.grad += federation.fedprox_mu * away
        torch.nn.utils.clip_grad_norm_(stage.parameters(), config.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


def _mean(trained: list[tuple[float, Any]]) -> Any:
    result = copy.deepcopy(trained[0][1])
    with torch.no_grad():
        for parts in zip(result.parameters(), *(s.parameters() for _, s in trained), strict=True):
            parts[0].copy_(sum(w * p for (w, _), p in zip(trained, parts[1:], strict=True)))
    return result


def _final(run_dir: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    checkpoint, _ = find_latest(run_dir)
    assert checkpoint is not None
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(checkpoint.path.glob("stage_*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize(
    "federation",
    [
        {"num_replicas": 2},
        {"num_replicas": 2, "server": "shared"},
        {"num_replicas": 1, "server": "shared"},
        {"num_replicas": 1, "server": "sequential"},
        {"num_replicas": 2, "fedprox_mu": 10.0},
        {"num_replicas": 2, "server": "shared", "fedprox_mu": 10.0},
    ],
    ids=str,
)
def test_a_run_equals_its_clients_trained_by_hand(
    federation: dict[str, Any], tmp_path: Path
) -> None:
    """shared: a step of the server stage has the mean gradient of the clients that are hosted."""
    config = tiny_config(
        federation=FOUR | federation, optimizer=OPTIMIZER, pipeline={"colocate": True}
    )
    data = tiny_data(tmp_path / "data", num_clients=4)
    run_dir = tmp_path / "run"
    run_distributed(_pretrain, config.world_size, _setup(config, data, run_dir))
    (expected,) = run_distributed(_by_hand, 1, config, data)
    actual = _final(run_dir)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=2e-5, err_msg=name)
    traffic = [r["collectives"] for r in _records(run_dir) if r["kind"] == "traffic"]
    shared = federation.get("server") == "shared" and federation["num_replicas"] == 2
    numel = [sum(v.size for n, v in actual.items() if _is_server(n) == s) for s in (False, True)]
    steps = 2 * 2  # turns on a replica, local steps
    trained = numel[1] + actual["roberta.embeddings.word_embeddings.weight"].size  # the decoder
    for collectives in traffic:
        # 2 replicas, each sends 2 (R - 1) / R = 1 times the tensor.
        assert collectives["shared_gradients"] == (2 * 4 * trained * steps if shared else 0)
        averaged = numel[0] if shared else sum(numel)
        assert collectives["fedavg"] == 2 * 4 * averaged * (federation["num_replicas"] - 1)


def _is_server(name: str) -> bool:
    return name.startswith("lm_head") or ".layer.2." in name or ".layer.3." in name


def test_a_shared_server_without_steps_of_its_own_would_not_equal_the_average(
    tmp_path: Path,
) -> None:
    """The modes differ: what the test above tells apart is not lost in its tolerance."""
    finals = []
    for number, server in enumerate(("replicated", "shared", "sequential")):
        replicas = 1 if server == "sequential" else 2
        config = tiny_config(
            federation=FOUR | {"num_replicas": replicas, "server": server},
            optimizer=OPTIMIZER,
            pipeline={"colocate": True},
        )
        run_dir = tmp_path / str(number)
        data = tiny_data(tmp_path / "data", num_clients=4)
        run_distributed(_pretrain, config.world_size, _setup(config, data, run_dir))
        finals.append(_final(run_dir))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert max(np.abs(finals[a][n] - finals[b][n]).max() for n in finals[a]) > 1e-3


def test_parts_stay_with_their_client_under_a_sequential_server(tmp_path: Path) -> None:
    """Embeddings and auxiliary head are the client's, its layers are handed on."""
    config = tiny_config(
        federation=FOUR
        | {
            "num_replicas": 1, "server": "sequential", "optimizer_state": "keep",
            "average": {"embeddings": False, "aux_head": False},
        },
        optimizer=OPTIMIZER,
        pipeline={"colocate": True},
    )  # fmt: skip
    run_dir, data = tmp_path / "run", tiny_data(tmp_path / "data", num_clients=4)
    run_distributed(_pretrain, 1, _setup(config, data, run_dir))
    checkpoint, _ = find_latest(run_dir)
    assert checkpoint is not None
    files = [run_dir / "clients" / name for name in client_files(checkpoint)]
    assert len(files) == 4, "the server stage's optimizer is no client's"
    kept = [torch.load(f, weights_only=True) for f in files]
    names = set(kept[0]["kept"])
    assert names and all(".embeddings." in n or n.startswith("aux_heads.") for n in names)
    assert all(client["optimizer"]["state"][0]["step"].item() == 4 for client in kept)
    one, other = (client["kept"] for client in kept[:2])
    assert all(not torch.equal(one[n], other[n]) for n in names if "word_embeddings" in n)
    server = torch.load(checkpoint.path / "server_01_data_00.pt", weights_only=True)
    assert server["optimizer"]["state"][0]["step"].item() == 2 * 4 * 2


@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize(
    "federation",
    [
        {"server_optimizer": {"name": "fedadam", "tau": 0.01}, "wire": "int8"},
        {"server": "shared"},
        {"server": "sequential", "num_replicas": 1, "optimizer_state": "keep"},
        {
            "aggregation": {"rule": "trimmed_mean", "weighting": "uniform", "num_byzantine": 1},
            "attack": {"kind": "noise", "num_attackers": 1},
            "fedprox_mu": 0.1,
        },
    ],
    ids=["server optimizer over int8", "shared", "sequential", "robust rule under attack"],
)
def test_state_between_rounds_survives_a_kill_bit_for_bit(
    federation: dict[str, Any], tmp_path: Path
) -> None:
    """Killed after a finished round, and in the second turn of the next one."""
    config = tiny_config(
        model={"hidden_dropout_prob": 0.1},
        federation=FOUR | {"num_rounds": 3, "num_local_steps": 3, "num_replicas": 2} | federation,
        checkpoint={"every_steps": 2},
    )
    data = tiny_data(tmp_path / "data", num_clients=4)
    num_turns = 4 // config.federation.num_replicas
    undisturbed = _run(config, data, tmp_path / "undisturbed")
    for killed_after in (3 * num_turns + 1, 3 * num_turns + 6):
        run_dir = tmp_path / f"killed_{killed_after}"
        with pytest.raises(AssertionError, match="died silently|failed"):
            _run(config, data, run_dir, _StopAfter(killed_after))
        checkpoint, _ = find_latest(run_dir)
        assert checkpoint is not None
        between = killed_after == 3 * num_turns + 1
        assert checkpoint.position.round_id == 1 and (checkpoint.position.step == 0) == between
        assert _run(config, data, run_dir) == undisturbed
        expected = _final(tmp_path / "undisturbed")
        for name, tensor in _final(run_dir).items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def _train_shared(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Any:
    """Train one client per replica; return this rank's weights by stage role."""
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.models.split import pipeline_edges

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    replica = PretrainingReplica(config, data, comm=comm)
    replica.engine.train(
        range(4),
        source=replica.training_source(comm.replica, start=0),
        lr=lambda step: 1e-3,
        on_step=lambda stage, result: None,
    )
    weights: dict[str, dict[str, np.ndarray]] = {"client": {}, "server": {}}
    for engine in replica.stages:
        for name, parameter in engine.stage.named_parameters():
            weights[engine.spec.role.value][name] = parameter.detach().numpy()
    comm.close()
    return comm.replica, weights


@pytest.mark.parametrize(
    "pipeline",
    [
        {"head_location": "client"},
        {"objective": "end_to_end", "schedule": "1f1b"},
        {"objective": "end_to_end", "schedule": "sequential", "head_location": "client"},
    ],
    ids=str,
)
def test_a_shared_server_is_one_model_in_every_mode(
    pipeline: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(
        pipeline=pipeline, federation={"server": "shared"}, optimizer={"max_grad_norm": 0.1}
    )
    results = run_distributed(_train_shared, 4, config, tiny_data(tmp_path))
    merged: list[dict[str, dict[str, np.ndarray]]] = [{"client": {}, "server": {}} for _ in "01"]
    for replica, weights in results:
        for role, tensors in weights.items():
            merged[replica][role] |= tensors
    for name, value in merged[0]["server"].items():
        np.testing.assert_array_equal(merged[1]["server"][name], value, err_msg=name)
    assert merged[0]["server"] and merged[0]["client"]
    embeddings = "roberta.embeddings.word_embeddings.weight"
    assert not np.array_equal(*(m["client"][embeddings] for m in merged)), "clients differ"
