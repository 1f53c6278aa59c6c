"""The configuration of a fine-tuning: presets load, wrong values are refused by their key."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fedpipe.commands.finetune.command import (
    check_library,
    count_here,
    find_grid,
    finetune,
)
from fedpipe.config.finetune import finetune_presets, load_finetune
from fedpipe.config.load import to_yaml
from fedpipe.errors import CheckpointError, ConfigError
from tests.helpers.cases import every

WRONG = [
    ("method.nam=full", "method.nam: unknown key in an override. Did you mean method.name?"),
    ("reduction_factor=2", "Did you mean method.reduction_factor?"),
    ("method.name=lorra", "method.name: expected one of full, houlsby"),
    ("method.rank=0", "method.rank: expected 1 or more"),
    ("method.alpha=0", "method.alpha: expected 1 or more"),
    ("method.matrices=[]", "method.matrices: expected at least one"),
    ("method.matrices=[x]", "method.matrices[0]: expected one of q, k, v"),
    ("method.dropout=1", "method.dropout: expected a value in [0, 1)"),
    ("method.prefix_length=0", "method.prefix_length: expected 1 or more"),
    ("method.reduction_factor=-1", "method.reduction_factor: expected a value above 0"),
    ("method={name: full, path: x}", "method.path: expected empty with method.name=full"),
    ("method.first_layer=-1", "method.first_layer: expected 0 or more"),
    ("method={name: full, first_layer: 1}", "method.first_layer: expected 0 with method.name=full"),
    ("method={name: pfeiffer_inv, first_layer: 1}", "method.first_layer: expected 0 with method"),
    ("task.max_length=4", "task.max_length: expected 8 or more"),
    ("task.max_train_examples=-1", "task.max_train_examples: expected 0 or more"),
    ("task.dirichlet_alpha=0", "task.dirichlet_alpha: expected a value above 0"),
    ("task.column=journal", "task.column: expected a column's name with task.split=column"),
    ("task.split=column", "task.column: expected a column's name with task.split=column"),
    ("scenario.dropout_share=1", "scenario.dropout_share: expected a value in [0, 1)"),
    ("scenario.straggler_share=-1", "scenario.straggler_share: expected a value in [0, 1)"),
    ("scenario.straggler_work=0", "scenario.straggler_work: expected a value in (0, 1]"),
    ("scoring.batch_size=0", "scoring.batch_size: expected 1 or more"),
    (
        "optimizer.name=muon",
        "optimizer.name: expected adamw, adam or sgd in fine-tuning, got 'muon'",
    ),
    ("batch_size=0", "batch_size: expected 1 or more"),
    ("hang_timeout_s=-1", "hang_timeout_s: expected 0 or more"),
    ("pipeline.colocate=true", "pipeline.cut: expected a cut with other keys of pipeline, got []"),
    ("pipeline={cut: [2, 1]}", "pipeline.cut: expected increasing layer indices"),
    ("pipeline={cut: [1], objective: end_to_end}", "pipeline.schedule: expected 1f1b or sequen"),
    ("pipeline={cut: [1], num_client_stages: 3}", "pipeline.num_client_stages: expected 1..2"),
    ("pipeline={cut: [1], num_micro_batches: 0}", "pipeline.num_micro_batches: expected 1 or"),
    ("pipeline={cut: [1], num_micro_batches: 3}", "batch_size: expected a multiple of pipeline."),
    ("pipeline={cut: [1], local_head: mlm}", "pipeline.local_head: unknown key"),
    ("deepspeed.config=x.json", "deepspeed.config: expected nothing without pipeline.cut"),
    ("federation.average.aux_head=false", "federation.average.aux_head: expected true without"),
    ("federation.clients_per_round=9", "federation.clients_per_round: expected 1..4"),
]


@every(("override", "expected"), WRONG)
def test_a_wrong_value_is_refused_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_finetune(None, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_WITH_A_CUT = [
    ("task.name=causal-lm", "pipeline.cut: expected [] with task.name=causal-lm"),
    ("method.name=prefix_tuning", "method.name: expected a method whose parameters lie in layers"),
    ("method.lora_average=product", "method.lora_average: expected factors with pipeline.cut"),
    ("method.first_layer=1", "method.first_layer: expected 0 with pipeline.cut"),
    ("model.precision=bf16", "model.precision: expected auto with pipeline.cut"),
    ("federation.server=sequential", "federation.server: expected replicated in fine-tuning"),
    (
        "pipeline={cut: [0], objective: end_to_end, schedule: 1f1b}",
        "pipeline.cut: expected 1 or more first, with lora and end_to_end, got [0]",
    ),
]


@every(("override", "expected"), WRONG_WITH_A_CUT)
def test_what_a_cut_does_not_go_with_is_refused_in_one_line(override: str, expected: str) -> None:
    cut = [] if override.startswith("pipeline") else ["pipeline.cut=[2]"]
    alone = ["federation.num_replicas=1"]  # what a sequential server needs
    with pytest.raises(ConfigError) as caught:
        load_finetune(None, [*cut, *alone, override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", [None, *finetune_presets()])
def test_what_is_written_down_is_read_back(preset: str | None, tmp_path: Path) -> None:
    config = load_finetune(None, [], preset=preset)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_finetune(str(tmp_path / "config.yaml"), []) == config


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--preset: expected one of fate-sentiment, hilmkil"):
        load_finetune(None, [], preset="hilmkill")


def test_a_grid_is_not_laid_over_another(tmp_path: Path) -> None:
    def grid(*axes: str) -> Any:
        return find_grid(None, [], axes, str(tmp_path / "run"), preset=None)

    first = grid("method.name=lora,full")
    assert [cell.name for cell in first.cells] == ["lora", "full"]
    assert grid("method.name=lora,full") == grid() == first
    expected = (
        r"run: expected the grid of the fine-tunings that is there, method\.name=lora,full,"
        r" got seed=1,2\. Continue it with --run-dir alone"
    )
    with pytest.raises(CheckpointError, match=expected):
        grid("seed=1,2")


def test_a_run_of_a_grid_that_has_begun_keeps_the_model_that_it_began_with(tmp_path: Path) -> None:
    def grid() -> Any:
        return find_grid(None, [], ["method.name=lora,full"], str(tmp_path), preset=None)

    cell = grid().cells[0]
    assert cell.config.model.path == "quickstart"
    settled = replace(cell.config, model=replace(cell.config.model, path="untrained"))
    cell.run.write(to_yaml(settled))
    (cell.run_dir / "metrics.jsonl").touch()
    assert [c.config.model.path for c in grid().cells] == ["untrained", "quickstart"]
    assert load_finetune(cell.run.saved, []).model.path == "untrained"


def test_without_the_adapters_library_the_way_to_get_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    expected = r"adapters library to be installed, got none\. Install it: pip install"
    with pytest.raises(ConfigError, match=expected):
        finetune(None, [], str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=expected):
        count_here()
    assert not list(tmp_path.iterdir())


def test_a_transformers_that_the_adapters_library_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["transformers~=4.57.6", "torch"])
    monkeypatch.setattr(metadata, "version", lambda name: "5.24.0")
    expected = r"transformers ~=4\.57\.6, which the adapters library needs, got 5\.24\.0\. Install"
    with pytest.raises(ConfigError, match=expected):
        count_here()
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.9")
    check_library()
