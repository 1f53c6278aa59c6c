"""A client of a round whose numbers are not finite: left out as a whole, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedpipe.config.schema import RunConfig
from fedpipe.distributed.env import ProcessEnv
from fedpipe.federation.rules import krum_select, median, squared_distances, trimmed_mean
from fedpipe.run.checkpoint import find_latest
from tests.distributed.test_pretrain import _pretrain, _records, _run, _setup, _StopAfter
from tests.helpers.distributed import run_distributed
from tests.helpers.poison import Poison
from tests.helpers.tiny import tiny_config, tiny_data

FIVE = {"num_clients": 5, "clients_per_round": 5, "num_rounds": 2, "num_local_steps": 2}
UNIFORM = {"weighting": "uniform"}
BAD = 3


def _train(env: ProcessEnv, setup: Any, poison: Poison) -> dict[tuple[int, int, int], Any]:
    """Run; return what every client had trained when its turn ended, by round, client and stage."""
    from fedpipe.federation.stages import StageReplica

    end_turn = StageReplica.end_turn
    trained = {}

    def noted(stages: StageReplica, turn: Any, *, round_id: int, **keywords: Any) -> None:
        for engine in stages.stages:
            trained[round_id, turn.client_id, engine.spec.stage_id] = {
                n: p.detach().clone().numpy() for n, p in engine.stage.named_parameters()
            }
        end_turn(stages, turn, round_id=round_id, **keywords)

    StageReplica.end_turn = noted  # type: ignore[method-assign]
    _pretrain(env, setup, poison)
    return trained


def _weights(run_dir: Path, round_id: int) -> list[dict[str, np.ndarray]]:
    folder = run_dir / "checkpoints" / f"round_{round_id:06d}"
    return [load_file(file) for file in sorted(folder.glob("stage_*.safetensors"))]


def _combine(config: RunConfig, rows: list[np.ndarray]) -> np.ndarray:
    """What the rule makes of the clients that are left, by hand."""
    stacked = torch.from_numpy(np.stack(rows))
    rule = config.federation.aggregation.rule
    if rule == "median":
        return median(stacked).numpy()
    if rule == "trimmed_mean":  # the one that is left out was the one that it withstands
        return trimmed_mean(stacked, num_byzantine=0).numpy()
    return stacked.mean(0).numpy()


@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize(
    ("federation", "poison", "atol"),
    [
        ({}, Poison((BAD,)), 1e-6),
        ({"aggregation": {"rule": "median", **UNIFORM}}, Poison((BAD,), what="weights"), 1e-6),
        (
            {"aggregation": {"rule": "trimmed_mean", "num_byzantine": 1, **UNIFORM}},
            Poison((BAD,), stage=0), 1e-6,
        ),
        ({"wire": "int8"}, Poison((BAD,), stage=0, what="weights"), 2e-4),
        ({"wire": "bf16"}, Poison((BAD,), step=0), 2e-4),
    ],
    ids=["mean", "median", "trimmed mean", "int8", "bf16"],
)  # fmt: skip
def test_the_average_is_that_of_the_others_on_every_stage(
    federation: dict[str, Any], poison: Poison, atol: float, tmp_path: Path
) -> None:
    config = tiny_config(federation=FIVE | federation, checkpoint={"keep_last": 2})
    setup = _setup(config, tiny_data(tmp_path / "data", num_clients=5), tmp_path / "run")
    trained: dict[tuple[int, int, int], Any] = {}
    for part in run_distributed(_train, config.world_size, setup, poison):
        trained |= part
    for stage, weights in enumerate(_weights(tmp_path / "run", 1)):
        for name, value in weights.items():
            rows = [trained[0, client, stage][name] for client in range(5) if client != BAD]
            expected = _combine(config, rows)
            np.testing.assert_allclose(value, expected, atol=atol, rtol=1e-5, err_msg=name)
    first, second = (r for r in _records(tmp_path / "run") if r["kind"] == "round")
    (refused,) = first["refused"]
    assert (refused["client"], refused["stage"]) == (BAD, poison.stage)
    assert refused["step"] == poison.step and refused["what"] == poison.what
    assert first["weights"][first["clients"].index(BAD)] == 0.0
    assert sum(first["weights"]) == pytest.approx(1.0) and first["averaged"]
    assert None not in first["loss"], "the losses of the others"
    assert second["refused"] == [] and None not in second["loss"]
    edges = [r["edges"] for r in _records(tmp_path / "run") if r["kind"] == "traffic"]
    sent = [r["collectives"] for r in _records(tmp_path / "run") if r["kind"] == "traffic"]
    assert sent[0] == sent[1] and edges[0] == edges[1], "what travels does not depend on it"


def test_krum_chooses_among_the_others_and_keeps_the_weights_where_too_few_are_left(
    tmp_path: Path,
) -> None:
    aggregation = {"rule": "krum", "num_byzantine": 1, **UNIFORM}
    config = tiny_config(
        federation=FIVE | {"aggregation": aggregation, "num_rounds": 3},
        checkpoint={"keep_last": 3},
    )
    data = tiny_data(tmp_path / "data", num_clients=5)
    one = run_distributed(
        _train, config.world_size, _setup(config, data, tmp_path / "run"),
        Poison((BAD,), stage=0), timeout_s=180,
    )  # fmt: skip
    trained = {key: value for part in one for key, value in part.items()}
    first, *_ = (r for r in _records(tmp_path / "run") if r["kind"] == "round")
    others = [c for c in first["clients"] if c != BAD]
    for stage, weights in enumerate(_weights(tmp_path / "run", 1)):
        rows = torch.stack([
            torch.cat([torch.from_numpy(trained[0, c, stage][n]).flatten() for n in weights])
            for c in others
        ])  # fmt: skip
        chosen = krum_select(squared_distances(rows), num_byzantine=0)
        expected = rows[chosen].mean(0).numpy()
        found = np.concatenate([value.ravel() for value in weights.values()])
        np.testing.assert_allclose(found, expected, atol=1e-6)

    three = _run(config, data, tmp_path / "three", Poison((0, 1, 2), rounds=(1,)))
    _, second, third = (r for r in three if r["kind"] == "round")
    assert len(second["refused"]) == 3 and not second["averaged"] and not any(second["weights"])
    before, after = _weights(tmp_path / "three", 1), _weights(tmp_path / "three", 2)
    for old, new in zip(before, after, strict=True):
        for name, value in old.items():
            np.testing.assert_array_equal(new[name], value, err_msg=name)
    assert third["averaged"] and third["refused"] == []


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("server", ["shared", "sequential"])
def test_a_server_that_is_handed_on_goes_on_from_where_the_bad_turn_began(
    server: str, tmp_path: Path
) -> None:
    """Beside it, a run whose bad clients make no local step on the server."""
    federation = {
        "num_clients": 4, "clients_per_round": 4, "num_rounds": 1, "num_local_steps": 2,
        "server": server, "num_replicas": 2 if server == "shared" else 1,
    }  # fmt: skip
    config = tiny_config(federation=federation)
    data = tiny_data(tmp_path / "data", num_clients=4)
    from fedpipe.federation.cohort import plan_round

    turns = plan_round(config, round_id=0, blocks_per_client=[s.num_blocks for s in data.train])
    bad = turns[1].client_id
    poison = Poison((bad,), step=1)
    run_dir = tmp_path / "run"
    records = _run(config, data, run_dir, poison)
    (record,) = (r for r in records if r["kind"] == "round")
    together = {t.client_id for t in turns[:2]} if server == "shared" else {bad}
    assert {fault["client"] for fault in record["refused"]} == together
    lost = {t.client_id for t in turns if t.client_id in together}
    skipped = tmp_path / "skipped"
    run_distributed(_pretrain, config.world_size, _setup(config, data, skipped), _Skip(lost))
    for old, new in zip(_weights(skipped, 1), _weights(run_dir, 1), strict=True):
        for name, value in old.items():
            np.testing.assert_allclose(new[name], value, atol=1e-6, err_msg=name)


class _Skip:
    """Leave out the turns of some clients as if they had never been drawn."""

    def __init__(self, clients: set[int]) -> None:
        self.clients = clients

    def __call__(self) -> None:
        import dataclasses

        from fedpipe.commands.pretrain import run as pretrain

        plan = pretrain.plan_round

        def without(*arguments: Any, **keywords: Any) -> Any:
            turns = [t for t in plan(*arguments, **keywords) if t.client_id not in self.clients]
            total = sum(t.weight for t in turns)
            return tuple(dataclasses.replace(t, weight=t.weight / total) for t in turns)

        pretrain.plan_round = without


class _PoisonAndStop:
    """A bad client, and a rank that dies after some local steps."""

    def __init__(self, poison: Poison, steps: int) -> None:
        self.poison, self.steps = poison, steps

    def __call__(self) -> None:
        self.poison()
        if self.steps:
            _StopAfter(self.steps)()


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize(
    ("pipeline", "federation", "killed_after"),
    [
        ({}, {"optimizer_state": "keep", "average": {"aux_head": False, "embeddings": False}}, 3),
        ({}, {"server": "sequential", "num_replicas": 1, "data_parallel_degree": 2}, 4),
        ({"objective": "end_to_end", "schedule": "1f1b"}, {"wire": "int8"}, 5),
    ],
    ids=["kept state", "sequential", "end to end"],
)
def test_a_refused_client_survives_a_stop_bit_for_bit(
    pipeline: dict[str, Any], federation: dict[str, Any], killed_after: int, tmp_path: Path
) -> None:
    """Killed in the turn after the bad step, or in a later turn of the same round."""
    config = tiny_config(
        model={"hidden_dropout_prob": 0.1},
        pipeline=pipeline,
        federation={
            "num_clients": 4, "clients_per_round": 4, "num_rounds": 2, "num_local_steps": 3,
        } | federation,
        checkpoint={"every_steps": 1},
    )  # fmt: skip
    data = tiny_data(tmp_path / "data", num_clients=4)
    from fedpipe.federation.cohort import plan_round

    turns = plan_round(config, round_id=0, blocks_per_client=[s.num_blocks for s in data.train])
    bad = turns[0].client_id
    poison = Poison((bad,), step=1)
    undisturbed = _run(config, data, tmp_path / "undisturbed", _PoisonAndStop(poison, 0))
    run_dir = tmp_path / "killed"
    with pytest.raises(AssertionError, match="died silently|failed"):
        _run(config, data, run_dir, _PoisonAndStop(poison, killed_after))
    assert _run(config, data, run_dir, _PoisonAndStop(poison, 0)) == undisturbed
    first, _ = (r for r in undisturbed if r["kind"] == "round")
    assert [fault["client"] for fault in first["refused"]] == [bad]
    for old, new in zip(_weights(tmp_path / "undisturbed", 2), _weights(run_dir, 2), strict=True):
        for name, value in old.items():
            np.testing.assert_array_equal(new[name], value, err_msg=name)
            assert np.isfinite(value).all(), name
    for file in (run_dir / "clients").glob(f"client_{bad:04d}/*.round_000000.pt"):
        assert torch.load(file, weights_only=True) == {}, "as before its first turn"


@pytest.mark.parametrize(
    ("federation", "poison", "message"),
    [
        (
            {"on_bad_update": "stop"},
            Poison((1,), rounds=(1,)),
            r"round 2: expected finite numbers .* \(not finite: loss of client 1 at local step 2",
        ),
        (
            {},
            Poison((0, 1, 2), rounds=(1,)),
            r"round 2: expected a finite update .* got none \(not finite: loss of client",
        ),
        (  # whose square overflows in the second moment
            {"server_optimizer": {"name": "fedadam"}},
            Poison((1,), stage=0, step=2, what="weights", value=3e38),
            r"round 1: expected finite weights after .* got others \(stage 0\)",
        ),
    ],
    ids=["stop", "all bad", "bad average"],
)
def test_a_run_ends_before_anything_that_is_not_finite_is_saved(
    federation: dict[str, Any], poison: Poison, message: str, tmp_path: Path
) -> None:
    federation = {"clients_per_round": 3, "num_rounds": 2} | federation
    config = tiny_config(pipeline={"colocate": True}, federation=federation)
    with pytest.raises(AssertionError, match=rf"TrainingError: {message}"):
        _run(config, tiny_data(tmp_path / "data"), tmp_path / "run", poison)
    checkpoint, _ = find_latest(tmp_path / "run")
    for file in checkpoint.path.glob("*.safetensors") if checkpoint else ():
        assert all(np.isfinite(value).all() for value in load_file(file).values())
