"""Evaluations: cells that learn, repeat, are kept or run again; tables, comparisons, errors."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig

from fedpipe.cli import main
from fedpipe.commands.evaluate import command as launcher
from fedpipe.commands.evaluate.cell import run_cell
from fedpipe.commands.evaluate.compare import compare, how_to_read, write_comparison
from fedpipe.commands.evaluate.evaluation import Evaluation, gather
from fedpipe.commands.evaluate.model_folder import check_models, read_models
from fedpipe.commands.evaluate.report import draw_scores, notes, outcome_text, table
from fedpipe.commands.evaluate.setup import read_evaluation, set_up_evaluation
from fedpipe.commands.evaluate.training import batches, drawn
from fedpipe.config.load import from_dict
from fedpipe.data import digests
from fedpipe.data.tasks.encoding import Encoded
from fedpipe.data.tasks.scoring import METRICS
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.models.lengths import num_positions
from fedpipe.report.drawing import render
from fedpipe.report.writer import read_metrics
from fedpipe.run.run_dir import RunDir
from tests.helpers.encoders import bert, easy_ner, easy_pairs, write_jsonl

FAST = {"num_epochs": 8, "learning_rate": 3e-3, "batch_size": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a NER task and a pair task, and one evaluation of all of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("one", "two")):
        bert(folder / "models" / name, seed=seed)
    easy_ner(folder / "data" / "ner")
    easy_pairs(folder / "data" / "glue")
    return folder


def set_up(home: Path, directory: Path, **values: Any) -> Evaluation:
    evaluation = {
        "models": [str(home / "models/one")], "tasks": ["ncbi-disease"],
        "data": str(home / "data"), **FAST, **values,
    }  # fmt: skip
    config = from_dict({"data": {"cache_dir": str(home / "cache")}, "evaluation": evaluation})
    return set_up_evaluation(config, directory, notify=print)


def run(evaluation: Evaluation) -> dict[str, Any]:
    for cell in evaluation.pending():
        run_cell(cell.run_dir)
    return gather(evaluation)


@pytest.fixture(scope="module")
def whole(home: Path) -> Evaluation:
    evaluation = set_up(
        home, home / "whole", models=[str(home / "models/one"), str(home / "models/two")],
        tasks=["ncbi-disease", "rte"], seeds=[0, 1],
    )  # fmt: skip
    run(evaluation)
    return evaluation


@pytest.mark.slow
def test_a_model_that_can_learn_learns_easy_tasks(whole: Evaluation) -> None:
    for cell in whole.cells:
        result = cell.result()
        assert result is not None
        score = "entity_f1" if cell.task.name == "ncbi-disease" else "accuracy"
        assert result["scores"][score] > 0.9, (cell.name, result["scores"])


def test_a_cell_leaves_its_configuration_record_predictions_and_result(whole: Evaluation) -> None:
    cell = whole.cells[0]
    names = {path.name for path in cell.run_dir.iterdir()} - {".lock"}
    assert names == {
        "cell.json", "config.yaml", "metrics.jsonl", "predictions.jsonl.gz", "result.json",
        "run.json", "statistics.npz",
    }  # fmt: skip
    records = read_metrics(cell.run_dir / "metrics.jsonl")
    assert [r["epoch"] for r in records if r["kind"] == "eval"] == list(range(1, 9))
    assert records[-2]["step"] == cell.num_steps == 8 * 8
    result = cell.result()
    assert result is not None
    lines = gzip.decompress((cell.run_dir / "predictions.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    gold, predicted = ([row[name] for row in rows] for name in ("gold", "predicted"))
    assert METRICS["entity_f1"].whole(gold, predicted, []) == result["scores"]["entity_f1"]
    source = whole.files[0].splits["test"]
    text = Path(source).read_text("utf-8").splitlines()
    assert gold == [json.loads(line)["tags"] for line in text]


def test_the_best_epoch_is_chosen_on_dev_and_never_on_a_dev_that_is_the_test(
    whole: Evaluation,
) -> None:
    results = {cell.name: cell.result() for cell in whole.cells}
    ner, pairs = (results[f"one_{task}_seed=0"] for task in ("ncbi-disease", "rte"))
    assert ner is not None and pairs is not None
    assert len(ner["dev_scores"]) == 8
    assert ner["best_epoch"] == 1 + int(np.argmax(ner["dev_scores"]))
    assert (pairs["dev_scores"], pairs["best_epoch"]) == ([], 8)


def test_table_page_and_figure_hold_means_spreads_and_intervals(whole: Evaluation) -> None:
    content = json.loads((whole.directory / "evaluation.json").read_text("utf-8"))
    row = content["rows"][0]
    scores = [cell["scores"]["entity_f1"] for cell in content["cells"][:2]]
    one = row["models"]["one"]
    assert (one["mean"], one["n"]) == (pytest.approx(np.mean(scores)), 2)
    assert one["std"] == pytest.approx(np.std(scores, ddof=1))
    assert one["interval"][0] <= one["mean"] <= one["interval"][1]
    lines = table(content).rows
    assert [line[:4] for line in lines] == [
        ("ncbi-disease", "F1", "30", "2"), ("rte", "accuracy", "30", "2"),
        ("macro average", "", "", ""),
    ]  # fmt: skip
    average = content["average"]["one"]["mean"]
    assert average == pytest.approx(np.mean([r["models"]["one"]["mean"] for r in content["rows"]]))
    assert any("rte: no labelled test split" in note for note in notes(content))
    for name in ("evaluation.html", "evaluation.md"):
        text = (whole.directory / name).read_text("utf-8")
        assert "macro average" in text and "Repeat this evaluation" in text
    assert (whole.directory / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_many_models_with_long_names_keeps_its_width(
    whole: Evaluation, tmp_path: Path
) -> None:
    content = dict(gather(whole))
    names = [f"{number}-of-many-models-with-a-long-name" for number in range(6)]
    content["models"] = [{"name": name} for name in names]
    for row in (*content["rows"], {"models": content["average"]}):
        entry = next(iter(row["models"].values()))
        row["models"].update(dict.fromkeys(names, entry))
    drawn = draw_scores(content)
    assert drawn is not None
    draw, height = drawn
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapses is only a warning
        render(draw, tmp_path / "figure.png", height=height)


def test_the_same_seed_gives_the_same_numbers_and_another_one_does_not(
    home: Path, whole: Evaluation, tmp_path: Path
) -> None:
    again = set_up(home, tmp_path / "again", seeds=[0])
    run(again)
    for name in ("predictions.jsonl.gz",):
        first, second = (
            evaluation.cells[0].run_dir / name for evaluation in (whole, again)
        )  # fmt: skip
        assert first.read_bytes() == second.read_bytes()

    def losses(evaluation: Evaluation, cell: int) -> list[float]:
        records = read_metrics(evaluation.cells[cell].run_dir / "metrics.jsonl")
        return [record["loss"] for record in records if record["kind"] == "step"]

    assert losses(whole, 0) == losses(again, 0) != losses(whole, 1)


def test_what_is_done_is_kept_and_what_changes_runs_again(
    home: Path, whole: Evaluation, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.directory, copy)
    shared = {"models": [str(home / "models/one")], "seeds": [0]}
    assert set_up(home, copy, **shared).pending() == []
    assert len(set_up(home, copy, **(shared | {"seeds": [0, 5]})).pending()) == 1
    assert len(set_up(home, copy, **shared, weight_decay=0.1).pending()) == 1
    assert len(set_up(home, copy, **shared, max_train_examples=20).pending()) == 1
    # another model under the old name, and another test file
    changed = tmp_path / "home"
    shutil.copytree(home / "models", changed / "models")
    shutil.copytree(home / "data", changed / "data")
    same = {"models": [str(changed / "models/one")], "data": str(changed / "data")}
    assert set_up(home, copy, **same).pending() == []
    bert(changed / "models/one", seed=7)
    assert len(set_up(home, copy, **same).pending()) == 1
    same["models"] = [str(home / "models/one")]
    write_jsonl(
        changed / "data/ner/ncbi_disease.test.jsonl", [{"tokens": ["w1"], "tags": ["B-Disease"]}]
    )
    assert len(set_up(home, copy, **same).pending()) == 1
    # a result that was cut short counts as none
    (copy / "cells/one_ncbi-disease_seed=0/result.json").write_text('{"key":', encoding="utf-8")
    assert len(set_up(home, copy, **shared).pending()) == 1


def test_files_that_change_under_their_size_and_time_are_scored_again(
    home: Path, whole: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)  # digests are remembered at once
    for name in ("models", "data"):
        shutil.copytree(home / name, tmp_path / name)
    shutil.copytree(whole.directory, tmp_path / "run")
    own = {"models": [str(tmp_path / "models/one")], "data": str(tmp_path / "data"), "seeds": [0]}

    def pending() -> int:
        return len(set_up(home, tmp_path / "run", **own).pending())

    def change(path: Path, old: bytes, new: bytes) -> None:
        status = path.stat()
        content = path.read_bytes()
        assert old in content and len(old) == len(new)
        path.write_bytes(content.replace(old, new))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size

    assert pending() == 0
    tags = (b'"O", "B-Disease"', b'"B-Disease", "O"')
    labels = (tmp_path / "data/ner/ncbi_disease.test.jsonl", *tags)
    weights = (tmp_path / "models/one/model.safetensors", b"\x3d", b"\x3c")
    for path, old, new in (labels, weights):
        before = path.read_bytes()
        change(path, old, new)
        assert pending() == 1, path.name
        path.write_bytes(before)
        assert pending() == 0


def test_rows_that_are_left_out_are_on_the_console_and_on_the_page(
    home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "data/glue", tmp_path / "data")
    path = tmp_path / "data/rte.dev.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    write_jsonl(path, [*rows, rows[0] | {"label": None}])
    said: list[str] = []
    config = from_dict({
        "data": {"cache_dir": str(home / "cache")},
        "evaluation": {
            "models": [str(home / "models/one")], "tasks": ["rte"], "data": str(tmp_path / "data"),
            **FAST, "num_epochs": 1,
        },
    })  # fmt: skip
    evaluation = set_up_evaluation(config, tmp_path / "run", notify=said.append)
    expected = (
        "1 of 31 rows; first: expected a label in every row, got none in rte.dev.jsonl.gz:31."
    )
    assert f"left out of test: {expected}" in said[0]
    content = gather(evaluation)
    (task,) = content["tasks"]
    assert (task["left_out"].keys(), task["examples"]["test"]) == ({"test"}, 30)
    assert any(expected in note for note in notes(content))


def test_a_part_of_the_examples_is_drawn_and_said(home: Path, tmp_path: Path) -> None:
    evaluation = set_up(
        home, tmp_path / "part", max_train_examples=20, max_test_examples=10, num_epochs=1
    )
    content = run(evaluation)
    assert content["tasks"][0]["num_train"] == 20
    assert content["rows"][0]["num_test"] == 10
    assert (
        "ncbi-disease: used 20 train examples of 60, 10 dev examples of 30, 10 test examples of 30."
    ) in notes(content)
    assert evaluation.cells[0].num_steps == 3


def test_a_regression_and_a_task_with_two_dev_sets_are_scored(home: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        rows = [
            {"text": f"w{n}", "text_pair": "w9", "label": float(n % 6)}
            for n in rng.integers(0, 50, 24)
        ]
        write_jsonl(tmp_path / "data" / f"stsb.{split}.jsonl", rows)
    for split in ("train", "dev_matched", "dev_mismatched"):
        rows = [{"text": f"w{n}", "text_pair": "w9", "label": n % 3} for n in range(24)]
        write_jsonl(tmp_path / "data" / f"mnli.{split}.jsonl", rows[: 24 if "mis" in split else 12])
    content = run(
        set_up(home, tmp_path / "run", tasks=["stsb", "mnli"], data=str(tmp_path / "data"),
               num_epochs=1)
    )  # fmt: skip
    assert [(row["task"], row["title"], row["num_test"]) for row in content["rows"]] == [
        ("stsb", "Pearson", 24), ("stsb", "Spearman", 24), ("mnli", "accuracy", 12),
        ("mnli", "accuracy, mismatched", 24),
    ]  # fmt: skip
    assert content["average"]["one"] is not None


def test_two_evaluations_are_compared_in_pairs(whole: Evaluation, tmp_path: Path) -> None:
    folder = str(whole.directory)
    content = compare(f"{folder}:one", f"{folder}:two")
    assert [row["task"] for row in content["rows"]] == ["ncbi-disease", "rte"]
    for row in content["rows"]:
        assert row["value"] == pytest.approx(row["first"] - row["second"])
        assert row["paired"] and row["n"] == [2]
    same = compare(f"{folder}:one", f"{folder}:one")
    assert all(row["interval"] == (0.0, 0.0) for row in same["rows"])
    write_comparison(content, tmp_path / "comparison")
    assert (tmp_path / "comparison/comparison.html").is_file()
    write_comparison(content, tmp_path / "comparison")


def test_fewer_than_three_trainings_are_not_tested_and_three_are_by_their_own_unit(
    whole: Evaluation, tmp_path: Path
) -> None:
    """Models trained alike with other seeds are the unit; their fine-tunings are averaged."""
    shutil.copytree(whole.directory, tmp_path / "run")
    path = tmp_path / "run/evaluation.json"
    content = json.loads(path.read_text("utf-8"))
    few = compare(f"{tmp_path}/run:one", f"{tmp_path}/run:two")
    assert {(row["over"], row["stands_out"]) for row in few["rows"]} == {("test examples", False)}
    assert "With fewer than 3 fine-tunings" in how_to_read(few)
    assert "says nothing about other models" in how_to_read(few)

    done = [cell for cell in content["cells"] if cell["task"] == "ncbi-disease"]
    for method, by in (("good", 0.4), ("bad", 0.0)):
        for seed in range(3):
            content["models"].append({"name": f"{method}{seed}"})
            for cell in (c for c in done if c["model"] == "one"):
                score = 0.5 + by + 0.01 * seed + 0.1 * cell["seed"]
                content["cells"].append(
                    cell | {"model": f"{method}{seed}", "scores": {"entity_f1": score}}
                )
    path.write_text(json.dumps(content), encoding="utf-8")
    sides = [f"{tmp_path}/run:" + ",".join(f"{m}{s}" for s in range(3)) for m in ("good", "bad")]
    (row,) = compare(*sides)["rows"]
    assert (row["over"], row["n"], row["paired"]) == ("seeds and test examples", [3, 3], False)
    assert (row["first"], row["value"]) == (pytest.approx(0.96), pytest.approx(0.4))
    assert row["stands_out"] and row["interval"][0] > 0
    (mixed,) = compare(sides[0], f"{tmp_path}/run:one")["rows"]
    assert (mixed["n"], mixed["p_value"]) == ([3, 1], None), "two fine-tunings are one pre-training"


def test_what_cannot_be_compared_is_said(
    home: Path, whole: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(whole.directory)
    with pytest.raises(CheckpointError, match=r"^--compare: expected the directory of an eval"):
        compare(str(tmp_path), folder)
    with pytest.raises(ConfigError, match="expected one of the models one, two of .*, got none"):
        compare(folder, folder)
    with pytest.raises(ConfigError, match="got 'three'"):
        compare(f"{folder}:three", folder)
    other = set_up(home, tmp_path / "other", max_test_examples=10, num_epochs=1)
    gather(other)
    with pytest.raises(ConfigError, match="expected a task that both have finished, got none"):
        compare(f"{folder}:one", str(tmp_path / "other"))
    run(other)
    with pytest.raises(CheckpointError, match="expected the same test examples of ncbi-disease"):
        compare(f"{folder}:one", str(tmp_path / "other"))
    assert main(["evaluate", "--compare", f"{folder}:one", f"{folder}:two"]) == 0
    assert "difference [95 %]" in capsys.readouterr().out


def test_models_that_cannot_be_fine_tuned_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(path: str, expected: str) -> None:
        with pytest.raises((CheckpointError, ConfigError), match=rf"^--model: {expected}"):
            check_models([path] if path else [])

    refused("", r"expected a Hugging Face folder to evaluate, got none\. Write for example")
    refused("nowhere", "expected a Hugging Face folder, got 'nowhere' without a config.json")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("[]", encoding="utf-8")
    refused(str(model), r"expected weights in .*, got none of model.safetensors")
    shutil.copy(home / "models/one/model.safetensors", model)
    refused(str(model), r"expected a tokenizer \(tokenizer.json\) in .*, got none")
    shutil.copy(home / "models/one/tokenizer.json", model)
    refused(str(model), "expected a JSON object in .*config.json")
    (model / "config.json").write_text("{}", encoding="utf-8")
    refused(str(model), "expected a model_type in")


def test_models_are_named_after_the_folders_that_tell_them_apart(
    home: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name / "export" for name in ("a/run", "b/run")]
    for folder in folders:
        shutil.copytree(home / "models/one", folder)
    found = check_models([str(folder.parent) for folder in folders])
    models = read_models(found, root=tmp_path)
    assert [model.name for model in models] == ["a-run", "b-run"]
    assert (models[0].num_positions, models[0].digest) == (64, models[1].digest)
    with pytest.raises(ConfigError, match="^--model: expected different models"):
        read_models([folders[0], folders[0]], root=tmp_path)


def test_the_positions_and_the_vocabulary_of_a_model_are_limits(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation.max_length: expected at most 64 .* got 65"):
        set_up(home, tmp_path / "a", max_length=65)
    shutil.copytree(home / "models/one", tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text("utf-8"))
    config["vocab_size"] = 20
    (tmp_path / "small/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected tokens below 20 .the vocabulary of"):
        set_up(home, tmp_path / "b", models=[str(tmp_path / "small")])


def test_a_roberta_that_names_no_padding_has_the_positions_that_it_has_in_transformers() -> None:
    content = {"model_type": "roberta", "max_position_embeddings": 514}
    assert num_positions(content) == num_positions(RobertaConfig(**content).to_dict()) == 512
    assert num_positions(content | {"pad_token_id": 0}) == 513
    assert num_positions(content | {"model_type": "bert"}) == 514


def test_sequences_are_as_long_as_the_model_was_trained_on_unless_it_is_asked_for(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "short"
    shutil.copytree(home / "models/one", model)
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    (model / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": 16}), encoding="utf-8"
    )
    lengths = [
        set_up(home, tmp_path / str(wanted), models=[str(model)], max_length=wanted)
        for wanted in (None, 64)
    ]
    assert [plan.cells[0].settings["max_length"] for plan in lengths] == [16, 64]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("length")]
    assert lines == [
        "length  ncbi-disease: sentences are split into windows of 16 tokens, the longest that"
        " short was trained on (usual 512)"
    ]


def test_a_tokenizer_that_does_not_say_how_far_it_goes_is_the_models_fault(
    home: Path, tmp_path: Path
) -> None:
    model = tmp_path / "torn"
    shutil.copytree(home / "models/one", model)
    (model / "tokenizer_config.json").write_text('{"model_max_length": 1', encoding="utf-8")
    with pytest.raises(CheckpointError, match="^--model: expected JSON in .*tokenizer_config"):
        set_up(home, tmp_path / "run", models=[str(model)])


def test_a_decoder_whose_configuration_names_no_pad_token_is_scored_on_sentences(
    home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "models/one", tmp_path / "gpt2")  # for its tokenizer
    words = json.loads((home / "models/one/config.json").read_text())["vocab_size"]
    config = GPT2Config(vocab_size=words, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    evaluation = set_up(
        home, tmp_path / "run", models=[str(tmp_path / "gpt2")], tasks=["rte"], num_epochs=1
    )
    content = run(evaluation)
    assert table(content).rows[0][3] == "1", table(content)


def test_a_model_that_transformers_cannot_read_fails_its_cell_only(
    home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "models/one", tmp_path / "broken")
    weights = tmp_path / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F99"', 1))
    evaluation = set_up(home, tmp_path / "run", models=[str(tmp_path / "broken")])
    with pytest.raises(CheckpointError, match="^--model: expected an encoder that transformers"):
        run_cell(evaluation.cells[0].run_dir)
    assert evaluation.pending()
    content = gather(evaluation)
    assert table(content).rows[0][3:] == ("0 of 1", "-")


BAD_LINES = [
    (["--tasks", "ncbi"], "got none. Write for example fedpipe evaluate --model"),
    (["--tasks", "mprc"], "Did you mean mrpc?"),
    (["--tasks", "ncbi,ncbi-disease"], "evaluation.tasks: expected every task once"),
    (["--seeds", "0,x"], "--seeds: expected whole numbers, got '0,x'"),
    (["--seeds", "1_0"], "--seeds: expected whole numbers, got '1_0'"),
    (["--seeds", "1,1"], "evaluation.seeds: expected every value once"),
    (["--parallel", "0"], "--parallel: expected 1 or more, got 0"),
    (["--parallel", "1_0"], "argument --parallel: expected a whole number, got '1_0'. See fed"),
    (["--preset", "fedbert"], "command line: unknown argument '--preset'"),
    (["evaluation.learning_rates=1"], "Did you mean evaluation.learning_rate?"),
    (["--compare", "a", "b"], "--compare: expected the directory of an evaluation, got 'a'"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_LINES)
def test_a_users_error_is_one_line_and_starts_nothing(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "fork_server", lambda preload: pytest.fail("it was started"))
    assert main(["evaluate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_a_directory_of_something_else_is_left_alone(home: Path, tmp_path: Path) -> None:
    RunDir.at(tmp_path, "pretrain").make()
    with pytest.raises(CheckpointError, match="expected a new directory or that of an evaluation"):
        read_evaluation(None, [], str(tmp_path))


def test_an_evaluation_goes_on_with_its_own_configuration(home: Path, whole: Evaluation) -> None:
    config, directory = read_evaluation(None, [], str(whole.directory))
    assert config.evaluation == whole.config.evaluation
    assert directory == whole.directory
    again, _ = read_evaluation(
        None, ["evaluation.num_epochs=2"], str(directory), chosen={"seeds": (3,)}
    )
    assert (again.evaluation.num_epochs, again.evaluation.seeds) == (2, (3,))


def test_nothing_is_started_where_all_is_done_and_a_cell_can_be_run_by_itself(
    whole: Evaluation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "fork_server", lambda preload: None)
    assert main(["evaluate", "--run-dir", str(whole.directory)]) == 0
    out = capsys.readouterr().out
    assert f"nothing to do: all 8 cells of {whole.directory} are done" in out
    assert f"report  {whole.directory / 'evaluation.html'}" in out
    cell = whole.cells[0]
    before = (cell.run_dir / "predictions.jsonl.gz").read_bytes()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["evaluate", "--run-dir", str(cell.run_dir)]) == 0
    assert capsys.readouterr().out.startswith("F1 ")
    assert (cell.run_dir / "predictions.jsonl.gz").read_bytes() == before


def test_the_page_says_how_tasks_are_scored(whole: Evaluation) -> None:
    content = json.loads((whole.directory / "evaluation.json").read_text("utf-8"))
    names = ("ddi", "jnlpba")
    tasks = [task | {"name": n} for task, n in zip(content["tasks"], names, strict=True)]
    tasks[0] |= {"best_epoch_by": "last", "truncated": {"one": {"test": 3}}, "folder": "packaged"}
    found = " ".join(notes(content | {"tasks": tasks, "data": "packaged"}))
    assert "jnlpba is the packaged slice" not in found, "it has files of its own"
    for sentence in (
        "ddi: micro-F1 over the four positive classes", "all entity types mapped to one",
        "ddi: there is no dev split, so the last epoch", "did not fit into max_length: one 3.",
        "ddi is the packaged slice", "No class is weighted",
    ):  # fmt: skip
        assert sentence in found


def test_an_epoch_has_every_sequence_once_and_batches_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    epochs = [
        list(batches(lengths, batch_size=16, rng=np.random.default_rng(seed))) for seed in (1, 1, 2)
    ]
    assert sorted(np.concatenate(epochs[0])) == list(range(1000))
    for first, second in zip(epochs[0], epochs[1], strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(epochs[0][0], epochs[2][0])
    padded = sum(len(batch) * lengths[batch].max() for batch in epochs[0])
    assert padded < 1.25 * lengths.sum()


def test_examples_are_drawn_with_all_their_windows() -> None:
    starts = np.arange(0, 31, 3)
    data = Encoded(
        ids=np.zeros(30, dtype=np.int32), types=np.zeros(30, dtype=np.int8), starts=starts,
        labels=np.zeros(10), examples=np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5], dtype=np.int32),
        num_truncated=0,
    )  # fmt: skip
    assert drawn(data, 0).tolist() == list(range(10))
    kept = set(data.examples[drawn(data, 3)])
    assert len(kept) == 3
    assert len(drawn(data, 3)) == sum(np.isin(data.examples, list(kept)))


def test_an_outcome_names_the_score() -> None:
    assert outcome_text({"scores": {"accuracy": 0.5, "f1": 0.25}}) == "accuracy 50.0, F1 25.0"
    assert outcome_text({}) == "no score"


def test_a_fine_tuning_that_diverges_says_so_beside_its_score(home: Path, tmp_path: Path) -> None:
    values = {"tasks": ["rte"], "num_epochs": 1, "learning_rate": 1e30}
    content = run(set_up(home, tmp_path / "diverged", **values))
    cell = content["cells"][0]
    assert cell["diverged_at"] == 2  # the first step still has the model's own weights
    assert outcome_text(cell).endswith(", diverged at step 2")
    assert notes(content)[-1] == (
        "The loss of `one_rte_seed=0` is no longer finite: unless an earlier epoch was chosen, "
        "the score means nothing. Lower evaluation.learning_rate."
    )


def test_a_task_of_ones_own_is_evaluated_kept_and_runs_again_when_its_file_changes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"ner": ("diseases", "kind: ner\nlabels: [Disease]\n")}
    own["pairs"] = ("same", "kind: pair\nlabels: [0, 1]\nmetric: [f1, accuracy]\n")
    for folder, (name, text) in own.items():
        make = easy_ner if folder == "ner" else easy_pairs
        make(tmp_path / folder, name=name)
        (tmp_path / folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    files = [str(tmp_path / folder / f"{name}.yaml") for folder, (name, _) in own.items()]
    arguments = {"tasks": [], "task_files": files, "data": "packaged", "num_epochs": 8}
    evaluation = set_up(home, tmp_path / "run", **arguments)
    content = run(evaluation)
    capsys.readouterr()
    assert [row["task"] for row in content["rows"]] == ["diseases", "same", "same"]
    for cell in evaluation.cells:
        result = cell.result()
        assert result is not None
        assert result["scores"][cell.task.metrics[0]] > 0.9, (cell.name, result["scores"])
    page = (tmp_path / "run/evaluation.md").read_text("utf-8")
    assert "diseases.yaml (own task)" in page
    assert not set_up(home, tmp_path / "run", **arguments).pending()
    # a cell can be repeated by itself
    repeated, _ = read_evaluation(
        str(evaluation.cells[0].run_dir / "config.yaml"), [], str(tmp_path / "again")
    )
    assert [c.key for c in set_up_evaluation(repeated, tmp_path / "again", notify=print).cells] == [
        evaluation.cells[0].key
    ]
    text = own["pairs"][1].replace("[f1, accuracy]", "matthews")
    Path(files[1]).write_text(text, encoding="utf-8")
    pending = set_up(home, tmp_path / "run", **arguments).pending()
    assert [cell.task.name for cell in pending] == ["same"]
    run_cell(pending[0].run_dir)
    assert list((pending[0].result() or {})["scores"]) == ["matthews"]
