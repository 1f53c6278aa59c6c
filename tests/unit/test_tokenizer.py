import json
from pathlib import Path

import pytest

from fedpipe.config.schema import DataConfig, RunConfig
from fedpipe.data.corpus import prepare, tokenizer_info
from fedpipe.data.tokenizer import SAMPLES, TokenizerInfo
from fedpipe.errors import CorpusError

BERT = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "word": 5}


def info_of(folder: Path) -> TokenizerInfo:
    return tokenizer_info(RunConfig(data=DataConfig(tokenizer=str(folder))))


def write(folder: Path, vocab: object, added: list[dict] | None = None, **names: object) -> Path:
    content = {"added_tokens": added or [], "model": {"vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if names:
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def test_the_packaged_vocabulary_has_robertas_special_ids():
    info = tokenizer_info(RunConfig())
    assert info.vocab_size == 8192
    assert (info.cls_id, info.pad_id, info.sep_id, info.mask_id) == (0, 1, 2, 4)
    assert info.special_ids == (0, 1, 2, 3, 4)


def test_transformers_reads_the_packaged_tokenizer_as_this_module_does():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(SAMPLES / "tokenizer"))
    info = tokenizer_info(RunConfig())
    ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
    assert ids == (info.cls_id, info.sep_id, info.mask_id)
    assert (len(tokenizer), tokenizer.pad_token_id) == (info.vocab_size, info.pad_id)
    assert sorted(tokenizer.all_special_ids) == list(info.special_ids)
    # The mask swallows the space before it, as a whole word's token would hold it.
    ids = tokenizer("The <mask> were treated.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["<s>", "The", "<mask>", "\u0120were"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The were treated."


def test_berts_special_tokens_are_found_by_their_usual_names(tmp_path):
    info = info_of(write(tmp_path, BERT))
    assert (info.cls_id, info.sep_id, info.mask_id, info.pad_id) == (2, 3, 4, 0)
    assert (info.vocab_size, info.special_ids) == (6, (0, 1, 2, 3, 4))


def test_the_folder_s_own_names_and_added_tokens_count(tmp_path):
    added = [{"id": 9, "content": "[HIDE]", "special": True}, {"id": 8, "content": "x"}]
    info = info_of(write(tmp_path, BERT, added, mask_token={"content": "[HIDE]"}, sep_token="word"))
    assert (info.mask_id, info.sep_id, info.vocab_size) == (9, 5, 10)
    assert info.special_ids == (0, 1, 2, 5, 9)


def test_a_unigram_vocabulary_is_a_list(tmp_path):
    info = info_of(write(tmp_path, [[token, -1.0] for token in BERT]))
    assert (info.vocab_size, info.mask_id) == (6, 4)


@pytest.mark.parametrize("part", ["cls", "sep", "mask", "pad"])
def test_a_vocabulary_without_a_needed_token_is_refused(tmp_path, part):
    vocab = {token: index for token, index in BERT.items() if part.upper() not in token}
    with pytest.raises(CorpusError, match=rf"data.tokenizer: expected a {part}_token in .* got"):
        info_of(write(tmp_path, vocab))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"data.tokenizer: expected a folder with a token"):
        info_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", r"data.tokenizer: expected JSON in .*tokenizer.json, got an unreadable file"),
        ("[]", r"data.tokenizer: expected a JSON object in .*tokenizer.json, got a list"),
        ("{}", r"data.tokenizer: expected a vocabulary in .*tokenizer.json, got none"),
    ],
)
def test_an_unreadable_tokenizer_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CorpusError, match=message):
        info_of(tmp_path)


def test_a_tokenizer_of_an_unknown_format_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    data = DataConfig(
        train=(str(tmp_path / "a.txt"),), valid=(), partition="paths",
        tokenizer=str(write(tmp_path, BERT)), cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(CorpusError, match=r"data.tokenizer: expected a tokenizer in .*json, got '"):
        prepare(RunConfig(data=data, federation=_one_client()))


def _one_client():
    from fedpipe.config.schema import FederationConfig

    return FederationConfig(num_clients=1, num_replicas=1, clients_per_round=1)
