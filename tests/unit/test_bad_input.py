"""What a user can get wrong in the configuration: one line, the key, the value, a way out."""

# ruff: noqa: E501  (one error a row: the tables are read across)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpipe.config.half_files import check_weights
from fedpipe.config.load import from_dict, load_config
from fedpipe.config.model_shape import resolve
from fedpipe.config.schema import ModelConfig
from fedpipe.errors import ConfigError
from tests.helpers.cases import every


def message(overrides: list[str], path: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert text.rstrip().endswith((".", "?")), "it must end in a sentence: a way out"
    return text


OVERRIDES = [
    # unknown keys: the nearest name, of the section or of any other
    ("federation.num_round=3", "federation.num_round: unknown key in an override. Did you mean federation.num_rounds?"),
    ("micro_batch_size=3", "Did you mean pipeline.micro_batch_size?"),
    ("train.lr=3", "train: unknown key"),
    ("modell.size=tiny", "Did you mean model?"),
    ("federation.average.embedding=1", "Did you mean federation.average.embeddings?"),
    ("log.zzz=1", "Keys of log: every, to."),
    ("zzz=1", "Keys of the file: name, seed, model,"),
    ("log.tensorboard=false", "log.tensorboard: unknown key in an override. Write log.to=[tensorboard] for true, log.to=[] for false."),
    # not an override at all
    ("seed", "expected section.key=value, got 'seed'"),
    ("=3", "expected section.key=value"),
    ("a..b=3", "expected section.key=value"),
    ("model={", "model: expected a YAML value, got '{'"),
    ("seed=!!int x", "seed: expected a YAML value"),
    ("model={size: tiny, size: base}", "model.size: expected once, got a second time"),
    # wrong types
    ("seed=x", "seed: expected a whole number, got 'x' in an override. Write digits only."),
    ("seed=1.5", "seed: expected a whole number, got 1.5"),
    ("seed=true", "seed: expected a whole number, got True"),
    ("seed=", "seed: expected a whole number, got null"),
    ("seed=[1]", "seed: expected a whole number, got [1]"),
    ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
    ("optimizer.lr=true", "optimizer.lr: expected a number, got True"),
    ("optimizer.lr=.inf", "optimizer.lr: expected a finite number"),
    (f"optimizer.lr=1{'0' * 400}", "optimizer.lr: expected a finite number"),
    ("optimizer.eps=.nan", "optimizer.eps: expected a finite number"),
    ("name=3", "name: expected a text, got 3 in an override. Put it in quotes."),
    ("name=null", "name: expected a text, got null"),
    ("pipeline.colocate=yes", "pipeline.colocate: expected true or false, got 'yes'"),
    ("pipeline.colocate=1", "pipeline.colocate: expected true or false, got 1"),
    ("pipeline.cut=2", "pipeline.cut: expected a list, got 2 in an override. Write pipeline.cut=[2]."),
    ("pipeline.cut=null", "pipeline.cut: expected a list, got null"),
    ("pipeline.cut=auto:\uff12", "pipeline.cut: expected a list, auto or auto:N"),
    ("pipeline.cut=[a]", "pipeline.cut[0]: expected a whole number, got 'a'"),
    ("optimizer.betas=[0.9,x]", "optimizer.betas[1]: expected a number, got 'x'"),
    ("federation=3", "federation: expected a section with keys, got 3"),
    ("federation.average=true", "federation.average: expected a section with keys, got True"),
    ("model.size=huge", "model.size: expected one of tiny, small, base, large, ettin-32m, modernbert-base, got 'huge'"),
    ("model.family=robert", "Did you mean roberta?"),
    ("model.size=null", "model.size: expected one of tiny, small, base, large, ettin-32m, modernbert-base, got null"),
    ("model.hidden_size=big", "model.hidden_size: expected a whole number"),
    ("model.hidden_act=3", "model.hidden_act: expected a text"),
    # one section's own limits
    ("data.train=[]", "data.train: expected at least one file"),
    ("data.sequence_length=4", "data.sequence_length: expected 8 or more, got 4"),
    ("data.padded_length=31", "data.padded_length: expected 0 or at least data.sequence_length (32), got 31"),
    ("data.padded_length=-1", "data.padded_length: expected 0 or at least data.sequence_length"),
    ("data.mask_probability=1.5", "data.mask_probability: expected a value in (0, 1)"),
    ("data.mask_probability=[0.3]", "data.mask_probability: expected a value in (0, 1), or two of them, got [0.3]"),
    ("data.mask_probability=[0.3, x]", "data.mask_probability[1]: expected a number, got 'x'"),
    ("data.mask_probability=x", "data.mask_probability: expected a number, got 'x'"),
    ("data.mask_probability=null", "data.mask_probability: expected a number, got null"),
    ("data.mask_switch=1", "data.mask_switch: expected a value in (0, 1), got 1.0"),
    ("data.dirichlet_alpha=0", "data.dirichlet_alpha: expected a value above 0"),
    ("data.num_workers=-1", "data.num_workers: expected 0 or more"),
    ("pipeline.cut=[4,4]", "pipeline.cut: expected increasing layer indices"),
    ("pipeline.cut=[-1]", "pipeline.cut: expected increasing layer indices, 0 or more"),
    ("pipeline.num_client_stages=3", "pipeline.num_client_stages: expected 1..2"),
    ("pipeline.num_micro_batches=0", "pipeline.num_micro_batches: expected 1 or more"),
    ("pipeline.schedule=1f1b", "Set pipeline.schedule=streaming or change pipeline.objective."),
    ("federation.num_replicas=0", "federation.num_replicas: expected 1 or more"),
    ("federation.num_local_epochs=-1", "federation.num_local_epochs: expected 0 or more"),
    ("federation.clients_per_round=7", "federation.clients_per_round: expected 1..6"),
    ("optimizer.lr=0", "optimizer.lr: expected a value above 0"),
    ("optimizer.betas=[0.9]", "optimizer.betas: expected two values in [0, 1)"),
    ("optimizer.warmup_ratio=1.5", "optimizer.warmup_ratio: expected a value in [0, 1]"),
    ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm: expected 0 or more"),
    ("optimizer.decay_ratio=0", "optimizer.decay_ratio: expected a value in (0, 1], got 0.0"),
    ("optimizer={decay: wsd, warmup_ratio: 0.5, decay_ratio: 0.6}", "optimizer.decay_ratio: expected at most 0.5 beside optimizer.warmup_ratio=0.5, got 0.6. Lower one of them"),
    ("optimizer.muon.momentum=1", "optimizer.muon.momentum: expected a value in [0, 1), got 1.0"),
    ("optimizer.muon.num_iterations=0", "optimizer.muon.num_iterations: expected 1 or more"),
    ("optimizer.name=mun", "optimizer.name: expected one of adamw, adam, sgd, muon, got 'mun' in an override. Did you mean muon?"),
    ("optimizer.power=0", "optimizer.power: expected a value above 0"),
    ("pipeline.hang_timeout_s=-1", "pipeline.hang_timeout_s: expected 0 or more"),
    ("checkpoint.every_rounds=0", "checkpoint.every_rounds: expected 1 or more"),
    ("checkpoint.every_steps=-1", "checkpoint.every_steps: expected 0 or more"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last: expected 1 or more"),
    ("validation.every_rounds=0", "validation.every_rounds: expected 1 or more"),
    ("validation.max_blocks_per_client=-1", "validation.max_blocks_per_client: expected 0 or more"),
    ("log.every=0", "log.every: expected 1 or more"),
    ("log.to=[wandb,wandb]", "log.to: expected every name once, got ['wandb', 'wandb']"),
    ("log.to=[tensorbord]", "log.to[0]: expected one of tensorboard, wandb, mlflow, trackio, got 'tensorbord' in an override. Did you mean tensorboard?"),
    # a name is a folder below runs/
    ("name=../x", "name: expected the name of one folder, for the default directory runs/NAME, got '../x'. Choose another name"),
    ("name=/tmp/x", "name: expected the name of one folder"),
    ("name=..", "name: expected the name of one folder"),
    ("name=''", "name: expected the name of one folder"),
    ('name="a\\nb"', "name: expected the name of one folder"),
    # several sections
    ("pipeline.cut=[4]", "pipeline.cut: expected increasing layer indices in 1..3 (the model has 4 layers), got [4]."),
    ("pipeline.cut=[1,2,3,4]", "pipeline.cut: expected at most 4 stages (the model has 4 layers), got 5."),
    ("pipeline.cut=[0,1,2,3,4]", "expected at most 5 stages"),
    ("data.partition=paths", "data.train: expected 6 entries, one per client (data.partition=paths), got 1."),
    ("data.mask_probability=0.99", "data.mask_probability: expected at most 0.94"),
    ("data.mask_probability=[0.15, 0.99]", "data.mask_probability: expected at most 0.94"),
    ("data={mask_probability: [0.3, 0.15], mask_switch: 0.95}", "data.mask_switch: expected at most 0.917 with federation.num_rounds=12, where the last round begins, got 0.95. Lower it, or raise federation.num_rounds"),
    ("model.num_attention_heads=3", "model.num_attention_heads: expected a divisor of model.hidden_size (128), got 3. Set model.num_attention_heads=2."),
    ("model={hidden_size: 100000000000, num_attention_heads: 7}", "(100000000000), got 7. Set model.num_attention_heads=8."),
    ("model.num_hidden_layers=0", "model.num_hidden_layers: expected 1 or more, got 0"),
    ("model.hidden_dropout_prob=1.0", "model.hidden_dropout_prob: expected a value in [0, 1)"),
    ("model.initializer_range=0", "model.initializer_range: expected a value above 0"),
    ("model.hidden_act=gleu", "model.hidden_act: expected one of gelu"),
    ("model.path=/nowhere", "model.path: expected a Hugging Face folder, got '/nowhere'"),
    ("deepspeed.config=/nowhere.json", "deepspeed.config: expected a readable JSON file"),
]  # fmt: skip


FEDERATIONS = [
    # the rule
    (["aggregation.num_byzantine=-1"], "federation.aggregation.num_byzantine: expected 0 or more, got -1."),
    (["aggregation.num_byzantine=1"], "federation.aggregation.num_byzantine: expected 0 with federation.aggregation.rule=mean, got 1."),
    (["aggregation.rule=median"], "federation.aggregation.weighting: expected uniform with federation.aggregation.rule=median, got 'tokens'."),
    (["aggregation={rule: trimmed_mean, weighting: uniform}"], "federation.aggregation.num_byzantine: expected 1 or more with federation.aggregation.rule=trimmed_mean, got 0."),
    (["aggregation={rule: krum, weighting: uniform}"], "federation.aggregation.num_byzantine: expected 1 or more with federation.aggregation.rule=krum, got 0."),
    (["aggregation={rule: trimmed_mean, weighting: uniform, num_byzantine: 2}", "clients_per_round=4"], "federation.clients_per_round: expected 5 or more with federation.aggregation.rule=trimmed_mean and num_byzantine=2, got 4."),
    (["aggregation={rule: median, weighting: uniform, num_byzantine: 2}", "clients_per_round=4"], "federation.clients_per_round: expected 5 or more"),
    (["aggregation={rule: krum, weighting: uniform, num_byzantine: 1}", "clients_per_round=4"], "federation.clients_per_round: expected 5 or more with federation.aggregation.rule=krum and num_byzantine=1, got 4."),
    (["aggregation={rule: median, weighting: uniform}", "wire=int8"], "federation.wire: expected fp32 with federation.aggregation.rule=median, got 'int8'. Set federation.wire=fp32."),
    (["aggregation={rule: median, weighting: uniform}", "wire=sparse"], "federation.wire: expected fp32 with federation.aggregation.rule=median, got 'sparse'. Set federation.wire=fp32."),
    (["density=0"], "federation.density: expected a value in (0, 1], got 0.0."),
    (["density=1.5"], "federation.density: expected a value in (0, 1], got 1.5."),
    # the server optimizer, FedProx and attackers
    (["server_optimizer.lr=0"], "federation.server_optimizer.lr: expected a value above 0"),
    (["server_optimizer.betas=[1, 0.9]"], "federation.server_optimizer.betas: expected two values in [0, 1)"),
    (["server_optimizer.tau=0"], "federation.server_optimizer.tau: expected a value above 0"),
    (["server_optimizer.name=fedyoghi"], "Did you mean fedyogi?"),
    (["fedprox_mu=-1"], "federation.fedprox_mu: expected 0 or more"),
    (["attack.num_attackers=-1"], "federation.attack.num_attackers: expected 0 or more"),
    (["attack.num_attackers=7"], "federation.attack.num_attackers: expected 0..6 (federation.num_clients), got 7."),
    (["attack.num_attackers=1"], "federation.attack.num_attackers: expected 0 with federation.attack.kind=none, got 1. Set both or neither."),
    (["attack.kind=noise"], "federation.attack.num_attackers: expected 1 or more with federation.attack.kind=noise, got 0."),
    (["attack={kind: noise, num_attackers: 1, scale: 0}"], "federation.attack.scale: expected a value above 0"),
    # a shared server
    (["server=shared", "clients_per_round=3"], "federation.clients_per_round: expected a multiple of federation.num_replicas (2) with federation.server=shared, got 3. Every replica takes part in every step."),
    (["server=shared", "num_local_epochs=1"], "federation.num_local_epochs: expected 0 with federation.server=shared, got 1.0."),
    (["server=shared", "clients_per_round=4", "aggregation={rule: median, weighting: uniform}"], "federation.aggregation.rule: expected mean with federation.server=shared, got 'median'."),
    (["server=shared", "average.server_layers=false"], "federation.average.server_layers: expected true with federation.server=shared, got False."),
    (["server=shared", "average.final_head=false"], "federation.average.final_head: expected true with federation.server=shared and pipeline.head_location=server, got False."),
    # clients one after another
    (["server=sequential"], "federation.num_replicas: expected 1 with federation.server=sequential, got 2. Set federation.num_replicas=1."),
    *(
        (["server=sequential", "num_replicas=1", "clients_per_round=6", *values], f"federation.{key} with federation.server=sequential")
        for values, key in (
            (["aggregation={rule: median, weighting: uniform}"], "aggregation.rule: expected mean"),
            (["server_optimizer.name=fedadam"], "server_optimizer.name: expected fedavg"),
            (["server_optimizer.lr=0.5"], "server_optimizer.lr: expected 1"),
            (["wire=bf16"], "wire: expected fp32"),
            (["fedprox_mu=0.1"], "fedprox_mu: expected 0"),
            (["attack={kind: noise, num_attackers: 1}"], "attack.kind: expected none"),
        )
    ),
]  # fmt: skip


@every(("overrides", "expected"), FEDERATIONS)
def test_a_federation_that_makes_no_sense_is_refused(overrides: list[str], expected: str) -> None:
    assert expected in message([f"federation.{override}" for override in overrides])


def test_a_shared_server_needs_stages_that_it_can_share() -> None:
    shared = "federation.server=shared"
    assert (
        "federation.server: expected replicated where no stage is the server's, got 'shared'."
        in (message([shared, "pipeline.cut=[]"]))
    )
    kept_head = "federation.average.aux_head=false"
    load_config(None, [shared, kept_head])  # the only auxiliary head is the client's
    expected = "federation.average.aux_head: expected true with federation.server=shared"
    assert expected in message([shared, kept_head, "pipeline.cut=[1,2]"])
    at_home = ["pipeline.head_location=client", "federation.average.final_head=false"]
    load_config(None, [shared, *at_home])


@every(
    ("override", "expected"),
    [
        (
            "federation.server=shared",
            "federation.server: expected replicated or sequential with ZeRO",
        ),
        ("federation.fedprox_mu=0.5", "federation.fedprox_mu: expected 0 with ZeRO, got 0.5."),
        (
            "optimizer.name=muon",
            "optimizer.name: expected adamw, adam or sgd with ZeRO, got 'muon'.",
        ),
    ],
)
def test_zero_hides_gradients_that_a_shared_server_fedprox_and_muon_need(
    override: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}), "utf-8")
    text = message([override, f"deepspeed.config={file}"])
    assert expected in text
    assert f"Remove zero_optimization from {file}" in text


def test_zero_hides_gradients_that_a_head_at_home_adds_to_the_embedding(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}), "utf-8")
    overrides = [
        "pipeline.objective=end_to_end", "pipeline.schedule=sequential",
        "pipeline.head_location=client", f"deepspeed.config={file}",
    ]  # fmt: skip
    expected = "model.tie_word_embeddings: expected false with ZeRO, pipeline.objective=end_to_end"
    assert expected in message(overrides)
    load_config(None, [*overrides, "model.tie_word_embeddings=false"])


@every(("override", "expected"), OVERRIDES)
def test_a_bad_override_is_refused(override: str, expected: str) -> None:
    assert expected in message([override])


def test_a_bad_held_out_list_is_refused() -> None:
    overrides = ["data.partition=paths", "federation.num_clients=2", "data.train=[a,b]"]
    assert "data.valid: expected 2 entries" in message(overrides)


FILES = [
    ("federation:\n  num_round: 3\n", "federation.num_round: unknown key in {}:2. Did you mean"),
    ("seed: 1\nfederation:\n  num_rounds: x\n", "got 'x' in {}:3."),
    ("seed: 1\nname: a\nseed: 2\n", "seed: expected once, got a second time in {}:3 (first in {}:1)"),
    ("log:\n  every: 1\n  every: 2\n", "log.every: expected once, got a second time in {}:3"),
    ("model:\n  size: [tiny\nseed: 1\n", "expected YAML, got an error"),
    ("model:\n\tsize: tiny\n", "{}:2: expected YAML"),
    ("- a\n- b\n", "{}:1: expected sections such as 'model:'"),
    ("just words\n", "expected sections"),
    ("seed: 1\n---\nseed: 2\n", "expected YAML"),
    ("seed: !!python/object:os.system x\n", "expected YAML"),
    ("a: &a [*a]\n", "expected YAML"),
    ("seed: \x01\n", "expected YAML"),
]  # fmt: skip


@every(("text", "expected"), FILES)
def test_a_bad_file_is_refused_with_its_line(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert expected.replace("{}", str(file)) in message([], str(file))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "--config: expected a readable YAML file" in message([], str(tmp_path / "none.yaml"))
    assert "(Is a directory)" in message([], str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff\n")
    assert "--config: expected UTF-8 text, got byte 0xff at offset 6" in message([], str(binary))


def test_plain_data_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match="seed: expected a whole number, got 'x' in state.json"):
        from_dict({"seed": "x"}, source="state.json")


# --------------------------------------------------------------------------- Hugging Face folders


def folder_with(tmp_path: Path, content: Any, *, weights: bool = True) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    if weights:
        (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return str(tmp_path)


ROBERTA = {"model_type": "roberta", "num_hidden_layers": 2, "hidden_size": 32,
           "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50265,
           "max_position_embeddings": 514}  # fmt: skip


@every(
    ("content", "expected"),
    [
        ("{", "expected JSON in"),
        ("[]", "model.path: expected a JSON object in"),
        ("{}", 'got None. Write "model_type": "roberta" into it if that is what the model is'),
        ({"model_type": "bert"}, "got 'bert'. Set model.family=bert."),
        ({"model_type": "camembert"}, "got 'camembert'. Set model.family=camembert."),
        (
            {"model_type": "gpt2"},
            "got 'gpt2'. fedpipe pre-trains roberta, bert, modernbert, camemb",
        ),
        ({"model_type": "albert"}, "does not pre-train albert: all of its layers are one"),
        ({"model_type": "electra"}, "does not pre-train electra: it learns to find replaced"),
        ({"model_type": "deberta-v2"}, "Use the folder of a roberta, bert, modernbert, "),
        ({**ROBERTA, "hidden_size": 33}, "model.num_attention_heads: expected a divisor"),
        ({**ROBERTA, "hidden_size": "32"}, "expected 1 or more as hidden_size in"),
        ({**ROBERTA, "layer_norm_eps": 10**400}, "expected a value above 0 as layer_norm_eps in"),
        ({**ROBERTA, "hidden_act": "swiglu"}, "got 'swiglu'. Correct it there, or use another fol"),
    ],
)
def test_a_folder_of_another_model_is_refused(content: Any, expected: str, tmp_path: Path) -> None:
    path = folder_with(tmp_path, content)
    assert expected in message([f"model.path={path}", "pipeline.cut=[1]"])


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path: Path) -> None:
    assert "expected a readable config.json" in message([f"model.path={tmp_path}"])
    path = folder_with(tmp_path, ROBERTA, weights=False)
    assert "model.path: expected weights" in message([f"model.path={path}"])


def test_the_folder_of_a_run_is_answered_with_its_export(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    export = folder_with(tmp_path / "export", ROBERTA)
    told = message([f"model.path={tmp_path}", "pipeline.cut=[1]"])
    assert told.endswith(f"got none. Did you mean {export!r}?")
    with pytest.raises(ConfigError, match=rf"got none of .* Did you mean '{export}'\?$"):
        check_weights(tmp_path, key="model.path")


def test_padding_that_the_positions_do_not_reach_is_refused() -> None:
    model = ModelConfig(max_position_embeddings=514)
    with pytest.raises(ConfigError) as caught:
        resolve(model, vocab_size=8192, sequence_length=600, pad_id=1)
    assert str(caught.value) == (
        "model.max_position_embeddings: expected at least 602 (data.sequence_length or"
        " data.padded_length + 2, where RoBERTa's positions start), got 514. Set the longer of them"
        " to 512 or less."
    )
    with pytest.raises(ConfigError, match=r"at least 608 .* got 514\. Leave it out\.$"):
        resolve(model, vocab_size=8192, sequence_length=100, pad_id=507)


def test_a_folder_whose_positions_end_too_early_may_be_given_more(tmp_path: Path) -> None:
    path = folder_with(tmp_path, {**ROBERTA, "max_position_embeddings": 34})
    sizes = {"vocab_size": 50265, "sequence_length": 48, "pad_id": 1}
    with pytest.raises(ConfigError) as caught:
        resolve(ModelConfig(path=path), **sizes)
    assert str(caught.value).endswith(
        "got 34. Set the longer of them to 32 or less, or model.max_position_embeddings=50, where"
        " those after the folder's 34 start anew."
    )
    resolve(ModelConfig(path=path, max_position_embeddings=50), **sizes)
    with pytest.raises(ConfigError, match="model.max_position_embeddings: expected 34 .config.js"):
        resolve(ModelConfig(path=path, max_position_embeddings=33), **sizes)


def test_a_size_that_contradicts_the_folder_is_refused(tmp_path: Path) -> None:
    path = folder_with(tmp_path, ROBERTA)
    text = message([f"model.path={path}", "model.hidden_size=64", "pipeline.cut=[1]"])
    assert "model.hidden_size: expected 32 (config.json in" in text


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    folder = ModelConfig(path=folder_with(tmp_path, ROBERTA))
    with pytest.raises(ConfigError, match="vocabulary and model disagree: .* has 50265 tokens"):
        resolve(folder, vocab_size=8192, sequence_length=128)
    with pytest.raises(ConfigError, match="vocabulary and model disagree: expected at least 60000"):
        resolve(folder, vocab_size=60000, sequence_length=128)
    with pytest.raises(ConfigError, match="model.vocab_size: vocabulary and model disagree"):
        resolve(ModelConfig(vocab_size=100), vocab_size=8192, sequence_length=128)
    resolve(folder, vocab_size=50200, sequence_length=128)  # an embedding padded to a multiple


FIELDS = [
    (
        {"position_embedding_type": "relative_key"},
        "expected position_embedding_type 'absolute' in {}, got 'relative_key'. Use the folder of a model with absolute positions.",
    ),
    ({"position_embedding_type": "alibi"}, "got 'alibi'. Use the folder of a model with absolute"),
    (
        {"is_decoder": True},
        "expected is_decoder False in {}, got True. Use the folder of an encoder",
    ),
    ({"is_encoder_decoder": True}, "expected is_encoder_decoder False in {}, got True."),
    ({"add_cross_attention": True}, "expected add_cross_attention False in {}, got True."),
    ({"pruned_heads": {"1": [0, 2]}}, "got {'1': [0, 2]}. Use the folder of the whole model."),
    ({"chunk_size_feed_forward": 64}, "got 64. Set it to 0 there: no result depends on it."),
    ({"quantization_config": {"load_in_8bit": True}}, "got {'load_in_8bit': True}. Use the folder"),
    ({"auto_map": {"AutoModel": "modeling_x.X"}}, "Use a model that is part of transformers and"),
    (
        {"attention_bias": False, "a": "\x1b[2J" * 20},
        r"got attention_bias = False, a = '\x1b[2J\x1b",
    ),
    (
        {"rope_theta": 1e4},
        "expected the fields of a roberta model in {}, got rope_theta = 10000.0. Remove it there if the model computes the same without it, or use another folder.",
    ),
]


@every(("fields", "expected"), FIELDS)
def test_a_field_that_the_stages_do_not_honour_is_refused_by_name(
    fields: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = folder_with(tmp_path, ROBERTA | fields)
    text = message([f"model.path={path}", "pipeline.cut=[1]"])
    assert expected.replace("{}", f"{path}/config.json") in text
    assert text.startswith("model.path: expected ")


@every(
    "name",
    [
        "roberta.encoder.layer.2.output.dense.bias",
        "roberta.encoder.layer.1.attention.self.distance_embedding.weight",
        "encoder.layer.0.output.adapters.a.adapter_down.0.weight",
    ],
)
def test_a_tensor_of_a_layer_that_would_be_left_out_is_refused(name: str, tmp_path: Path) -> None:
    path = folder_with(tmp_path, ROBERTA)
    names = ["roberta.encoder.layer.1.output.LayerNorm.gamma", "lm_head.bias", name]
    header = json.dumps({n: {"data_offsets": [0, 0]} for n in names}).encode()
    weights = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert (
        f"model.path: expected the tensors of 2 roberta layers (config.json) in {path}, got {name}."
        in message([f"model.path={path}", "pipeline.cut=[1]"])
    )


@every(
    ("name", "shape", "expected"),
    [
        (
            "roberta.embeddings.word_embeddings.weight",
            [9, 4],
            "{name} of shape [{vocab}, {hidden}]",
        ),
        ("roberta.encoder.layer.0.attention.self.query.weight", [4, 4], "the tensors of 2 roberta"),
    ],
)
def test_weights_of_other_sizes_than_config_json_says_are_refused_before_a_rank_reads_them(
    name: str, shape: list[int], expected: str, tmp_path: Path
) -> None:
    path = folder_with(tmp_path, ROBERTA)
    header = json.dumps({name: {"data_offsets": [0, 0], "shape": shape}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    wanted = expected.format(
        name=name, vocab=ROBERTA.get("vocab_size", 50265), hidden=ROBERTA.get("hidden_size", 768)
    )
    text = message([f"model.path={path}", "pipeline.cut=[1]"])
    assert text.startswith(f"model.path: expected {wanted}")


def test_a_tokenizer_that_pads_with_another_token_moves_no_position(tmp_path: Path) -> None:
    roberta = ModelConfig(path=folder_with(tmp_path, ROBERTA))
    sizes = {"vocab_size": 50265, "sequence_length": 128}
    resolve(roberta, **sizes, pad_id=1)
    with pytest.raises(ConfigError, match=r"expected pad_token_id 0 \(data.tokenizer\) .*, got 1:"):
        resolve(roberta, **sizes, pad_id=0)
    roberta = ModelConfig(path=folder_with(tmp_path, ROBERTA | {"pad_token_id": "1\n"}))
    with pytest.raises(ConfigError, match=r"got '1\\n': the positions"):
        resolve(roberta, **sizes, pad_id=1)
    bert = ModelConfig(family="bert", path=folder_with(tmp_path, ROBERTA | {"model_type": "bert"}))
    resolve(bert, **sizes, pad_id=7)  # its positions begin at 0


# ------------------------------------------------------------------------------ DeepSpeed's JSON

CLIPPING = (
    "{}: gradient_clipping couples the stages' losses. Remove it and set"
    " optimizer.max_grad_norm, which clips per stage."
)
JSONS = [
    ({"gradient_clipping": 1.0}, CLIPPING),
    ({"optimizer": {"type": "AdamW"}}, "{}: optimizer cannot be used: the optimizer is the YAML's."),
    ({"scheduler": {}}, "Remove it and set optimizer.decay, warmup_ratio."),
    ({"pipeline": {"stages": 2}}, "stages are the YAML's. Remove it and set pipeline.cut."),
    ({"bf16": {"enabled": True}}, "FedAvg written into bf16 parameters is undone by their fp32 masters. Use torch_autocast"),
    ({"bf16": {}}, "{}: bf16 cannot be used"),
    ({"bf16": True}, "{}: bf16 cannot be used"),
    ({"fp16": {"enabled": "auto"}}, "FedAvg written into fp16 parameters"),
    ({"zero_optimization": {"stage": 2}}, "{}: zero_optimization.stage: expected 0 or 1, got 2."),
    ({"zero_optimization": {"stage": True}}, "expected 0 or 1, got True"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "{}: zero_optimization.offload_optimizer: expected no offloading"),
    ({"zero_optimization": 1}, "{}: zero_optimization: expected an object, got 1"),
    ({"torch_autocast": {"enabled": True}}, "{}: torch_autocast.dtype: expected 'bfloat16', got None"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "got 'float16'"),
    ({"torch_autocast": {"enabled": "yes"}}, "torch_autocast.enabled: expected true or false"),
    ({"torch_autocast": {"dtyp": "bfloat16"}}, "{}: torch_autocast.dtyp: unknown DeepSpeed key"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: expected 'fp32'"),
    ({"train_batch_size": 64}, "{}: train_batch_size: expected 32 (from pipeline.micro_batch_size"),
    ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu: expected 32"),
    ({"zero_optimisation": {}}, "{}: zero_optimisation: unknown DeepSpeed key. Did you mean zero_optimization?"),
    ({"qqq": 1}, "{}: qqq: unknown DeepSpeed key. Remove it."),
    ("[]", "deepspeed.config: expected a JSON object in {}, got list"),
    ("[" * 100_000, "deepspeed.config: expected JSON that Python reads, got maximum recursion"),
    ('{"a": ' + "1" * 5000 + "}", "expected JSON that Python reads, got Exceeds the limit"),
    ('{\n "a": 1,\n}', "deepspeed.config: expected JSON, got"),
    ('{"steps_per_print": 1, "steps_per_print": 2}', "steps_per_print: expected once"),
]  # fmt: skip


@every(("content", "expected"), JSONS)
def test_a_json_that_couples_stages_or_is_wrong_is_refused(
    content: Any, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    assert expected.replace("{}", str(file)) in message([f"deepspeed.config={file}"])


def test_a_json_error_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{\n "steps_per_print": 1\n "x": 2\n}', encoding="utf-8")
    assert f"{file}:3" in message([f"deepspeed.config={file}"])
    file.write_bytes(b'{"a": "\xff"}')
    assert "expected UTF-8 text, got byte 0xff" in message([f"deepspeed.config={file}"])
