"""Files that are not what their name says are found before any process starts, in one line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpipe.commands.evaluate.model_folder import check_models
from fedpipe.commands.finetune.setup import check_model_folder
from fedpipe.config.finetune import BaseModelConfig, FinetuneConfig, MethodConfig
from fedpipe.config.half_files import check_weights
from fedpipe.config.load import from_dict, load_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import check_sources, tokenizer_info
from fedpipe.data.sources import folder_files, resolve
from fedpipe.data.tasks.files import find_files
from fedpipe.data.tasks.registry import find_task
from fedpipe.data.tokenizer import check_tokenizer
from fedpipe.errors import CheckpointError, ConfigError, FedPipeError
from fedpipe.models.peft import load_adapter

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 501200538\n"
CONFIG = json.dumps({"model_type": "roberta"}).encode()


def safetensors(*, num_bytes: int = 64) -> bytes:
    tensor = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(num_bytes)


def model(folder: Path, **files: bytes) -> str:
    """A folder with everything that is looked at before weights are read."""
    whole = {"config.json": CONFIG, "model.safetensors": safetensors(), "tokenizer.json": b"{}"}
    for name, content in (whole | {n.replace("__", "."): c for n, c in files.items()}).items():
        (folder / name).write_bytes(content)
    return str(folder)


def config_of(**data: object) -> RunConfig:
    base = {"valid": [], "partition": "iid"}
    return from_dict({"data": base | data})


def corpus(suffix: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        file = folder / f"text{suffix}"
        file.write_bytes(POINTER)
        check_sources(config_of(train=[str(file)]))

    return check


def saved_dataset(folder: Path) -> None:
    (folder / "data.arrow").write_bytes(POINTER)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    folder_files(*resolve("data.train", (str(folder),)))


def yaml(folder: Path) -> None:
    (folder / "a.yaml").write_bytes(POINTER)
    load_config(str(folder / "a.yaml"), [])


def deepspeed(folder: Path) -> None:
    (folder / "a.json").write_bytes(POINTER)
    load_config(None, [f"deepspeed.config={folder / 'a.json'}"])


def saved_state(folder: Path) -> None:
    (folder / "state.json").write_bytes(POINTER)
    folder_files(*resolve("data.train", (str(folder),)))


def vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "vocab.txt").write_bytes(POINTER)
    check_tokenizer(folder, key="data.tokenizer")


def task(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / f"{split}.tsv").write_bytes(POINTER)
    find_files(find_task("ncbi-disease"), str(folder), alone=True)


def pretrained(name: str) -> Callable[[Path], None]:
    return lambda folder: load_config(None, [f"model.path={model(folder, **{name: POINTER})}"])


def tuned(name: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        path = model(folder, **{name: POINTER})
        check_model_folder(FinetuneConfig(model=BaseModelConfig(path=path)))

    return check


def evaluated(name: str) -> Callable[[Path], None]:
    return lambda folder: check_models([model(folder, **{name: POINTER})])


def tokenizer(folder: Path) -> None:
    tokenizer_info(config_of(tokenizer=model(folder, tokenizer__json=POINTER)))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "pytorch_adapter.bin").write_bytes(POINTER)
    load_adapter(None, folder, MethodConfig(), kind="ner")  # type: ignore[arg-type]


POINTERS = [
    ("method.path", adapter),
    ("model.path", pretrained("config__json")),
    ("model.path", pretrained("model__safetensors")),
    ("model.path", tuned("config__json")),
    ("model.path", tuned("model__safetensors")),
    ("model.path", tuned("tokenizer__json")),
    ("--model", evaluated("config__json")),
    ("--model", evaluated("model__safetensors")),
    ("--model", evaluated("tokenizer__json")),
    ("data.tokenizer", tokenizer),
    *(("data.train", corpus(s)) for s in (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")),
    ("data.train", saved_dataset),
    ("data.train", saved_state),
    ("--config", yaml),
    ("deepspeed.config", deepspeed),
    ("data.tokenizer", vocabulary),
    ("evaluation.data", task),
]


@pytest.mark.parametrize(("key", "check"), POINTERS)
def test_a_pointer_of_git_lfs_is_named_wherever_a_file_is_read(
    key: str, check: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(FedPipeError) as caught:
        check(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{key}: expected the content of '{tmp_path}/")
    assert text.endswith(f", got a Git LFS pointer to it. Run git lfs pull in '{tmp_path}'.")


def test_weights_that_are_cut_short_are_found_without_reading_them(tmp_path: Path) -> None:
    path = Path(model(tmp_path))
    check_weights(path, key="model.path")

    def refused(name: str, content: bytes, expected: str) -> None:
        for file in tmp_path.glob("*model*"):
            file.unlink()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^--model: expected {expected}"):
            check_weights(path, key="--model")

    short = safetensors(num_bytes=60)
    refused("model.safetensors", short, rf"{len(short) + 4} bytes of weights in .*, got 1")
    for torn in (b"", short[:20], b"<!DOCTYPE html>" * 9, b"\x02" + bytes(7) + b"[]"):
        refused("model.safetensors", torn, r"readable weights in .*, got no safetensors\. Download")
    with zipfile.ZipFile(tmp_path / "whole", "w") as archive:
        archive.writestr("data.pkl", bytes(100))
    whole = (tmp_path / "whole").read_bytes()
    for torn in (b"", whole[:-30]):
        refused("pytorch_model.bin", torn, r"whole weights in .*pytorch_model.bin, got a part")
    (tmp_path / "pytorch_model.bin").write_bytes(whole)
    check_weights(path, key="--model")
    index = json.dumps({"weight_map": {"x": "model-1.safetensors"}}).encode()
    refused("model.safetensors.index.json", index, r"model-1.safetensors .see the index. in .*none")
    refused("model.safetensors.index.json", b"{}", r"a weight_map in .*, got none")
    refused("config.json", CONFIG, r"weights in .*, got none of model.safetensors, model.safetens")


def test_a_header_of_weights_with_ends_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    for wrong in (b"[]]", b"Infinity]"):
        path = Path(model(tmp_path, model__safetensors=safetensors().replace(b"64]", wrong)))
        with pytest.raises(ConfigError, match=r"^--model: expected readable weights in .*, got no"):
            check_weights(path, key="--model")


@pytest.mark.parametrize("name", ["vocab_size", "max_position_embeddings", "pad_token_id"])
def test_a_size_that_is_no_whole_number_is_refused_before_a_model_is_evaluated(
    name: str, tmp_path: Path
) -> None:
    content = json.dumps({"model_type": "roberta", name: "a"}).encode()
    with pytest.raises(CheckpointError, match=rf"^--model: expected a whole number as {name} in "):
        check_models([model(tmp_path, config__json=content)])
