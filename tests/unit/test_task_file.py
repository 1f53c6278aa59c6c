"""Tasks of the user's own: task files, the data they describe, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpipe.data.tasks.files import find_files
from fedpipe.data.tasks.reading import Example, read_task
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.data.tasks.task_file import choose_tasks, own_tasks, read_task_file
from fedpipe.errors import ConfigError, CorpusError, FedPipeError
from tests.helpers.encoders import write_jsonl

NOTES = """\
name: triage
kind: classification
columns: {text: note, label: urgency}
labels: [low, high]
metric: [accuracy, f1]
"""
DRUGS = "kind: ner\nlabels: [Drug, Dose]\ncolumns: {words: word, tags: tag}\n"


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def read(folder: Path, data: str = "packaged") -> tuple[Any, dict[str, list[Example]]]:
    """Read the one task of a folder, as an evaluation of the folder does."""
    (task,) = choose_tasks([], [str(folder)], data)
    splits, _, left_out = read_task(find_files(task, data, alone=False), typed=False)
    assert not left_out
    return task, splits


def test_a_classification_is_read_from_csv_with_quotes_line_ends_and_semicolons(
    tmp_path: Path,
) -> None:
    rows = 'id,note,urgency\n1,"pain, ""sharp""\nsince noon",high\n\n2,checked,low\n'
    folder = write(tmp_path, task__yaml=NOTES, train__csv=rows, test__csv=rows.replace(",", ";"))
    task, splits = read(folder)
    assert (task.name, task.kind, task.metrics) == ("triage", "classification", ("accuracy", "f1"))
    assert splits["train"] == [
        Example(('pain, "sharp"\nsince noon',), 1), Example(("checked",), 0),
    ]  # fmt: skip
    assert [example.label for example in splits["test"]] == [1, 0]
    assert [example.where.rpartition(":")[2] for example in splits["train"]] == ["2", "5"]


def test_entity_types_of_an_own_task_are_kept_apart_in_json_lines_and_conll(
    tmp_path: Path,
) -> None:
    lines, conll = (write(tmp_path / name / "drugs", task__yaml=DRUGS) for name in ("a", "b"))
    for split in ("train", "test"):
        write_jsonl(lines / f"{split}.jsonl", [{"word": ["x", "5"], "tag": ["B-Drug", "B-Dose"]}])
        write(conll, **{f"{split}__conll": "x B-Drug\n5 B-Dose\n"})
    for folder in (lines, conll):
        task, splits = read(folder)
        assert task.name == "drugs"  # of its folder
        assert TaskSpec.of(task).labels == ("O", "B-Drug", "I-Drug", "B-Dose", "I-Dose")
        assert splits["train"] == [Example(("x", "5"), (1, 3))]


def test_pairs_and_numbers_are_read_with_named_files_of_another_folder(tmp_path: Path) -> None:
    description = "kind: pair\nlabels: [0, 1]\nfiles: {train: a.tsv, dev: b.tsv}\n"
    own = write(tmp_path / "own", same__yaml=description)
    rows = "text\ttext_pair\tlabel\none\ttwo\t1\n"
    data = write(tmp_path / "data", a__tsv=rows, b__tsv=rows)
    (task,) = choose_tasks([], [str(own / "same.yaml")], str(data))
    splits, test, _ = read_task(find_files(task, str(data), alone=False), typed=False)
    assert (splits["train"], test) == ([Example(("one", "two"), 1)], "dev")
    pain = write(tmp_path / "pain", task__yaml="kind: regression\ncolumns: {label: pain}\n")
    for split in ("train", "test"):
        write(pain, **{f"{split}__csv": "text,pain\nworse,7.5\n"})
    task, splits = read(pain)
    assert task.metrics == ("pearson",)
    assert splits["test"] == [Example(("worse",), 7.5)]


def test_task_files_of_a_data_folder_are_found_by_their_names_and_without(tmp_path: Path) -> None:
    for name in ("triage", "drugs"):
        write(tmp_path / name, task__yaml=DRUGS if name == "drugs" else NOTES)
    assert [task.name for task in own_tasks(str(tmp_path))] == ["drugs", "triage"]
    assert [task.name for task in choose_tasks([], [], str(tmp_path))] == ["drugs", "triage"]
    chosen = choose_tasks(["rte", "Triage"], [str(tmp_path / "drugs")], str(tmp_path))
    assert [task.name for task in chosen] == ["rte", "triage", "drugs"]
    assert [task.name for task in choose_tasks([], [], "packaged")] == ["ncbi-disease"]
    with pytest.raises(ConfigError, match=r"got 'triagee'. Did you mean triage\?$"):
        choose_tasks(["triagee"], [], str(tmp_path))


WRONG = [
    ("kind: nre\nlabels: [A]\n", "kind: expected one of classification, pair, regression, ner, "
     "got 'nre' in {file}:1. Did you mean ner?"),
    ("labels: [a, b]\n", "kind: expected one of classification, pair, regression, ner, got nothing"
     " in {file}"),
    ("kind: ner\nlables: [A]\n", "lables: unknown key in {file}:2. Did you mean labels?"),
    ("kind: ner\nlabels: [A]\ncolumns: {word: x}\n",
     "columns.word: unknown key in {file}:3. Did you mean columns.words?"),
    ("kind: ner\nlabels: [A]\ncolumns: {text: x}\n",
     "columns.text: expected only words, tags with kind ner, got 'x' in {file}:3."),
    ("kind: ner\nlabels: [A]\nmetric: accuracy\n", "metric: expected one of entity_f1, "
     "entity_precision, entity_recall with kind ner, got 'accuracy' in {file}:3. The default is"),
    ("kind: classification\nlabels: [a, b, c]\nmetric: f1\n",
     "metric: expected accuracy or micro_f1 with more than two labels, got 'f1' in {file}:3."),
    ("kind: classification\nlabels: a\n",
     "labels: expected 2 classes or more with kind classification, got ['a'] in {file}:2."),
    ("kind: ner\n", "labels: expected 1 entity type or more with kind ner, got [] in {file}"),
    ("kind: regression\nlabels: [1]\n", "labels: expected none with kind regression, got ['1']"),
    ("kind: pair\nlabels: [a, a]\n", "labels: expected different names, got ['a', 'a'] in"),
    ("kind: ner\nlabels: [B-Drug]\n", "labels: expected entity types without O, B- and I-, got "
     "'B-Drug' in {file}:2. Write Drug."),
    ("kind: pair\nlabels: [a, b]\nnegative: c\n", "negative: expected some of a, b, got 'c' in"),
    ("kind: pair\nlabels: [a, b]\nname: a/b\n", "name: expected letters, digits and . _ + - (it"),
    ("kind: pair\nlabels: [a, b]\nname: RTE\n", "name: expected a name that no task of fedpipe"),
    ("kind: pair\nlabels: [a, b]\nname: imdb\n", "name: expected a name that no task of fedpipe"),
    ("kind: pair\nlabels: [a, b]\nfiles: {test: x.csv}\n", "files: expected train, and dev or "
     "test, got 'test' in {file}:3."),
    ("- a\n", "{file}:1: expected sections such as"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_what_is_wrong_with_a_task_file_is_said_in_one_line_with_its_place(
    text: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_task_file(str(file), key="--task-file")
    assert expected.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_file_that_is_not_there_is_named_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--task-file: expected a readable YAML file, got"):
        read_task_file(str(tmp_path / "none.yaml"), key="--task-file")


GOOD = "note,urgency\n" + "fine,low\n" * 100
WRONG_DATA: list[tuple[dict[str, str], str]] = [
    # 1 % of the rows: a label that nobody declared is no accident
    ({"train__csv": GOOD + "bad,urgent\n"}, "evaluation.data: expected one of low, high in column "
     "'urgency' of {folder}/train.csv:102, got 'urgent'. Declare it under labels in {folder}/task."
     "yaml, or correct the row."),
    ({"test__csv": GOOD.replace("urgency", "label")}, "evaluation.data: expected a column 'urgency'"
     " with the label of triage in {folder}/test.csv:2, got note, label. Rename the column, or name"
     " it under columns in {folder}/task.yaml."),
    ({"test__csv": GOOD.replace("note", "text")}, "expected a column 'note' with the text of"),
    ({"test__csv": GOOD.replace(",low", ",")}, "evaluation.data: expected a label in every row"),
    ({"test__csv": GOOD.replace(",low", ",1")}, "expected one of low, high in column 'urgency'"),
    ({"test__csv": GOOD.replace("fine", "a,b")}, "expected the 2 columns of the header, got 3 in "
     "{folder}/test.csv:2. Put cells that hold ',' in quotes."),
    ({"test__csv": GOOD + '"open,low\n' * 19}, "expected cells between ',', got {folder}/test.csv"),
    ({"task__yaml": NOTES + "files: {train: train.csv, test: none.csv}\n"}, "files.test: expected a"
     " file, got '{folder}/none.csv' in {folder}/task.yaml, which is none."),
    ({"task__yaml": NOTES + "files: {train: train.csv, test: test.xls}\n"}, "files.test: expected a"
     " name that ends with .jsonl, .jsonl.gz, .tsv, .txt, .conll, .iob, .csv, .csv.gz for kind"),
    ({"task__yaml": NOTES + "files: {train: train.csv, test: a.jsonl}\n", "a__jsonl": "{}"},
     "files: expected one format, got train.csv, a.jsonl in {folder}/task.yaml."),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "expected"), WRONG_DATA)
def test_what_is_wrong_with_the_data_of_an_own_task_names_column_and_label(
    changed: dict[str, str], expected: str, tmp_path: Path
) -> None:
    files = {"task__yaml": NOTES, "train__csv": GOOD, "test__csv": GOOD}
    folder = write(tmp_path, **files | changed)
    with pytest.raises(FedPipeError) as caught:
        read(folder)
    assert expected.format(folder=folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_of_csv_that_is_no_text_is_a_bad_row_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, task__yaml=NOTES, train__csv=GOOD, test__csv=GOOD)
    with open(folder / "test.csv", "ab") as file:
        file.write(b"\xff,low\nlast,high\n")
    (task,) = choose_tasks([], [str(folder)], "packaged")
    splits, _, left_out = read_task(find_files(task, "packaged", alone=True), typed=False)
    assert splits["test"][-1] == Example(("last",), 1)
    assert left_out["test"].startswith("1 of 102 rows; first: expected UTF-8 text, got the byte")
    (folder / "test.csv").write_bytes(b"\xff,urgency\n")
    with pytest.raises(CorpusError, match=r"got the byte 0xff in .*test.csv:1"):
        read(folder)
