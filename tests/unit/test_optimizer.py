"""Learning rate, weight decay groups and clipping of a stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpipe.config.schema import OptimizerConfig, PipelineConfig
from fedpipe.models.families import hf_config
from fedpipe.models.split import stage_specs
from fedpipe.models.stage import Stage, build_stage
from fedpipe.pipeline.optimizer import build_optimizer, clip_, learning_rate, make_optimizer

TOTAL = 100


def _lr(step: int, **keys: Any) -> float:
    return learning_rate(OptimizerConfig(lr=1.0, **keys), step, total_steps=TOTAL)


def _curve(**keys: Any) -> list[float]:
    return [_lr(step, **keys) for step in range(TOTAL)]


@pytest.mark.parametrize("decay", ["linear", "polynomial", "constant"])
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


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99])
def test_the_shortest_runs_have_a_learning_rate(total: int, warmup: float) -> None:
    config = OptimizerConfig(lr=1.0, warmup_ratio=warmup)
    for step in range(total):
        assert 0 < learning_rate(config, step, total_steps=total) <= 1


def test_a_step_beyond_the_end_has_the_last_learning_rate() -> None:
    assert _lr(TOTAL + 50, end_lr=0.3) == pytest.approx(0.3)


def _stage(family: str = "roberta") -> Stage:
    from fedpipe.config.model_shape import resolve
    from fedpipe.config.schema import ModelConfig

    model = ModelConfig(
        family=family, num_hidden_layers=2, hidden_size=8, num_attention_heads=2,
        intermediate_size=12,
    )  # fmt: skip
    config = hf_config(
        resolve(model, vocab_size=31, sequence_length=10), pad_id=0, cls_id=1, sep_id=2
    )
    specs = stage_specs(PipelineConfig(cut=(1,)), num_hidden_layers=2)
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
