"""Aggregation over real replicas against the same in one process with plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.sparse_row import SPARSE_BLOCK
from fedpipe.distributed.wire import TensorSpec
from fedpipe.federation.traffic import (
    BLOCK,
    averaging_bytes,
    averaging_floats,
    padded_numel,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

REPLICAS, CLIENTS, ROUNDS = 3, 5, 4
Weights = dict[str, np.ndarray]


def _change(shape: torch.Size, *, name: str, client_id: int, round_id: int) -> torch.Tensor:
    """What a client adds to a parameter: the same in every process."""
    from fedpipe.models.weights import stable_seed

    generator = torch.Generator().manual_seed(stable_seed(name, client_id, round_id))
    size = 10.0 ** -(1 + client_id)  # clients that differ in size, so that a wrong weight shows
    return torch.randn(shape, generator=generator) * size


def _rounds(
    env: ProcessEnv, config: RunConfig, data: PreparedData
) -> tuple[list[dict[int, Weights]], list[dict[int, int]], dict[str, int]]:
    """Let every client add its change; return global weights and bytes by round and stage."""
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.federation import aggregation
    from fedpipe.federation.cohort import plan_round

    # Several buckets per stage, the last one smaller; in thirds, so that no byte count is rounded.
    aggregation.BUCKET_ELEMENTS = aggregation.ENCODED_BUCKET_ELEMENTS = 2 * REPLICAS * BLOCK
    comm = Comm(Grid.from_config(config), env, edges=())
    replica = PretrainingReplica(config, data, comm=comm)

    def state() -> dict[int, Weights]:
        return {
            s: {n: t.numpy().copy() for n, t in sync.global_state().items()}
            for s, sync in replica.synchronizers.items()
        }

    history, sent = [state()], []
    blocks = [40] * config.federation.num_clients
    for round_id in range(ROUNDS):
        for turn in plan_round(config, round_id=round_id, blocks_per_client=blocks):
            if turn.replica_id != comm.replica:
                continue
            for engine in replica.stages:
                sync = replica.synchronizers[engine.spec.stage_id]
                sync.set_weights(None)
                with torch.no_grad():
                    for name, parameter in engine.stage.named_parameters():
                        parameter += _change(
                            parameter.shape, name=name, client_id=turn.client_id, round_id=round_id
                        )
                sync.take_update(turn.client_id, weight=turn.weight, round_id=round_id)
        sent.append({s: sync.synchronize() for s, sync in replica.synchronizers.items()})
        history.append(state())
    comm.close()
    for sync in replica.synchronizers.values():
        held = [*sync.unfinished_round.values(), *sync.residuals.values(), *sync.moments.values()]
        numel = sum(p.numel() for n, p in sync.global_state().items() if n not in sync.kept_state())
        floats = averaging_floats(numel, federation=config.federation)
        assert sum(t.numel() for t in held if t.dim()) == floats
    return history, sent, dict(comm.sent_bytes)


def _config(**federation: Any) -> RunConfig:
    base = {
        "num_clients": CLIENTS, "clients_per_round": CLIENTS, "num_replicas": REPLICAS,
        "num_rounds": ROUNDS,
    }  # fmt: skip
    return tiny_config(pipeline={"colocate": True}, federation=base | federation)


def _run(config: RunConfig, folder: Path) -> tuple[list[dict[int, Weights]], list[dict[int, int]]]:
    """Run all replicas; they must agree bit for bit, also in what they count."""
    results = run_distributed(_rounds, config.world_size, config, tiny_data(folder))
    history, sent, ledger = results[0]
    for other, other_sent, _ in results[1:]:
        assert other_sent == sent
        for round_a, round_b in zip(history, other, strict=True):
            for stage, weights in round_a.items():
                for name, value in weights.items():
                    np.testing.assert_array_equal(value, round_b[stage][name], err_msg=name)
    assert ledger.get("fedavg", 0) == sum(sum(stages.values()) for stages in sent)
    return history, sent


def _changes(name: str, shape: tuple[int, ...], cohort: list[int], round_id: int) -> torch.Tensor:
    size = torch.Size(shape)
    return torch.stack(
        [_change(size, name=name, client_id=c, round_id=round_id) for c in cohort]
    ).double()


def _cohort(config: RunConfig, round_id: int) -> list[Any]:
    from fedpipe.federation.cohort import plan_round

    return list(plan_round(config, round_id=round_id, blocks_per_client=[40] * CLIENTS))


def _krum(changes: dict[str, torch.Tensor], num_byzantine: int) -> list[int]:
    flat = torch.cat([c.flatten(1) for c in changes.values()], dim=1)
    distances = torch.cdist(flat, flat).square()
    nearest = len(flat) - num_byzantine - 2
    scores = distances.sort(dim=1).values[:, 1 : 1 + nearest].sum(1)
    return scores.argsort()[:nearest].tolist()


@pytest.mark.parametrize(
    ("rule", "num_byzantine"), [("mean", 0), ("median", 0), ("trimmed_mean", 1), ("krum", 1)]
)
def test_a_rule_over_replicas_equals_it_in_one_process(
    rule: str, num_byzantine: int, tmp_path: Path
) -> None:
    aggregation = {"rule": rule, "num_byzantine": num_byzantine, "weighting": "uniform"}
    config = _config(aggregation=aggregation)
    history, sent = _run(config, tmp_path)
    for round_id in range(ROUNDS):
        cohort = [turn.client_id for turn in _cohort(config, round_id)]
        for stage, before in history[round_id].items():
            changes = {n: _changes(n, w.shape, cohort, round_id) for n, w in before.items()}
            selected = _krum(changes, num_byzantine) if rule == "krum" else range(CLIENTS)
            for name, value in history[round_id + 1][stage].items():
                clients = changes[name][list(selected)]
                if rule == "median":
                    change = clients.median(0).values
                elif rule == "trimmed_mean":
                    change = clients.sort(0).values[1:-1].mean(0)
                else:
                    change = clients.mean(0)
                expected = before[name] + change.numpy()
                np.testing.assert_allclose(value, expected, atol=3e-7, err_msg=name)
    for stage, weights in history[0].items():
        numel = sum(w.size for w in weights.values())
        expected_bytes = averaging_bytes(numel, federation=config.federation)
        assert [counts[stage] for counts in sent] == [expected_bytes] * ROUNDS


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_server_optimizer_over_replicas_equals_it_in_one_process(
    name: str, tmp_path: Path
) -> None:
    from fedpipe.federation.rules import ServerOptimizer

    config = _config(server_optimizer={"name": name, "lr": 0.5, "tau": 0.01})
    history, _ = _run(config, tmp_path)
    for stage, first in history[0].items():
        weights = {n: torch.from_numpy(w).double() for n, w in first.items()}
        optimizers = {
            n: ServerOptimizer(config.federation.server_optimizer, like=w)
            for n, w in weights.items()
        }
        for round_id in range(ROUNDS):
            turns = _cohort(config, round_id)
            shares = torch.tensor([t.weight for t in turns], dtype=torch.float64)
            for n, w in weights.items():
                changes = _changes(n, tuple(w.shape), [t.client_id for t in turns], round_id)
                optimizers[n].step_(w, w + torch.tensordot(shares, changes, dims=1))
                np.testing.assert_allclose(history[round_id + 1][stage][n], w.numpy(), atol=5e-6)


@pytest.mark.parametrize(("wire", "step"), [("bf16", 2.0**-9), ("int8", 1 / 254)])
def test_what_a_compressed_average_rounds_off_is_sent_later(
    wire: str, step: float, tmp_path: Path
) -> None:
    """One round errs by the format's step, and so does the sum of all: errors do not pile up."""
    config = _config(wire=wire, aggregation={"weighting": "uniform"})
    history, sent = _run(config, tmp_path)
    for stage, first in history[0].items():
        total = {n: torch.zeros(w.shape, dtype=torch.float64) for n, w in first.items()}
        for round_id in range(ROUNDS):
            cohort = [turn.client_id for turn in _cohort(config, round_id)]
            for name, value in history[round_id + 1][stage].items():
                total[name] += _changes(name, first[name].shape, cohort, round_id).mean(0)
                error = np.abs(value - first[name] - total[name].numpy()).max()
                # Each replica and a shard's owner round changes of up to 5 sigma, a fifth of 0.5.
                assert 0 < error < (REPLICAS + 1) * 0.1 * step, (name, round_id)
        numel = sum(w.size for w in first.values())
        expected = averaging_bytes(numel, federation=config.federation)
        assert [counts[stage] for counts in sent] == [expected] * ROUNDS


def test_sparse_changes_over_replicas_equal_one_process_bit_for_bit(tmp_path: Path) -> None:
    """What has arrived and what is owed make up all that the clients have learnt."""
    config = _config(wire="sparse", density=0.05)
    history, sent = _run(config, tmp_path)
    for stage in history[0]:
        flat = {r: _flat(weights[stage]) for r, weights in enumerate(history)}
        numel = flat[0].numel()
        padded = padded_numel(numel, federation=config.federation)
        owed, learnt = torch.zeros(REPLICAS, padded), torch.zeros(numel, dtype=torch.float64)
        for round_id in range(ROUNDS):
            start, total = flat[round_id], torch.zeros(padded)
            for replica in range(REPLICAS):
                turns = [t for t in _cohort(config, round_id) if t.replica_id == replica]
                trained, weight = torch.zeros(numel), sum(t.weight for t in turns)
                for turn in turns:
                    new = {
                        n: w + _change(torch.Size(w.shape), name=n, client_id=turn.client_id,
                                       round_id=round_id).numpy()
                        for n, w in history[round_id][stage].items()
                    }  # fmt: skip
                    trained.add_(_flat(new), alpha=turn.weight)
                    learnt += turn.weight * (_flat(new).double() - start)
                owed[replica, :numel].add_(trained).sub_(start, alpha=weight)
                rows = owed[replica].view(-1, SPARSE_BLOCK)
                spec = TensorSpec(tuple(rows.shape), torch.float32, "sparse", density=0.05)
                arrived = spec.decode(spec.encode(rows))
                rows -= arrived
                total += arrived.flatten()
            assert torch.equal(flat[round_id + 1], total[:numel] + start)
            known = flat[round_id + 1].double() - flat[0] + owed.sum(0)[:numel]
            torch.testing.assert_close(known, learnt, atol=2e-6, rtol=0)
        expected = averaging_bytes(numel, federation=config.federation)
        assert [counts[stage] for counts in sent] == [expected] * ROUNDS


def _flat(weights: Weights) -> torch.Tensor:
    return torch.cat([torch.from_numpy(w).flatten() for w in weights.values()])


def test_a_compressed_average_of_one_replica_is_exact(tmp_path: Path) -> None:
    plain = _config(num_replicas=1)
    exact, _ = _run(plain, tmp_path)
    history, sent = _run(_config(num_replicas=1, wire="int8"), tmp_path)
    for stage, weights in exact[-1].items():
        for name, value in weights.items():
            np.testing.assert_array_equal(history[-1][stage][name], value)
    assert all(count == 0 for counts in sent for count in counts.values())


@pytest.mark.parametrize("rule", ["mean", "krum"])
@pytest.mark.parametrize("kind", ["sign_flip", "noise"])
def test_krum_ignores_attackers_that_ruin_the_mean(kind: str, rule: str, tmp_path: Path) -> None:
    """Client 0, whose change is the largest, attacks with 100 times its size."""
    attack = {"kind": kind, "num_attackers": 1, "scale": 100.0}
    aggregation = {"rule": rule, "num_byzantine": int(rule == "krum"), "weighting": "uniform"}
    history, _ = _run(_config(attack=attack, aggregation=aggregation), tmp_path)
    largest = max(
        np.abs(value - history[0][stage][name]).max()
        for stage, weights in history[1].items()
        for name, value in weights.items()
    )
    assert (largest > 5.0) == (rule == "mean")
    assert (largest < 0.1) == (rule == "krum")


def test_what_is_kept_does_not_travel(tmp_path: Path) -> None:
    average = {"embeddings": False, "aux_head": False, "client_layers": False}
    for federation in (
        {"wire": "sparse"},
        {"wire": "int8"},
        {"server_optimizer": {"name": "fedadam"}},
        {},
    ):
        config = _config(average=average, **federation)
        history, sent = _run(config, tmp_path)
        assert all(counts[0] == 0 < counts[1] for counts in sent)
        for name, value in history[0][0].items():
            np.testing.assert_array_equal(history[-1][0][name], value, err_msg=name)
