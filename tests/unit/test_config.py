"""Configuration: precedence, exact round trips, model sizes, DeepSpeed's JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedpipe.config.deepspeed import autocast_dtype, deepspeed_config
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.load import (
    build,
    check,
    diff,
    from_dict,
    load_config,
    to_dict,
    to_yaml,
)
from fedpipe.config.model_shape import ModelShape, resolve
from fedpipe.config.schema import (
    DataConfig,
    DeepSpeedConfig,
    FederationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from fedpipe.config.tree import parse, parse_override
from fedpipe.errors import ConfigError, FedPipeError
from fedpipe.families import FAMILIES
from tests.helpers.cases import every

REPOSITORY = Path(__file__).parents[2]


def yaml_file(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


# ------------------------------------------------------------------------------------- loading


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "federation:\n  num_rounds: 7\n  num_local_steps: 9\n")
    federation = load_config(path, ["federation.num_rounds=3"]).federation
    assert federation.num_rounds == 3
    assert federation.num_local_steps == 9
    assert federation.num_clients == FederationConfig().num_clients


def test_the_last_of_two_equal_overrides_wins() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_no_file_means_the_packaged_quick_start() -> None:
    config = load_config(None, [])
    assert config.name == "quickstart"
    assert config.world_size == 4
    assert config.federation.clients_per_round < config.federation.num_clients


def test_an_empty_file_means_every_default(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, "# nothing\n"), []) == RunConfig()


def test_override_values_are_yaml_and_may_be_nested() -> None:
    config = load_config(
        None,
        [
            "federation.average.embeddings=false",
            "pipeline.cut=[1, 3]",
            "model.hidden_size=null",
            "optimizer.lr=1e-4",
            "name='2024'",
            "data={train: [a.txt], valid: []}",
            "federation.average={aux_head: false}",
        ],
    )
    assert config.federation.average.embeddings is False
    assert config.federation.average.aux_head is False
    assert config.pipeline.cut == (1, 3)
    assert config.optimizer.lr == 1e-4
    assert config.name == "2024"
    assert config.data.train == ("a.txt",)
    assert config.data.sequence_length == 32, "a section given whole is merged, not replaced"


def test_a_whole_number_is_a_number() -> None:
    lr = load_config(None, ["optimizer.lr=1"]).optimizer.lr
    assert lr == 1.0
    assert type(lr) is float


@every("word", ["on", "off", "yes", "no", "12:30", "2024-01-01", "0123", "1_000"])
def test_words_that_yaml_1_1_reads_as_something_else_stay_words(word: str) -> None:
    config = load_config(None, [f"name={word}"])
    assert config.name == word
    assert from_dict(to_dict(config)) == config


PATHS = {
    RunConfig: ["model.path", "data.train", "data.valid", "data.tokenizer", "data.cache_dir",
                "evaluation.models", "evaluation.data", "evaluation.task_files",
                "outer.folder", "deepspeed.config"],
    FinetuneConfig: ["model.path", "method.path", "task.data", "task.file"],
}  # fmt: skip


@pytest.mark.parametrize("root", PATHS, ids=lambda root: root.__name__)
def test_every_path_of_every_configuration_may_begin_at_home(
    root: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = []
    for key, value in _values(root()):
        text = "[~/a, b]" if isinstance(value, list) else "~/a"
        if not isinstance(value, (str, list)):
            continue
        for node in (parse_override(f"{key}={text}"), parse(_nested(key, text), source="f")):
            with contextlib.suppress(ConfigError):  # a list of numbers, or of few words
                after = dict(_values(build(root, node)))[key]
                if after == (["/home/me/a", "b"] if isinstance(value, list) else "/home/me/a"):
                    found.append(key)
    assert sorted(found) == sorted([*PATHS[root], *PATHS[root]])


def test_a_path_that_nobody_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.cache_dir: expected the home directory of a kno"):
        load_config(None, ["data.cache_dir=~nobody-here/x"])
    with pytest.raises(ConfigError, match=r"^data.cache_dir: expected names of up to 255 bytes in"):
        load_config(None, [f"data.cache_dir=a/{256 * 'x'}/b"])
    for key in ("data.cache_dir", "name"):
        with pytest.raises(ConfigError, match=rf"^{key}: expected a text without NUL, got 'a.x00'"):
            load_config(None, [f'{key}="a\\0"'])
    assert load_config(None, ["data.cache_dir=./~x"]).data.cache_dir == "./~x"


def _values(config: object) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []

    def visit(prefix: str, values: dict[str, object]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(f"{prefix}{name}.", value)
            else:
                found.append((f"{prefix}{name}", value))

    visit("", parse(to_yaml(config), source="").plain())
    return found


def _nested(key: str, text: str) -> str:
    *sections, name = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    return "\n".join([*lines, f"{'  ' * len(sections)}{name}: {text}"])


ODD_TEXTS = ["", "1e5", "null", "true", "0x1F", "a: b", "- x", "#", "'", '"', "\n", " a ", "[", "é"]


@every("text", ODD_TEXTS)
def test_round_trip_through_yaml_is_exact_for_odd_texts(text: str, tmp_path: Path) -> None:
    config = replace(RunConfig(), data=DataConfig(train=(text, "x"), text_column=text))
    assert load_config(yaml_file(tmp_path, to_yaml(config)), []) == config


@every("number", [1e-06, 1e300, 0.1, 1 / 3, 5e-324, 123456789.123])
def test_round_trip_through_yaml_is_exact_for_numbers(number: float, tmp_path: Path) -> None:
    config = replace(RunConfig(), optimizer=OptimizerConfig(lr=number, eps=number))
    assert load_config(yaml_file(tmp_path, to_yaml(config)), []) == config


def test_round_trip_through_json_is_exact() -> None:
    config = load_config(None, ["federation.average.final_head=false", "pipeline.cut=[1,2]"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_yaml_lists_every_key() -> None:
    text = to_yaml(RunConfig())
    for section, values in to_dict(RunConfig()).items():
        assert f"{section}:" in text
        for key in values if isinstance(values, dict) else ():
            assert f"  {key}:" in text


def test_diff_names_exactly_the_keys_that_differ() -> None:
    a = load_config(None, [])
    b = load_config(None, ["optimizer.lr=0.5", "federation.average.aux_head=false", "seed=9"])
    assert diff(a, a) == {}
    assert diff(a, b) == {
        "seed": (0, 9), "federation.average.aux_head": (True, False),
        "optimizer.lr": (a.optimizer.lr, 0.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "launch" / "configs").glob("*.yaml")), ids=lambda f: f.name
)
def test_every_shipped_configuration_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    load_config(str(file), [])


def test_any_cut_that_leaves_every_server_stage_a_layer_is_accepted() -> None:
    for size in range(4):
        for cut in itertools.combinations(range(1, 4), size):
            load_config(None, [f"pipeline.cut={list(cut)}"])
            load_config(None, [f"pipeline.cut={[0, *cut]}"])


# --------------------------------------------------------------------------------- model sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("tiny", (4, 128, 4, 512)),
        ("small", (4, 512, 8, 2048)),
        ("base", (12, 768, 12, 3072)),
        ("large", (24, 1024, 16, 4096)),
    ],
)
def test_presets_have_the_published_sizes(size: str, expected: tuple[int, ...]) -> None:
    model = from_dict({"model": {"size": size}}).model
    shape = resolve(model, vocab_size=8192, sequence_length=128)
    found = (
        shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads,
        shape.intermediate_size,
    )  # fmt: skip
    assert found == expected


def test_explicit_sizes_win_over_the_preset() -> None:
    model = ModelConfig(size="base", hidden_size=256, num_attention_heads=4, vocab_size=9000)
    shape = resolve(model, vocab_size=8192, sequence_length=128)
    assert (shape.hidden_size, shape.num_attention_heads, shape.vocab_size) == (256, 4, 9000)
    assert shape.num_hidden_layers == 12


@pytest.mark.parametrize(
    ("family", "length", "positions"),
    [("roberta", 128, 130), ("roberta", 1024, 1026), ("bert", 128, 128), ("bert", 1024, 1024)],
)
def test_positions_end_where_a_block_does(family: str, length: int, positions: int) -> None:
    model = from_dict({"model": {"family": family}}).model
    shape = resolve(model, vocab_size=100, sequence_length=length, pad_id=1)
    assert shape.max_position_embeddings == positions


def test_robertas_positions_begin_after_the_padding_token() -> None:
    shape = resolve(ModelConfig(), vocab_size=8192, sequence_length=32, pad_id=8191)
    assert shape.max_position_embeddings == 8191 + 1 + 32


def hf_folder(folder: Path, family: str, **sizes: int) -> Path:
    """A real folder, written by transformers."""
    import transformers

    names = {"roberta": "Roberta", "bert": "Bert"}
    config = getattr(transformers, f"{names[family]}Config")(**sizes)
    getattr(transformers, f"{names[family]}ForMaskedLM")(config).save_pretrained(folder)
    return folder


SMALL = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
    "vocab_size": 97, "max_position_embeddings": 40, "type_vocab_size": 1,
}  # fmt: skip


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_hugging_face_folder_gives_every_size(family: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, family, **SMALL)
    model = from_dict({"model": {"family": family, "path": str(folder), "size": "base"}}).model
    shape = resolve(model, vocab_size=97, sequence_length=16)
    assert {name: shape.config[name] for name in SMALL} == SMALL


def test_two_tensors_of_a_folder_are_not_made_one(tmp_path: Path) -> None:
    tied, untied = (
        ModelConfig(
            path=str(
                hf_folder(tmp_path / name, "roberta", **SMALL, tie_word_embeddings=name == "tied")
            )
        )
        for name in ("tied", "untied")
    )
    sizes = {"vocab_size": 90, "sequence_length": 12}
    assert resolve(tied, **sizes).tie_word_embeddings is True
    assert resolve(replace(tied, tie_word_embeddings=False), **sizes).tie_word_embeddings is False
    assert resolve(untied, **sizes).tie_word_embeddings is False
    with pytest.raises(ConfigError, match=r"^model.tie_word_embeddings: expected False \(config"):
        resolve(replace(untied, tie_word_embeddings=True), **sizes)


def test_dropout_may_differ_from_the_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "roberta", **SMALL)
    model = ModelConfig(path=str(folder), hidden_dropout_prob=0.0, hidden_size=32)
    shape = resolve(model, vocab_size=90, sequence_length=16)
    assert shape.config["hidden_dropout_prob"] == 0.0
    assert shape.config["attention_probs_dropout_prob"] == 0.1


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts_are_those_of_transformers(family: str, biased: bool) -> None:
    import torch

    kind = FAMILIES[family]
    sizes = {name: value for name, value in SMALL.items() if name in kind.keys}
    model = from_dict({"model": {"family": family, **sizes}}).model
    shape = resolve(model, vocab_size=97, sequence_length=16)
    biases = {name: biased for name in shape.config if name.endswith("_bias")}
    shape = replace(shape, config={**shape.config, **biases})
    with torch.device("meta"):
        config = kind.config_class()(
            **{**shape.config, "tie_word_embeddings": False, "pad_token_id": 1}
        )
        whole = kind.masked_lm_class()(config)
    for first, second in kind.twins.items():  # one tensor in 4.x; in 5.x with tied weights only
        module, _, name = second.rpartition(".")
        setattr(whole.get_submodule(module), name, whole.get_parameter(first))
    layers = whole.get_submodule(kind.layers)
    assert shape.embedding_parameters() == count(whole.get_submodule(kind.embeddings))
    assert shape.layer_parameters(0, 1) == count(layers[0])
    assert shape.layer_parameters(1, 2) == count(layers[1])
    assert shape.layer_parameters(1, 1) == 0
    encoder = shape.embedding_parameters() + shape.layer_parameters(0, len(layers))
    assert shape.head_parameters(tied=False) == count(whole) - encoder
    assert shape.head_parameters(tied=True) == count(whole) - encoder - 97 * 32


def count(module: object) -> int:
    return sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]


def test_flops_are_two_per_weight_and_token_plus_attention() -> None:
    shape: ModelShape = resolve(ModelConfig(), vocab_size=8192, sequence_length=128)
    matrices = 4 * 128 * 128 + 2 * 128 * 512
    sequence = 64 * (2 * matrices + 4 * 64 * 128)
    assert shape.layers_flops(0, 1, sequence_length=64) == sequence
    assert shape.layers_flops(1, 4, sequence_length=64) == 3 * sequence
    assert shape.head_flops_per_token() == 2 * (128 * 128 + 128 * 8192)


# ------------------------------------------------------------------------------ DeepSpeed's JSON


def with_json(folder: Path, content: object, **sections: object) -> RunConfig:
    file = folder / "ds.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return replace(RunConfig(), deepspeed=DeepSpeedConfig(config=str(file)), **sections)


def test_batch_sizes_are_filled_in_and_clipping_is_off() -> None:
    config = replace(RunConfig(), federation=FederationConfig(data_parallel_degree=3))
    assert deepspeed_config(config) == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 96,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def test_the_json_keeps_its_own_keys_and_may_repeat_ours(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 32,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": 1},
        "fp16": {"enabled": False},
        "flops_profiler": {"enabled": True},
        "steps_per_print": 5,
    }
    found = deepspeed_config(with_json(tmp_path, content))
    assert found["zero_optimization"] == {"stage": 1}
    assert found["flops_profiler"] == {"enabled": True}
    assert found["steps_per_print"] == 5
    assert found["gradient_clipping"] == 0.0


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", "bf16"])
def test_autocast_has_one_spelling(spelling: str, tmp_path: Path) -> None:
    content = {"torch_autocast": {"enabled": True, "dtype": spelling}}
    found = deepspeed_config(with_json(tmp_path, content))
    assert found["torch_autocast"]["dtype"] == autocast_dtype(found) == "bfloat16"


@pytest.mark.parametrize(
    ("name", "dtype"), [("cpu_debug", None), ("fp32", None), ("bf16", "bfloat16")]
)
def test_shipped_jsons_are_accepted_here_and_by_deepspeed(
    name: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    file = REPOSITORY / "ds_configs" / f"{name}.json"
    found = deepspeed_config(replace(RunConfig(), deepspeed=DeepSpeedConfig(config=str(file))))
    assert autocast_dtype(found) == dtype
    monkeypatch.setenv("WORLD_SIZE", "1")
    theirs = Theirs(found)
    assert theirs.gradient_clipping == 0.0
    assert theirs.train_batch_size == 32
    assert theirs.torch_autocast_enabled == (dtype is not None)


def test_a_zoo_of_configurations_passes_all_checks() -> None:
    for overrides in (
        ["pipeline.objective=end_to_end", "pipeline.schedule=1f1b"],
        ["pipeline.objective=end_to_end", "pipeline.schedule=sequential", "pipeline.cut=[0]"],
        ["model.size=large", "pipeline.cut=[3,6,9,12,15,18,21]", "pipeline.num_client_stages=3"],
        ["federation.num_replicas=5", "federation.clients_per_round=2"],
        ["data.partition=paths", "federation.num_clients=2", "data.train=[a,b]", "data.valid=[]"],
    ):
        try:
            check(load_config(None, overrides))
        except FedPipeError as error:  # pragma: no cover
            pytest.fail(f"{overrides}: {error}")
