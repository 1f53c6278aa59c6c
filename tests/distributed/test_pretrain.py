"""Rounds of federated pre-training with real processes: averaging, kept parts, resume."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData, save_manifest
from fedpipe.distributed.env import ProcessEnv
from fedpipe.report.writer import read_metrics
from fedpipe.run.checkpoint import find_latest
from fedpipe.run.run_dir import RunSetup
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

TIMES = ("seconds", "tokens_per_s", "sync_s")


def _setup(config: RunConfig, data: PreparedData, run_dir: Path) -> RunSetup:
    save_manifest(data, Path(data.directory))
    run_dir.mkdir(exist_ok=True)
    checkpoint, _ = find_latest(run_dir)
    return RunSetup(
        config=config,
        run_dir=run_dir,
        data_dir=data.directory,
        checkpoint=checkpoint,
        started_at=time.monotonic(),
    )


def _pretrain(env: ProcessEnv, setup: RunSetup, patch: Callable[[], None] | None = None) -> None:
    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.federation.loop import run_rounds

    if patch:
        patch()
    run_rounds(Pretraining, setup, env=env, emit=lambda kind, record: None)


def _run(
    config: RunConfig, data: PreparedData, run_dir: Path, patch: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Run to the end; return the records without wall times."""
    run_distributed(_pretrain, config.world_size, _setup(config, data, run_dir), patch)
    return _records(run_dir)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in TIMES} for r in records if r["kind"] != "system"
    ]


def _losses(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted(
        (r["round"], r["step"], r["stage"], r["loss"])
        for r in records
        if r["kind"] == "step" and r["replica"] == 0
    )


def _everyone_reads_client_0() -> None:
    from fedpipe.commands.pretrain.replica import PretrainingReplica

    original = PretrainingReplica.training_source
    PretrainingReplica.training_source = lambda self, client_id, *, start: original(
        self, 0, start=start
    )


@pytest.mark.parametrize(
    "pipeline",
    [
        {},
        {"cut": [1, 3]},
        {"head_location": "client"},
        {
            "head_location": "client", "objective": "end_to_end", "schedule": "sequential",
            "cut": [0],
        },
    ],
    ids=str,
)  # fmt: skip
def test_one_process_equals_stages_in_processes_equals_identical_replicas(
    pipeline: dict[str, Any], tmp_path: Path
) -> None:
    data = tiny_data(tmp_path / "data", num_clients=4, identical=True)
    federation = {"num_clients": 4, "clients_per_round": 1, "num_replicas": 1}
    one = tiny_config(federation=federation, pipeline={**pipeline, "colocate": True})
    stages = tiny_config(federation=federation, pipeline=pipeline)
    federation |= {"num_replicas": 2, "clients_per_round": 2}
    replicas = tiny_config(federation=federation, pipeline=pipeline)
    reference = _run(one, data, tmp_path / "one", _everyone_reads_client_0)
    in_processes = _run(stages, data, tmp_path / "stages", _everyone_reads_client_0)
    replicated = _run(replicas, data, tmp_path / "replicas", _everyone_reads_client_0)
    num_stages = one.pipeline.num_virtual_stages
    assert len(_losses(reference)) == 2 * 3 * num_stages
    for other in (in_processes, replicated):
        np.testing.assert_allclose(
            np.array(_losses(other), float), np.array(_losses(reference), float), atol=2e-6
        )


def _synchronize(env: ProcessEnv, config: RunConfig, data: PreparedData, weights: list[float]):  # type: ignore[no-untyped-def]
    import torch

    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.federation.cohort import Turn
    from fedpipe.models.split import pipeline_edges

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    replica = PretrainingReplica(config, data, comm=comm)
    result = {}
    for engine in replica.stages:
        synchronizer = replica.synchronizers[engine.spec.stage_id]
        first = {n: p.detach().clone() for n, p in engine.stage.named_parameters()}
        if weights[comm.replica]:
            with torch.no_grad():
                for parameter in engine.stage.parameters():
                    parameter.fill_(1.0 + comm.replica)
            turn = Turn(
                client_id=0,
                replica_id=0,
                num_steps=1,
                num_examples=1,
                num_tokens=1,
                weight=weights[comm.replica],
            )
            synchronizer.take_update(turn.client_id, weight=turn.weight, round_id=0)
        synchronizer.synchronize()
        kept = synchronizer.kept_state()
        synchronizer.set_weights(None)
        result |= {
            n: (p.detach().numpy().copy(), first[n].numpy(), n in kept)
            for n, p in engine.stage.named_parameters()
            if n not in engine.stage.copied
        }
    comm.close()
    return result


def test_averaging_equals_the_weighted_mean_by_hand(tmp_path: Path) -> None:
    config = tiny_config(federation={"num_replicas": 3, "clients_per_round": 3})
    results = run_distributed(
        _synchronize, 6, config, tiny_data(tmp_path), [0.25, 0.75, 0.0]
    )  # the third replica is idle
    for result in results:
        for name, (mean, _, _) in result.items():
            np.testing.assert_allclose(mean, 0.25 * 1.0 + 0.75 * 2.0, rtol=1e-6, err_msg=name)


def test_parts_that_are_kept_start_from_the_first_values(tmp_path: Path) -> None:
    average = {"embeddings": False, "server_layers": False}
    config = tiny_config(federation={"average": average})
    results = run_distributed(_synchronize, 4, config, tiny_data(tmp_path), [0.5, 0.5])
    kept = {n for result in results for n, (*_, is_kept) in result.items() if is_kept}
    assert {n.split(".layer.")[0] for n in kept} == {
        "roberta.encoder",
        *(n for n in kept if ".embeddings." in n),
    }
    assert all(int(n.split(".")[3]) >= 2 for n in kept if ".layer." in n)
    for result in results:
        for name, (value, first, is_kept) in result.items():
            expected = first if is_kept else np.full_like(value, 1.5)
            np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


def test_kept_parts_follow_the_client_to_another_replica(tmp_path: Path) -> None:
    """Three clients on two replicas: in some round a client changes its replica."""
    config = tiny_config(
        federation={
            "average": {"embeddings": False, "client_layers": False, "aux_head": False},
            "num_rounds": 5, "clients_per_round": 2, "num_local_steps": 1,
            "optimizer_state": "keep",
        },
        checkpoint={"keep_last": 5},
        optimizer={"lr": 0.05, "warmup_ratio": 0.0, "decay": "constant"},
    )  # fmt: skip
    run_dir = tmp_path / "run"
    records = _run(config, tiny_data(tmp_path / "data"), run_dir)
    hosts: dict[int, set[int]] = {}
    for record in records:
        if record["kind"] == "step":
            hosts.setdefault(record["client"], set()).add(record["replica"])
    assert any(len(replicas) == 2 for replicas in hosts.values()), "the seed moves a client"
    import torch

    last = sorted((run_dir / "clients").glob("client_*/stage_00_*"))
    assert len(last) >= len(hosts)
    by_client: dict[str, list[Path]] = {}
    for path in last:
        by_client.setdefault(path.parent.name, []).append(path)
    for paths in by_client.values():
        newest = torch.load(paths[-1], weights_only=True)
        turns = newest["optimizer"]["state"][0]["step"].item()
        client = int(paths[0].parent.name.split("_")[1])
        trained = sum(
            r["kind"] == "step" and r["client"] == client and r["stage"] == 0 for r in records
        )
        assert turns == trained, "the optimizer has seen every step of its client, and no other"
        assert not any(n.startswith("lm_head") for n in newest["kept"])


@dataclasses.dataclass
class _StopAfter:
    """Die by SIGKILL after some local steps of this rank."""

    steps: int

    def __call__(self) -> None:
        import os
        import signal

        from fedpipe.pipeline.stage_engine import StageEngine

        original = StageEngine._optimizer_step
        left = [self.steps]

        def dying(engine: Any, cmd: Any) -> None:
            original(engine, cmd)
            left[0] -= 1
            if left[0] == 0 and engine.spec.stage_id == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        from fedpipe.pipeline import schedule as ops

        StageEngine._INSTRUCTION_MAP = StageEngine._INSTRUCTION_MAP | {ops.OptimizerStep: dying}


@pytest.mark.matrix(sample=3)
@pytest.mark.parametrize(
    ("killed_after", "keep", "head_location"),
    [
        *((after, keep, "server") for after in (2, 5, 9) for keep in ("reset", "keep")),
        (5, "keep", "client"),
        (9, "reset", "client"),
    ],
)
def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(
    killed_after: int, keep: str, head_location: str, tmp_path: Path
) -> None:
    data = tiny_data(tmp_path / "data")
    config = tiny_config(
        model={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        federation={
            "optimizer_state": keep, "clients_per_round": 3, "num_rounds": 3,
            "average": {"embeddings": keep == "reset", "final_head": keep == "reset"},
        },
        pipeline={"head_location": head_location},
        checkpoint={"every_steps": 2},
    )  # fmt: skip
    undisturbed = _run(config, data, tmp_path / "undisturbed")
    run_dir = tmp_path / "killed"
    with pytest.raises(AssertionError, match="died silently|failed"):
        _run(config, data, run_dir, _StopAfter(killed_after))
    resumed = _run(config, data, run_dir)
    assert resumed == undisturbed
    finals = [
        {f.name: load_file(f) for f in sorted(d.glob("checkpoints/round_000003/*.safetensors"))}
        for d in (tmp_path / "undisturbed", run_dir)
    ]
    assert finals[0].keys() == finals[1].keys()
    assert len(finals[0]) == config.pipeline.num_virtual_stages
    for file, tensors in finals[0].items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, finals[1][file][name], err_msg=name)


def _count_looks_back(env: ProcessEnv, setup: RunSetup) -> tuple[int, int]:
    """Pre-train; return how often the record was opened and how many cohorts were drawn."""
    import sys

    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.federation import cohort
    from fedpipe.federation.loop import run_rounds

    opened, drawn, draw = [], [], cohort.draw_cohort

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("metrics.jsonl"):
            opened.append(arguments)

    def drawn_again(*arguments: Any, **keywords: Any) -> Any:
        drawn.append(keywords)
        return draw(*arguments, **keywords)

    sys.addaudithook(count)
    cohort.draw_cohort = drawn_again
    run_rounds(Pretraining, setup, env=env, emit=lambda kind, record: None)
    return len(opened), len(drawn)


def test_a_round_costs_the_same_however_many_came_before(tmp_path: Path) -> None:
    """The record is opened at the start only, and every cohort is drawn once."""
    rounds = 5
    config = tiny_config(
        federation={"num_rounds": rounds, "num_replicas": 1, "num_local_steps": 1},
        pipeline={"colocate": True}, checkpoint={"every_steps": 1},
    )  # fmt: skip
    setup = _setup(config, tiny_data(tmp_path / "data"), tmp_path / "run")
    ((opened, drawn),) = run_distributed(_count_looks_back, 1, setup)
    assert drawn == rounds
    assert opened == 2, "to be written and to see whether its last line is whole"


def test_the_ledger_of_a_local_loss_run_has_no_backward_byte(tmp_path: Path) -> None:
    records = _run(tiny_config(), tiny_data(tmp_path / "data"), tmp_path / "run")
    traffic = [r for r in records if r["kind"] == "traffic"]
    hidden, targets = 2 * 16 * 32 * 4, 2 * 2 * 2 * 4
    assert len(traffic) == 2
    for record in traffic:
        (edge,) = record["edges"]
        assert edge["bytes_backward"] == edge["messages_backward"] == 0
        assert edge["messages_forward"] == 2 * 3 * 3  # replicas x steps x micro-batches
        assert edge["bytes_forward"] == 2 * 3 * 3 * (hidden + targets)
        assert record["collectives"]["fedavg"] > 0


def test_every_stage_is_validated_for_every_client_with_held_out_text(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data", num_clients=4)
    empty = dataclasses.replace(data.valid[1], num_blocks=0)
    data = dataclasses.replace(data, valid=(data.valid[0], empty, *data.valid[2:]))
    records = _run(tiny_config(federation={"num_clients": 4}), data, tmp_path / "run")
    first, last = (r for r in records if r["kind"] == "eval")
    for stage in (0, 1):
        scores = last["stages"][stage]
        assert scores["clients"].keys() == {"0", "2", "3"}
        blocks = [data.valid[client].num_blocks for client in (0, 2, 3)]
        mean = np.average([*scores["clients"].values()], weights=blocks)
        assert scores["loss"] == pytest.approx(mean)
        assert scores["worst_loss"] == max(scores["clients"].values())
        assert scores["loss"] < first["stages"][stage]["loss"]


def test_validation_masks_as_the_last_round_whatever_a_round_trains_with(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    scored, first = {}, {}
    for name, masking in {
        "small": {"mask_probability": 0.2},
        "large": {"mask_probability": 0.4},
        "both": {"mask_probability": [0.2, 0.4], "mask_switch": 0.5},
    }.items():
        records = _run(tiny_config(data=masking), data, tmp_path / name)
        scored[name] = [r["tokens"] for r in records if r["kind"] == "eval"]
        first[name] = [r for r in records if r["kind"] == "step" and r["round"] == 0]
    assert first["both"] == first["small"] != first["large"]
    assert scored["both"] == scored["large"] == [2 * n for n in scored["small"]]


def test_the_ledger_counts_gradients_inside_a_client(tmp_path: Path) -> None:
    federation = {"data_parallel_degree": 2, "num_replicas": 1, "clients_per_round": 1}
    config = tiny_config(federation=federation | {"num_rounds": 1})
    records = _run(config, tiny_data(tmp_path / "data"), tmp_path / "run")
    (traffic,) = (r for r in records if r["kind"] == "traffic")
    weights = load_files(tmp_path / "run")
    numel = sum(tensor.size for tensor in weights.values())
    copied = weights["roberta.embeddings.word_embeddings.weight"].size
    assert "lm_head.decoder.weight" not in weights, "it is the word embedding"
    # 3 steps, 2 ranks, each sends 2 (d - 1) / d = 1 times the float32 gradients.
    gradients = 3 * 2 * (numel + copied) * 4
    assert traffic["collectives"] == {
        "fedavg": 0, "shared_gradients": 0, "gradients": gradients, "embedding": 2 * copied * 4,
    }  # fmt: skip


def load_files(run_dir: Path) -> dict[str, np.ndarray]:
    """Tensors of the newest checkpoint, all stages."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted((run_dir / "checkpoints" / "round_000001").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
