import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
from fedpipe.data import cache
from fedpipe.data.blocks import PreparedData, Shard
from fedpipe.data.corpus import load_prepared, prepare, token_counts, tokenizer_info
from fedpipe.data.packing import pack
from fedpipe.data.sources import Source
from fedpipe.errors import CorpusError

WORDS = ("patients", "were", "randomised", "to", "placebo", "or", "caf\u00e9", "the", "trial", "<s>")


def make_text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def write_rows(path: Path, num_rows: int, *, wards: int = 4, seed: int = 0) -> str:
    rng = random.Random(seed)
    # Ward i has about i + 1 shares of the documents.
    names = [f"w{ward}" for ward in range(wards) for _ in range(ward + 1)]
    lines = []
    for index in range(num_rows):
        ward = names[index % len(names)]
        lines.append(json.dumps({"text": make_text(rng, rng.randint(20, 80)), "ward": ward}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_wordpiece(folder: Path, texts: list[str]) -> Path:
    """A BERT tokenizer folder as old ones are: with padding and truncation switched on."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(10)
    tokenizer.enable_padding(length=10)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run over generated rows, partitioned by their ward; keywords change ``data``."""
    train = write_rows(tmp_path / "train.jsonl", 120)
    valid = write_rows(tmp_path / "valid.jsonl", 40, seed=1)

    def make(*, num_clients: int = 3, seed: int = 0, **data) -> RunConfig:
        fields = {
            "train": (train,), "valid": (valid,), "partition_column": "ward", "num_workers": 1,
            "sequence_length": 32, "cache_dir": str(tmp_path / "cache"),
        } | data  # fmt: skip
        federation = FederationConfig(num_clients=num_clients, num_replicas=1, clients_per_round=1)
        return RunConfig(data=DataConfig(**fields), federation=federation, seed=seed)

    return make


def blocks_of(shard: Shard) -> np.ndarray:
    return np.fromfile(shard.path, shard.dtype).reshape(-1, shard.sequence_length)


def rows_of(config: RunConfig, key: str = "train") -> list[dict]:
    path = Path(getattr(config.data, key)[0])
    return [json.loads(line) for line in path.read_text().splitlines()]


def phases_of(config: RunConfig) -> tuple[PreparedData, set[str]]:
    seen: set[str] = set()
    prepared = prepare(config, progress=lambda phase, done, total: seen.add(phase.split()[0]))
    return prepared, seen


def same_content(one: PreparedData, two: PreparedData) -> bool:
    pairs = zip((*one.train, *one.valid), (*two.train, *two.valid), strict=True)
    return all(np.array_equal(blocks_of(a), blocks_of(b)) for a, b in pairs)


def test_blocks_decode_back_to_the_documents_of_their_client(run):
    config = run()
    prepared = prepare(config)
    decoder = Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))
    for shard in prepared.train:
        blocks = blocks_of(shard)
        assert (blocks[:, 0] == prepared.cls_id).all() and (blocks[:, -1] == prepared.sep_id).all()
        stream = blocks[:, 1:-1].ravel()
        ends = np.flatnonzero(stream == prepared.sep_id)
        pieces = [decoder.decode(part.tolist()).lstrip("</s>") for part in np.split(stream, ends)]
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
    own = prepare(run(num_clients=2, partition="paths", train=tuple(files), valid=tuple(files)))
    assert all(np.array_equal(blocks_of(a), blocks_of(b))
               for a, b in zip(own.train, own.valid, strict=True))  # fmt: skip


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


def test_a_second_call_only_looks_and_changed_content_is_tokenised_again(run):
    config = run()
    first, phases = phases_of(config)
    assert phases == {"hash", "check", "tokenise"}
    again, phases = phases_of(config)
    assert (again, phases) == (first, {"hash"})
    with open(config.data.train[0], "a") as file:
        file.write(json.dumps({"text": "new words", "ward": "w0"}) + "\n")
    changed, phases = phases_of(config)
    assert "tokenise" in phases
    assert sum(shard.num_documents for shard in changed.train) == 121


def test_a_cache_hit_imports_neither_datasets_nor_tokenizers(run):
    config = run()
    prepare(config)
    code = f"""
        import sys
        from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
        from fedpipe.data.corpus import prepare
        prepare({config!r}.__class__(**{{k: v for k, v in []}})) if 0 else None
        config = RunConfig(
            data=DataConfig(**{dataclasses.asdict(config.data)!r}),
            federation=FederationConfig(num_clients=3, num_replicas=1, clients_per_round=1),
        )
        seen = set()
        prepare(config, progress=lambda phase, done, total: seen.add(phase))
        print(seen, [m for m in ("datasets", "tokenizers", "transformers", "torch", "pyarrow")
                     if m in sys.modules])
    """
    result = run_python(code)
    assert result.stdout.strip() == "{'hash'} []", result.stderr


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )


def test_the_key_follows_content_and_settings_but_not_paths(run, tmp_path):
    base = prepare(run()).directory
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(run().data.train[0]).read_bytes())
    assert prepare(run(train=(str(moved),))).directory == base
    # Only a partition that draws depends on the seed.
    assert prepare(run(seed=7)).directory == base
    assert prepare(run(mask_probability=0.3)).directory == base
    assert prepare(run(num_workers=2)).directory == base
    others = [
        run(sequence_length=16), run(num_clients=2), run(partition="iid"), run(valid=()),
        run(partition="iid", seed=7), run(partition="dirichlet"), run(train=run().data.valid),
        run(partition="dirichlet", dirichlet_alpha=2.0),
    ]  # fmt: skip
    directories = {prepare(config).directory for config in others}
    assert len(directories) == len(others)
    assert base not in directories


def test_the_tokenizer_is_part_of_the_key(run, tmp_path):
    texts = [row["text"] for row in rows_of(run())]
    one = prepare(run(tokenizer=str(make_wordpiece(tmp_path / "bert", texts)))).directory
    two = prepare(run(tokenizer=str(make_wordpiece(tmp_path / "bert", texts[:3])))).directory
    assert one != two != prepare(run()).directory


def test_a_digest_is_remembered_until_size_or_time_changes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = Source(key="data.train", entry=0, kind="txt", path=str(path))

    def digest() -> list[str]:
        return cache.content_digests((source,), tmp_path, progress=lambda done, total: None)

    os.utime(path, ns=(0, 10**18))
    before = digest()
    path.write_text("two")
    os.utime(path, ns=(0, 10**18))
    assert digest() == before
    os.utime(path, ns=(0, 10**18 + 1))
    after = digest()
    assert after != before
    # A file of this very moment may change once more under the same time stamp.
    path.write_text("six")
    assert digest() != after
    path.write_text("ten")
    assert digest() not in (before, after)
    path.unlink()
    path.mkdir()
    with pytest.raises(CorpusError, match=r"data.train: expected a readable file, got '.*a.txt'"):
        digest()


@pytest.mark.parametrize("phase", ["tokenise data.train", "tokenise data.valid"])
def test_a_killed_preparation_leaves_nothing_that_a_later_one_takes(run, tmp_path, phase):
    config = run()
    code = f"""
        import os, signal
        from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
        from fedpipe.data import packing
        from fedpipe.data.corpus import prepare
        packing._BATCH_CHARACTERS_PER_THREAD = 2000
        def kill(phase, done, total):
            if phase == {phase!r} and done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        prepare(RunConfig(
            data=DataConfig(**{dataclasses.asdict(config.data)!r}),
            federation=FederationConfig(num_clients=3, num_replicas=1, clients_per_round=1),
        ), progress=kill)
    """
    result = run_python(code)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = (tmp_path / "cache" / "prepared").iterdir()
    assert left.name.startswith(".building.")
    assert any(file.stat().st_size for file in left.glob("*.bin"))
    prepared = prepare(config)
    assert not left.exists()
    undisturbed = prepare(run(cache_dir=str(tmp_path / "other")))
    assert same_content(prepared, undisturbed)
    assert (token_counts(prepared) == token_counts(undisturbed)).all()


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_damaged_prepared_text_is_made_again(run, damage):
    prepared = prepare(run())
    shard = Path(prepared.train[1].path)
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(whole[:-2])
    else:
        (shard.parent / "manifest.json").unlink()
    assert prepare(run()) == prepared
    assert shard.read_bytes() == whole
    assert [path.name for path in shard.parent.parent.iterdir()] == [shard.parent.name]


def test_of_two_builds_of_one_key_the_first_stays(tmp_path):
    with cache.building(tmp_path, "key") as slow:
        with cache.building(tmp_path, "key") as quick:
            (quick / "manifest.json").write_text("first")
        (slow / "manifest.json").write_text("second")
    assert (tmp_path / "prepared" / "key" / "manifest.json").read_text() == "first"
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_the_batches_of_the_tokenizer_do_not_show(run, monkeypatch, tmp_path):
    whole = prepare(run())
    monkeypatch.setattr("fedpipe.data.packing._BATCH_CHARACTERS_PER_THREAD", 100)
    assert same_content(whole, prepare(run(cache_dir=str(tmp_path / "other"), num_workers=2)))
    assert "RAYON_NUM_THREADS" not in os.environ


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
                                cache_dir={str(tmp_path / 'cache')!r}),
                federation=FederationConfig(num_clients=1, num_replicas=1, clients_per_round=1)))
            print(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
        """)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout) >> 10)
    assert peaks[1] - peaks[0] < 12, peaks


@pytest.mark.parametrize("key", ["data.train", "data.valid"])
def test_a_client_with_less_than_a_block_is_named_with_its_size(run, tmp_path, key):
    path = tmp_path / "short.jsonl"
    rows = rows_of(run())
    rows = [row for row in rows if row["ward"] != "w2"] + [{"text": "two words", "ward": "w2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = rf"{key}: expected at least one block of 30 tokens for client \d \(w2\), got \d tokens"
    with pytest.raises(CorpusError, match=message):
        prepare(run(num_clients=4, **{key.removeprefix("data."): (str(path),)}))


def test_a_text_that_changes_between_the_readings_is_refused(tmp_path, run):
    info = tokenizer_info(run())
    for num_documents in (1, 3):
        with pytest.raises(CorpusError, match=r"data: expected 2 documents as in the first reading"):
            pack([("words", "")] * num_documents, np.zeros(2, dtype=np.int32),
                 paths=[tmp_path / "a.bin"], tokenizer=info, sequence_length=16, num_threads=1,
                 progress=lambda done: None)  # fmt: skip


def test_a_cache_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"data.cache_dir: expected a writable directory, got '.*f"):
        prepare(run(cache_dir=str(tmp_path / "file" / "cache")))


def test_the_cache_is_where_the_desktop_keeps_caches(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(run(cache_dir="")).directory.startswith(str(tmp_path / "xdg" / "fedpipe"))


def test_large_vocabularies_take_four_bytes_per_token(run, tmp_path):
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepared = prepare(run(tokenizer=str(tmp_path)))
    assert (prepared.vocab_size, prepared.train[0].dtype) == (70_001, "<u4")
    assert 70_000 in blocks_of(prepared.train[0])
