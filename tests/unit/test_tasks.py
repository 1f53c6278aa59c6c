"""Tasks: where their files are found, how every format is read, and what can be wrong with them."""

# ruff: noqa: E501  (one error a row: the tables are read across)

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpipe.config.load import from_dict
from fedpipe.config.schema import RunConfig
from fedpipe.data.tasks.files import find_files
from fedpipe.data.tasks.reading import Example, hub_fingerprint, read_task
from fedpipe.data.tasks.registry import TASKS, find_task, tag_names
from fedpipe.errors import ConfigError, CorpusError
from tests.helpers.cases import every
from tests.helpers.encoders import PACKAGED, write_jsonl

NER = [{"tokens": ["a", "b"], "tags": ["B-Disease", "O"]}]
CONLL = "-DOCSTART-\tX\tO\n\na\tB-Disease\nb\tO\n\nc\tO\n"


def read(
    name: str, data: Path | str, *, typed: bool = False, alone: bool = False
) -> tuple[dict[str, list[Example]], str]:
    splits, test, left_out = read_task(
        find_files(find_task(name), str(data), alone=alone), typed=typed
    )
    assert not left_out
    return splits, test


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_every_task_of_the_reference_evaluations_is_there_with_published_settings() -> None:
    assert sorted(TASKS) == sorted(
        ["bc2gm", "bc5cdr-chemical", "bc5cdr-disease", "ncbi-disease", "jnlpba", "ddi", "gad",
         "pubmedqa", "rte", "mrpc", "mnli", "qnli", "qqp", "stsb", "sst2", "cola", "wnli"]
    )  # fmt: skip
    for task in TASKS.values():
        assert 2e-5 <= task.defaults.learning_rate <= 5e-5
        assert task.defaults.batch_size in (16, 32)
        assert 3 <= task.defaults.num_epochs <= 20


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("BC2GM", "bc2gm"),
        ("STS-B", "stsb"),
        ("bc5cdr_chem", "bc5cdr-chemical"),
        ("sst-2", "sst2"),
        ("DDI", "ddi"),
    ],
)
def test_usual_spellings_of_a_task_are_understood(written: str, name: str) -> None:
    assert find_task(written).name == name


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("mprc", "Did you mean mrpc?"),
        ("ncbi-diseases", "Did you mean ncbi-disease?"),
        ("zzz", "Choose one."),
    ],
)
def test_an_unknown_task_is_named_with_the_nearest_one(written: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks: expected one of bc2gm, ") as caught:
        find_task(written)
    assert str(caught.value).endswith(f"got {written!r}. {hint}")


def test_the_packaged_task_is_read() -> None:
    splits, test = read("ncbi-disease", "packaged")
    assert {name: len(examples) for name, examples in splits.items()} == {
        "train": 600,
        "dev": 150,
        "test": 200,
    }
    assert test == "test"
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 120_000


def test_json_lines_are_found_in_sub_folders_and_dev_is_the_test_without_another(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "text_pair": "b", "label": 1, "idx": 7}]
    for split in ("train", "dev"):
        write_jsonl(tmp_path / "glue" / f"rte.{split}.jsonl.gz", rows)
    write_jsonl(tmp_path / "ner" / "mrpc.train.jsonl", rows)
    splits, test = read("rte", tmp_path)
    assert splits == {"train": [Example(("a", "b"), 1)], "test": [Example(("a", "b"), 1)]}
    assert test == "dev"


def test_conll_folders_are_read_with_bare_tags_too(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "NCBI-disease-IOB",
        train__tsv=CONLL,
        devel__tsv="a B\nb I\n",
        test__tsv=CONLL,
        train_dev__tsv=CONLL,
    )
    splits, test = read("ncbi-disease", folder.parent)
    assert test == "test"
    assert splits["train"] == [Example(("a", "b"), (1, 0)), Example(("c",), (0,))]
    assert splits["dev"] == [Example(("a", "b"), (1, 2))]


GLUE = {
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
        Example(("a", "b"), 1),
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n", Example(("a", "b"), 0)),
    "mrpc": (
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\t"a\tb\n',
        Example(('"a', "b"), 1),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n", Example(("a", "b"), 0)),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t1\n",
        Example(("a", "b"), 1),
    ),
    "stsb": (
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta\tb\t3.8\n",
        Example(("a", "b"), 3.8),
    ),
    "sst2": ("sentence\tlabel\na\t1\n", Example(("a",), 1)),
    "cola": ("gj04\t0\t*\ta\n", Example(("a",), 0)),
}


@every("name", GLUE)
def test_glues_own_tables_are_read_and_its_test_files_have_no_labels(
    name: str, tmp_path: Path
) -> None:
    text, example = GLUE[name]
    unlabelled = "index\tsentence\n0\ta\n" if name == "cola" else "index\tquestion\n0\ta\n"
    write(tmp_path / name.upper(), train__tsv=text, dev__tsv=text, test__tsv=unlabelled)
    splits, test = read(name, tmp_path)
    assert (splits, test) == ({"train": [example], "test": [example]}, "dev")


def test_a_link_to_the_folder_of_a_task_is_followed_and_loops_end(tmp_path: Path) -> None:
    pairs({"text": "a", "text_pair": "b", "label": 0})(tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").iterdir():
        file.rename(file.with_name(file.name.removeprefix("rte.")))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rte").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    found = find_files(find_task("rte"), str(tmp_path / "data"), alone=False)
    assert sorted(found.splits) == ["dev", "train"]


def test_mnli_has_a_second_dev_set(tmp_path: Path) -> None:
    text = "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n"
    write(tmp_path / "MNLI", train__tsv=text, dev_matched__tsv=text, dev_mismatched__tsv=text)
    splits, test = read("mnli", tmp_path)
    assert test == "dev"
    assert splits["mismatched"] == [Example(("a", "b"), 2)]


def test_saved_hugging_face_datasets_are_read_by_the_names_of_their_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    names = ClassLabel(names=["entailment", "not_entailment"])
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": names}
    )
    rows = {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}
    hidden = rows | {"label": [-1]}
    parts = {"train": rows, "validation": rows, "test": hidden}
    DatasetDict(
        {k: Dataset.from_dict(v, features=features) for k, v in parts.items()}
    ).save_to_disk(tmp_path / "rte")
    assert read("rte", tmp_path) == (
        {"train": [Example(("a", "b"), 1)], "test": [Example(("a", "b"), 1)]},
        "dev",
    )

    tags = Sequence(ClassLabel(names=["O", "I-Disease", "B-Disease"]))
    data = Dataset.from_dict(
        {"tokens": [["a", "b"]], "ner_tags": [[2, 1]]},
        features=Features({"tokens": Sequence(Value("string")), "ner_tags": tags}),
    )
    for split in ("train", "test"):
        data.save_to_disk(tmp_path / "ncbi_disease" / split)
    assert read("ncbi-disease", tmp_path)[0]["test"] == [Example(("a", "b"), (1, 2))]


def test_a_dataset_that_hugging_face_loads_by_name_is_read(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_jsonl(
            tmp_path / "set" / f"{split}.jsonl",
            [{"question": "q", "context": "c", "label": "maybe"}],
        )
    name = f"hf:{tmp_path / 'set'}"
    splits, test = read("pubmedqa", name)
    assert (splits["test"], test) == ([Example(("q", "c"), 2)], "dev")
    files = find_files(find_task("pubmedqa"), name, alone=True)
    assert hub_fingerprint(files) == hub_fingerprint(files)
    assert find_files(find_task("mrpc"), "hf:nyu-mll/glue", alone=True).splits == {
        "all": "nyu-mll/glue:mrpc"
    }


def test_the_entity_types_of_jnlpba_are_one_or_kept(tmp_path: Path) -> None:
    row = {"tokens": ["a", "b", "c"], "tags": ["B-protein", "I-protein", "B-cell_line"]}
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"jnlpba.{split}.jsonl", [row])
    assert read("jnlpba", tmp_path)[0]["test"][0].label == (1, 2, 1)
    typed = read("jnlpba", tmp_path, typed=True)[0]["test"][0].label
    tags = tag_names(find_task("jnlpba"), typed=True)
    assert isinstance(typed, tuple)
    assert [tags[tag] for tag in typed] == row["tags"]


def test_labels_of_ddi_and_a_folder_of_any_name_for_one_task(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": "a", "label": "DDI-int"}])
    assert read("ddi", tmp_path, alone=True)[0]["test"] == [Example(("a",), 3)]
    with pytest.raises(CorpusError, match="expected files of ddi in"):
        read("ddi", tmp_path)


def ner(rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for split in ("train", "test"):
            write_jsonl(folder / f"ncbi_disease.{split}.jsonl", rows)

    return make


def pairs(row: dict[str, Any], task: str = "rte") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for split in ("train", "dev"):
            write_jsonl(folder / f"{task}.{split}.jsonl", [row])

    return make


def tables(**texts: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / "rte", **texts) and None  # type: ignore[func-returns-value]


def conll(**texts: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / "ncbi-disease", **texts) and None  # type: ignore[func-returns-value]


def damaged(folder: Path) -> None:
    write_jsonl(folder / "rte.train.jsonl", [{"text": "a", "text_pair": "b", "label": 0}])
    (folder / "rte.dev.jsonl.gz").write_bytes(b"\x1f\x8b\x08 not gzip")


def broken_save(folder: Path) -> None:
    for split in ("train", "test"):
        write(folder / "rte" / split, state__json="{}")


def listing(text: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / "rte", dataset_dict__json=text) and None  # type: ignore[func-returns-value]


def twice(folder: Path) -> None:
    for place in ("a", "b"):
        pairs({"text": "a", "text_pair": "b", "label": 0})(folder / place)


PAIR = {"text": "a", "text_pair": "b", "label": 0}
ERRORS: list[tuple[str, Callable[[Path], None], str]] = [
    ("rte", lambda folder: None, r"expected files of rte in .* Name them rte\.train\.jsonl\.gz"),
    ("rte", twice, "expected one place for rte, got .*/a .JSON lines. and .*/b "),
    (
        "rte",
        pairs({"text": "a", "label": 0}),
        "expected a column 'text_pair' or 'sentence2' with the text of rte in .*train.jsonl:1, got text, label. Rename",
    ),
    (
        "rte",
        pairs({"text": "a", "text_pair": "b"}),
        "expected a column 'label' with the label of rte in .*:1, got text, text_pair",
    ),
    (
        "rte",
        pairs(PAIR | {"label": "maybe"}),
        "expected one of entailment, not_entailment as label of rte, got 'maybe' in .*:1",
    ),
    (
        "rte",
        pairs(PAIR | {"label": 2}),
        "expected one of entailment, not_entailment as label of rte, got 2",
    ),
    (
        "rte",
        pairs(PAIR | {"label": None}),
        "expected a label in every row, got none in .*train.jsonl:1",
    ),
    ("rte", pairs(PAIR | {"text": 3}), "expected text in column 'text', got 3 in .*:1"),
    (
        "stsb",
        pairs(PAIR | {"label": "high"}, "stsb"),
        "expected a number as label of stsb, got 'high'",
    ),
    (
        "rte",
        tables(train__tsv="index\tsentence1\tsentence2\tlabel\n0\ta\n", dev__tsv=GLUE["rte"][0]),
        r"expected the 4 columns of the header, got 2 in .*train\.tsv:2",
    ),
    (
        "rte",
        tables(dev__tsv=GLUE["rte"][0]),
        "expected a train split of rte in .*/rte, got dev. Add the file",
    ),
    (
        "rte",
        tables(train__tsv=GLUE["rte"][0]),
        "expected a test or dev split of rte with labels in .*/rte, got train",
    ),
    (
        "rte",
        tables(train__tsv=GLUE["rte"][0], test__tsv="index\tsentence1\tsentence2\n0\ta\tb\n"),
        "expected a test or dev split of rte with labels",
    ),
    (
        "rte",
        tables(train__tsv=GLUE["rte"][0], dev__tsv=""),
        "expected examples in the dev split of rte, got an empty file",
    ),
    (
        "rte",
        damaged,
        "expected a readable file, got '.*rte.dev.jsonl.gz': ",
    ),
    ("rte", broken_save, "expected a readable dataset, got '.*rte/train': "),
    ("rte", listing("{oops"), "expected JSON in .*/rte/dataset_dict.json, got "),
    ("rte", listing("{}"), "expected a list of splits in .*/rte/dataset_dict.json, got none"),
    (
        "rte",
        listing('{"splits": ["train", "test"]}'),
        r"expected the split 'train' \(see dataset_dict.json\) in '.*/rte', got none. Save",
    ),
    (
        "rte",
        pairs(PAIR | {"label": "9" * 5000}),
        r"expected one of entailment, not_entailment as label of rte, got '9{59}\.\.\. in",
    ),
    (
        "ncbi-disease",
        ner([{"tokens": ["a", "b"], "tags": ["O"]}]),
        "expected a tag per word, got 2 words and 1 tags in .*:1",
    ),
    (
        "ncbi-disease",
        ner([{"tokens": [], "tags": []}]),
        "expected a list of words and one of tags, got",
    ),
    (
        "ncbi-disease",
        ner([{"tokens": ["a"], "tags": ["B-Gene"]}]),
        "expected one of O, B-Disease, I-Disease as label of ncbi-disease, got 'B-Gene'",
    ),
    ("ncbi-disease", ner([{"tokens": ["a"], "tags": ["S-Disease"]}]), "got 'S-Disease' in"),
    (
        "ncbi-disease",
        ner([{"words": ["a"], "labels": ["O"]}]),
        "expected a column 'tags' or 'ner_tags' with the label of",
    ),
    (
        "ncbi-disease",
        conll(train__tsv="a\tO\nb\n", test__tsv=CONLL),
        r"expected a token, a tab and a tag, got 'b' in .*train\.tsv:2",
    ),
]


@every(("name", "make", "expected"), ERRORS)
def test_what_is_wrong_with_a_task_is_said_in_one_line(
    name: str, make: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(CorpusError, match=rf"(?s)^evaluation\.data: .*{expected}") as caught:
        read(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


FIRST = "index\tsentence1\tsentence2\tlabel\n"
GOOD = "{n}\ta\tb\tentailment\n"


def glue(bad: str, *, rows: int = 50) -> Callable[[Path], None]:
    """RTE's tables, a bad line among those of the training split."""
    good = "".join(GOOD.format(n=n) for n in range(rows - 1))
    return tables(train__tsv=FIRST + bad + good, dev__tsv=FIRST + good)


def lines(task: str, bad: Any, good: dict[str, Any], *, rows: int = 50) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_jsonl(folder / f"{task}.train.jsonl", [bad, *[good] * (rows - 1)])
        write_jsonl(folder / f"{task}.dev.jsonl", [good])

    return make


def latin1(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same with a byte that is no UTF-8 for every ``*``."""

    def made(folder: Path) -> None:
        make(folder)
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes().replace(b"*", b"\xe9"))

    return made


TAGGED: dict[str, Any] = NER[0]
NAN = float("nan")
BAD_ROWS: list[tuple[str, Callable[[Path], None], str]] = [
    ("rte", glue("0\ta\n"), r"expected the 4 columns of the header, got 2 in train\.tsv:2"),
    ("rte", glue("0\ta\t \tentailment\n"), "expected text in column 'text_pair', got   in"),
    ("rte", lines("rte", PAIR | {"label": None}, PAIR), r"got none in rte\.train\.jsonl:1"),
    ("rte", lines("rte", PAIR | {"label": NAN}, PAIR), "expected a label in every row, got none"),
    ("rte", lines("rte", PAIR | {"label": " "}, PAIR), "expected a label in every row, got none"),
    (
        "rte",
        lines("rte", PAIR | {"label": "None"}, PAIR),
        "expected a label in every row, got none",
    ),
    ("rte", lines("rte", PAIR | {"label": [1]}, PAIR), r"as label of rte, got \[1\] in"),
    ("rte", lines("rte", PAIR | {"label": "\u00b2"}, PAIR), "as label of rte, got '\u00b2' in"),
    ("rte", lines("rte", PAIR | {"text": None}, PAIR), "expected text in column 'text', got None"),
    (
        "rte",
        lines("rte", PAIR | {"text": ["a"]}, PAIR),
        r"expected text in column 'text', got \['a",
    ),
    ("rte", lines("rte", PAIR | {"text": {"a": 1}}, PAIR), "expected text in column 'text', got {"),
    ("rte", lines("rte", [1], PAIR), r"expected a JSON object per line, got '\[1\]' in"),
    ("stsb", lines("stsb", PAIR | {"label": True}, PAIR), "a number as label of stsb, got True"),
    ("stsb", lines("stsb", PAIR | {"label": "1_0"}, PAIR), "a number as label of stsb, got '1_0'"),
    ("stsb", lines("stsb", PAIR | {"label": "\uff13"}, PAIR), "a number as label of stsb, got '"),
    (
        "ncbi-disease",
        lines("ncbi-disease", TAGGED | {"tags": ["O", None]}, TAGGED),
        "as label of ncbi-disease, got None in",
    ),
    (
        "ncbi-disease",
        lines("ncbi-disease", TAGGED | {"tokens": ["a", None]}, TAGGED),
        "expected words, got 'None' among them in",
    ),
    (
        "ncbi-disease",
        lines("ncbi-disease", TAGGED | {"tokens": [["a"], "b"]}, TAGGED),
        "expected words, got",
    ),
    (
        "ncbi-disease",
        conll(train__tsv="a\tO\nb\n\n" + 49 * "a\tO\n\n", test__tsv=CONLL),
        r"expected a token, a tab and a tag, got 'b' in train\.tsv:2",
    ),
    ("rte", glue("0\ta\0\tb\tentailment\n"), r"expected text, got a NUL byte .* in train\.tsv:2"),
    (
        "ncbi-disease",
        conll(train__tsv="a\tO\n\0b\tO\n\n" + 49 * "a\tO\n\n", test__tsv=CONLL),
        r"expected text, got a NUL byte .* in train\.tsv:2",
    ),
    (
        "rte",
        latin1(lines("rte", PAIR | {"text": "caf*"}, PAIR)),
        r"expected UTF-8 text, got the byte 0xe9 in rte\.train\.jsonl:1",
    ),
]


@every(("name", "make", "expected"), BAD_ROWS)
def test_a_bad_row_of_50_is_left_out_and_said_with_its_place(
    name: str, make: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    make(tmp_path)
    splits, _, left_out = read_task(
        find_files(find_task(name), str(tmp_path), alone=False), typed=False
    )
    assert len(splits["train"]) == 49
    assert list(left_out) == ["train"]
    assert re.match(rf"1 of 50 rows; first: .*{expected}", left_out["train"]), left_out


@pytest.mark.parametrize(("bad", "rows"), [(1, 19), (3, 59), (29, 58)])
def test_more_than_5_percent_of_bad_rows_are_refused_with_the_first(
    bad: int, rows: int, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rte.train.jsonl", [PAIR])
    labels = [1] * (rows - bad) + [None] * bad
    write_jsonl(tmp_path / "rte.test.jsonl", [PAIR | {"label": label} for label in labels])
    write_jsonl(tmp_path / "rte.dev.jsonl", [PAIR])
    with pytest.raises(
        CorpusError,
        match=rf"expected a label in every row, got none in .*rte\.test\.jsonl:{rows - bad + 1}\. Use a "
        rf"file with labels\. So it is with {bad} of {rows} rows; up to 5 % are left out\.$",
    ):
        read("rte", tmp_path)


def test_one_missing_label_does_not_replace_the_test_split(tmp_path: Path) -> None:
    labels = [None, *[1] * 49]
    for split in ("train", "dev"):
        write_jsonl(tmp_path / f"rte.{split}.jsonl", [PAIR])
    write_jsonl(tmp_path / "rte.test.jsonl", [PAIR | {"label": label} for label in labels])
    files = find_files(find_task("rte"), str(tmp_path), alone=False)
    splits, test, left_out = read_task(files, typed=False)
    assert (test, len(splits["test"]), len(splits["dev"])) == ("test", 49, 1)
    assert left_out["test"].startswith("1 of 50 rows; first: expected a label in every row")


def test_labels_are_compared_by_value(tmp_path: Path) -> None:
    labels = [1, "1", 1.0, "1.0", "not_entailment", " not_entailment"]
    for split in ("train", "dev"):
        write_jsonl(tmp_path / f"rte.{split}.jsonl", [PAIR | {"label": x} for x in labels])
    assert {example.label for example in read("rte", tmp_path)[0]["train"]} == {1}


def test_a_line_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    pairs(PAIR)(tmp_path)
    (tmp_path / "rte.dev.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"expected a JSON object per line, got '\[1\]' in .*:1"):
        read("rte", tmp_path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("nowhere", "expected a folder, hf:NAME or packaged, got 'nowhere'"),
        (
            "packaged",
            "expected a folder with rte, got packaged, which holds a slice of ncbi-disease",
        ),
        ("hf:", "expected hf:NAME or hf:NAME:CONFIG, got 'hf:'"),
        ("hf:a:b:c", "expected hf:NAME or hf:NAME:CONFIG"),
    ],
)
def test_a_data_folder_that_is_none_is_said(data: str, expected: str) -> None:
    with pytest.raises(CorpusError, match=expected):
        find_files(find_task("rte"), data, alone=True)


def config(**values: Any) -> RunConfig:
    return from_dict({"evaluation": values})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seeds": []}, "evaluation.seeds: expected at least one"),
        ({"seeds": [1, 1]}, "evaluation.seeds: expected every value once"),
        ({"seeds": [-1]}, "evaluation.seeds: expected whole numbers, 0 or more"),
        ({"learning_rate": 0.0}, "evaluation.learning_rate: expected a value above 0"),
        ({"num_epochs": 0}, "evaluation.num_epochs: expected a value above 0"),
        ({"max_length": 4}, "evaluation.max_length: expected 8 or more"),
        ({"warmup_ratio": 1.0}, "evaluation.warmup_ratio: expected a value in"),
        ({"max_train_examples": -1}, "evaluation.max_train_examples: expected 0 or more"),
        ({"num_draws": 10}, "evaluation.num_draws: expected 1000 or more"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert str(caught.value).startswith(expected)
