"""Presets: the published systems as settings, found wherever fedpipe is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpipe.commands.plan.plan import build_plan
from fedpipe.config.load import diff, load_config, preset_names
from fedpipe.config.schema import RunConfig
from fedpipe.errors import ConfigError
from tests.helpers.cases import every

REPOSITORY = Path(__file__).parents[2]
OVERLAY = str(REPOSITORY / "launch/configs/scaled_down.yaml")
FILES = REPOSITORY / "fedpipe/config/presets"


def preset(name: str, *overrides: str, path: str | None = None) -> RunConfig:
    return load_config(path, overrides, preset=name)


def test_every_system_of_the_comparison_has_a_preset() -> None:
    assert preset_names() == [
        "bioclinical-modernbert", "diloco", "fedbert", "fedbert-6-6", "fedbert-parallel",
        "fedbiobert-1-3", "fedbiobert-2-10", "fedbiobert-2-2", "fedbiobert-4-8", "fedbiobert-6-6",
        "muloco",
    ]  # fmt: skip
    assert all(preset(name).name == name for name in preset_names())


def test_default_gives_way_to_preset_to_file_to_override(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("federation:\n  num_rounds: 5\noptimizer:\n  lr: 1e-4\n", encoding="utf-8")
    config = preset("fedbiobert-4-8", "optimizer.lr=2e-4", path=str(file))
    assert config.optimizer.lr == 2e-4, "the override's"
    assert config.federation.num_rounds == 5, "the file's"
    assert config.pipeline.cut == (4,), "the preset's"
    assert config.federation.server_optimizer.name == "fedavg", "the default"


def test_a_preset_alone_takes_nothing_from_the_quick_start() -> None:
    assert preset("fedbert").validation == RunConfig().validation
    assert load_config(None, []).validation != RunConfig().validation


def test_an_unknown_preset_names_them_all_and_the_closest() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("fedbiobert_4-8")
    expected = ", ".join(preset_names())
    assert str(caught.value) == (
        f"--preset: expected one of {expected}, got 'fedbiobert_4-8'. Did you mean fedbiobert-4-8?"
    )


def test_a_path_is_no_preset() -> None:
    with pytest.raises(ConfigError, match=r"^--preset: expected one of .*, got '\.\./quickstart'"):
        preset("../quickstart")


@pytest.mark.parametrize(
    "name", ["fedbiobert-2-10", "fedbiobert-6-6", "fedbiobert-1-3", "fedbiobert-2-2"]
)
def test_the_fedbiobert_presets_differ_in_size_and_cut_only(name: str) -> None:
    size = ["model.size", "model.intermediate_size", "optimizer.end_lr"]
    small = preset(name).model.size == "small"
    changed = set(diff(preset("fedbiobert-4-8"), preset(name)))
    assert changed == {"name", "pipeline.cut", *(size if small else [])}


def test_the_6_6_baseline_differs_in_objective_and_schedule_only() -> None:
    base, ours = preset("fedbert-6-6"), preset("fedbiobert-6-6")
    assert list(diff(base, ours)) == [
        "name", "pipeline.objective", "pipeline.schedule", "pipeline.micro_batch_size",
        "pipeline.num_micro_batches",
    ]  # fmt: skip
    assert base.blocks_per_step == ours.blocks_per_step == 16


def test_the_base_model_has_the_published_parts() -> None:
    # Theirs: client 53.40 M with an unused pooler of D (D + 1), server 56.70 M, head 24.46 M with
    # the positions, types and LayerNorm of a dead embedding table.
    client, server, head = build_plan(preset("fedbiobert-4-8")).stages
    pooler, dead = 768 * 769, (514 + 2 + 2) * 768
    assert client.num_parameters + pooler == pytest.approx(53.40e6, abs=5e3)
    assert server.num_parameters == pytest.approx(56.70e6, abs=5e3)
    assert head.num_parameters + dead == pytest.approx(24.46e6, abs=5e3)


def test_fedberts_two_strategies_differ_in_the_server_only() -> None:
    assert list(diff(preset("fedbert"), preset("fedbert-parallel"))) == [
        "name", "federation.num_replicas", "federation.server",
    ]  # fmt: skip


def test_diloco_has_momentum_outside_and_muloco_muon_inside() -> None:
    outer = preset("diloco").federation.server_optimizer
    assert (outer.name, outer.nesterov, outer.lr, outer.betas[0]) == ("fedavgm", True, 0.7, 0.9)
    changed = diff(preset("diloco"), preset("muloco"))
    assert list(changed) == ["name", "optimizer.name"]
    assert preset("muloco").optimizer.name == "muon"


@every("name", preset_names())
def test_labels_stay_at_home_in_every_preset(name: str) -> None:
    pipeline = preset(name).pipeline
    assert pipeline.head_location == "client" or not pipeline.cut, "a client has all of the model"


@every("name", preset_names())
def test_the_overlay_changes_sizes_and_never_the_method(name: str) -> None:
    whole, scaled = preset(name), preset(name, path=OVERLAY)
    method = {
        "name", "seed", "model.num_hidden_layers", "federation.server", "federation.num_replicas",
        "federation.optimizer_state", *(f"pipeline.{key}" for key in (
            "objective", "schedule", "cut", "head_location", "local_head", "num_client_stages")),
    }  # fmt: skip
    changed = diff(whole, scaled)
    assert not method & set(changed)
    assert {"model.hidden_size", "data.sequence_length"} <= set(changed)
    assert scaled.world_size <= 4


@every("name", preset_names())
def test_every_preset_says_where_it_is_from_and_what_it_corrects(name: str) -> None:
    header = (FILES / f"{name}.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    for word in ("# Source: ", "# Corrected here:", "# Not published, chosen here: "):
        assert word in header
