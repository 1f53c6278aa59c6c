"""Stages: first weights, continued pre-training, equality with the unsplit transformers model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from fedpipe.config.load import load_config
from fedpipe.config.model_shape import ModelShape, resolve
from fedpipe.config.schema import ModelConfig, PipelineConfig
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.families import FAMILIES, LAYER
from fedpipe.families.family import gather
from fedpipe.models.split import merge, stage_specs
from fedpipe.models.stage import Stage, build_stage
from fedpipe.models.weights import hf_config, in_final_head, load_pretrained, stable_seed
from fedpipe.run.export import build_model, write_model

LAYERS, VOCAB, LENGTH = 4, 53, 12
CUTS = [(), (0,), (2,), (1, 3), (0, 1, 2, 3)]
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def _shape(family: str, **keys: Any) -> ModelShape:
    model = ModelConfig(
        family=family, num_hidden_layers=LAYERS, hidden_size=16, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20, **keys,
    )  # fmt: skip
    return resolve(model, vocab_size=VOCAB, sequence_length=LENGTH)


def _config(family: str, **keys: Any) -> PretrainedConfig:
    pad = int(FAMILIES[family].positions == "after padding")
    config = hf_config(_shape(family, **keys), pad_id=pad, cls_id=2, sep_id=3)
    if family == "modernbert":
        config.local_attention = 6  # shorter than the sequences
    return config


def _stages(
    config: PretrainedConfig,
    cut: tuple[int, ...],
    *,
    path: str = "",
    seed: int = 0,
    tied: bool = False,
    **keys: Any,
) -> list[Stage]:
    specs = stage_specs(PipelineConfig(cut=cut, **keys), num_hidden_layers=LAYERS, tied=tied)
    stages: list[Stage] = []
    for spec in specs:
        shared = stages[0].word_embedding if stages else None
        stage, _ = build_stage(spec, config, seed=seed, path=path, word_embedding=shared)
        stages.append(stage.eval())
    return stages


def _weights(stages: list[Stage]) -> dict[str, torch.Tensor]:
    return merge(dict(stage.named_parameters()) for stage in stages)


def _randomise(module: torch.nn.Module) -> None:
    """Give every parameter, biases too, a value that no default has."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.normal_(0.1, 0.3, generator=generator)


def _random_model(family: str, *, tied: bool, bare: bool = False) -> PreTrainedModel:
    config = _config(family)
    config.tie_word_embeddings = tied
    auto = AutoModel if bare else AutoModelForMaskedLM
    model: PreTrainedModel = auto.from_config(config)
    _randomise(model)
    return model.eval()


def _head(stage: Stage) -> dict[str, torch.Tensor]:
    """Parameters of a stage's head, under their names in the final one."""
    family, own = stage.family, f"aux_heads.{stage.spec.stage_id}.head."
    return {
        in_final_head(name, family=family): parameter
        for name, parameter in stage.named_parameters()
        if name.startswith(own)
        or (stage.spec.is_last and not LAYER.search(name) and family.embeddings not in name)
    }


def _decoder(stage: Stage) -> Any:
    return stage.get_submodule(stage._head_name(stage.family.decoder.removesuffix(".weight")))


def _assert_heads_alike(stages: list[Stage]) -> None:
    final = _head(stages[-1])
    assert sum(tensor.dim() == 2 and bool(tensor.std() > 0) for tensor in final.values()) == 2
    for stage in stages[:-1]:
        head = _head(stage)
        tied = {stage.family.decoder} if stage.spec.is_first else set()
        assert head.keys() == final.keys() - tied
        assert all(torch.equal(head[name], final[name]) for name in head)


def _logits(stages: list[Stage], ids: torch.Tensor) -> torch.Tensor:
    """The stages in sequence; the final head at every position."""
    hidden, everywhere = ids, torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        for stage in stages:
            hidden = stage(hidden)
            if stage.spec.home_head is not None:
                hidden = stage.head_inputs(hidden, everywhere)
        return stages[-1].logits(hidden, everywhere)


def _ids() -> torch.Tensor:
    return torch.randint(4, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@FAMILY
@pytest.mark.parametrize("at_home", [False, True], ids=["server", "client"])
def test_the_last_layer_runs_at_masked_positions_only_and_changes_nothing(
    family: str, at_home: bool
) -> None:
    """Values and gradients are those of the whole layer; its FLOPs are those of the plan."""
    config = _config(family)
    head_location = "client" if at_home else "server"
    stage = _stages(config, (2,), head_location=head_location)[1].double()
    _randomise(stage)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, LENGTH, config.hidden_size, generator=generator).double()
    positions = torch.tensor([[1, 4], [0, 2], [3, 5]])
    last = stage.get_submodule(f"{FAMILIES[family].layers}.{LAYERS - 1}")

    def gradients(outputs: torch.Tensor) -> list[torch.Tensor]:
        (outputs * torch.arange(outputs.numel()).view_as(outputs)).sum().backward()
        found = [p.grad for p in last.parameters()]
        last.zero_grad()
        assert all(g is not None for g in found)
        return [g for g in found if g is not None]

    before_last = stage(hidden).detach()
    # The fused kernel is not counted.
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        outputs = stage.head_inputs(before_last, positions)
    whole = FAMILIES[family].run_layer(last, before_last, stage._around(before_last, None))
    expected = gather(whole, positions)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs), gradients(expected))
    expected_flops = _shape(family).masked_layer_flops(LENGTH, num_masked=positions.shape[1])
    assert flops.get_total_flops() == len(hidden) * expected_flops


# -- first weights -------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_first_weights_do_not_depend_on_the_cut(family: str, cut: tuple[int, ...]) -> None:
    config = _config(family)
    whole = _weights(_stages(config, ()))
    torch.manual_seed(99)  # nor on torch's generator
    parts = _weights(_stages(config, cut, local_head="mlm+layer"))
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


@FAMILY
def test_first_weights_depend_on_the_seed_and_on_the_name(family: str) -> None:
    config = _config(family)
    first, other = (_weights(_stages(config, (2,), seed=seed)) for seed in (0, 1))
    layers = FAMILIES[family].layers
    name, matrix = next((n, p) for n, p in first.items() if n.startswith(layers) and p.ndim == 2)
    assert not torch.equal(matrix, other[name])
    assert not torch.equal(matrix, first[name.replace(f"{layers}.0.", f"{layers}.1.")])


@FAMILY
def test_every_head_starts_as_the_final_one(family: str) -> None:
    _assert_heads_alike(_stages(_config(family), (1, 3)))


@FAMILY
def test_first_weights_have_the_scale_of_the_family(family: str) -> None:
    config = _config(family, initializer_range=0.05)
    for name, tensor in _weights(_stages(config, ())).items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:
            std = 0.05
            if family == "modernbert":  # as in its own _init_weights
                std *= 0.88  # what a cut at two deviations leaves
                std /= 8**0.5 if name.endswith(("Wo.weight", "head.dense.weight")) else 1
                assert tensor.abs().max() <= 2 * 0.05
            assert 0.6 * std < tensor.std() < 1.4 * std, name


@FAMILY
def test_only_the_first_auxiliary_head_is_tied_to_the_embedding(family: str) -> None:
    stages = _stages(_config(family), (1, 3))
    embedding = stages[0].get_parameter(FAMILIES[family].word_embeddings)
    first, middle = (_decoder(stages[s]).weight for s in (0, 1))
    final = stages[2].get_parameter(FAMILIES[family].decoder)
    assert first is embedding
    assert len({t.data_ptr() for t in (embedding, middle, final)}) == 3
    assert torch.equal(middle, embedding) and torch.equal(final, embedding)
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    own = f"{stages[0]._head_name(FAMILIES[family].decoder)}"
    assert own not in names, "a tied tensor is trained once"


def test_a_seed_is_the_same_everywhere() -> None:
    assert stable_seed(0, "roberta.embeddings") == 3726088441176485494
    assert 0 <= stable_seed("x", (1, 2)) < 2**63


# -- equality with transformers --------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_export_has_the_logits_of_the_stages_in_sequence(
    family: str, cut: tuple[int, ...], tmp_path: Path
) -> None:
    config = _config(family)
    stages = _stages(config, cut)
    for stage in stages:
        _randomise(stage)
    write_model(build_model(_weights(stages), config), tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(model) is FAMILIES[family].masked_lm_class()
    assert model.config.model_type == family
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        expected = model(input_ids=_ids()).logits
    torch.testing.assert_close(_logits(stages, _ids()), expected, atol=1e-6, rtol=1e-6)


@FAMILY
@pytest.mark.parametrize(
    ("cut", "keys"),
    [
        ((), {}),
        (
            (0,),
            {"objective": "end_to_end", "schedule": "sequential", "head_location": "client"},
        ),
    ],
    ids=["whole", "head at home"],
)
def test_a_tied_decoder_is_exported_as_the_word_embedding(
    family: str, cut: tuple[int, ...], keys: dict[str, Any], tmp_path: Path
) -> None:
    config = _config(family)
    stages = _stages(config, cut, tied=True, **keys)
    for stage in stages:
        _randomise(stage)
    state = _weights(stages)
    assert FAMILIES[family].decoder not in state, "one tensor is trained and sent once"
    write_model(build_model(state, config), tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert model.config.tie_word_embeddings is True and config.tie_word_embeddings is False
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(
            _logits(stages, _ids()), model(input_ids=_ids()).logits, atol=1e-6, rtol=1e-6
        )


def test_a_checkpoint_of_another_model_is_not_exported() -> None:
    config = _config("roberta")
    state = _weights(_stages(config, (2,)))
    del state["lm_head.dense.bias"]
    with pytest.raises(CheckpointError, match=r"difference at \['lm_head.dense.bias'\]"):
        build_model(state, config)


@FAMILY
@pytest.mark.parametrize("head", ["mlm", "mlm+layer"])
def test_the_loss_is_that_of_transformers_on_the_masked_tokens(family: str, head: str) -> None:
    """Checked on the client stage: a model of its layers and its head has the same loss."""
    config = _config(family)
    stage = _stages(config, (2,), local_head=head)[0]
    _randomise(stage)
    ids = _ids()
    positions = torch.tensor([[1, 5], [0, 11], [3, 4]])
    targets = torch.stack([positions, torch.tensor([[7, 8], [9, 10], [11, 12]])]).int()
    with torch.no_grad():
        loss = stage.loss(stage(ids), targets)
        each = stage.loss(stage(ids), targets, reduction="none")

    whole = _config(family)
    whole.num_hidden_layers = 2 + (head == "mlm+layer")
    if getattr(whole, "layer_types", None):  # transformers 5.x
        whole.layer_types = whole.layer_types[: whole.num_hidden_layers]
    model = AutoModelForMaskedLM.from_config(whole).eval()
    state = {n: p for n, p in stage.named_parameters() if not n.startswith("aux_heads")}
    state |= _head(stage)
    state[FAMILIES[family].decoder] = stage.word_embedding
    for first, second in FAMILIES[family].twins.items():
        state[second] = state[first]
    if head == "mlm+layer":
        for name, parameter in stage.get_submodule("aux_heads.0.layer").state_dict().items():
            state[f"{FAMILIES[family].layers}.2.{name}"] = parameter
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    labels = torch.full_like(ids, -100).scatter(1, positions, targets[1].long())
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    assert each.shape == (3, 2)
    torch.testing.assert_close(each.mean(), loss)


# -- continued pre-training ------------------------------------------------------------------------


def _pickle(folder: Path) -> None:
    """Rewrite a folder's weights as transformers wrote them before version 5."""
    for file in folder.glob("*.safetensors"):
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / name)
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace('"model-', '"pytorch_model-')
        (folder / "pytorch_model.bin.index.json").write_text(text.replace(".safetensors", ".bin"))
        index.unlink()


def _assert_equals(stages: list[Stage], model: PreTrainedModel) -> None:
    expected = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in _weights(stages).items():
        # An untied model of transformers 5.x has a second bias, and that one is used.
        family = FAMILIES[model.config.model_type]
        other = expected.get(family.twins.get(name, ""), expected[name])
        assert torch.equal(parameter, other), name


@FAMILY
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "pickled", "sharded_pickled"])
def test_a_masked_lm_folder_is_continued_exactly(
    family: str, tied: bool, form: str, tmp_path: Path
) -> None:
    model = _random_model(family, tied=tied)
    size = "8KB" if form.startswith("sharded") else "5GB"
    model.save_pretrained(tmp_path, max_shard_size=size)
    pickled = form.endswith("pickled")
    if pickled:
        _pickle(tmp_path)
    files = sorted(tmp_path.glob("*.bin" if pickled else "*.safetensors"))
    assert (len(files) > 1) == form.startswith("sharded")
    # transformers' Trainer leaves such a file beside the weights
    torch.save({"lr": 1}, tmp_path / "training_args.bin")

    config = _config(family)
    stages = _stages(config, (1, 3), path=str(tmp_path))
    _assert_equals(stages, model)
    _assert_heads_alike(stages)
    with torch.no_grad():
        expected = model(input_ids=_ids()).logits
    torch.testing.assert_close(_logits(stages, _ids()), expected, atol=1e-5, rtol=1e-5)


@FAMILY
def test_a_bare_encoder_leaves_the_head_its_first_values_and_says_so(
    family: str, tmp_path: Path
) -> None:
    model = _random_model(family, tied=True, bare=True)
    model.save_pretrained(tmp_path)
    config = _config(family)
    specs = stage_specs(PipelineConfig(cut=(2,)), num_hidden_layers=LAYERS)
    (client, client_missing), (server, server_missing) = (
        build_stage(s, config, seed=0, path=str(tmp_path)) for s in specs
    )
    kind = FAMILIES[family]
    names = {n for n, _ in server.named_parameters() if not n.startswith(f"{kind.prefix}.")}
    assert set(server_missing) == names - {kind.decoder} and server_missing
    assert all(n.startswith("aux_heads.0.head.") for n in client_missing) and client_missing
    assert torch.equal(server.get_parameter(kind.decoder), model.get_input_embeddings().weight)
    assert not _decoder(server).bias.any()
    compared = 0
    for name, parameter in model.named_parameters():
        layer = LAYER.search(f"{kind.prefix}.{name}")
        if layer and int(layer[1]) >= 2:
            assert torch.equal(server.get_parameter(f"{kind.prefix}.{name}"), parameter), name
            compared += 1
    assert compared > 8


def test_the_names_of_the_original_bert_are_understood(tmp_path: Path) -> None:
    """Its LayerNorms have gamma and beta, as in TensorFlow."""
    model = _random_model("bert", tied=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        : t for n, t in load_file(file).items()
    }  # fmt: skip
    assert any(n.endswith("gamma") for n in renamed)
    save_file(renamed, file)
    _assert_equals(_stages(_config("bert"), (2,), path=str(tmp_path)), model)


@FAMILY
def test_a_folder_in_half_precision_is_read_as_float32(family: str, tmp_path: Path) -> None:
    model = _random_model(family, tied=True).half()
    model.save_pretrained(tmp_path)
    stages = _stages(_config(family), (2,), path=str(tmp_path))
    assert {p.dtype for p in _weights(stages).values()} == {torch.float32}
    _assert_equals(stages, model.float())


_BERT: list[dict[str, Any]] = [
    {},
    {"pad_token_id": 0, "tie_word_embeddings": False, "classifier_dropout": 0.3},
    {"pad_token_id": VOCAB - 1, "hidden_act": "relu", "num_attention_heads": 4},
    {"type_vocab_size": 3, "layer_norm_eps": 0.1, "output_hidden_states": True},
    {"architectures": ["X"], "torchscript": True, "id2label": {0: "a"}},
]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "roberta": _BERT, "bert": _BERT, "camembert": _BERT[:2], "xlm-roberta": _BERT[:2],
    "distilbert": [
        {},
        {"tie_word_embeddings": False, "activation": "relu", "n_heads": 4, "qa_dropout": 0.3},
        {"sinusoidal_pos_embds": True, "pad_token_id": VOCAB - 1},
    ],
    "modernbert": [
        {},
        {
            "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True,
            "decoder_bias": False, "tie_word_embeddings": False,
        },
        {"local_attention": 4, "global_attn_every_n_layers": 2, "num_attention_heads": 4},
        {"local_attention": 2, "global_attn_every_n_layers": 9},  # in chunks of 2
        {"local_attention": 40},  # longer than the sequences
        {"local_attention": 1},  # of a token to itself
        {"hidden_activation": "relu", "classifier_activation": "silu", "norm_eps": 0.1},
        {"global_rope_theta": 50.0, "local_rope_theta": 9.0, "classifier_pooling": "mean"},
        {"reference_compile": False, "sparse_prediction": True, "pad_token_id": VOCAB - 1},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields"), [(f, fields) for f in FAMILIES for fields in VARIANTS[f]], ids=str
)
@pytest.mark.parametrize("extended", [False, True])
def test_an_accepted_folder_has_the_logits_that_it_has_in_transformers(
    family: str, fields: dict[str, Any], extended: bool, tmp_path: Path
) -> None:
    """What config.json may say is computed exactly, wherever the model is cut."""
    kind = FAMILIES[family]
    config = kind.config_class()(**{**kind.read(_config(family).to_dict()), **fields})
    config.max_position_embeddings = kind.first_position(config.pad_token_id) + LENGTH
    model = AutoModelForMaskedLM.from_config(config)
    _randomise(model)
    model.save_pretrained(tmp_path)
    more = config.max_position_embeddings + 5 if extended else None
    shape = resolve(
        ModelConfig(family=family, path=str(tmp_path), max_position_embeddings=more),  # type: ignore[arg-type]
        vocab_size=VOCAB, sequence_length=LENGTH, pad_id=config.pad_token_id,
    )  # fmt: skip
    ours = hf_config(shape, pad_id=config.pad_token_id, cls_id=2, sep_id=3)
    carried = {name: getattr(ours, name) for name in kind.fields if hasattr(config, name)}
    wanted = {name: getattr(config, name) for name in carried}
    changed = {"tie_word_embeddings", "max_position_embeddings"}
    assert {n: v for n, v in carried.items() if n not in changed} == {
        n: v for n, v in wanted.items() if n not in changed
    }
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    ids = _ids()
    ids[0, -3:] = config.pad_token_id
    with torch.no_grad():
        logits = _logits(_stages(ours, (1, 3), path=str(tmp_path)), ids)
        torch.testing.assert_close(logits, expected(ids)[0], atol=1e-5, rtol=1e-5)


def _starts(second_document: int) -> torch.Tensor:
    """What travels for sequences of two documents, as if no position were masked."""
    return torch.full((3, 1), 1 << second_document, dtype=torch.int32)


@FAMILY
@pytest.mark.parametrize("cut", [(), (1, 3)], ids=str)
@pytest.mark.parametrize("local_attention", [6, 2])  # by mask, and in chunks
def test_a_document_does_not_see_its_neighbour_in_the_block(
    family: str, cut: tuple[int, ...], local_attention: int
) -> None:
    config = _config(family)
    config.local_attention = local_attention  # of ModernBERT
    specs = stage_specs(PipelineConfig(cut=cut), num_hidden_layers=LAYERS)
    stages = [build_stage(s, config, seed=0, start_words=1)[0].eval() for s in specs]
    for stage in stages:
        _randomise(stage)
    ids, second = _ids(), 5
    everywhere = torch.arange(LENGTH, dtype=torch.int32).expand_as(ids)
    known = torch.cat([everywhere, _starts(second)], 1)

    def logits(tokens: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        hidden = tokens
        with torch.no_grad():
            for stage in stages:
                hidden = stage(hidden, known)
            return stages[-1].logits(hidden, known)

    other = ids.clone()
    other[:, :second] = (other[:, :second] - 3) % (VOCAB - 4) + 4
    first, changed = logits(ids, known), logits(other, known)
    assert not torch.isclose(first[:, :second], changed[:, :second]).all()
    torch.testing.assert_close(first[:, second:], changed[:, second:])
    whole = torch.cat([everywhere, _starts(30)], 1)
    assert not torch.isclose(logits(ids, whole)[:, second:], logits(other, whole)[:, second:]).all()
    if FAMILIES[family].positions == "rotary":  # where a document begins changes nothing
        length = LENGTH - second
        alone = torch.cat([everywhere[:, :length], _starts(30)], 1)
        torch.testing.assert_close(
            first[:, second:], logits(ids[:, second:], alone), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("length", "local_attention", "documents"),
    [(37, 4, False), (37, 4, True), (64, 8, True), (16, 2, True)],
)
def test_chunks_of_a_long_sequence_compute_what_a_mask_does(
    length: int, local_attention: int, documents: bool
) -> None:
    """Outputs and gradients, and no nan beyond the end of the sequence."""
    kind, config = FAMILIES["modernbert"], _config("modernbert")
    config.local_attention = local_attention
    layer = kind.make_layer(config, 1).double()
    _randomise(layer)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, length, config.hidden_size, generator=generator).double()
    hidden.requires_grad_()
    visible = None
    if documents:
        of = (torch.rand(2, length, generator=generator) < 0.15).cumsum(1)
        visible = of[:, None, :, None] == of[:, None, None, :]
    around = kind.surroundings(config, length, visible, hidden.device)
    assert around.band is not None
    found = []
    for surroundings in (around, replace(around, band=None)):
        outputs = kind.run_layer(layer, hidden, surroundings)
        weighted = (outputs * torch.arange(length)[:, None]).sum()
        gradients = torch.autograd.grad(weighted, [hidden, *layer.parameters()])
        found.append([outputs, *gradients])
    for chunked, masked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, masked)
    positions = torch.tensor([[1, 5, length - 1], [0, 7, 9]])
    some = kind.run_layer_at(layer, hidden, positions, around)
    torch.testing.assert_close(some, gather(found[0][0], positions))


@pytest.mark.parametrize(("length", "local_attention"), [(37, 4), (16, 4), (15, 4), (12, 1)])
def test_a_modernbert_costs_what_the_plan_says_in_chunks_too(
    length: int, local_attention: int
) -> None:
    kind, shape = FAMILIES["modernbert"], _shape("modernbert")
    fields = {"local_attention": local_attention, "global_attn_every_n_layers": 3}
    shape = replace(shape, config={**shape.config, **fields})
    config = hf_config(shape, pad_id=0, cls_id=2, sep_id=3)
    around = kind.surroundings(config, length, None, torch.device("cpu"))
    hidden = torch.zeros(2, length, shape.hidden_size)
    costs = []
    for index in range(7):
        layer = kind.make_layer(config, index)
        # The fused kernel is not counted.
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
            kind.run_layer(layer, hidden, around)
        costs.append(flops.get_total_flops() // 2)
    for first in range(7):
        for end in range(first, 8):
            planned = shape.layers_flops(first, end, sequence_length=length)
            assert planned == sum(costs[first:end]), (first, end)


def test_positions_that_a_folder_does_not_have_are_named(tmp_path: Path) -> None:
    _random_model("roberta", tied=True).save_pretrained(tmp_path)
    config = _config("roberta")
    config.max_position_embeddings = 25
    spec = stage_specs(PipelineConfig(cut=(2,)), num_hidden_layers=LAYERS)[0]
    _, missing = build_stage(spec, config, seed=0, path=str(tmp_path))
    assert missing == ["roberta.embeddings.position_embeddings.weight[20:]"]


@FAMILY
def test_every_field_that_transformers_writes_by_default_is_accepted(
    family: str, tmp_path: Path
) -> None:
    kind = FAMILIES[family]
    default = kind.config_class()()
    found = dict(kind.read(default.to_dict()))  # without what a family has lost in 5.x
    assert {name: found.get(name) for name in kind.fields} == {
        name: field.default for name, field in kind.fields.items()
    }
    assert found["pad_token_id"] == kind.pad_token_id
    assert all(value == found.get(name, value) for name, (value, _) in kind.fixed.items())
    biased = {n: True for n, field in kind.fields.items() if n.endswith("_bias")}
    every = kind.config_class()(**_config(family).to_dict() | biased)
    every._attn_implementation = "sdpa"
    layer = {name for name, _ in kind.make_layer(every, 1).named_parameters()}
    renamed = {name for name in kind.layer_tensors if name.endswith(("gamma", "beta"))}
    assert layer == kind.layer_tensors - renamed
    _random_model(family, tied=True).save_pretrained(tmp_path)
    counts = [name for name, field in kind.fields.items() if field.kind == "count"]
    sizes = {name: getattr(_config(family), name) for name in counts}  # those of the weights
    (tmp_path / "config.json").write_text(json.dumps(found | sizes | {"torch_dtype": "float32"}))
    resolve(ModelConfig(family=family, path=str(tmp_path)), vocab_size=1, sequence_length=LENGTH)  # type: ignore[arg-type]


_BASE = {
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "num_attention_heads": 12, "num_hidden_layers": 12, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "type_vocab_size": 2, "model_type": "bert",
}  # fmt: skip
_POOLER = {
    "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert-base-uncased": _BASE | {
        "architectures": ["BertForMaskedLM"], "gradient_checkpointing": False, "pad_token_id": 0,
        "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
        "use_cache": True, "vocab_size": 30522,
    },
    "bert-base-multilingual-cased": _BASE | _POOLER | {"vocab_size": 119547},
    "biobert": _BASE | _POOLER | {
        "finetuning_task": None, "is_decoder": False, "num_labels": 2, "output_attentions": False,
        "output_hidden_states": False, "torchscript": False, "use_bfloat16": False,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "vocab_size": 28996,
    },
    "BiomedBERT": _BASE | {"architectures": ["BertForMaskedLM"], "vocab_size": 30522},
    "all-MiniLM-L6-v2": _BASE | {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
        "gradient_checkpointing": False, "hidden_size": 384, "intermediate_size": 1536,
        "num_hidden_layers": 6, "pad_token_id": 0, "vocab_size": 30522,
    },
    "roberta-base": _BASE | {
        "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2,
        "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "model_type": "roberta",
        "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265,
    },
    "a fine-tuned RoBERTa": _BASE | {
        "_num_labels": 3, "classifier_dropout": None, "problem_type": "single_label_classification",
        "model_type": "roberta", "torch_dtype": "float32", "_attn_implementation_autoset": True,
        "vocab_size": 50265,
    },
}  # fmt: skip


def _newer(kinds: list[str], far: Any = None, near: Any = None, **fields: Any) -> dict[str, Any]:
    """A ModernBERT's config.json as transformers 5.24 writes it."""
    rotary = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", far or 160000.0), ("sliding_attention", near or 1e4))
    }
    return {
        "model_type": "modernbert", "num_hidden_layers": len(kinds), "rope_parameters": rotary,
        "layer_types": [f"{kind}_attention" for kind in kinds], **fields,
    }  # fmt: skip


FULL, NEAR = "full", "sliding"


@pytest.mark.parametrize(
    ("content", "every", "bases"),
    [
        (_newer([FULL, NEAR, NEAR, FULL]), 3, (160000.0, 1e4)),
        (_newer([FULL, NEAR], 50.0, 9.0), 3, (50.0, 9.0)),
        (_newer([FULL, NEAR, FULL, NEAR]), 2, (160000.0, 1e4)),
        (_newer([FULL] * 4), 1, (160000.0, 1e4)),
        (_newer([FULL, NEAR, NEAR, NEAR]), 4, (160000.0, 1e4)),
        (_newer([FULL, NEAR], 50.0, global_attn_every_n_layers=2, global_rope_theta=50.0), 2,
         (50.0, 1e4)),
        ({"global_attn_every_n_layers": 2, "global_rope_theta": 5.0, "local_rope_theta": None}, 2,
         (5.0, 5.0)),
    ],
)  # fmt: skip
def test_a_modernbert_of_either_version_of_transformers_is_read_alike(
    content: dict[str, Any], every: int, bases: tuple[float, float]
) -> None:
    found = FAMILIES["modernbert"].read(content)
    assert "layer_types" not in found and "rope_parameters" not in found
    assert found["global_attn_every_n_layers"] == every
    assert (found["global_rope_theta"], found["local_rope_theta"]) == bases


@pytest.mark.parametrize(
    "content",
    [
        _newer([FULL, NEAR, NEAR, NEAR, FULL, NEAR, FULL]),
        _newer([NEAR, FULL, FULL]),
        _newer([FULL, NEAR], global_attn_every_n_layers=1),
        _newer([FULL, NEAR], global_rope_theta=5.0),
        _newer([FULL, NEAR], num_hidden_layers=3),
        _newer([FULL], rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 2.0}}),
        _newer([NEAR] * 20_000),
        _newer([FULL, NEAR], num_hidden_layers=2.0),
        _newer([FULL], rope_parameters={"full_attention": 160000.0}),
    ],
    ids=[
        "not periodic",
        "local first",
        "contradiction",
        "two bases",
        "too short",
        "scaled",
        "long",
        "no whole number",
        "no object",
    ],
)
def test_a_modernbert_that_the_stages_would_not_compute_is_refused(
    content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    expected = r"fields of a modernbert model in .*, got (layer_types|rope_parameters) = "
    with pytest.raises(ConfigError, match=expected):
        resolve(
            ModelConfig(family="modernbert", path=str(tmp_path)), vocab_size=1, sequence_length=8
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_json_of_a_published_model_is_accepted(name: str, tmp_path: Path) -> None:
    content = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = ModelConfig(family=content["model_type"], path=str(tmp_path))
    shape = resolve(model, vocab_size=1, sequence_length=LENGTH)
    assert shape.vocab_size == content["vocab_size"]
    assert shape.config["layer_norm_eps"] == content["layer_norm_eps"]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    _random_model("roberta", tied=True).save_pretrained(tmp_path)
    config = _config("roberta")
    config.vocab_size = VOCAB + 1
    with pytest.raises(
        ConfigError, match=r"^model.path: expected roberta.embeddings.word_embeddings.weight of "
        r"shape \[54, 16\], got \[53, 16\] in .*\. Use that model's own tokenizer and sizes\."
    ):  # fmt: skip
        _stages(config, (2,), path=str(tmp_path))


def test_a_folder_without_a_layer_is_refused(tmp_path: Path) -> None:
    """The layer would start at random in the middle of a trained model."""
    _random_model("roberta", tied=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layer.3." not in n}, file)
    with pytest.raises(ConfigError, match=r"^model.path: expected roberta.encoder.layer.3\."):
        _stages(_config("roberta"), (2,), path=str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_refused_in_one_line(file: str, tmp_path: Path) -> None:
    model = _random_model("roberta", tied=True)
    model.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        _pickle(tmp_path)
    content = (tmp_path / file).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<!DOCTYPE html>" * 9):
        (tmp_path / file).write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"^model.path: expected readable .*{file}, got "):
            _stages(_config("roberta"), (2,), path=str(tmp_path))


@FAMILY
def test_tensors_that_config_json_asks_for_are_missed_before_a_rank_reads_the_others(
    family: str, tmp_path: Path
) -> None:
    _random_model(family, tied=True).save_pretrained(tmp_path)
    model = ModelConfig(family=family, path=str(tmp_path))  # type: ignore[arg-type]
    whole, kind = load_file(tmp_path / "model.safetensors"), FAMILIES[family]

    def read() -> None:
        resolve(model, vocab_size=1, sequence_length=LENGTH)

    read()
    for what, place in (("the embeddings", kind.embeddings), ("layer 1", f"{kind.layers}.1")):
        inside = [name for name in whole if name.startswith(f"{place}.")]
        left_out = min(inside, key=lambda name: whole[name].numel())
        save_file({n: t for n, t in whole.items() if n != left_out}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"^model.path: expected [\d,]+ weights of {what} "):
            read()
    save_file(whole, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    for bias in (name for name in kind.fields if name in ("norm_bias", "mlp_bias")):
        (tmp_path / "config.json").write_text(json.dumps(content | {bias: True}))
        with pytest.raises(ConfigError, match=r"weights of (the embeddings|layer 0) "):
            read()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, "a word"])
def test_weights_that_are_no_numbers_are_refused_by_name(value: Any, tmp_path: Path) -> None:
    _random_model("roberta", tied=True).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    name, expected = "roberta.encoder.layer.3.output.dense.bias", "readable weights in .*, got "
    if isinstance(value, float):
        value, expected = whole[name].fill_(value), f"finite weights in .*, got NaN or .* in {name}"
    torch.save(whole | {name: value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"^model.path: expected {expected}"):
        _stages(_config("roberta"), (2,), path=str(tmp_path))


@FAMILY
@pytest.mark.parametrize("cut", [(), (2,)], ids=str)
def test_a_decoder_that_config_json_ties_to_another_embedding_is_refused(
    family: str, cut: tuple[int, ...], tmp_path: Path
) -> None:
    """Versions of transformers differ in which of the two matrices they take."""
    model = _random_model(family, tied=False)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=rf"^model.path: expected {FAMILIES[family].decoder} to"):
        _stages(_config(family), cut, path=str(tmp_path))
    same = load_file(tmp_path / "model.safetensors")
    same[FAMILIES[family].decoder] = same[FAMILIES[family].word_embeddings].clone()
    save_file(same, tmp_path / "model.safetensors")
    _stages(_config(family), cut, path=str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    stage = _stages(_config("roberta"), ())[0]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model.path: expected roberta.* without it. Use a wh"):
        load_pretrained(stage, family=stage.family, path=str(tmp_path))


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _random_model("roberta", tied=False)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(None, ["model.path=~/model", "data.sequence_length=12"])
    shape = resolve(config.model, vocab_size=VOCAB, sequence_length=LENGTH)
    hf = hf_config(shape, pad_id=1, cls_id=2, sep_id=3)
    _assert_equals(_stages(hf, (2,), path=config.model.path), model)


def test_sinusoidal_positions_have_the_deviation_of_the_others_and_show_distance() -> None:
    config = _config("roberta")
    spec = stage_specs(PipelineConfig(cut=()), num_hidden_layers=config.num_hidden_layers)[0]
    plain, _ = build_stage(spec, config, seed=0)
    stage, _ = build_stage(spec, config, seed=0, sinusoidal_positions=True)
    name = "roberta.embeddings.position_embeddings.weight"
    table = stage.get_parameter(name).detach()
    assert table.square().mean().sqrt().item() == pytest.approx(config.initializer_range)
    assert not table[0, 0::2].any(), "sin 0"
    near, far = (table[3] @ table[4]).item(), (table[3] @ table[9]).item()
    assert near > far > -near
    for other, value in stage.named_parameters():
        assert torch.equal(value, plain.get_parameter(other)) == (other != name), other
