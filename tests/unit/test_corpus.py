import dataclasses
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fedpipe.data.corpus import check_sources, load_prepared, prepare, token_counts, tokenizer_info
from fedpipe.data.masking import MaskedReader
from fedpipe.data.packing import pack
from fedpipe.errors import CorpusError
from tests.helpers.corpora import (
    WORDS,
    blocks_of,
    make_text,
    make_wordpiece,
    rows_of,
    run_maker,
    run_python,
    same_content,
    write_rows,
)


@pytest.fixture
def run(tmp_path):
    return run_maker(tmp_path)


def test_blocks_decode_back_to_the_documents_of_their_client(run):
    config = run()
    prepared = prepare(config)
    decoder = Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))
    for shard in prepared.train:
        blocks = blocks_of(shard)
        assert (blocks[:, 0] == prepared.cls_id).all() and (blocks[:, -1] == prepared.sep_id).all()
        stream = blocks[:, 1:-1].ravel()
        ends = np.flatnonzero(stream == prepared.sep_id)
        pieces = [decoder.decode(part.tolist()) for part in np.split(stream, ends)]
        texts = [row["text"] for row in rows_of(config) if row["ward"] in shard.values]
        assert shard.num_documents == len(texts)
        # The dropped partial block may take the end of the last documents.
        assert len(texts) - 2 <= len(pieces) <= len(texts)
        assert pieces[:-1] == texts[: len(pieces) - 1]
        assert texts[len(pieces) - 1].startswith(pieces[-1].rstrip("\ufffd"))
        assert shard.num_tokens - len(stream) in range(config.data.sequence_length - 2)


def test_a_wordpiece_vocabulary_packs_the_same_way(run, tmp_path):
    folder = make_wordpiece(tmp_path / "bert", [row["text"] for row in rows_of(run())])
    config = run(tokenizer=str(folder))
    prepared = prepare(config)
    assert (prepared.pad_id, prepared.cls_id, prepared.sep_id, prepared.mask_id) == (0, 2, 3, 4)
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    for shard in prepared.train:
        tokens: list[int] = []
        for row in rows_of(config):
            if row["ward"] in shard.values:
                tokens += [3, *encoder.encode(row["text"], add_special_tokens=False).ids]
        stream = blocks_of(shard)[:, 1:-1].ravel()
        assert stream.tolist() == tokens[1 : len(stream) + 1]
        assert len(stream) > 500


def test_text_that_spells_a_special_token_stays_text(run):
    prepared = prepare(run())
    inside = np.concatenate([blocks_of(shard)[:, 1:-1] for shard in prepared.train])
    assert not np.isin(inside, [prepared.cls_id, prepared.mask_id, prepared.pad_id]).any()


def test_clients_hold_their_wards_and_held_out_text_follows(run, tmp_path):
    extra = [{"text": make_text(random.Random(3), 50), "ward": "unknown"}] * 5
    rows = rows_of(run(), "valid")
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + extra))
    prepared = prepare(run(valid=(str(path),)))
    # Shares of 4, 3, 2 and 1: the smallest ward joins the client with the third largest.
    assert [set(shard.values) for shard in prepared.train] == [{"w3"}, {"w2"}, {"w0", "w1"}]
    assert [set(shard.values) for shard in prepared.valid] == [{"w3"}, {"w2"}, {"w0", "w1"}]
    assert prepared.num_ignored_documents == 5
    assert sum(shard.num_documents for shard in prepared.valid) == len(rows)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_seeded_partition_covers_every_document_once(run, partition):
    first, second = (prepare(run(partition=partition, seed=seed)) for seed in (0, 1))
    for prepared in (first, second):
        assert sum(shard.num_documents for shard in prepared.train) == 120
        assert sum(shard.num_documents for shard in prepared.valid) == 40
    assert not same_content(first, second)


def test_with_paths_each_entry_is_a_client_and_one_held_out_entry_is_for_all(run, tmp_path):
    files = [write_rows(tmp_path / f"{i}.jsonl", 20 + i, seed=i) for i in range(2)]
    prepared = prepare(run(num_clients=2, partition="paths", train=tuple(files)))
    assert [shard.num_documents for shard in prepared.train] == [20, 21]
    assert [shard.client_id for shard in prepared.valid] == [0, 1]
    assert len({shard.path for shard in prepared.valid}) == 1
    own = [write_rows(tmp_path / f"v{i}.jsonl", 10 + i, seed=7 + i) for i in range(2)]
    each = prepare(run(num_clients=2, partition="paths", train=tuple(files), valid=tuple(own)))
    assert [shard.num_documents for shard in each.valid] == [10, 11]


def test_no_held_out_text_gives_no_held_out_shards(run):
    assert prepare(run(valid=())).valid == ()


def test_a_manifest_reads_back_as_it_was_returned(run):
    prepared = prepare(run())
    assert load_prepared(prepared.directory) == prepared
    sizes = {prepared.vocab_size, *(shard.dtype for shard in prepared.train)}
    assert sizes == {8192, "<u2"}


def test_token_counts_are_those_of_the_training_text(run):
    config = run()
    prepared = prepare(config)
    counts = token_counts(prepared)
    encoder = Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))
    encoder.encode_special_tokens = True
    expected = np.zeros(prepared.vocab_size, dtype=np.int64)
    for row in rows_of(config):
        ids = encoder.encode(row["text"], add_special_tokens=False).ids
        expected += np.bincount(ids, minlength=len(expected))
    assert (counts == expected).all()
    assert counts.dtype == np.int64


def test_the_batches_of_the_tokenizer_do_not_show(run, monkeypatch, tmp_path):
    whole = prepare(run())
    monkeypatch.setattr("fedpipe.data.packing._BATCH_CHARACTERS", 100)
    assert same_content(whole, prepare(run(cache_dir=str(tmp_path / "other"), num_workers=2)))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """16 times the text: 24 MB more on disk, hardly more in memory."""
    texts = [" ".join(WORDS)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    # Few long words: quick to tokenise, but a whole file in memory would show.
    line = json.dumps({"text": ("patients " + "x" * 500 + " ") * 20, "ward": "a"}) + "\n"
    peaks = []
    for num_lines in (150, 2400):
        path = tmp_path / f"{num_lines}.jsonl"
        path.write_text(line * num_lines)
        result = run_python(f"""
            from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
            from fedpipe.data.corpus import prepare
            prepare(RunConfig(
                data=DataConfig(train=({str(path)!r},), valid=(), tokenizer={str(tmp_path)!r},
                                partition_column="ward", num_workers=1,
                                cache_dir={str(tmp_path / "cache")!r}),
                federation=FederationConfig(num_clients=1, num_replicas=1, clients_per_round=1)))
            print(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
        """)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout) >> 10)
    assert peaks[1] - peaks[0] < 12, peaks


def write_wards(path: Path, words: dict[str, int]) -> tuple[str, ...]:
    """Write one document per ward, of as many words."""
    rng = random.Random(4)
    rows = [{"text": make_text(rng, size), "ward": ward} for ward, size in words.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def test_all_clients_without_a_block_to_train_on_are_named_with_their_sizes(run, tmp_path):
    train = write_wards(tmp_path / "a.jsonl", {"w0": 100, "w1": 2, "w2": 100, "w3": 1})
    message = (
        r"data.train: expected at least one block of 30 tokens for each of 4 clients, got less for "
        r"2: client 2 \(w1\) \d tokens, client 3 \(w3\) \d tokens\. Add text, lower"
    )
    with pytest.raises(CorpusError, match=message):
        prepare(run(num_clients=4, train=train))


def test_a_client_may_have_no_held_out_text_but_not_all_of_them(run, tmp_path):
    valid = write_wards(tmp_path / "some.jsonl", {"w0": 100, "w1": 2, "w2": 100})
    prepared = prepare(run(num_clients=4, valid=valid))
    assert [shard.values for shard in prepared.valid] == [(), ("w2",), ("w1",), ("w0",)]
    assert [shard.num_blocks > 0 for shard in prepared.valid] == [False, True, False, True]
    valid = write_wards(tmp_path / "none.jsonl", {"w1": 2})
    message = (
        r"data.valid: expected .* for at least one client, got less for all 4: client 0 0 tokens, "
        r"client 1 0 tokens, client 2 \(w1\) \d tokens, .*, or set data.valid=\[\]\."
    )
    with pytest.raises(CorpusError, match=message):
        prepare(run(num_clients=4, valid=valid))


def make_words(folder: Path) -> str:
    """A vocabulary of the ASCII words; others are one unknown token each."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word for word in WORDS if word.isascii()]
    vocab = {token: index for index, token in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_blocks_with_too_little_to_mask_are_left_out_and_counted(run, tmp_path):
    config = run(num_clients=2, tokenizer=make_words(tmp_path / "words"), mask_probability=0.3)
    rows = rows_of(config)
    strange = " ".join(["\u0e44\u0e17\u0e22"] * 95)
    path = tmp_path / "thai.jsonl"
    lines = [*rows[:60], {"text": strange, "ward": "w3"}, *rows[60:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(path),)))
    prepared = prepare(config)
    assert [shard.num_left_out for shard in prepared.train] in ([2, 0], [3, 0])
    for client_id, shard in enumerate(prepared.train):
        reader = MaskedReader(
            prepared, client_id, split="train", seed=0, num_masked=config.data.num_masked
        )
        assert len(reader.batch(0, shard.num_blocks).labels) == shard.num_blocks
    (tmp_path / "unknown.jsonl").write_text(json.dumps({"text": strange, "ward": "w0"}) + "\n")
    message = (
        r"client 0 \(w0\) 95 tokens with 3 blocks of fewer than 10 ordinary ones\. .* knows the"
    )
    with pytest.raises(CorpusError, match=message):
        prepare(
            run(num_clients=1, train=(str(tmp_path / "unknown.jsonl"),), mask_probability=0.3,
                tokenizer=str(tmp_path / "words"))
        )  # fmt: skip


def test_held_out_documents_that_stand_in_the_training_text_are_counted(run, tmp_path):
    config = run()
    own, other = rows_of(config, "valid"), rows_of(config)
    copied = [{"text": f" {row['text']}\n", "ward": "w1"} for row in other[7:10]]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*own, *copied]))
    prepared = prepare(run(valid=(str(path),)))
    assert (prepared.num_held_out, prepared.num_overlapping) == (len(own) + 3, 3)
    assert prepare(config).num_overlapping == 0


def test_held_out_text_that_is_the_training_text_is_refused(run, tmp_path):
    train = run().data.train
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(train[0]).read_bytes())
    for valid in (train, (str(copy),)):
        with pytest.raises(CorpusError, match=r"data.valid: expected text that is not trained on"):
            prepare(run(valid=valid))
    with pytest.raises(CorpusError, match=r"data.valid: expected text that is not trained on"):
        check_sources(run(valid=train))


def test_a_text_that_changes_between_the_readings_is_refused(tmp_path, run):
    info = tokenizer_info(run())
    for num_documents in (1, 3):
        with pytest.raises(CorpusError, match=r"data: expected 2 documents as in the first"):
            pack([("words", "")] * num_documents, np.zeros(2, dtype=np.int32),
                 paths=[tmp_path / "a.bin"], tokenizer=info, sequence_length=16, num_masked=1,
                 num_threads=1,
                 progress=lambda done: None)  # fmt: skip


def test_large_vocabularies_take_four_bytes_per_token(run, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(5, 70_000)), "the"]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepared = prepare(run(tokenizer=str(tmp_path)))
    assert (prepared.vocab_size, prepared.train[0].dtype) == (70_001, "<u4")
    assert 70_000 in blocks_of(prepared.train[0])


def test_a_document_costs_the_same_in_a_large_vocabulary(run, tmp_path):
    info = tokenizer_info(run())
    seconds = []
    for vocab_size in (info.vocab_size, 2_000_000):
        large = dataclasses.replace(info, vocab_size=vocab_size)
        started = time.process_time()
        packed = pack([("word", "")] * 4000, np.zeros(4000, dtype=np.int32),
                      paths=[tmp_path / f"{vocab_size}.bin"], tokenizer=large, sequence_length=32,
                      num_masked=1, num_threads=2, progress=lambda done: None)  # fmt: skip
        seconds.append(time.process_time() - started)
        assert packed.token_counts.sum() >= 4000
    # 4,000 arrays of two million counters would take seconds.
    assert seconds[1] < seconds[0] + 1.0, seconds
