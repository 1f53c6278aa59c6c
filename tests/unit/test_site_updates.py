"""Updates of sites: what is refused, and how the others become the next weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpipe.commands.consortium.config import read_consortium
from fedpipe.commands.plan.plan import build_plan
from fedpipe.config.federation import AggregationConfig, ServerOptimizerConfig
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import wrap
from fedpipe.errors import ConfigError, FederationError
from fedpipe.federation.outer import SiteUpdate, read_update, write_next_global
from fedpipe.federation.rules import (
    ServerOptimizer,
    krum_select,
    median,
    squared_distances,
    trimmed_mean,
)
from fedpipe.run.outer import (
    GLOBAL,
    GLOBAL_FACTS,
    UPDATE,
    UPDATE_FACTS,
    VERSION,
    UpdateFacts,
    digest_of,
    has_arrived,
)
from fedpipe.run.tensor_file import Layout, TensorFile, write_tensors
from fedpipe.run.update import crossing_layouts, encode, encoded_layout, write_global

LAYOUTS = {"a.weight": Layout("F32", (3, 4)), "b.bias": Layout("F32", (5,))}
DENSITY = 0.5
SITES = ("alpha", "beta", "delta", "gamma", "omega")
TOKENS = {name: 100 * (index + 1) for index, name in enumerate(SITES)}


@pytest.fixture
def config() -> RunConfig:
    return load_config(None, [])


def _draw(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(layout.shape)).astype(np.float32)
        for name, layout in LAYOUTS.items()
    }


def _flat(tensors: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([t.ravel() for t in tensors.values()]))


def _write_base(folder: Path, config: RunConfig) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    base = _draw(99)
    write_global(folder, 0, LAYOUTS, iter(base.values()), config=config)
    return base


def _write_update(
    folder: Path, base: Path, change: dict[str, np.ndarray], *, tokens: int, wire: str = "fp32"
) -> None:
    folder.mkdir(parents=True)
    layouts = {name: encoded_layout(layout, wire, DENSITY) for name, layout in LAYOUTS.items()}
    write_tensors(folder / UPDATE, layouts, (encode(t, wire, DENSITY) for t in change.values()))
    facts: dict[str, Any] = {
        "version": VERSION, "round": 0, "base_sha256": digest_of(base / GLOBAL), "wire": wire,
        "sha256": digest_of(folder / UPDATE), "tokens": tokens, "train_loss": [],
        "base_valid_loss": [], "valid_loss": [], "valid_tokens": 0, "seconds": 1.0, "fedpipe": "x",
    }  # fmt: skip
    (folder / UPDATE_FACTS).write_text(json.dumps(facts))


def _read(site: str, folder: Path, base: Path) -> SiteUpdate:
    facts = json.loads((base / GLOBAL_FACTS).read_text())
    return read_update(site, folder, facts, LAYOUTS, density=DENSITY)


def _weights(folder: Path) -> torch.Tensor:
    file = TensorFile(folder / GLOBAL)
    return _flat({name: file.read(name) for name in file.layouts})


def _combined(rule: str, changes: torch.Tensor) -> torch.Tensor:
    """The same of whole vectors, (sites, all weights)."""
    if rule == "median":
        return median(changes)
    if rule == "trimmed_mean":
        return trimmed_mean(changes, num_byzantine=1)
    if rule == "krum":
        return changes[krum_select(squared_distances(changes), num_byzantine=1)].mean(0)
    shares = torch.tensor([TOKENS[name] for name in SITES]) / sum(TOKENS.values())
    return (shares[:, None] * changes).sum(0)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean", "krum"])
@pytest.mark.parametrize("order", [SITES, SITES[::-1]])
def test_updates_are_combined_as_whole_vectors_are_in_any_order(
    tmp_path: Path, config: RunConfig, rule: Any, order: tuple[str, ...]
) -> None:
    base = _write_base(tmp_path / "base", config)
    changes = {name: _draw(index) for index, name in enumerate(SITES)}
    for name in SITES:
        _write_update(tmp_path / name, tmp_path / "base", changes[name], tokens=TOKENS[name])
    robust = rule != "mean"
    aggregation = AggregationConfig(
        rule=rule, weighting="uniform" if robust else "tokens", num_byzantine=int(robust)
    )
    (tmp_path / "next").mkdir()
    facts = write_next_global(
        tmp_path / "next",
        tmp_path / "base",
        [_read(name, tmp_path / name, tmp_path / "base") for name in order],
        index=0,
        aggregation=aggregation,
        optimizer=ServerOptimizerConfig(),
        config=config,
    )
    assert (facts["round"], facts["sha256"]) == (1, digest_of(tmp_path / "next" / GLOBAL))
    rows = torch.stack([_flat(changes[name]) for name in SITES])
    torch.testing.assert_close(_weights(tmp_path / "next"), _flat(base) + _combined(rule, rows))


@pytest.mark.parametrize(
    "optimizer",
    [
        ServerOptimizerConfig(name="fedavgm", lr=0.7, nesterov=True),
        ServerOptimizerConfig(name="fedadam", lr=0.1),
        ServerOptimizerConfig(name="fedyogi", lr=0.1),
    ],
)
def test_the_moments_of_an_outer_optimizer_go_on_from_round_to_round(
    tmp_path: Path, config: RunConfig, optimizer: ServerOptimizerConfig
) -> None:
    folder = tmp_path / "round_0"
    expected = _flat(_write_base(folder, config))
    whole = ServerOptimizer(optimizer, like=expected)
    for index in range(3):
        change, target = _draw(index, 0.1), tmp_path / f"round_{index + 1}"
        target.mkdir()
        site = tmp_path / f"site_{index}"
        _write_update(site, folder, change, tokens=7)
        facts = json.loads((site / UPDATE_FACTS).read_text()) | {"round": index}
        (site / UPDATE_FACTS).write_text(json.dumps(facts))
        write_next_global(
            target,
            folder,
            [_read("alpha", site, folder)],
            index=index,
            aggregation=AggregationConfig(),
            optimizer=optimizer,
            config=config,
        )
        whole.step_(expected, expected + _flat(change))
        folder = target
        torch.testing.assert_close(_weights(folder), expected)


def _facts(**changed: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / UPDATE_FACTS
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def _tensors(**changed: np.ndarray) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = TensorFile(folder / UPDATE)
        kinds = {"float32": "F32", "float64": "F64"}
        tensors = {name: file.read(name) for name in file.layouts}
        tensors |= {name.replace("_", "."): tensor for name, tensor in changed.items()}
        layouts = {n: Layout(kinds[t.dtype.name], t.shape) for n, t in tensors.items()}
        write_tensors(folder / UPDATE, layouts, tensors.values())
        _facts(sha256=digest_of(folder / UPDATE))(folder)

    return change


_FIVE = np.zeros(5, dtype=np.float32)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_facts(round=3), "expected outer round 0, got 3"),
        (_facts(base_sha256="f" * 64), "SHA-256 of its base"),
        (_facts(sha256="f" * 64), "expected SHA-256 ffffffffffff"),
        (_facts(tokens=0), "a whole number of tokens above 0, got 0"),
        (_facts(tokens=float("inf")), "a whole number of tokens above 0, got inf"),
        (_facts(tokens=True), "a whole number of tokens above 0, got True"),
        (_facts(valid_loss="low"), "a list of numbers as valid_loss, got low"),
        (_facts(base_valid_loss=7.5), "a list of numbers as base_valid_loss, got 7.5"),
        (_facts(train_loss=[1.0, [2.0]]), "a list of numbers as train_loss"),
        (_facts(train_loss=[1e300]), "a list of numbers as train_loss, got [1e+300]"),
        (_facts(seconds="1 h"), "seconds of 0 or more, got 1 h"),
        (_facts(seconds=None), "seconds of 0 or more, got None"),
        (_facts(valid_tokens=-1), "valid_tokens of 0 or more, got -1"),
        (_facts(seconds=10**400), f"seconds of 0 or more, got 1{'0' * 119}. It is left out"),
        (_facts(wire="fp8"), "format fp32, bf16, int8 or sparse, got fp8"),
        (_facts(version=9), "expected version 1, got 9"),
        (lambda folder: (folder / UPDATE_FACTS).write_text("[]"), "no JSON that says so"),
        (lambda folder: (folder / UPDATE).unlink(), "expected a file that can be read"),
        (_tensors(b_bias=_FIVE[:4]), "b.bias as F32[4] instead of F32[5]"),
        (_tensors(b_bias=_FIVE.astype(float)), "b.bias as F64[5] instead of F32[5]"),
        (_tensors(more=_FIVE), "a tensor more that it does not have"),
        (_tensors(**{"x" * 200: _FIVE}), f"a tensor {'x' * 111}. It is left out"),
        (_tensors(b_bias=_FIVE + np.nan), "NaN or infinity in b.bias"),
        (_tensors(b_bias=_FIVE - np.inf), "NaN or infinity in b.bias"),
    ],
)
def test_an_update_that_must_not_be_averaged_is_refused_by_name(
    tmp_path: Path, config: RunConfig, spoil: Callable[[Path], None], expected: str
) -> None:
    _write_base(tmp_path / "base", config)
    _write_update(tmp_path / "site", tmp_path / "base", _draw(0), tokens=7)
    _read("alpha", tmp_path / "site", tmp_path / "base")
    spoil(tmp_path / "site")
    with pytest.raises(FederationError) as refusal:
        _read("alpha", tmp_path / "site", tmp_path / "base")
    assert expected in str(refusal.value)


_HEADER = {
    "a.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
    "b.bias": {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]},
}


@pytest.mark.parametrize(
    "changed",
    [
        {"data_offsets": [-20, 0]},
        {"data_offsets": [0, 20]},
        {"data_offsets": [52, 72]},
        {"data_offsets": [48, 1000]},
        {"data_offsets": [48.0, 68.0]},
        {"data_offsets": [float("inf"), 68]},
        {"data_offsets": []},
        {"shape": [-1, -5]},
        {"shape": [5.0]},
        {"shape": [10**30]},
        {"shape": 5},
        {"dtype": "F8_E4M3"},
        {"dtype": ["F32"]},
    ],
)
def test_a_header_whose_tensors_do_not_follow_one_another_is_refused(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    def write(header: dict[str, Any], data: bytes) -> TensorFile:
        text = json.dumps(header).encode()
        (tmp_path / UPDATE).write_bytes(len(text).to_bytes(8, "little") + text + data)
        return TensorFile(tmp_path / UPDATE)

    assert write(_HEADER, bytes(68)).layouts == LAYOUTS
    for size in (48, 68, 72):
        with pytest.raises(FederationError, match="without a readable header"):
            _ = write(_HEADER | {"b.bias": _HEADER["b.bias"] | changed}, bytes(size)).layouts


def test_an_update_has_arrived_once_its_file_is_the_one_that_its_facts_name(
    tmp_path: Path, config: RunConfig
) -> None:
    _write_base(tmp_path / "base", config)
    site = tmp_path / "site"
    assert not has_arrived(site)
    _write_update(site, tmp_path / "base", _draw(0), tokens=7)
    assert has_arrived(site)
    whole = (site / UPDATE).read_bytes()
    (site / UPDATE).write_bytes(whole[:-1])
    assert not has_arrived(site)
    (site / UPDATE).unlink()
    assert not has_arrived(site)
    (tmp_path / "elsewhere").write_bytes(whole)
    (site / UPDATE).symlink_to(tmp_path / "elsewhere")
    assert not has_arrived(site)


@pytest.mark.parametrize(("wire", "worst"), [("bf16", 2**-8), ("int8", 1 / 254)])
def test_a_narrow_update_is_off_by_its_rounding_at_most(
    tmp_path: Path, config: RunConfig, wire: str, worst: float
) -> None:
    _write_base(tmp_path / "base", config)
    change = _draw(3)
    _write_update(tmp_path / "site", tmp_path / "base", change, tokens=7, wire=wire)
    update = _read("alpha", tmp_path / "site", tmp_path / "base")
    for name, layout in LAYOUTS.items():
        error = (update.change(name, layout) - torch.from_numpy(change[name])).abs()
        assert float(error.max()) <= worst * float(np.abs(change[name]).max())


def test_a_sparse_update_makes_the_weights_of_its_largest_values(
    tmp_path: Path, config: RunConfig
) -> None:
    config = load_config(None, [f"federation.density={DENSITY}"])
    base, change = _write_base(tmp_path / "base", config), _draw(3)
    _write_update(tmp_path / "site", tmp_path / "base", change, tokens=7, wire="sparse")
    update = _read("alpha", tmp_path / "site", tmp_path / "base")
    found = {name: update.change(name, LAYOUTS[name], DENSITY).numpy() for name in LAYOUTS}
    for name, decoded in found.items():
        largest = np.sort(np.abs(change[name]), axis=None)[-round(DENSITY * decoded.size)]
        assert ((decoded != 0) == (np.abs(change[name]) >= largest)).all()
        assert (np.sign(decoded) == np.sign(change[name]))[decoded != 0].all()
    arguments: dict[str, Any] = {"index": 0, "optimizer": ServerOptimizerConfig(), "config": config}
    folders = tmp_path / "next", tmp_path / "base"
    folders[0].mkdir()
    write_next_global(*folders, [update], aggregation=AggregationConfig(), **arguments)
    torch.testing.assert_close(_weights(folders[0]), _flat(base) + _flat(found))
    median_rule = AggregationConfig(rule="median", weighting="uniform")
    with pytest.raises(FederationError, match="expected mean with sparse updates, got median"):
        write_next_global(*folders, [update], aggregation=median_rule, **arguments)


def test_a_consortium_with_a_robust_rule_has_no_sparse_updates() -> None:
    tree = {
        "federation": {
            "sites": ["alpha", "beta"], "aggregation": {"rule": "median", "weighting": "uniform"},
        },
        "pretrain": {"outer": {"wire": "sparse"}},
    }  # fmt: skip
    with pytest.raises(ConfigError) as refusal:
        read_consortium(wrap(tree, "f"), source="f")
    assert str(refusal.value) == (
        "pretrain.outer.wire: expected fp32, bf16 or int8 with federation.aggregation.rule=median,"
        " got 'sparse'. A robust rule needs whole changes."
    )


def test_a_sparse_update_with_positions_outside_of_its_tensors_is_refused(
    tmp_path: Path, config: RunConfig
) -> None:
    site, base = tmp_path / "site", tmp_path / "base"
    _write_base(base, config)
    _write_update(site, base, _draw(3), tokens=7, wire="sparse")
    file = TensorFile(site / UPDATE)
    spoilt = {name: np.full_like(file.read(name), 255) for name in LAYOUTS}
    write_tensors(site / UPDATE, file.layouts, spoilt.values())
    _facts(sha256=digest_of(site / UPDATE))(site)
    with pytest.raises(FederationError, match="expected positions within its tensors, got others"):
        _read("alpha", site, base)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["pipeline.head_location=client", "federation.average.final_head=false"],
        ["pipeline.cut=[1,2]", "pipeline.local_head=mlm+layer", "model.family=bert"],
        ["pipeline.objective=end_to_end", "pipeline.schedule=1f1b"],
    ],
)
def test_the_plan_counts_the_weights_that_cross_between_sites(settings: list[str]) -> None:
    config = load_config(None, ["outer.folder=x", *settings])
    numel = sum(int(np.prod(layout.shape)) for layout in crossing_layouts(config).values())
    assert f"change of {numel:,} weights" in str(build_plan(config))


def test_the_page_names_everything_that_leaves_a_site() -> None:
    page = Path(__file__).parents[2] / "docs/explanation/what-leaves-a-client.md"
    section = page.read_text(encoding="utf-8").partition("## Sites that share no cluster")[2]
    assert [key for key in UpdateFacts.__annotations__ if f"`{key}`" not in section] == []
