"""Learning rate, weight decay groups and clipping of a stage."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fedpipe.config.model_shape import ModelShape, resolve
from fedpipe.config.schema import ModelConfig, OptimizerConfig, PipelineConfig
from fedpipe.families import FAMILIES
from fedpipe.models.split import stage_specs
from fedpipe.models.stage import Stage, build_stage
from fedpipe.models.weights import hf_config
from fedpipe.pipeline.muon import Muon, orthogonal
from fedpipe.pipeline.optimizer import build_optimizer, clip_, learning_rate, make_optimizer

TOTAL = 100


def _lr(step: int, **keys: Any) -> float:
    return learning_rate(OptimizerConfig(lr=1.0, **keys), step, total_steps=TOTAL)


def _curve(**keys: Any) -> list[float]:
    return [_lr(step, **keys) for step in range(TOTAL)]


@pytest.mark.parametrize("decay", ["linear", "polynomial", "constant", "wsd"])
def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero(decay: str) -> None:
    curve = _curve(decay=decay, warmup_ratio=0.1)
    assert curve[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert max(curve) == curve[9] == curve[10] == 1.0


def test_linear_decay_ends_one_step_above_its_end() -> None:
    curve = _curve(decay="linear", warmup_ratio=0.0, end_lr=0.2)
    assert curve == pytest.approx([0.2 + 0.8 * (1 - k / TOTAL) for k in range(TOTAL)])


def test_polynomial_decay_has_its_power() -> None:
    curve = _curve(decay="polynomial", power=3.0, warmup_ratio=0.5)
    assert curve[75] == pytest.approx(0.5**3)
    assert all(a > b for a, b in zip(curve[50:], curve[51:], strict=False))


def test_constant_stays_at_the_peak() -> None:
    assert set(_curve(decay="constant", warmup_ratio=0.0)) == {1.0}


def test_warm_up_stable_decay_falls_linearly_over_its_share_of_the_steps() -> None:
    curve = _curve(decay="wsd", warmup_ratio=0.1, decay_ratio=0.25, end_lr=0.2)
    assert set(curve[9:76]) == {1.0}
    assert curve[75:] == pytest.approx([0.2 + 0.8 * (1 - k / 25) for k in range(25)])
    whole = _curve(decay="wsd", warmup_ratio=0.0, decay_ratio=1.0)
    assert whole == _curve(decay="linear", warmup_ratio=0.0)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99])
@pytest.mark.parametrize("decay", ["linear", "wsd"])
def test_the_shortest_runs_have_a_learning_rate(total: int, warmup: float, decay: str) -> None:
    config = OptimizerConfig(lr=1.0, warmup_ratio=warmup, decay=decay, decay_ratio=0.01)
    for step in range(total):
        assert 0 < learning_rate(config, step, total_steps=total) <= 1


def test_a_step_beyond_the_end_has_the_last_learning_rate() -> None:
    assert _lr(TOTAL + 50, end_lr=0.3) == pytest.approx(0.3)


def _shape(family: str) -> ModelShape:
    model = ModelConfig(
        family=family, num_hidden_layers=2, hidden_size=8, num_attention_heads=2,
        intermediate_size=12,
    )  # fmt: skip
    return resolve(model, vocab_size=31, sequence_length=10)


def _stage(family: str = "roberta", **pipeline: Any) -> Stage:
    config = hf_config(_shape(family), pad_id=0, cls_id=1, sep_id=2)
    specs = stage_specs(PipelineConfig(**{"cut": (1,)} | pipeline), num_hidden_layers=2)
    return build_stage(specs[0], config, seed=0)[0]


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_biases_and_layer_norms_do_not_decay(name: str, family: str) -> None:
    stage = _stage(family)
    optimizer = build_optimizer(stage, OptimizerConfig(name=name, weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    parameters = dict(stage.named_parameters())
    assert len(decay) == len(parameters), "every parameter once, the tied decoder too"
    for parameter_name, parameter in parameters.items():
        plain = parameter.dim() == 1
        assert decay[id(parameter)] == (0.0 if plain else 0.3), parameter_name


def test_norms_that_are_not_called_so_do_not_decay() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    decayed, plain = make_optimizer(model.parameters(), OptimizerConfig()).param_groups
    assert plain["weight_decay"] == 0.0 < decayed["weight_decay"]
    found = {id(p) for p in plain["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in found}
    assert {"h.0.ln_1.weight", "ln_f.weight", "h.0.mlp.c_fc.bias"} <= names
    assert not any(name.endswith(("wte.weight", "c_fc.weight")) for name in names)


def test_adamw_and_adam_differ_in_how_they_decay() -> None:
    results = {}
    for name in ("adamw", "adam"):
        stage = _stage()
        optimizer = build_optimizer(stage, OptimizerConfig(name=name, weight_decay=0.1, lr=0.01))
        for parameter in stage.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        results[name] = stage.get_parameter("roberta.embeddings.word_embeddings.weight").detach()
    assert not torch.allclose(results["adamw"], results["adam"])


def test_clipping_scales_to_the_norm_and_returns_the_one_before() -> None:
    stage = _stage()
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in stage.parameters())
    assert clip_(stage, max_norm=0.0) == pytest.approx(count**0.5, rel=1e-5)
    assert clip_(stage, max_norm=1.0) == pytest.approx(count**0.5, rel=1e-5), "0 did not clip"
    assert clip_(stage, max_norm=5.0) == pytest.approx(1.0, rel=1e-4), "and 1.0 did"
    assert clip_(stage, max_norm=5.0) == pytest.approx(1.0, rel=1e-4), "a small norm stays"


# -- Muon ------------------------------------------------------------------------------------------


def _muon_names(stage: Stage) -> set[str]:
    optimizer = build_optimizer(stage, OptimizerConfig(name="muon"))
    groups = [g for g in optimizer.param_groups if "momentum" in g]
    found = {id(p) for g in groups for p in g["params"]}
    every = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in stage.parameters()), "each in one group"
    return {name for name, p in stage.named_parameters() if id(p) in found}


@pytest.mark.parametrize("head", ["mlm", "mlm+layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_muon_has_the_matrices_of_layers_and_no_embedding_head_norm_or_bias(
    family: str, head: str
) -> None:
    stage = _stage(family, local_head=head)
    names = _muon_names(stage)
    layers = {re.match(r".*\.layers?\.\d+\.|aux_heads\.0\.layer\.", name)[0] for name in names}
    assert len(layers) == 1 + (head == "mlm+layer"), layers
    matrices = {name for name, p in stage.named_parameters() if p.ndim == 2}
    assert names == {name for name in matrices if name.startswith(tuple(layers))}
    of_a_layer = sum(FAMILIES[family].linear_flops(_shape(family).config))  # as the plan has them
    assert sum(stage.get_parameter(n).numel() for n in names) == len(layers) * of_a_layer


def test_a_stage_without_layers_has_adamw_alone() -> None:
    optimizer = build_optimizer(_stage(cut=(0,)), OptimizerConfig(name="muon", weight_decay=0.3))
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_muon_is_torchs_muon_and_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: torch's own rounds to bfloat16, in which products of stacks differ in a bit."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours, theirs = _stage(local_head="mlm+layer"), _stage(local_head="mlm+layer")
    names = _muon_names(ours)
    muon = build_optimizer(ours, OptimizerConfig(name="muon", betas=(0.9, 0.98), **settings))
    of_torch = [
        torch.optim.Muon(
            [p for n, p in theirs.named_parameters() if n in names],
            adjust_lr_fn="match_rms_adamw",
            **settings,
        ),
        make_optimizer(
            [p for n, p in theirs.named_parameters() if n not in names], OptimizerConfig(**settings)
        ),
    ]
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = p.grad.clone()
        for optimizer in (muon, *of_torch):
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_updates_are_nearly_orthogonal_and_a_zero_gradient_moves_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 24), (24, 8)]
    updates = orthogonal([torch.randn(s, generator=draw) for s in shapes], num_iterations=5)
    assert [tuple(u.shape) for u in updates] == shapes
    for update in updates:
        values = torch.linalg.svdvals(update)
        assert 0.6 < values.min() <= values.max() < 1.3
    (still,) = orthogonal([torch.zeros(4, 6)], num_iterations=5)
    assert torch.equal(still, torch.zeros(4, 6))


def test_muon_goes_on_bit_for_bit_from_its_state(tmp_path: Any) -> None:
    def steps(stage: Stage, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            for p in stage.parameters():
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()

    config = OptimizerConfig(name="muon", lr=0.02)
    straight = _stage()
    optimizer = build_optimizer(straight, config)
    assert isinstance(optimizer, Muon)
    steps(straight, optimizer, range(2))
    torch.save([straight.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    steps(straight, optimizer, range(2, 4))

    resumed = _stage()
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    optimizer = build_optimizer(resumed, config)
    optimizer.load_state_dict(state)
    steps(resumed, optimizer, range(2, 4))
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
