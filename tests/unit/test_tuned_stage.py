"""Stages with adapters and task heads compute what the model that is not cut computes."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedpipe.config.evaluation import Kind
from fedpipe.config.finetune import CutConfig, FinetuneConfig, Method, MethodConfig
from fedpipe.config.schema import PipelineConfig
from fedpipe.errors import ConfigError
from fedpipe.models.peft import attach, trainable
from fedpipe.models.split import AUX_HEADS, merge, owner, part_of, stage_specs
from fedpipe.models.tuned_stage import TunedStage, check_cut, local_head_numel
from tests.helpers.tuned import LENGTH, small_batch, small_config, small_model

METHODS = [name for name in get_args(Method) if name != "prefix_tuning"]
END_TO_END = PipelineConfig(cut=(1,), objective="end_to_end", schedule="sequential")
LOCAL = PipelineConfig(cut=(1,))
HOME = PipelineConfig(cut=(1,), head_location="client")


def tuned(family: str, kind: Kind, method: str) -> Any:
    """Build a model of two layers with an adapter whose effect is not zero."""
    model = small_model(family, kind)
    torch.manual_seed(1)
    attach(model, MethodConfig(name=method, reduction_factor=4), split=True)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if method != "full" and not name.startswith("classifier"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def stages(pipeline: PipelineConfig, *which: Any) -> list[TunedStage]:
    specs = stage_specs(pipeline, num_hidden_layers=2)
    return [TunedStage(spec, tuned(*which), which[1]).eval() for spec in specs]


def micro_batch(kind: Kind) -> tuple[dict[str, Any], torch.Tensor]:
    """Return padded inputs with their labels, and the targets of a stage."""
    batch = small_batch(kind)
    lengths = torch.tensor([12, 7, 3, 12, 9, 5])
    batch["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = batch["labels"] if kind == "ner" else batch["labels"][:, None]
    known = batch["attention_mask"].bool() if kind == "ner" else torch.ones_like(labels).bool()
    bits = labels.float().view(torch.int32) if kind == "regression" else labels.int()
    weights = (known / known.sum()).float().view(torch.int32)
    if kind == "ner":
        batch["labels"] = labels.where(known, -100)
    return batch, torch.stack([lengths[:, None].expand_as(bits).int(), bits, weights])


def run(parts: list[TunedStage], batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
    hidden = torch.stack([batch["input_ids"], torch.zeros_like(batch["input_ids"])])
    for stage in parts:
        hidden = stage(hidden, targets[0])
    return hidden


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_stages_in_a_row_have_the_loss_and_the_gradients_of_the_whole_model(
    family: str, method: str
) -> None:
    for kind in ("classification", "regression", "ner"):
        whole = tuned(family, kind, method)
        batch, targets = micro_batch(kind)
        expected = whole(**batch).loss
        expected.backward()
        parts = stages(END_TO_END, family, kind, method)
        loss = parts[-1].loss(run(parts, batch, targets), targets)
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
        found = merge(trainable(part) for part in parts)
        for name, parameter in trainable(whole).items():
            grad = found.pop(name).grad
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grad = torch.zeros_like(parameter) if grad is None else grad
            torch.testing.assert_close(grad, wanted, atol=2e-6, rtol=1e-4, msg=f"{kind}: {name}")
        assert not found


def test_a_weight_of_zero_hides_a_sequence() -> None:
    part = stages(LOCAL, "bert", "classification", "lora")[0]
    batch, targets = micro_batch("classification")
    targets[2, 3:] = 0
    three = part.loss(run([part], batch, targets), targets)
    labels = batch["labels"][:3]
    logits = part.logits(run([part], batch, targets))[:3, 0]
    torch.testing.assert_close(three, functional.cross_entropy(logits, labels) / 2)


@pytest.mark.parametrize("kind", ["classification", "regression", "ner"])
def test_a_head_at_home_scores_what_the_head_on_the_server_does(kind: Kind) -> None:
    batch, targets = micro_batch(kind)
    server = stages(LOCAL, "bert", kind, "pfeiffer")
    client, middle, home = stages(HOME, "bert", kind, "pfeiffer")
    expected = server[-1].score(run(server, batch, targets), targets)
    rows = middle.head_inputs(run([client, middle], batch, targets), targets[0])
    assert rows.shape == (6, LENGTH if kind == "ner" else 1, 32)
    torch.testing.assert_close(home.score(home(rows, targets[0]), targets), expected)
    assert not [name for name in trainable(middle) if not name.startswith("bert.encoder")]
    assert all(name.startswith(("classifier", "bert.pooler")) for name in trainable(home))


def test_every_trained_parameter_has_one_stage_and_a_switch() -> None:
    for method in METHODS:
        parts = stages(LOCAL, "bert", "classification", method)
        specs = [part.spec for part in parts]
        for part in parts:
            for name in trainable(part):
                assert owner(name, specs) == part.spec.stage_id
                head = "aux_head" if name.startswith(AUX_HEADS) else "final_head"
                layers = "client_layers" if part.spec.is_first else "server_layers"
                inside = "embeddings" if "encoder.layer" not in name else layers
                outside = not name.startswith("bert.") or "pooler" in name
                assert part_of(name, part.spec) == (head if outside else inside), name
        local = sum(p.numel() for n, p in trainable(parts[0]).items() if n.startswith(AUX_HEADS))
        config = parts[0].get_submodule(f"{AUX_HEADS}.0.head")
        assert local == sum(p.numel() for p in config.parameters())
    assert local == local_head_numel(small_model("bert").config, "classification")


def test_a_stage_holds_no_layer_of_another() -> None:
    import gc

    first = stages(LOCAL, "bert", "classification", "houlsby_inv")[0]
    hooks = list(first.get_submodule("bert.embeddings")._forward_hooks.values())
    gc.collect()
    assert hooks and all(hook.__self__.encoder is None for hook in hooks)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"family": "distilbert"}, r"^pipeline.cut: expected a model of roberta or bert, got dist"),
        ({"cut": 2}, r"^pipeline.cut: expected layers below 2, got 2\. Lower it"),
        ({"position_embedding_type": "relative_key"}, r"'absolute', got 'relative_key'\. Use anot"),
        ({"is_decoder": True}, r"^pipeline.cut: expected a model with is_decoder False, got True"),
        ({"attn_implementation": "eager"}, r"with _attn_implementation 'sdpa', got 'eager'\. Use"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(changes: dict[str, Any], match: str) -> None:
    cut = changes.pop("cut", 1)
    config = small_config(changes.pop("family", "bert"), **changes)
    with pytest.raises(ConfigError, match=match):
        check_cut(config, cut)


def test_the_batch_is_what_the_micro_batches_make_up() -> None:
    config = FinetuneConfig(batch_size=12, pipeline=CutConfig(cut=(1,), num_micro_batches=3))
    assert config.stages.micro_batch_size == 4
    assert np.prod([config.stages.micro_batch_size, config.stages.num_micro_batches]) == 12
