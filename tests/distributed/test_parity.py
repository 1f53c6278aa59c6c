"""The loop of the parity study against the engine: so the study speaks about the product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.distributed.env import ProcessEnv
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny import tiny_config, tiny_data

STEPS = 6
END_TO_END = {"objective": "end_to_end", "schedule": "1f1b"}


def _engine(env: ProcessEnv, config: RunConfig, data: PreparedData) -> list[list[float | None]]:
    """Losses by step and stage."""
    from fedpipe.commands.pretrain.replica import PretrainingReplica
    from fedpipe.distributed.comm import Comm
    from fedpipe.distributed.topology import Grid
    from fedpipe.models.split import pipeline_edges
    from fedpipe.pipeline.optimizer import learning_rate

    comm = Comm(Grid.from_config(config), env, edges=pipeline_edges(config.pipeline))
    replica = PretrainingReplica(config, data, comm=comm)
    losses: list[list[float | None]] = [[None] * config.pipeline.num_stages for _ in range(STEPS)]

    def record(stage: int, result: Any) -> None:
        losses[result.step][stage] = result.loss

    replica.engine.train(
        range(STEPS),
        source=replica.training_source(0, start=0),
        lr=lambda step: learning_rate(config.optimizer, step, total_steps=STEPS),
        on_step=record,
    )
    comm.close()
    return losses


@pytest.fixture(autouse=True)
def _study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.parametrize(
    "pipeline",
    [{}, {"cut": (1, 2, 3), "local_head": "mlm+layer"}, END_TO_END],
    ids=["mlm", "mlm+layer", "end_to_end"],
)
def test_the_study_trains_as_the_engine_does(pipeline: dict[str, Any], tmp_path: Path) -> None:
    from parity_methods import Method, Trainer

    data = tiny_data(tmp_path)
    sections = {"federation": {"num_replicas": 1, "clients_per_round": 1}}
    base = tiny_config(**sections)
    together = tiny_config(**sections, pipeline={**pipeline, "colocate": True})
    (expected,) = run_distributed(_engine, 1, together, data)
    found = list(Trainer(base, data, Method(pipeline=pipeline)).steps(STEPS))
    for ours, theirs in zip(found, expected, strict=True):
        assert [loss is None for loss in ours] == [loss is None for loss in theirs]
        values = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
        np.testing.assert_allclose(*zip(*values, strict=True), atol=1e-5)
    assert found[-1][-1] < found[0][-1], "the steps lower the loss"


def _client(data: PreparedData, method: Any, scale: float) -> dict[str, np.ndarray]:
    """The first stage a step after the method's rarest one, the final loss times ``scale``."""
    from parity_methods import Trainer

    config = tiny_config(
        federation={"num_replicas": 1, "clients_per_round": 1},
        optimizer={"max_grad_norm": 0.0, "name": "sgd", "lr": 0.1},
    )
    trainer = Trainer(config, data, method)
    final, plain = trainer.stages[-1], trainer.stages[-1].loss
    final.loss = lambda *args, **options: plain(*args, **options) * scale
    for _ in trainer.steps(method.period + 2):
        pass
    return {n: p.detach().numpy().copy() for n, p in trainer.stages[0].named_parameters()}


def test_the_first_stage_hears_of_later_losses_where_a_method_says_so(tmp_path: Path) -> None:
    from parity import methods

    data = tiny_data(tmp_path)
    for name, method in methods().items():
        plain, scaled = _client(data, method, 1.0), _client(data, method, 10.0)
        same = all(np.array_equal(plain[key], scaled[key]) for key in plain)
        assert same == (method.backward == "nothing"), name
