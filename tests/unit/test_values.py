import json
import math
from decimal import Decimal

import pytest

from fedpipe.commands.finetune.examples import read_texts
from fedpipe.config.finetune import CAUSAL_LM, TaskConfig
from fedpipe.data.reading import NO_VALUE, read
from fedpipe.data.sources import Columns, resolve
from fedpipe.data.values import is_missing, name_of, text_of
from fedpipe.errors import CorpusError

NOTHING = (
    None,
    math.nan,
    Decimal("nan"),
    "",
    " \t",
    "nan",
    "NaN",
    "null",
    "None",
    " none\n",
    "<NA>",
)
NAMES = {
    "1": (1, 1.0, "1", "1.0", " 1 ", Decimal("1.00")),
    "0": (0, -0.0, "-0.0"),
    "1.5": (1.5, "1.5", Decimal("1.50")),
    "caf\u00e9 bar": ("caf\u00e9 bar", "cafe\u0301  bar\n"),
    "01": ("01",),
    "1" * 5000: ("1" * 5000, "1" * 5000 + ".0"),  # more digits than Python reads as a number
    "250.10": ("250.10",),
    "True": (True, "True"),
    "a?": ("a\ud800",),
}


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_nothing_has_many_spellings(value):
    assert is_missing(value)
    assert text_of(value) is None
    assert name_of(value) is None


@pytest.mark.parametrize("name", NAMES, ids=[name[:9] for name in NAMES])
def test_owners_are_compared_by_value(name):
    assert {name_of(value) for value in NAMES[name]} == {name}


@pytest.mark.parametrize("value", [[1], {"a": 1}, b"a", math.inf], ids=repr)
def test_what_names_nobody_and_says_nothing_is_refused(value):
    with pytest.raises(TypeError, match="expected text or a number, got "):
        name_of(value)
    with pytest.raises(TypeError, match="expected text, got "):
        text_of(value)


def write(folder, kind, rows):
    if kind == "jsonl":
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    path = str(folder / ("a.parquet" if kind == "parquet" else "saved"))
    data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_every_kind_of_file_reads_texts_and_owners_alike(tmp_path, kind):
    columns = Columns(text="text", partition="ward")
    texts = [None, "", " \n", "nan", "None", "one", "two", "six"]
    rows = [{"text": text, "ward": "a"} for text in texts]
    (source,) = resolve("data.train", (write(tmp_path, kind, rows),))
    assert [text for text, _ in read(source, columns=columns)] == ["one", "two", "six"]
    # Files with types cannot mix numbers and words in a column.
    for owners in ([1.0, math.nan, 2.0, None], ["1", "nan", "2.0", "  "]):
        rows = [{"text": "word", "ward": owner} for owner in owners]
        folder = tmp_path / str(owners[0])
        folder.mkdir()
        (source,) = resolve("data.train", (write(folder, kind, rows),))
        found = [owner for _, owner in read(source, columns=columns)]
        assert found == ["1", NO_VALUE, "2", NO_VALUE]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_an_owner_that_is_a_class_has_the_name_that_json_lines_give_it(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    own = datasets.ClassLabel(names=["north", "south"])
    features = datasets.Features(text=datasets.Value("string"), ward=own)
    rows = {"text": ["a", "b", "c"], "ward": [1, 0, None]}
    data = datasets.Dataset.from_dict(rows, features=features)
    path = str(tmp_path / ("a.parquet" if kind == "parquet" else "saved"))
    data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    (source,) = resolve("data.train", (path,))
    found = [owner for _, owner in read(source, columns=Columns(text="text", partition="ward"))]
    assert found == ["south", "north", NO_VALUE]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_owner_that_is_a_list_is_refused_with_its_row(tmp_path, kind):
    rows = [{"text": "word", "ward": ["a"]}]
    (source,) = resolve("data.train", (write(tmp_path, kind, rows),))
    message = r"data.partition_column: expected text or a number in column 'ward' of .*, got \"\['a"
    with pytest.raises(CorpusError, match=message) as caught:
        list(read(source, columns=Columns(text="text", partition="ward")))
    assert {"jsonl": "a.jsonl:1", "parquet": "row 1 of "}[kind] in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": math.nan, "ward": 1}, r"^task.data: expected text in column 'text' of .*:1, got"),
        ({"text": "a", "ward": {}}, r"^task.column: expected text or a number in .*:1, got '\{\}'"),
    ],
)
def test_texts_to_fine_tune_on_are_read_by_the_same_rules(tmp_path, row, message):
    good = [{"text": "a", "ward": ward} for ward in (1, "1", 1.0, None, math.nan)]
    task = TaskConfig(name=CAUSAL_LM, data=str(tmp_path), split="column", column="ward")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    _, columns, _ = read_texts(task)
    assert columns[0] == ["1", "1", "1", NO_VALUE, NO_VALUE]
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(CorpusError, match=message):
        read_texts(task)
