"""Which parameter belongs to which stage, through the state dicts of real transformers models."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fedpipe.config.load import load_config
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import PipelineConfig
from fedpipe.errors import FederationError
from fedpipe.models.split import (
    StageRole,
    StageSpec,
    merge,
    model_stages,
    owner,
    part_of,
    split,
    stage_specs,
)
from tests.helpers.cases import every

LAYERS = 4
CUTS = [cut for n in range(LAYERS + 1) for cut in combinations(range(LAYERS), n)]
"""Every list of increasing first layers, from one stage to one stage per layer, with and without
a stage of embeddings alone."""


def _model(family: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "num_hidden_layers": LAYERS, "hidden_size": 8, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 23, "max_position_embeddings": 20,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "bert":
        return BertForMaskedLM(BertConfig(**sizes))
    return RobertaForMaskedLM(RobertaConfig(**sizes))


def _specs(cut: tuple[int, ...], **keys: Any) -> tuple[StageSpec, ...]:
    return stage_specs(PipelineConfig(cut=cut, **keys), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module", params=["roberta", "bert"])
def state(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    return dict(_model(request.param).state_dict())


@every("cut", CUTS)
def test_merge_undoes_split_bit_for_bit(
    cut: tuple[int, ...], state: dict[str, torch.Tensor]
) -> None:
    parts = split(state, _specs(cut))
    assert len(parts) == len(cut) + 1
    assert sum(map(len, parts)) == len(state), "every tensor is on one stage"
    whole = merge(parts)
    assert whole.keys() == state.keys()
    for name, tensor in state.items():
        assert whole[name].dtype == tensor.dtype
        assert torch.equal(whole[name], tensor), name


@every("cut", CUTS)
def test_a_layer_lives_where_the_cut_says(
    cut: tuple[int, ...], state: dict[str, torch.Tensor]
) -> None:
    specs = _specs(cut)
    for name in state:
        if ".embeddings." in name:
            expected = 0
        elif ".encoder.layer." in name:
            layer = int(name.split(".")[3])
            expected = sum(layer >= first for first in cut)
        else:
            expected = len(cut)
        assert owner(name, specs) == expected, name


def test_the_filter_reads_names_of_two_digits() -> None:
    specs = stage_specs(PipelineConfig(cut=(2, 11)), num_hidden_layers=24)
    name = "roberta.encoder.layer.{}.attention.self.query.weight"
    assert [owner(name.format(i), specs) for i in (1, 2, 10, 11, 12, 23)] == [0, 1, 1, 2, 2, 2]


def test_two_stages_with_the_same_parameter_are_refused() -> None:
    with pytest.raises(FederationError, match=r"^lm_head.bias: expected on one stage, got two\."):
        merge([{"lm_head.bias": 1}, {"lm_head.bias": 1}])


def test_auxiliary_heads_belong_to_their_stage_and_not_to_the_model() -> None:
    specs = _specs((1, 3))
    names = ["aux_heads.0.head.bias", "aux_heads.1.layer.output.dense.weight", "lm_head.bias"]
    parts = split(dict.fromkeys(names, 0), specs)
    assert [list(part) for part in parts] == [[n] for n in names]
    assert list(merge(parts)) == ["lm_head.bias"]


def test_every_parameter_obeys_one_switch() -> None:
    client, middle, last = _specs((1, 3), num_client_stages=2)
    layer = "bert.encoder.layer.{}.output.dense.bias"
    assert part_of("bert.embeddings.LayerNorm.weight", client) == "embeddings"
    assert part_of(layer.format(0), client) == "client_layers"
    assert part_of("aux_heads.0.head.transform.dense.bias", client) == "aux_head"
    assert part_of(layer.format(2), middle) == "client_layers"
    assert part_of("aux_heads.1.layer.output.dense.bias", middle) == "aux_head"
    assert part_of(layer.format(3), last) == "server_layers"
    assert part_of("cls.predictions.transform.dense.bias", last) == "final_head"


def test_stages_have_the_role_the_layers_and_the_head_of_the_configuration() -> None:
    specs = _specs((0, 3), num_client_stages=1, local_head="mlm+layer")
    assert [s.role for s in specs] == [StageRole.CLIENT, StageRole.SERVER, StageRole.SERVER]
    assert [s.num_layers for s in specs] == [0, 3, 1]
    assert [s.head for s in specs] == ["mlm+layer", "mlm+layer", "mlm"]
    assert [s.contents for s in specs] == [
        ("embeddings", "aux_head"), ("layers 0-2", "aux_head"), ("layer 3", "lm_head")
    ]  # fmt: skip


def test_end_to_end_has_one_head_at_the_end() -> None:
    specs = _specs((1, 3), objective="end_to_end", schedule="1f1b")
    assert [s.head for s in specs] == ["", "", "mlm"]
    assert [s.has_head for s in specs] == [False, False, True]


END_TO_END = ("pipeline.objective=end_to_end", "pipeline.schedule=1f1b")
HOME = "pipeline.head_location=client"
KEPT = "federation.average.embeddings=false"


@pytest.mark.parametrize(
    ("overrides", "decoder"),
    [
        (["pipeline.cut=[]"], "shared"),
        ([HOME, *END_TO_END], "shared"),
        ([], "copied"),
        (["pipeline.cut=[1,2]"], "copied"),
        ([HOME], "copied"),
        ([HOME, KEPT], "copied"),
        ([KEPT, "pipeline.num_client_stages=2"], "copied"),
        ([KEPT], "own"),
        ([*END_TO_END], "own"),
        (["model.tie_word_embeddings=false"], "own"),
        (["model.tie_word_embeddings=false", "pipeline.cut=[]"], "own"),
        (["model.tie_word_embeddings=false", HOME, *END_TO_END], "own"),
    ],
    ids=str,
)
def test_the_final_decoder_is_the_embedding_where_it_may_know_it(
    overrides: list[str], decoder: str
) -> None:
    config = load_config(None, overrides)
    shape = resolve(config.model, vocab_size=23, sequence_length=8)
    stages = model_stages(config, shape)
    assert stages[-1].decoder == decoder
    for stage in stages[:-1]:  # only the first stage has a word embedding to share
        assert stage.decoder == ("shared" if stage.is_first and stage.has_head else "own")
