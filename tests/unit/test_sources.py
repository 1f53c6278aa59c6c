import gzip
import json
import os
from pathlib import Path

import pytest

from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
from fedpipe.data.corpus import check_sources, prepare
from fedpipe.data.reading import NO_VALUE, check, read
from fedpipe.data.sources import Columns, Source, resolve
from fedpipe.errors import CorpusError
from tests.helpers.cases import every

TEXT = Columns(text="text", partition="")
OWNED = Columns(text="text", partition="ward")
ROWS = [{"text": f"Patient {i} was well.", "ward": f"w{i % 2}", "id": i} for i in range(300)]


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def only(entry: str) -> Source:
    (source,) = resolve("data.train", (entry,))
    return source


def texts(entry: str, columns: Columns = TEXT) -> list:
    return list(read(only(entry), columns=columns))


def config(tmp_path: Path, **data) -> RunConfig:
    fields = {"valid": (), "partition": "iid", "cache_dir": str(tmp_path / "cache")} | data
    return RunConfig(data=DataConfig(**fields), federation=FederationConfig(
        num_clients=2, num_replicas=1, clients_per_round=1))  # fmt: skip


EXPECTED = [(row["text"], row["ward"]) for row in ROWS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_give_text_and_owner(tmp_path, name):
    assert texts(write(tmp_path / name, jsonl(ROWS)), OWNED) == EXPECTED


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_text_has_one_document_per_line_and_skips_blank_ones(tmp_path, name, end):
    path = write(tmp_path / name, f"one{end}{end}  {end}two{end}three")
    assert texts(path) == [("one", ""), ("two", ""), ("three", "")]


def test_parquet_gives_text_and_owner(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    check(only(path), columns=OWNED)
    assert texts(path, OWNED) == EXPECTED


def test_a_saved_dataset_gives_text_and_owner(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    check(only(str(tmp_path / "saved")), columns=OWNED)
    assert texts(str(tmp_path / "saved"), OWNED) == EXPECTED


def test_a_dataset_by_name_is_loaded_with_its_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    home = tmp_path / "owner"
    home.mkdir()
    # load_dataset reads a local folder by the same rules as one on the hub.
    write(home / "train.jsonl", jsonl(ROWS))
    write(home / "validation.jsonl", jsonl(ROWS[:9]))
    assert texts(f"hf:{home}", OWNED) == EXPECTED
    assert texts(f"hf:{home}:validation", OWNED) == EXPECTED[:9]
    (held_out,) = resolve("data.valid", (f"hf:{home}",))
    assert list(read(held_out, columns=OWNED)) == EXPECTED[:9]


def test_a_glob_gives_its_files_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name)
    sources = resolve("data.train", (str(tmp_path / "*.txt"), str(tmp_path / "b.txt")))
    assert [Path(source.path).stem for source in sources] == ["a", "b", "c", "b"]
    assert [source.entry for source in sources] == [0, 0, 0, 1]


@pytest.mark.parametrize("key", ["train", "valid"])
@pytest.mark.parametrize("spelling", ["a.txt", "./a.txt", "*.txt", "link.txt", "sub/../a.txt"])
def test_a_file_that_is_named_twice_is_refused(tmp_path, monkeypatch, spelling, key):
    write(tmp_path / "a.txt", "words")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.txt").symlink_to("../a.txt")
    monkeypatch.chdir(tmp_path)
    again = "sub/link.txt" if spelling == "link.txt" else spelling
    message = rf"data.{key}: expected every file once, got '.*txt', which is 'a.txt' again\. Remove"
    entries = {"train": ("packaged",), "valid": ()} | {key: ("a.txt", again)}
    with pytest.raises(CorpusError, match=message):
        check_sources(config(tmp_path, **entries))


def test_packaged_text_has_eight_journals_and_the_documents_of_both_files_differ():
    columns = Columns(text="text", partition="journal")
    splits = []
    for key in ("data.train", "data.valid"):
        (source,) = resolve(key, ("packaged",))
        splits.append(list(read(source, columns=columns)))
    train, valid = splits
    assert {journal for _, journal in train} == {journal for _, journal in valid}
    assert len({journal for _, journal in train}) == 8
    assert 3.5e6 < sum(len(text.encode()) for text, _ in train) < 4.5e6
    assert not {text for text, _ in train} & {text for text, _ in valid}


def test_every_packaged_document_is_attributed_and_freely_licensed():
    samples = Path(resolve("data.train", ("packaged",))[0].path).parent
    table = (samples / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    listed = {line.split(" | ")[0].removeprefix("| "): line for line in table}
    for name in ("train", "valid"):
        with gzip.open(samples / f"bio_pmc.{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                line = listed[row["id"]]
                assert row["license"].startswith(("CC-BY ", "CC0"))
                assert row["license"] in line and row["journal"] in line and row["year"] in line


def test_empty_documents_are_left_out_and_a_missing_owner_has_a_name(tmp_path):
    rows = [{"text": "", "ward": "a"}, {"text": None, "ward": "a"}, {"text": "x", "ward": None}]
    path = write(tmp_path / "a.jsonl", jsonl(rows) + "\n   \n")
    assert texts(path, OWNED) == [("x", NO_VALUE)]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS[:1]).encode())
    assert texts(path) == [(ROWS[0]["text"], "")]


def test_half_a_surrogate_pair_in_json_becomes_a_question_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "a\ud800b \ud83d\ude00"}')
    assert texts(path) == [("a?b \U0001f600", "")]


def test_a_character_over_the_end_of_the_first_megabyte_is_no_fault(tmp_path):
    path = write(tmp_path / "a.txt", b"a" * ((1 << 20) - 1) + "\u20ac\n".encode())
    check(only(path), columns=TEXT)


def test_the_line_reader_tells_how_far_it_is(tmp_path):
    path = write(tmp_path / "a.txt", "word\n" * 5000)
    seen: list[int] = []
    list(read(only(path), columns=TEXT, tick=seen.append))
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= os.path.getsize(path)


REFUSED_AT_ONCE = {
    "absent.jsonl": (None, r"data.train: expected a file or folder, got '.*absent.jsonl', whic"),
    "*.none": (None, r"data.train: expected files that match '.*\*.none', got none"),
    "empty.txt": ("", r"data.train: expected text, got the empty file '.*empty.txt'"),
    "empty.txt.gz": ("", r"data.train: expected text, got the empty archive '.*empty.txt.gz'"),
    "blank.txt": ("\n \n", r"data.train: expected at least one document, got only empty"),
    "table.csv": ("a,b", r"data.train: expected a file ending .* got '.*table.csv'"),
    "zero.txt": (b"one\ntwo\nthr\0ee\n", r"data.train: .* NUL byte \(binary data\) .*zero.txt:3"),
    "latin.txt": (b"one\ncaf\xe9\n", r"data.train: expected UTF-8 .* 0xe9 in .*latin.txt:2\."),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', r"0xe9 in .*latin.jsonl:1\. .* iconv"),
    "list.jsonl": ("[1]\n", r"data.train: expected a JSON object per line, got '\[1\]' in .*l:1\."),
    "half.jsonl": ('{"text": "a\n', r"data.train: expected a JSON object per .*half.jsonl:1"),
    "columns.jsonl": ('{"body": 1, "id": 2}', r"data.text_column: .* 'text' in .*:1, got body, id"),
    "number.jsonl": ('{"text": 12}', r"data.text_column: expected text in column .* got '12'"),
    "fake.parquet": ("no", r"data.train: expected a Parquet file, got '.*fake.parquet': \w+: .*"),
}


@every("name", REFUSED_AT_ONCE)
def test_a_bad_source_is_refused_at_once_in_one_line(tmp_path, name):
    content, message = REFUSED_AT_ONCE[name]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(CorpusError, match=message) as caught:
        check_sources(config(tmp_path, train=(str(tmp_path / name),)))
    assert "\n" not in str(caught.value)


# Two good lines; they reach behind the first megabyte, where the quick check stops.
GOOD = jsonl([ROWS[0], {"text": "word " * 220_000}]).encode()
REFUSED_WITH_ITS_LINE = {
    "not_json.jsonl": (b"{oops\n", r"data.train: .* got '\{oops' in .*not_json.jsonl:3\."),
    "a_list.jsonl": (b'["text"]\n', r"data.train: expected a JSON object per line.*a_list.jsonl:3"),
    "latin.jsonl": (b'{"text": "\xe9"}\n', r"data.train: expected UTF-8 text.*latin.jsonl:3\."),
    "zero.jsonl": (b'{"text": "\0"}\n', r"data.train: .*NUL byte .*zero.jsonl:3\."),
    "no_text.jsonl": (b'{"id": 1}\n', r"data.text_column: .*no_text.jsonl:3, got id\."),
    "a_list.text.jsonl": (b'{"text": ["a"]}\n', r"data.text_column: .*jsonl:3, got \"\['a'\]\"\."),
    "deep.jsonl": (b"[" * 200_000 + b"\n", r"data.train: expected a JSON object.*deep.jsonl:3"),
}


@every("name", REFUSED_WITH_ITS_LINE)
def test_prepare_names_the_line_that_cannot_be_used(tmp_path, name):
    line, message = REFUSED_WITH_ITS_LINE[name]
    path = write(tmp_path / name, GOOD + line)
    check_sources(config(tmp_path, train=(path,)))
    with pytest.raises(CorpusError, match=message):
        prepare(config(tmp_path, train=(path,)))
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_missing_partition_column_is_named_with_those_that_exist(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:1]))
    message = r"data.partition_column: expected a column 'journal' in .*a.jsonl:1, got text, ward,"
    with pytest.raises(CorpusError, match=message):
        check_sources(config(tmp_path, train=(path,), partition="column"))
    text = write(tmp_path / "a.txt", "words")
    with pytest.raises(CorpusError, match=r"partition_column: .*a.txt, which is plain text, go"):
        check_sources(config(tmp_path, train=(text,), partition="column"))


def test_a_missing_column_of_a_dataset_is_named_with_those_that_exist(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        with pytest.raises(CorpusError, match=rf"data.text_column: .*'body' in .*{name}, got t"):
            check_sources(config(tmp_path, train=(str(tmp_path / name),), text_column="body"))


def test_damaged_archives_and_parquet_files_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    packed = gzip.compress(os.urandom(4000).hex().encode())
    (tmp_path / "cut.txt.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "plain.txt.gz").write_bytes(b"never packed")
    for name in ("cut.txt.gz", "plain.txt.gz"):
        with pytest.raises(CorpusError, match=rf"data.train: expected a readable .*{name}"):
            check_sources(config(tmp_path, train=(str(tmp_path / name),)))
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    content = bytearray(path.read_bytes())
    content[4:600] = os.urandom(596)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"data.train: expected readable rows in .* after row 0"):
        texts(str(path))


def test_a_parquet_file_without_rows_is_refused_as_any_empty_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(CorpusError, match=r"one document, got the Parquet file .* without"):
        check_sources(config(tmp_path, train=[path], valid=[], partition="iid"))


def test_a_folder_that_datasets_did_not_save_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"expected a folder written by save_to_disk, .* with"):
        resolve("data.train", (str(tmp_path),))
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "state.json", "{}")
    with pytest.raises(CorpusError, match=r"expected one split, got '.*' with test\."):
        resolve("data.train", (str(tmp_path),))
    source = only(str(tmp_path / "test"))
    with pytest.raises(CorpusError, match=r"save_to_disk, got '.*' with an unreadable data"):
        check(source, columns=TEXT)
    split = str(tmp_path / "test")
    with pytest.raises(CorpusError, match=r"save_to_disk, got '.*' with an unreadable state.json"):
        prepare(config(tmp_path, train=(split,)))
    write(tmp_path / "test" / "state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}')
    with pytest.raises(CorpusError, match=r"expected the file data-0.arrow \(see state.json\) in"):
        prepare(config(tmp_path, train=(split,)))


def test_all_files_that_do_not_exist_are_named_at_once(tmp_path):
    there = write(tmp_path / "a.txt", "words")
    message = r"data.train: expected a file or folder, got 'no', 'none', which do not exist\. Cor"
    with pytest.raises(CorpusError, match=message):
        resolve("data.train", ("no", there, "packaged", "none"))


@pytest.mark.parametrize("entry", ["hf:", "hf::train", "hf:a:b:c"])
def test_a_misspelt_hub_entry_is_refused(tmp_path, entry):
    with pytest.raises(CorpusError, match=r"data.train: expected hf:NAME or hf:NAME:SPLIT, got '"):
        check_sources(config(tmp_path, train=(entry,)))


def test_a_hub_name_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"data.train: expected a readable dataset, got 'a/b:"):
        prepare(config(tmp_path, train=("hf:a/b",)))


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (3, 0, r"data.train: expected 2 entries, one per client .* got 3\. Set federation"),
        (2, 3, r"data.valid: expected 2 entries, one per client, or one for all .* got 3\."),
    ],
)
def test_paths_need_an_entry_per_client(tmp_path, train, valid, message):
    path = write(tmp_path / "a.txt", "words")
    fields = {"train": (path,) * train, "valid": (path,) * valid, "partition": "paths"}
    with pytest.raises(CorpusError, match=message):
        check_sources(config(tmp_path, **fields))
