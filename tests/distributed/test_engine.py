"""The pipeline engine against a single process and against plain PyTorch, with real processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

STEPS = 5
ATOL = 2e-6
"""float32: the order of sums may differ between a thread and a process, nothing else."""

ONE_REPLICA = {"num_replicas": 1, "clients_per_round": 1}
HOME = {"head_location": "client"}


def _replica(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Any:
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.models.split import pipeline_edges

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    return PretrainingReplica(config, data, comm=comm)


def _train(env: ProcessEnv, config: RunConfig, data: PreparedData, client_id: int = 0) -> Any:
    """Train; return losses and gradient norms by stage, weights by name, ledger, gradients."""
    replica = _replica(env, config, data)
    results: dict[int, list[tuple[float | None, float]]] = {s: [] for s in replica.comm.stages}
    replica.engine.train(
        range(STEPS),
        source=replica.training_source(client_id, start=0),
        lr=lambda step: 1e-3,
        on_step=lambda stage, r: results[stage].append((r.loss, r.grad_norm)),
    )
    weights = {n: p.detach().numpy() for s in replica.stages for n, p in s.stage.named_parameters()}
    sent = {
        (s.spec.stage_id, name): link.sent_bytes
        for s in replica.stages
        for name, link in (
            ("fwd", s.links.activations_out),
            ("bwd", s.links.gradients_out),
            ("home", s.links.home_out),
        )
        if link is not None
    }
    replica.comm.close()
    return results, weights, sent


def _united(results: list[Any]) -> tuple[dict[int, Any], dict[str, Any], dict[Any, int]]:
    losses, weights, sent = {}, {}, {}
    for stage_losses, stage_weights, stage_sent in results:
        losses |= stage_losses
        weights |= stage_weights
        sent |= stage_sent
    return losses, weights, sent


def _assert_equal(a: Any, b: Any, atol: float = ATOL) -> None:
    assert a[0].keys() == b[0].keys()
    for stage in a[0]:
        for (loss_a, norm_a), (loss_b, norm_b) in zip(a[0][stage], b[0][stage], strict=True):
            assert loss_a == loss_b if loss_a is None else abs(loss_a - loss_b) <= atol
            assert abs(norm_a - norm_b) <= 10 * atol
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], atol=10 * atol, err_msg=name)


@pytest.mark.parametrize(
    "pipeline",
    [
        {"cut": [2]},
        {"cut": [1, 3], "local_head": "mlm+layer", "num_client_stages": 2},
        {"cut": [0], "activation_checkpointing": True},
        {"cut": [2], "objective": "end_to_end", "schedule": "1f1b"},
        {"cut": [1, 3], "objective": "end_to_end", "schedule": "sequential"},
        {**HOME, "cut": [2]},
        {**HOME, "cut": [1, 2, 3], "num_client_stages": 2},
        {
            "cut": [1, 2],
            "head_location": "client",
            "in_flight": 1,
            "wire": ["fp32", "bf16", "int8", "int8"],
        },
        {
            "cut": [0],
            "head_location": "client",
            "objective": "end_to_end",
            "schedule": "sequential",
        },
        {"cut": [1, 2], "head_location": "client", "objective": "end_to_end", "schedule": "1f1b"},
    ],
    ids=str,
)
def test_stages_in_processes_equal_stages_in_one_process(
    pipeline: dict[str, Any], tmp_path: Path
) -> None:
    data = tiny_data(tmp_path)
    spread = tiny_config(pipeline={**pipeline, "micro_batch_size": 2}, federation=ONE_REPLICA)
    together = tiny_config(pipeline={**pipeline, "colocate": True}, federation=ONE_REPLICA)
    many = _united(run_distributed(_train, spread.world_size, spread, data))
    one = _united(run_distributed(_train, 1, together, data))
    _assert_equal(many, one)
    final = [loss for loss, _ in many[0][max(many[0])]]
    assert final[-1] < final[0], "five steps lower the loss"


def _train_behind(env: ProcessEnv, config: RunConfig, data: PreparedData, behind: int) -> Any:
    """Train; return (step, loss, norm) by stage, and how far each stage was when it said so."""
    replica = _replica(env, config, data)
    engines = {engine.spec.stage_id: engine for engine in replica.stages}
    said: dict[int, list[tuple[int, float | None, float]]] = {s: [] for s in engines}
    ahead: dict[int, list[int]] = {s: [] for s in engines}
    for engine in replica.stages:
        engine.results_behind = behind

    def on_step(stage: int, result: Any) -> None:
        said[stage].append((result.step, result.loss, result.grad_norm))
        ahead[stage].append(engines[stage]._step - 1 - result.step)

    replica.engine.train(
        range(STEPS), source=replica.training_source(0, start=0), lr=lambda step: 1e-3,
        on_step=on_step,
    )  # fmt: skip
    replica.comm.close()
    return said, ahead


def test_numbers_that_are_read_a_step_later_are_the_same_and_none_is_lost(tmp_path: Path) -> None:
    config = tiny_config(pipeline={"cut": [2], "colocate": True}, federation=ONE_REPLICA)
    data = tiny_data(tmp_path)
    ((at_once, no_step),) = run_distributed(_train_behind, 1, config, data, 0)
    ((later, one_step),) = run_distributed(_train_behind, 1, config, data, 1)
    assert later == at_once
    assert [step for step, *_ in later[0]] == list(range(STEPS))
    for stage in later:
        assert no_step[stage] == [0] * STEPS
        assert one_step[stage] == [1] * (STEPS - 1) + [0], "the last one at the end"


def _train_over_late_connections(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Any:
    """Train where the first message of an edge waits for its other end, as NCCL's does."""
    from datetime import timedelta

    import torch.distributed as dist

    from fedpipe.distributed.comm import Channel

    store = dist.FileStore(f"{env.rendezvous.removeprefix('file://')}_edges", env.world_size)
    met = set()

    def late(method: Any, *, end: str, other: str) -> Any:
        def first_waits(channel: Any, tensor: Any) -> Any:
            edge = f"{channel._source}-{channel._target}"
            if edge not in met:
                met.add(edge)
                store.set(f"{edge}/{end}", "there")
                store.wait([f"{edge}/{other}"], timedelta(seconds=20))
            return method(channel, tensor)

        return first_waits

    Channel.isend = late(Channel.isend, end="source", other="target")
    Channel.irecv = late(Channel.irecv, end="target", other="source")
    losses, _, _ = _train(env, config, data)
    return losses


@pytest.mark.parametrize(
    "pipeline",
    [
        {"cut": [1, 2]},
        {**HOME, "cut": [1, 2]},
        {"cut": [1, 3], "objective": "end_to_end", "schedule": "1f1b"},
    ],
    ids=str,
)
def test_no_stage_waits_for_a_connection_that_its_neighbour_cannot_make(
    pipeline: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(pipeline=pipeline, federation=ONE_REPLICA)
    data = tiny_data(tmp_path)
    losses = run_distributed(_train_over_late_connections, config.world_size, config, data)
    assert all(len(results) == STEPS for rank in losses for results in rank.values())


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("roberta", HOME | {"cut": [0], "objective": "end_to_end", "schedule": "sequential"}),
        ("bert", HOME | {"cut": [2], "objective": "end_to_end", "schedule": "sequential"}),
        ("roberta", {"cut": [2], "objective": "end_to_end", "schedule": "1f1b"}),
        ("roberta", HOME | {"cut": [1, 2], "local_head": "mlm+layer"}),
    ],
    ids=str,
)
def test_padding_to_every_position_changes_what_is_computed_and_not_what_is_learnt(
    family: str, pipeline: dict[str, Any], tmp_path: Path
) -> None:
    plain = _padded(0, pipeline | {"colocate": True}, family=family)
    padded = _padded(24, pipeline, family=family)
    data = tiny_data(tmp_path)
    without = _united(run_distributed(_train, 1, plain, data))
    padding = _united(run_distributed(_train, padded.world_size, padded, data))
    _assert_equal(without, padding, atol=1e-5)
    assert all(padding[2][link] > sent for link, sent in without[2].items())


def test_padding_changes_no_validation_loss(tmp_path: Path) -> None:
    data, pipeline = tiny_data(tmp_path), {"cut": [1, 2], "colocate": True}
    plain, padded = (
        run_distributed(_score, 1, _padded(length, pipeline), data)[0] for length in (0, 24)
    )
    assert plain.keys() == padded.keys() == {0, 1, 2}
    for stage, (loss, num_tokens) in plain.items():
        assert padded[stage] == (pytest.approx(loss, abs=1e-6 * num_tokens), num_tokens)


def _padded(length: int, pipeline: dict[str, Any], family: str = "roberta") -> RunConfig:
    return tiny_config(
        model={"family": family, "max_position_embeddings": 26},
        data={"padded_length": length},
        pipeline=pipeline,
        federation=ONE_REPLICA,
    )


def _score(env: ProcessEnv, config: RunConfig, data: PreparedData) -> dict[int, Any]:
    """Validate the first weights on client 0: stage -> (summed loss, masked tokens)."""
    replica = _replica(env, config, data)
    scores = replica.evaluate([0], last_rounds=[None])
    replica.comm.close()
    return {stage: clients[0] for stage, clients in scores.items()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_compiled_stages_in_threads_compute_what_others_do(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    results = []
    for compiled in (False, True):
        pipeline = {"cut": [1], "compile": compiled, "colocate": True}
        config = tiny_config(
            model={"num_hidden_layers": 2}, pipeline=pipeline, federation=ONE_REPLICA
        )
        results.append(_united(run_distributed(_train, 1, config, data, timeout_s=300.0)))
    _assert_equal(*results, atol=1e-5)


def test_local_loss_sends_nothing_backwards(tmp_path: Path) -> None:
    config = tiny_config(federation=ONE_REPLICA)
    *_, sent = _united(run_distributed(_train, 2, config, tiny_data(tmp_path)))
    hidden, targets = 2 * 16 * 32 * 4, 2 * 2 * 2 * 4
    assert sent == {(0, "fwd"): STEPS * 3 * (hidden + targets)}


def test_only_masked_positions_go_home_and_only_their_gradients_come_back(tmp_path: Path) -> None:
    config = tiny_config(
        pipeline={"cut": [1, 2], "head_location": "client"}, federation=ONE_REPLICA
    )
    *_, sent = _united(run_distributed(_train, 3, config, tiny_data(tmp_path)))
    hidden, masked, positions = 2 * 16 * 32 * 4, 2 * 2 * 32 * 4, 2 * 2 * 4
    messages = STEPS * 3
    assert sent == {
        (0, "fwd"): messages * (hidden + positions),
        (1, "fwd"): messages * (hidden + positions),
        (1, "home"): messages * masked,
        (2, "home"): messages * masked,
        (3, "bwd"): messages * masked,
        (4, "bwd"): messages * masked,
    }


@pytest.mark.parametrize(
    ("cut", "objective", "schedule"),
    [
        ([2], "local_loss", "streaming"),
        ([1, 2, 3], "local_loss", "streaming"),
        ([1, 3], "end_to_end", "1f1b"),
        ([0], "end_to_end", "sequential"),
    ],
)
def test_a_head_at_home_learns_what_a_head_on_the_server_does(
    cut: list[int], objective: str, schedule: str, tmp_path: Path
) -> None:
    """A server stage and its head are one back-propagated piece, wherever the head is."""
    data = tiny_data(tmp_path)
    pipeline = {"cut": cut, "objective": objective, "schedule": schedule}
    sections = {
        "model": {"tie_word_embeddings": False},
        "federation": ONE_REPLICA,
        "optimizer": {"max_grad_norm": 0.0},
    }
    server = tiny_config(pipeline=pipeline, **sections)
    home = tiny_config(pipeline={**pipeline, "head_location": "client"}, **sections)
    a = _united(run_distributed(_train, server.world_size, server, data))
    b = _united(run_distributed(_train, home.world_size, home, data))
    for (loss_a, _), (loss_b, _) in zip(a[0][max(a[0])], b[0][max(b[0])], strict=True):
        assert abs(loss_a - loss_b) <= ATOL
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], atol=10 * ATOL, err_msg=name)


def test_end_to_end_sends_one_gradient_per_activation(tmp_path: Path) -> None:
    config = tiny_config(
        pipeline={"objective": "end_to_end", "schedule": "1f1b"}, federation=ONE_REPLICA
    )
    *_, sent = _united(run_distributed(_train, 2, config, tiny_data(tmp_path)))
    assert sent[1, "bwd"] == STEPS * 3 * 2 * 16 * 32 * 4


def _plain_pytorch(env: ProcessEnv, config: RunConfig, data: PreparedData) -> Any:
    """The unsplit transformers model, trained by a plain loop on the same batches."""
    import torch

    from fedpipe.models.stage import build_stage
    from fedpipe.pipeline.optimizer import build_optimizer

    replica = _replica(env, config, data)  # for its batches; one stage, not trained
    replica.hf_config.tie_word_embeddings = replica.specs[0].decoder == "shared"
    stage, _ = build_stage(replica.specs[0], replica.hf_config, seed=config.seed)
    model = stage.family.masked_lm_class()(replica.hf_config)
    head = model.get_submodule(stage.family.head)
    head.decoder.bias = head.bias  # one tensor in transformers 4.x, two in 5.x
    model.load_state_dict(stage.state_dict())
    optimizer = build_optimizer(model, config.optimizer)
    source = replica.training_source(0, start=0)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro_batch in range(config.pipeline.num_micro_batches):
            ids, targets = source(step, micro_batch)
            labels = torch.full_like(ids, -100).scatter(1, targets[0].long(), targets[1].long())
            loss = model(input_ids=ids, labels=labels).loss / config.pipeline.num_micro_batches
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total, float(norm)))
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    replica.comm.close()
    return {0: losses}, weights, {}


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize(
    ("schedule", "head_location", "tied"),
    [
        ("1f1b", "server", False),
        ("sequential", "server", False),
        ("1f1b", "client", True),
        ("sequential", "client", True),
        ("sequential", "client", False),
    ],
)
def test_end_to_end_over_the_cut_equals_plain_pytorch(
    schedule: str, head_location: str, tied: bool, family: str, tmp_path: Path
) -> None:
    data = tiny_data(tmp_path)
    pipeline = {
        "objective": "end_to_end",
        "schedule": schedule,
        "cut": [1, 3],
        "head_location": head_location,
    }
    sections = {
        "model": {"family": family, "tie_word_embeddings": tied},
        "federation": ONE_REPLICA,
        "optimizer": {"max_grad_norm": 0.0},  # each stage would clip by its own norm
    }
    config = tiny_config(pipeline=pipeline, **sections)
    whole = tiny_config(pipeline={**pipeline, "cut": [], "head_location": "server"}, **sections)
    split = _united(run_distributed(_train, 3, config, data))
    plain = _united(run_distributed(_plain_pytorch, 1, whole, data))
    assert any(name.endswith("decoder.weight") for name in split[1]) is not tied
    for (a, _), (b, _) in zip(split[0][max(split[0])], plain[0][0], strict=True):
        assert abs(a - b) <= ATOL
    for name, expected in plain[1].items():
        np.testing.assert_allclose(split[1][name], expected, atol=2e-5, err_msg=name)


def _first_gradients(
    env: ProcessEnv, config: RunConfig, data: PreparedData, scale: float
) -> dict[str, Any]:
    """Gradients of the first local step, the last stage's loss multiplied by ``scale``."""
    replica = _replica(env, config, data)
    gradients: dict[str, Any] = {}
    for engine in replica.stages:
        if engine.spec.is_last:
            plain = engine.stage.loss
            engine.stage.loss = lambda *a, f=plain, **k: f(*a, **k) * scale
        step = engine.engine.step

        def record(engine: Any = engine, step: Any = step) -> None:
            for name, parameter in engine.stage.named_parameters():
                gradients[name] = parameter.grad.clone().numpy()
            step()

        engine.engine.step = record
    replica.engine.train(
        range(1), source=replica.training_source(0, start=0), lr=lambda s: 1e-3,
        on_step=lambda stage, result: None,
    )  # fmt: skip
    replica.comm.close()
    return gradients


@pytest.mark.parametrize("head_location", ["server", "client"])
def test_scaling_a_later_loss_changes_no_earlier_gradient(
    head_location: str, tmp_path: Path
) -> None:
    config = tiny_config(
        pipeline={"head_location": head_location},
        federation=ONE_REPLICA,
        optimizer={"max_grad_norm": 0.0},
    )
    data = tiny_data(tmp_path)
    client, server = run_distributed(_first_gradients, 2, config, data, 1.0)
    client_scaled, server_scaled = run_distributed(_first_gradients, 2, config, data, 1000.0)
    encoder = [name for name in client if not name.startswith("lm_head.")]
    assert encoder
    for name in encoder:
        np.testing.assert_array_equal(client[name], client_scaled[name], err_msg=name)
    scaled, plain = client_scaled | server_scaled, client | server
    for name in ("lm_head.dense.weight", "roberta.encoder.layer.3.output.dense.weight"):
        np.testing.assert_allclose(scaled[name], 1000 * plain[name], rtol=1e-3, atol=1e-3)


def test_data_parallel_ranks_equal_one_rank_with_their_batches(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    two = tiny_config(federation={**ONE_REPLICA, "data_parallel_degree": 2})
    results = run_distributed(_train, 4, two, data)
    wide = tiny_config(pipeline={"micro_batch_size": 4}, federation=ONE_REPLICA)
    expected = _united(run_distributed(_train, 2, wide, data))
    # The masks of a batch come from its first block, so only the split of batches can differ.
    assert np.isfinite([loss for loss, _ in results[0][0][0]]).all()
    for stage in (0, 1):
        for name, weight in results[stage][1].items():
            np.testing.assert_array_equal(weight, results[stage + 2][1][name], err_msg=name)
    assert expected[1].keys() == (results[0][1] | results[1][1]).keys()


def _opened_shards(env: ProcessEnv, config: RunConfig, data: PreparedData) -> set[str]:
    """Corpus files that this process has mapped or open while it trains on client 1."""
    replica = _replica(env, config, data)
    source = replica.training_source(1, start=0)
    opened: set[str] = set()

    def look(stage: int, result: Any) -> None:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        files = [line.split()[-1] for line in maps.splitlines() if line.endswith(".bin")]
        files += [str(p.resolve()) for p in Path("/proc/self/fd").iterdir() if p.exists()]
        opened.update(Path(f).name for f in files if f.endswith(".bin"))

    replica.engine.train(range(2), source=source, lr=lambda step: 1e-3, on_step=look)
    replica.comm.close()
    return opened


def test_a_first_stage_opens_its_clients_shard_and_a_later_one_none(tmp_path: Path) -> None:
    config = tiny_config(federation=ONE_REPLICA)
    client, server = run_distributed(_opened_shards, 2, config, tiny_data(tmp_path))
    assert client == {"train_1.bin"}
    assert server == set()
