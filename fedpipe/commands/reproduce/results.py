"""Results of a reproduction: times, losses, scores, speed-ups and differences. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from fedpipe.commands.evaluate.content import CellResult, Settings, Tested
from fedpipe.commands.evaluate.evaluation import Evaluation, ScoredCell, read_statistics
from fedpipe.commands.evaluate.intervals import METHOD, Sample, estimate, holm, mean_of, sample
from fedpipe.commands.reproduce.time_to_score import Race, race, speed_up
from fedpipe.commands.reproduce.variants import Variant
from fedpipe.data.tasks.scoring import METRICS
from fedpipe.errors import CheckpointError
from fedpipe.report.format import is_number
from fedpipe.report.records import Environment
from fedpipe.report.summary import RunSummary
from fedpipe.run.run_dir import describe_environment

if TYPE_CHECKING:
    from fedpipe.commands.reproduce.setup import Reproduction, SystemCell

AGREEMENT = 1e-3
"""Largest relative difference of losses at which two runs count as identical weights."""
HELD_OUT = "held-out loss"


class VariantFacts(TypedDict):
    """A system; numbers are means over its seeds of pre-training."""

    name: str
    title: str
    kind: str
    num_stages: int
    measured_rounds: int
    scored_as: str
    """The system whose models are scored for this one: itself, or one with identical weights."""
    loss_difference: float | None
    """Largest relative difference of the loss of a round from that of its twin."""
    clock: list[float]
    """Seconds of training at the end of every round."""
    seconds_per_round: float
    seconds_range: list[float]
    tokens_per_round: int
    losses: list[float]
    held_out: list[float]
    steps: list[list[float]]
    """Seconds and training loss along the first seed's run."""


class TaskScores(TypedDict):
    """A task, and the scores of the systems on it."""

    name: str
    metric: str
    title: str
    untrained: float
    scores: dict[str, list[float]]
    """By system, the score after every round."""
    learnt: dict[str, bool]
    """By system, whether its scores are significantly above those of the untrained model."""
    num_train: int
    num_test: int
    settings: Settings


class LossRace(TypedDict):
    """The time to the held-out loss of a baseline."""

    loss: float
    baseline_s: float
    own_s: float | None
    ratio: float | None


class RaceFacts(TypedDict):
    """The fields of ``Race`` and its ratio."""

    task: str
    target: float
    baseline_s: float
    own_s: float | None
    learnt: bool
    ratio: float | None


class SpeedUpFacts(TypedDict):
    """The speed-up of a run of fedpipe over a baseline."""

    variant: str
    baseline: str
    per_round: float
    races: list[RaceFacts]
    held_out: LossRace
    mean: float | None
    peak: float | None
    reached: int
    """Tasks whose score is reached."""
    never: tuple[str, ...]
    unlearnt: tuple[str, ...]


class ScoreDifference(TypedDict):
    """Scores of fedpipe minus scores of FedBERT on a task, after the same tokens."""

    variant: str
    task: str
    last: Tested
    """Difference after the last round."""
    all: Tested
    """Mean difference over all rounds."""


class Content(TypedDict):
    """The content of ``reproduce.json``."""

    experiment: str
    scale: str
    seeds: list[int]
    evaluation_seeds: list[int]
    num_rounds: int
    text: list[str]
    tasks_from: str
    num_draws: int
    intervals: str
    variants: list[VariantFacts]
    tasks: list[TaskScores]
    speed_ups: list[SpeedUpFacts]
    differences: list[ScoreDifference]
    environment: Environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The numbers of a pre-training run by round."""

    seconds: tuple[float, ...]
    """Seconds of local steps and averaging, without start-up, validation and checkpoints."""
    losses: tuple[float, ...]
    """Loss of the final head, mean over the steps of the round."""
    held_out: tuple[float, ...]
    """Loss of the final head on held-out text after the round."""
    tokens: tuple[int, ...]

    def clock(self, num_rounds: int) -> list[float]:
        """Return the training time at each round's end; untrained rounds take the mean time."""
        mean = sum(self.seconds) / len(self.seconds)
        rest = [mean] * (num_rounds - len(self.seconds))
        return list(accumulate([*self.seconds, *rest]))


Curves = dict[str, list[Curve]]
"""By variant, a curve per seed."""


def read_curve(run: SystemCell) -> Curve:
    """Read the metrics of a finished run.

    Raises:
        CheckpointError: metrics.jsonl is damaged, or a round has a loss that is not finite.
    """
    summary = RunSummary.load(run.run_dir)
    rounds, scored = (summary.records.get(kind, []) for kind in ("round", "eval"))
    if not len(rounds) == len(scored) == run.config.federation.num_rounds:
        raise CheckpointError(
            f"{run.run_dir}: expected a record of {run.config.federation.num_rounds} "
            f"rounds, got {len(rounds)}. Remove the directory and run it again."
        )
    losses = [record["loss"][-1] for record in rounds]
    held_out = [record["stages"][-1]["loss"] for record in scored]
    for index, pair in enumerate(zip(losses, held_out, strict=True)):
        if not all(map(is_number, pair)):
            raise CheckpointError(
                f"{run.run_dir}: expected finite losses after every round, got others in round"
                f" {index + 1} of {len(rounds)}: the training diverged. Set a lower optimizer.lr,"
                " and compare in another directory."
            )
    return Curve(
        seconds=tuple(record["seconds"] for record in rounds),
        losses=tuple(losses),
        held_out=tuple(held_out),
        tokens=tuple(record["tokens"] for record in rounds),
    )


def loss_difference(first: Curve, second: Curve) -> float:
    """Return the largest relative difference of the losses of two runs in common rounds."""
    pairs = [*zip(first.losses, second.losses, strict=False)]
    pairs += zip(first.held_out, second.held_out, strict=False)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def read_curves(plan: Reproduction) -> Curves:
    """Read the metrics of all runs, which must be done."""
    return {v.name: [read_curve(run) for run in plan.of(v)] for v in plan.variants}


def agreement(plan: Reproduction, curves: Curves) -> dict[str, float]:
    """Return, for every variant with a twin, the relative difference of their losses."""
    return {
        v.name: max(map(loss_difference, curves[v.name], curves[v.twin]))
        for v in plan.variants
        if v.twin
    }


def scored_as(plan: Reproduction, curves: Curves) -> dict[str, str]:
    """Return, for every variant, the variant whose models are scored for it."""
    far = agreement(plan, curves)
    return {v.name: v.twin if far.get(v.name, 1.0) <= AGREEMENT else v.name for v in plan.variants}


def wanted_models(plan: Reproduction, curves: Curves) -> list[tuple[SystemCell, int]]:
    """Return all models to score: run and number of rounds, 0 for the untrained model."""
    scored = set(scored_as(plan, curves).values())
    runs = [run for run in plan.cells if run.variant.name in scored]
    found = plan.untrained()
    for run in runs:
        found += [(run, r + 1) for r in range(run.config.federation.num_rounds)]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scores:
    """The finished cells of a task, by variant and round."""

    evaluation: Evaluation
    plan: Reproduction
    cells: dict[str, list[ScoredCell]]
    """Cells by folder of the model."""
    key: str
    """Key of the metric."""

    def _cells(self, variant: Variant, round_id: int) -> list[ScoredCell]:
        runs = self.plan.of(variant)
        return [c for run in runs for c in self.cells[run.model_name(round_id)]]

    def sample(self, variant: Variant, round_id: int) -> Sample:
        """Resample the scores after a round, by seed of pre-training; undefined scores are 0."""
        cells = self._cells(variant, round_id)
        scores = [finished(cell)["scores"][self.key] for cell in cells]
        found = sample(
            METRICS[self.key],
            [score if is_number(score) else 0.0 for score in scores],
            [read_statistics(cell.run_dir, self.key) for cell in cells],
            num_draws=self.plan.config.evaluation.num_draws,
        )
        whole = Sample(scores=found.scores, drawn=np.nan_to_num(found.drawn))
        return whole.per_unit(len(self.plan.of(variant)))


def finished(cell: ScoredCell) -> CellResult:
    """Return the result of a finished cell."""
    result = cell.result()
    assert result is not None, cell.name
    return result


def summarise(plan: Reproduction, evaluation: Evaluation, curves: Curves) -> Content:
    """Compute all numbers of the page.

    Args:
        plan: Reproduction whose runs are all done.
        evaluation: Evaluation of ``wanted_models`` whose cells are all done.
        curves: Curves from ``read_curves``.

    Returns:
        Content of reproduce.json.
    """
    num_rounds = plan.config.federation.num_rounds
    source, far = scored_as(plan, curves), agreement(plan, curves)
    by_name = {v.name: v for v in plan.variants}
    variants = [
        _variant(v, plan, curves[v.name], scored=source[v.name], far=far.get(v.name))
        for v in plan.variants
    ]
    tasks: list[TaskScores] = []
    differences: list[ScoreDifference] = []
    reference = next(v.name for v in plan.variants if v.kind == "fedbert")
    for place in evaluation.files:
        metric = place.task.metrics[0]
        cells: dict[str, list[ScoredCell]] = {}
        for cell in evaluation.cells:
            if cell.task == place.task:
                cells.setdefault(cell.model.path.rpartition("/")[2], []).append(cell)
        scores = _Scores(evaluation=evaluation, plan=plan, cells=cells, key=metric)
        untrained = scores.sample(plan.variants[0], 0)
        by_round = {
            name: [scores.sample(by_name[name], r + 1) for r in range(_rounds(by_name[name]))]
            for name in dict.fromkeys(source.values())
        }
        any_cell = next(iter(cells.values()))[0]
        result = finished(any_cell)
        tasks.append(
            {
                "name": place.task.name,
                "metric": metric,
                "title": METRICS[metric].title,
                "untrained": float(untrained.scores.mean()),
                "scores": {
                    name: [float(each.scores.mean()) for each in rounds]
                    for name, rounds in by_round.items()
                },
                "learnt": {
                    name: _is_learnt(rounds, untrained) for name, rounds in by_round.items()
                },
                "num_train": result["num_train"],
                "num_test": result["num_test"]["test"],
                "settings": any_cell.settings,
            }
        )
        differences += [
            _difference(v.name, place.task.name, by_round[v.name], by_round[reference])
            for v in plan.variants
            if v.kind == "fedpipe" and source[v.name] == v.name
        ]
    found = [tested for each in differences for tested in (each["last"], each["all"])]
    for each, stands_out in zip(found, holm([e["p_value"] for e in found]), strict=True):
        each["stands_out"] = stands_out
    return {
        "experiment": plan.experiment,
        "scale": plan.config.reproduce.scale,
        "seeds": list(plan.config.reproduce.seeds),
        "evaluation_seeds": list(plan.config.evaluation.seeds),
        "num_rounds": num_rounds,
        "text": list(plan.config.data.train),
        "tasks_from": plan.config.evaluation.data,
        "num_draws": plan.config.evaluation.num_draws,
        "intervals": METHOD,
        "variants": variants,
        "tasks": tasks,
        "speed_ups": _speed_ups(variants, tasks),
        "differences": differences,
        "environment": describe_environment(),
    }


def _is_learnt(rounds: Sequence[Sample], untrained: Sample) -> bool:
    """Whether the mean score of all rounds is above that of the untrained model.

    The best round alone would be chosen on the same test examples that judge it.
    """
    found = estimate(mean_of(rounds) - untrained).interval
    return found is not None and found[0] > 0


def _rounds(variant: Variant) -> int:
    return variant.config.federation.num_rounds


def _variant(
    variant: Variant,
    plan: Reproduction,
    curves: Sequence[Curve],
    *,
    scored: str,
    far: float | None,
) -> VariantFacts:
    clocks = [curve.clock(plan.config.federation.num_rounds) for curve in curves]
    seconds = [second for curve in curves for second in curve.seconds]
    return {
        "name": variant.name,
        "title": variant.title,
        "kind": variant.kind,
        "num_stages": variant.config.pipeline.num_stages,
        "measured_rounds": _rounds(variant),
        "scored_as": scored,
        "loss_difference": far,
        "clock": np.mean(clocks, axis=0).tolist(),
        "seconds_per_round": float(np.mean(seconds)),
        "seconds_range": [min(seconds), max(seconds)],
        "tokens_per_round": int(np.mean([t for curve in curves for t in curve.tokens])),
        "losses": np.mean([curve.losses for curve in curves], axis=0).tolist(),
        "held_out": np.mean([curve.held_out for curve in curves], axis=0).tolist(),
        "steps": _steps(plan.of(variant)[0], clocks[0]),
    }


def _steps(run: SystemCell, clock: Sequence[float], points: int = 200) -> list[list[float]]:
    """Return times and training losses of the final head in the run of the first seed."""
    summary = RunSummary.load(run.run_dir)
    tokens, losses = summary.training_loss(summary.num_stages - 1)
    after = summary.tokens_after_round()
    known = [0.0, *clock[: len(after) - 1]]
    seconds = np.interp(tokens, [after[r - 1] for r in range(len(after))], known)
    size = max(1, len(losses) // points)  # a point is the mean of so many steps
    whole = range(0, len(losses) - size + 1, size)
    return [
        [float(seconds[i : i + size].mean()), float(np.mean(losses[i : i + size]))] for i in whole
    ]


def _speed_ups(variants: Sequence[VariantFacts], tasks: Sequence[TaskScores]) -> list[SpeedUpFacts]:
    """Compare every run of fedpipe with every baseline, on all tasks and on held-out loss."""
    found: list[SpeedUpFacts] = []
    for own in (v for v in variants if v["kind"] == "fedpipe"):
        for baseline in (v for v in variants if v["kind"] != "fedpipe"):
            races = [
                race(
                    task["name"],
                    learnt=task["learnt"][baseline["scored_as"]],
                    baseline=_timed(baseline, task["scores"][baseline["scored_as"]]),
                    own=_timed(own, task["scores"][own["scored_as"]]),
                )
                for task in tasks
            ]
            gain = speed_up(races)
            found.append(
                {
                    "variant": own["name"],
                    "baseline": baseline["name"],
                    "per_round": baseline["seconds_per_round"] / own["seconds_per_round"],
                    "races": [_race_facts(each) for each in races],
                    "held_out": _loss_race(own, baseline, variants),
                    "mean": gain.mean,
                    "peak": gain.peak,
                    "reached": gain.reached,
                    "never": gain.never,
                    "unlearnt": gain.unlearnt,
                }
            )
    return found


def _race_facts(race: Race) -> RaceFacts:
    return {
        "task": race.task,
        "target": race.target,
        "baseline_s": race.baseline_s,
        "own_s": race.own_s,
        "learnt": race.learnt,
        "ratio": race.ratio,
    }


def _timed(variant: VariantFacts, scores: Sequence[float]) -> tuple[list[float], Sequence[float]]:
    return variant["clock"][: len(scores)], scores


def _loss_race(
    own: VariantFacts, baseline: VariantFacts, variants: Sequence[VariantFacts]
) -> LossRace:
    by_name = {v["name"]: v for v in variants}
    timed = [
        _timed(v, [-loss for loss in by_name[v["scored_as"]]["held_out"]]) for v in (baseline, own)
    ]
    lost = race(HELD_OUT, learnt=True, baseline=timed[0], own=timed[1])
    return {
        "loss": -lost.target,
        "baseline_s": lost.baseline_s,
        "own_s": lost.own_s,
        "ratio": lost.ratio,
    }


def _difference(
    variant: str, task: str, own: Sequence[Sample], theirs: Sequence[Sample]
) -> ScoreDifference:
    """Subtract FedBERT's scores from fedpipe's at equal tokens: last round, and mean of rounds."""
    by_round = [first - second for first, second in zip(own, theirs, strict=True)]
    return {
        "variant": variant,
        "task": task,
        "last": {**estimate(by_round[-1]).to_dict(), "stands_out": False},
        "all": {**estimate(mean_of(by_round)).to_dict(), "stands_out": False},
    }
