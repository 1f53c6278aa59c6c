"""``pipeline.cut: auto``: what it stands for, who chooses, and that a run keeps what it has."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from fedpipe.commands.plan.cut import LayerCosts, best_cut, cut_lines
from fedpipe.commands.plan.measure import measure_layer_costs
from fedpipe.commands.pretrain.setup import set_up
from fedpipe.commands.study.sweep import set_up_sweep
from fedpipe.commands.throughput.command import throughput
from fedpipe.commands.throughput.report import ThroughputSettings
from fedpipe.config import load
from fedpipe.config.schema import RunConfig
from fedpipe.errors import ConfigError
from fedpipe.models.split import placement, stage_specs
from fedpipe.pipeline.timeline import StageCost
from fedpipe.run.run_dir import RunDir, resolve

TINY = (
    "model.num_hidden_layers=6", "model.hidden_size=16", "model.num_attention_heads=2",
    "model.intermediate_size=32", "pipeline.micro_batch_size=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("auto", "even"), [("auto", (3,)), ("auto:2", (3,)), ("auto:4", (1, 3, 4))]
)
def test_an_open_cut_is_even_has_passed_all_checks_and_is_written_down_as_open(
    auto: str, even: tuple[int, ...], tmp_path: Path
) -> None:
    config = load.load_config(None, [*TINY, f"pipeline.cut={auto}"])
    assert config.pipeline.is_open
    assert config.pipeline.cut == even
    (tmp_path / "config.yaml").write_text(load.to_yaml(config))
    for again in (
        load.load_config(str(tmp_path / "config.yaml"), []), load.from_dict(load.to_dict(config)),
    ):  # fmt: skip
        assert again == config and again.pipeline.is_open
    with pytest.raises(ConfigError, match=r"pipeline\.wire"):
        overrides = [*TINY, f"pipeline.cut={auto}", "pipeline.wire=[bf16,bf16,bf16,bf16]"]
        load.load_config(None, overrides)


def test_a_settled_cut_is_a_list() -> None:
    config = load.load_config(None, [*TINY, "pipeline.cut=auto"])
    settled = load.with_cut(config, (5,))
    assert not settled.pipeline.is_open
    assert settled == load.load_config(None, [*TINY, "pipeline.cut=[5]"])


def test_whoever_measures_chooses_once_and_the_run_keeps_the_choice(tmp_path: Path) -> None:
    seen = []

    def choose(config: RunConfig) -> tuple[int, ...]:
        seen.append(config.pipeline.cut)
        return (5,)

    overrides = [*TINY, "pipeline.cut=auto", f"data.cache_dir={tmp_path}/cache"]
    run, config = resolve("pretrain", None, overrides, str(tmp_path / "run"))
    assert config.pipeline.is_open
    setup = set_up(run, config, notify=lambda line: None, choose_cut=choose)
    assert seen == [(3,)]
    saved = load.load_config(str(tmp_path / "run/config.yaml"), [])
    assert setup.config == saved
    assert (saved.pipeline.cut, saved.pipeline.is_open) == ((5,), False)


@pytest.mark.parametrize("wrong", ["auto:1", "auto:x", "automatic", "auto:"])
def test_another_word_is_refused(wrong: str) -> None:
    expected = rf"pipeline.cut: expected a list, auto or auto:N for N stages, got '{wrong}'"
    with pytest.raises(ConfigError, match=expected):
        load.load_config(None, [f"pipeline.cut='{wrong}'"])


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline.cut: expected at most 6 stages"):
        load.load_config(None, [*TINY, "pipeline.cut=auto:7"])


def test_a_run_that_has_begun_keeps_its_cut_and_any_other_is_open(tmp_path: Path) -> None:
    overrides = [*TINY, "pipeline.cut=auto"]
    saved = load.load_config(None, [*TINY, "pipeline.cut=[5]"])
    RunDir.at(tmp_path, "pretrain").make().write(load.to_yaml(saved))
    assert resolve("pretrain", None, overrides, str(tmp_path))[1].pipeline.is_open
    (tmp_path / "metrics.jsonl").touch()
    pipeline = resolve("pretrain", None, overrides, str(tmp_path))[1].pipeline
    assert (pipeline.cut, pipeline.is_open) == ((5,), False)


def test_a_sweep_and_a_grid_of_measurements_want_a_list(tmp_path: Path) -> None:
    axes = ["pipeline.cut=auto,[2]"]
    expected = r"pipeline\.cut: expected a list, the same wherever a cell runs, got auto\."
    with pytest.raises(ConfigError, match=expected):
        set_up_sweep(None, TINY, axes, str(tmp_path / "sweep"), preset=None)
    with pytest.raises(ConfigError, match=expected):
        throughput(None, TINY, str(tmp_path / "tp"), grid_keys=axes, settings=ThroughputSettings())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first_cut", [0, 1])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("head_location", ["server", "client"])
def test_the_chosen_cut_is_the_best_of_all(
    head_location: str, num_stages: int, first_cut: int
) -> None:
    """Brute force over all cuts; a process' load is all that it holds."""
    layers_s = (3.0, 1.0, 4.0, 1.0, 5.0, 2.0)
    cut = (first_cut, *range(2, num_stages))
    overrides = [*TINY, f"pipeline.cut={list(cut)}", f"pipeline.head_location={head_location}"]
    config = load.load_config(None, overrides)
    specs = stage_specs(config.pipeline, num_hidden_layers=len(layers_s))
    rest_s = (7.0, 0.5, 2.5, 1.0, 1.5)[: len(specs)]
    stages = tuple(StageCost(1.0, 2.0, optimizer_s=0.25 * i) for i in range(len(specs)))
    costs = LayerCosts(layers_s=layers_s, rest_s=rest_s, stages=stages)

    def busiest(cut: tuple[int, ...]) -> float:
        pipeline = replace(config.pipeline, cut=cut)
        loads = []
        for held in placement(stage_specs(pipeline, num_hidden_layers=len(layers_s))):
            loads.append(0.0)
            for spec in held:
                own = rest_s[spec.stage_id] + sum(layers_s[spec.first_layer : spec.end_layer])
                loads[-1] += pipeline.num_micro_batches * own + stages[spec.stage_id].optimizer_s
        return max(loads)

    possible = itertools.combinations(range(first_cut, len(layers_s)), num_stages - 1)
    found = best_cut(costs, config)
    assert busiest(found) == min(map(busiest, possible))
    line = cut_lines(costs, config, cut=found)[-1]
    assert str(list(found)) in line and "predicted" in line


@pytest.mark.parametrize(
    "keys",
    [
        ("pipeline.cut=[3]",),
        ("pipeline.cut=[2,4]", "pipeline.local_head=mlm+layer"),
        ("pipeline.cut=[2,4]", "pipeline.head_location=client"),
        ("pipeline.cut=[2,4]", "pipeline.objective=end_to_end", "pipeline.schedule=1f1b"),
        ("pipeline.cut=[3]", "pipeline.activation_checkpointing=true", "model.family=bert"),
    ],
    ids=str,
)
def test_every_kind_of_stage_is_measured(keys: tuple[str, ...]) -> None:
    config = load.load_config(None, [*TINY, *keys])
    costs = measure_layer_costs(config)
    assert len(costs.layers_s) == 6
    assert len(costs.stages) == len(costs.rest_s) == config.pipeline.num_virtual_stages
    assert all(stage.forward_s > 0 for stage in costs.stages[: config.pipeline.num_stages])
    assert all(stage.optimizer_s > 0 for stage in costs.stages)
    assert len(best_cut(costs, config)) == len(config.pipeline.cut)
