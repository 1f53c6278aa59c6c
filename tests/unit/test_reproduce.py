"""``fedpipe reproduce``: times to a score, the systems compared, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpipe.cli import main
from fedpipe.commands.evaluate.intervals import METHOD
from fedpipe.commands.reproduce.config import SCALES, load_reproduction
from fedpipe.commands.reproduce.report import below, differences_table
from fedpipe.commands.reproduce.results import read_curve
from fedpipe.commands.reproduce.time_to_score import best, race, speed_up, time_to
from fedpipe.commands.reproduce.variants import make_variants
from fedpipe.config.load import diff
from fedpipe.errors import CheckpointError
from fedpipe.report.document import Strong
from tests.helpers.records import make_records


def test_a_score_is_reached_on_the_line_between_two_rounds() -> None:
    clock, scores = [10.0, 20.0, 30.0], [0.2, 0.6, 0.5]
    assert time_to(0.4, clock, scores) == pytest.approx(15.0)
    assert time_to(0.6, clock, scores) == pytest.approx(20.0)


def test_a_score_is_reached_after_the_first_round_at_the_earliest() -> None:
    assert time_to(0.1, [10.0, 20.0], [0.2, 0.6]) == 10.0


def test_a_score_above_all_is_never_reached() -> None:
    assert time_to(0.7, [10.0, 20.0], [0.2, 0.6]) is None


def test_the_best_score_counts_where_it_comes_first() -> None:
    assert best([1.0, 2.0, 3.0], [0.3, 0.5, 0.5]) == (0.5, 2.0)


def test_mean_and_peak_leave_out_tasks_that_are_never_reached_or_not_learnt() -> None:
    baseline = ([10.0, 20.0], [0.4, 0.6])
    races = [
        race("a", learnt=True, baseline=baseline, own=([5.0, 10.0], [0.4, 0.6])),
        race("b", learnt=True, baseline=baseline, own=([5.0, 10.0], [0.6, 0.6])),
        race("c", learnt=True, baseline=baseline, own=([5.0, 10.0], [0.4, 0.5])),
        race("d", learnt=False, baseline=baseline, own=([5.0, 10.0], [0.7, 0.7])),
    ]
    assert [each.ratio for each in races] == [2.0, 4.0, None, None]
    total = speed_up(races)
    assert (total.mean, total.peak, total.reached) == (3.0, 4.0, 2)
    assert (total.never, total.unlearnt) == (("c",), ("d",))


def test_a_speed_up_over_no_task_is_no_number() -> None:
    races = [race("a", learnt=True, baseline=([1.0], [0.5]), own=([1.0], [0.4]))]
    assert (speed_up(races).mean, speed_up(races).peak) == (None, None)


@pytest.mark.parametrize("scale", SCALES)
def test_systems_differ_in_how_they_compute_and_in_nothing_that_they_learn_from(scale: str) -> None:
    config = load_reproduction(None, [], scale=scale)
    config = replace(config, reproduce=replace(config.reproduce, timed_rounds=0))
    systems = make_variants(config)
    layers, cuts = config.num_layers, config.reproduce.cuts
    assert [s.config.pipeline.cut for s in systems[:4]] == 2 * [(0,), (layers // 2,)]
    assert [s.config.pipeline.cut[0] for s in systems[4:-1]] == list(cuts)
    assert {s.twin for s in systems if s.twin} <= {s.name for s in systems if not s.twin}
    for system in systems:
        allowed = {
            "name", "data.padded_length", "pipeline.objective", "pipeline.schedule", "pipeline.cut",
            "pipeline.head_location", "pipeline.micro_batch_size", "pipeline.num_micro_batches",
            "pipeline.wire",
        }  # fmt: skip
        assert set(diff(systems[0].config, system.config)) <= allowed
        assert system.config.blocks_per_step == systems[0].config.blocks_per_step


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.25, 0.5, 0.75, 1.0])
def test_the_first_rounds_have_the_learning_rates_of_the_whole(warmup: float) -> None:
    from fedpipe.pipeline.optimizer import learning_rate

    overrides = ["reproduce.timed_rounds=2", f"optimizer.warmup_ratio={warmup}"]
    config = load_reproduction(None, overrides)
    systems = {s.name: s for s in make_variants(config)}
    short, whole = systems["fedbert-0-4-published"], systems["fedbert-0-4"]
    rounds = config.federation.num_rounds
    assert (short.config.federation.num_rounds, whole.config.federation.num_rounds) == (2, rounds)
    for step in range(0, 200, 7):
        rates = [
            learning_rate(
                s.config.optimizer, step, total_steps=100 * s.config.federation.num_rounds
            )
            for s in (short, whole)
        ]
        assert rates[0] == pytest.approx(rates[1], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "argument --scale: invalid choice: 'huge'"),
        (["--seeds", "a"], "--seeds: expected whole numbers, got 'a'"),
        (["--data", "/nowhere"], "evaluation.data: expected"),
        (["reproduce.cuts=[4]"], "reproduce.cuts: expected layers 1..3"),
        (["reproduce.cuts=[]"], "reproduce.cuts: expected one or more"),
        (["reproduce.published_length=8"], "reproduce.published_length: expected data.sequence_le"),
        (["reproduce.timed_rounds=99"], "reproduce.timed_rounds: expected at most"),
        (
            ["optimizer.decay=polynomial", "optimizer.warmup_ratio=0.1"],
            "reproduce.timed_rounds: expected 0 (all), or",
        ),
        (
            ["optimizer.decay=wsd"],
            "reproduce.timed_rounds: expected 0 (all), or optimizer.decay=li",
        ),
        (["federation.average.embeddings=false"], "federation.average.embeddings: expected true"),
        (["data.padded_length=80"], "data.padded_length: expected 0 in a reproduction"),
        (["data.attention=document"], "data.attention: expected block in a reproduction"),
        (
            ["data.mask_probability=[0.3,0.15]", "data.mask_switch=0.5"],
            "data.mask_probability: expected one share of masked",
        ),
        (["data.valid=[]"], "data.valid: expected held-out text"),
        (["data.train=[nowhere.txt]"], "fedbert-0-4-published: data.train"),
        (["evaluation.tasks=[nothing]"], "evaluation.tasks: expected"),
        (["model.hidden=3"], "model.hidden: unknown key"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    assert main(["reproduce", "fedbiobert", "--run-dir", str(run_dir), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not run_dir.exists()


@pytest.mark.parametrize("kind", ["round", "eval"])
def test_a_run_that_diverged_is_named_with_its_round_and_not_compared(
    kind: str, tmp_path: Path
) -> None:
    records = make_records(num_rounds=3)
    (_, second, _) = (record for record in records if record["kind"] == kind)
    if kind == "round":
        second["loss"][-1] = None
    else:
        second["stages"][-1]["loss"] = None
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    config = SimpleNamespace(federation=SimpleNamespace(num_rounds=3))
    with pytest.raises(CheckpointError, match=r"got others in round 2 of 3: the training diverged"):
        read_curve(SimpleNamespace(run_dir=tmp_path, config=config))  # type: ignore[arg-type]


def test_another_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "bert"]) == 2
    assert "invalid choice: 'bert'" in capsys.readouterr().err


def test_a_seed_changes_the_seed_alone() -> None:
    system = make_variants(load_reproduction(None, []))[0]
    assert system.with_seed(3) == replace(system.config, seed=3)


def test_the_page_names_what_holms_correction_leaves_and_says_where_seeds_are_too_few() -> None:
    def difference(task: str, low: float, high: float, p: float | None, *, strong: bool) -> dict:
        found = {
            "value": (low + high) / 2, "interval": [low, high], "over": "", "n": [3],
            "p_value": p, "stands_out": strong,
        }  # fmt: skip
        return {"variant": "own", "task": task, "last": found, "all": found}

    content = {
        "variants": [{"name": "own", "title": "fedpipe 2-2"}], "seeds": [0, 1, 2],
        "intervals": METHOD, "tasks": [{"name": "a"}, {"name": "b"}],
        "differences": [
            difference("a", 0.01, 0.02, 0.001, strong=True),
            difference("b", -0.05, -0.01, 0.03, strong=False),
        ],
    }  # fmt: skip
    text = below(content)
    assert "Holm's correction over the 4 differences" in text
    assert (
        "After the last round: above after correction: fedpipe 2-2 on a; 1 of 2 whole intervals "
        "above 0; below after correction: none; 1 of 2 whole intervals below 0."
    ) in text
    cells = [row[2] for row in differences_table(content).rows]
    assert [type(cell) is Strong for cell in cells] == [True, True, False, False]
    for each in content["differences"]:
        each["last"] |= {"p_value": None, "stands_out": False}
    text = below(content | {"seeds": [0]})
    assert "too few seeds for a test" in text and "after correction" not in text
