import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpipe.commands.plan.plan import build_plan, render
from fedpipe.config.schema import DataConfig, ModelConfig, RunConfig
from fedpipe.data.corpus import prepare, tokenizer_info
from fedpipe.data.tokenizer import SAMPLES, TokenizerInfo, check_tokenizer
from fedpipe.errors import CorpusError
from fedpipe.run.export import cut_texts, model_card, word_tokens

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
    added = [{"id": 7, "content": "[HIDE]", "special": True}, {"id": 6, "content": "x"}]
    info = info_of(write(tmp_path, BERT, added, mask_token={"content": "[HIDE]"}, sep_token="word"))
    assert (info.mask_id, info.sep_id, info.vocab_size) == (7, 5, 8)
    assert info.special_ids == (0, 1, 2, 5, 7)


def test_a_unigram_vocabulary_is_a_list(tmp_path):
    info = info_of(write(tmp_path, [[token, -1.0] for token in BERT]))
    assert (info.vocab_size, info.mask_id) == (6, 4)


@pytest.mark.parametrize("part", ["cls", "sep", "mask", "pad"])
def test_a_vocabulary_without_a_needed_token_is_refused(tmp_path, part):
    vocab = {token: index for token, index in BERT.items() if part.upper() not in token}
    with pytest.raises(CorpusError, match=rf"data.tokenizer: expected a {part}_token in .* got"):
        info_of(write(tmp_path, vocab))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"expected a folder with a token.*pretrained\(DIR\)\.$"):
        info_of(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").touch()
    with pytest.raises(CorpusError, match=r"save_pretrained\(DIR\) after pip install sentencepi"):
        info_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", r"data.tokenizer: expected JSON in .*tokenizer.json, got Expecting property"),
        ("[]", r"data.tokenizer: expected a JSON object in .*tokenizer.json, got a list"),
        ("version https://git-lfs.github.com/spec/v1\noid x", r"tokenizer.json', got a Git LFS"),
        (
            "[" * 100_000,
            r"data.tokenizer: expected JSON in .*tokenizer.json, got maximum rec",
        ),
        *(
            (
                text,
                r"expected the model and the added tokens of a tokenizer in .*tokenizer.json, got",
            )
            for text in (
                '{"model": "x"}',
                '{"model": {"vocab": [1, 2]}}',
                '{"model": {"vocab": [[]]}}',
                '{"added_tokens": "x"}',
                '{"added_tokens": [{"content": "x"}]}',
            )
        ),
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


# ------------------------------------------------------------------ a vocabulary and its own rules

CASED = {"type": "BertNormalizer", "lowercase": False, "strip_accents": None, "clean_text": True,
         "handle_chinese_chars": True}  # fmt: skip
UNCASED = CASED | {"lowercase": True}


def words(num: int, *others: str) -> dict[str, int]:
    entries = [*(entry for entry in BERT), *(f"w{index}" for index in range(num)), *others]
    return {entry: index for index, entry in enumerate(entries)}


def folder_of(folder: Path, vocab: dict, lines: list[str] | None = None, **content: object) -> Path:
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    folder.mkdir(exist_ok=True)
    text = json.dumps({"model": model | {"vocab": vocab}, **content})
    (folder / "tokenizer.json").write_text(text)
    if lines is not None:
        (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_a_cased_vocabulary_with_a_lower_casing_normaliser_is_refused(tmp_path):
    vocab = words(30, "The", "##Gene", "\u00c9t\u00e9", "B", "C")
    with pytest.raises(CorpusError) as caught:
        info_of(folder_of(tmp_path, vocab, normalizer=UNCASED))
    assert str(caught.value) == (
        "data.tokenizer: expected entries that the tokenizer's normaliser leaves as they are in "
        f"'{tmp_path}', got 5 of 36 entries that can never occur, such as ('The', 'the'). Save the "
        "tokenizer with its own normaliser: do_lower_case=False of a cased vocabulary."
    )
    with pytest.raises(CorpusError, match=r"^--model: expected entries that the tokenizer's norm"):
        check_tokenizer(tmp_path, key="--model")  # of a model that is fine-tuned or evaluated
    assert info_of(folder_of(tmp_path, vocab, normalizer=CASED)).warnings == ()
    assert check_tokenizer(tmp_path, key="--model") == ()


def test_a_few_entries_that_cannot_occur_are_counted_and_shown_in_the_plan(tmp_path):
    vocab = words(30, "\u00e9", "\u4e09", "##ing")
    info = info_of(folder_of(tmp_path, vocab, normalizer=UNCASED))
    line = "data.tokenizer: 1 of 34 entries that can never occur, such as ('\u00e9', 'e')"
    assert info.warnings == (line,)
    config = RunConfig(data=DataConfig(tokenizer=str(tmp_path)))
    assert render(build_plan(config)).splitlines()[-1] == f"  warning  {line}"


def test_entries_of_bytes_are_compared_as_the_text_that_they_write(tmp_path):
    lower = {"type": "Lowercase"}
    bytelevel = {"type": "ByteLevel"}
    vocab = words(30, "\u0120the", "\u0120The", "\u00c3\u00a9", "\u00c3")
    folder = folder_of(tmp_path, vocab, normalizer=lower, pre_tokenizer=bytelevel)
    (line,) = info_of(folder).warnings
    assert line.endswith("1 of 35 entries that can never occur, such as ('\u0120The', 'the')")


def test_equal_lines_of_a_vocabulary_are_found_when_it_is_read(tmp_path):
    """The first of them leaves a gap, and every line after it may have another id."""
    lines = [*words(30), "w0", "w1"]
    ids = {line: index for index, line in enumerate(lines)}
    found = info_of(folder_of(tmp_path, ids, lines)).warnings
    assert found == (
        "data.tokenizer: 2 of 38 ids without an entry, such as 6",
        "data.tokenizer: 2 of 38 lines of vocab.txt with other ids, such as ['w0']",
    )
    with pytest.raises(CorpusError, match=r"expected the vocabulary of tokenizer.json also in voc"):
        info_of(folder_of(tmp_path, ids, sorted(ids, key=ids.__getitem__)))
    with pytest.raises(CorpusError, match=r"expected an entry for every id in .*, got 7 of 14 ids"):
        info_of(folder_of(tmp_path / "b", {**words(0), "x": 13}))


def test_an_id_without_an_entry_is_no_word_of_the_samples(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT, "##s", "42", "last", "last"]))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    assert tokenizer.convert_ids_to_tokens([8]) == [None]
    starts, words = word_tokens(tokenizer, 10)
    assert starts[5:].tolist() == [True, False, True, True, True]
    assert words[5:].tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("space", ["\u0120", "\u2581"])  # byte-level BPE, SentencePiece
def test_a_word_of_the_samples_begins_with_the_space_of_its_vocabulary(space):
    tokens = [f"{space}dose", "s", f"{space}42", "<mask>"]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [tokens[i] for i in ids])
    starts, words = word_tokens(tokenizer, 4)
    assert starts.tolist() == [True, False, True, False]
    assert words.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": 5}, r"expected an id of its own for every entry in .*, got 5 for 'word' and 'a'"),
        ({"a": -1}, r"expected whole numbers, 0 or more, as ids in .*, got -1 for 'a'"),
        ({"a": "6"}, r"got '6' for 'a'. Save the tokenizer again"),
    ],
)
def test_ids_that_are_no_ids_are_refused(tmp_path, change, message):
    with pytest.raises(CorpusError, match=message):
        info_of(folder_of(tmp_path, BERT | change))


@pytest.mark.parametrize("name", [{"lstrip": True}, ["[MASK]"], 5], ids=repr)
def test_a_special_token_without_a_text_is_refused(tmp_path, name):
    with pytest.raises(CorpusError, match=r"expected the text of the mask_token in .*\.json, got"):
        info_of(write(tmp_path, BERT, mask_token=name))


def test_a_vocab_txt_of_another_vocabulary_is_refused_however_short(tmp_path):
    with pytest.raises(CorpusError, match=r"got 1 of 2 lines of vocab.txt with other ids, such as"):
        info_of(folder_of(tmp_path, BERT, ["[PAD]", "other"]))


def test_a_vocabulary_without_the_entry_of_unknown_words_is_refused(tmp_path):
    vocab = {entry: index for index, entry in enumerate(e for e in BERT if e != "[UNK]")}
    with pytest.raises(CorpusError, match=r"expected the entry '\[UNK\]', which stands for unkn"):
        info_of(folder_of(tmp_path, vocab))


def test_mask_and_padding_are_tokens_of_their_own(tmp_path):
    folder = write(tmp_path, BERT, pad_token="[SEP]")
    with pytest.raises(
        CorpusError, match=r"expected a pad_token of its own in .*, got the sep_tok"
    ):
        info_of(folder)


def test_an_exported_tokenizer_cuts_texts_where_training_ended(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(SAMPLES / "tokenizer"))
    tokenizer.backend_tokenizer.enable_truncation(max_length=512, stride=2)
    cut_texts(tokenizer, 8)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    assert (saved["max_length"], saved["stride"]) == (8, 2)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(again("a b c d e f g h i j k", truncation=True)["input_ids"]) == 8


def test_the_card_of_a_continued_model_names_its_first_weights_and_its_whole_length(tmp_path):
    folder = tmp_path / "lab" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        '{"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 514}'
    )
    for path, origin, length in ("", "random", 128), (str(folder), "those of `lab/base`", 512):
        config = RunConfig(model=ModelConfig(path=path), data=DataConfig(sequence_length=128))
        card = model_card(config, "2 clients: 3 rounds", score="2.0 nats", tied=True)
        assert f"- First weights: {origin}\n" in card
        assert f"- Sequence length: at most {length} tokens" in card
