"""What a throughput report says: on made-up measurements whose right answer is known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedpipe.commands.plan.cut import best_cut
from fedpipe.commands.plan.flops import layer_flops, masked_layer_flops
from fedpipe.commands.plan.ideal import predict, scheduled
from fedpipe.commands.study.study import Cell
from fedpipe.commands.throughput.advice import advise, take_apart
from fedpipe.commands.throughput.files import chrome_events
from fedpipe.commands.throughput.page import blocks, headline, terminal_text
from fedpipe.commands.throughput.points import (
    content,
    points_blocks,
    points_headline,
    points_table,
)
from fedpipe.commands.throughput.report import (
    Measurement,
    StageWindow,
    single_replica,
    summarise,
)
from fedpipe.commands.throughput.utilisation import Product, step_flops
from fedpipe.config.model_shape import model_shape
from fedpipe.config.schema import RunConfig
from fedpipe.models.split import stage_specs
from fedpipe.pipeline.timeline import StageCost
from fedpipe.report.document import to_html, to_markdown
from tests.helpers.tiny import VOCAB, tiny_config

LAYER_S, HEAD_S = 0.030, 0.020


def config_of(cut: list[int], *, layers: int = 8, **pipeline: Any) -> RunConfig:
    config = tiny_config(pipeline={"cut": cut, **pipeline}, model={"num_hidden_layers": layers})
    return single_replica(config)


def stage_costs(config: RunConfig, *, optimizer_s: float = 0.001) -> list[StageCost]:
    """Stages whose layers and heads all cost the same per FLOP, but for the last layer's rows."""
    flops = step_flops("streaming", config, vocab_size=VOCAB)
    shape = model_shape(config, vocab_size=VOCAB)
    rate = LAYER_S / (3 * layer_flops(config, shape, 0)) / config.pipeline.num_micro_batches
    return [
        StageCost(forward_s=f * rate / 3, backward_s=f * rate * 2 / 3, optimizer_s=optimizer_s)
        for f in flops
    ]


def window(cost: StageCost, stage: int, *, name: str, step_s: float, slow: float) -> StageWindow:
    """Four steps of 3 micro-batches; the second and third count."""
    events = []
    for step in range(4):
        now = 10.0 + step * step_s
        for micro_batch in range(3):
            kinds = [("forward", cost.forward_s), ("backward", cost.backward_s)]
            if name == "streaming":
                kinds[1] = ("local_backward", cost.backward_s)
            for kind, seconds in kinds:
                events.append((kind, micro_batch, step, now, now + slow * seconds))
                now += slow * seconds
        events.append(("optimizer_step", 0, step, now, now + slow * cost.optimizer_s))
        events.append(("recv_activation", 0, step, now, 10.0 + (step + 1) * step_s))
    ends = tuple(10.0 + step * step_s for step in range(1, 5))
    return StageWindow(
        stage=stage, ends=ends, events=tuple(events), forward_bytes=512, backward_bytes=0
    )


def measurement_of(
    config: RunConfig, *, emulated: bool = False, factors: tuple[float, ...] = (1.0, 1.0)
) -> Measurement:
    """Every schedule takes exactly what the simulator says; the machine is slow by ``factors``."""
    windows = {}
    for name in ("streaming", "1f1b", "sequential", "stock"):
        costs = stage_costs(config)
        step_s = predict(name, costs, config).step_s
        windows[name] = [
            [
                window(cost, stage, name=name, step_s=slow * step_s, slow=slow)
                for stage, cost in enumerate(costs)
            ]
            for slow in factors
        ]
    num_stages = config.pipeline.num_stages
    return Measurement(
        windows=windows,
        traces=windows,
        peak_memory_bytes={name: [1 << 20] * num_stages for name in windows},
        matmul_flops_per_s=[] if emulated else [[1e9 / slow for slow in factors]] * num_stages,
        vocab_size=VOCAB,
        device="cpu",
        threads_per_process=1,
    )


def report_of(config: RunConfig, **options: Any) -> dict[str, Any]:
    environment = {"host": "h", "repeat": "fedpipe throughput --config 'a b'"}
    if options.get("emulated"):
        environment["emulate_ms"] = 5.0  # type: ignore[assignment]
    return summarise(measurement_of(config, **options), config, environment=environment)


# --------------------------------------------------------------------------------------- the FLOPs


def test_mfu_is_the_models_flops_over_those_of_the_product_in_the_same_repetition() -> None:
    config = config_of([4])
    report = report_of(config, factors=(1.0, 3.0))  # slow product, slow training: the same share
    flops = sum(step_flops("streaming", config, vocab_size=VOCAB))
    step_s = predict("streaming", stage_costs(config), config).step_s
    streaming = report["schedules"]["streaming"]
    assert streaming["mfu_pct"] == pytest.approx(100 * flops / step_s / 2e9)
    assert streaming["flops_per_s"] == pytest.approx(flops / (2 * step_s))  # median of 1 and 3
    assert report["environment"]["matmul_flops_per_s"] == pytest.approx([2e9 / 3] * 2)
    assert report["environment"]["matmul"] == "32 x 32 by 32 x 64, float32"


def test_busy_mfu_and_busy_share_make_up_the_mfu() -> None:
    streaming = report_of(config_of([2]))["schedules"]["streaming"]
    whole = zip(streaming["busy_mfu_pct"], streaming["stage_busy_pct"], strict=True)
    assert sum(mfu * busy / 100 for mfu, busy in whole) / 2 == pytest.approx(streaming["mfu_pct"])


def test_recomputed_activations_are_not_achieved_work() -> None:
    plain = config_of([4])
    pipeline = replace(plain.pipeline, activation_checkpointing=True)
    recomputing = replace(plain, pipeline=pipeline)
    assert step_flops("1f1b", plain, vocab_size=VOCAB) == step_flops(
        "1f1b", recomputing, vocab_size=VOCAB
    )


def test_a_local_step_counts_heads_and_the_last_layers_masked_rows_only() -> None:
    config = config_of([4])
    shape = model_shape(config, vocab_size=VOCAB)
    layer = layer_flops(config, shape, 0)
    last = masked_layer_flops(config, shape, 7)
    masked = 2
    assert config.data.num_masked == masked
    head = 2 * masked * shape.head_flops_per_token()
    streaming = [3 * 3 * (4 * layer + head), 3 * 3 * (3 * layer + last + head)]
    assert step_flops("streaming", config, vocab_size=VOCAB) == streaming
    assert step_flops("stock", config, vocab_size=VOCAB) == [3 * 3 * 4 * layer, streaming[1]]


def test_emulated_devices_have_no_mfu() -> None:
    report = report_of(config_of([4]), emulated=True)
    for schedule in report["schedules"].values():
        assert {schedule[k] for k in ("mfu_pct", "flops_per_s", "busy_mfu_pct")} == {None}
    assert report["environment"]["matmul_flops_per_s"] is None
    text = to_markdown("t", blocks(report))
    assert "emulated devices, 5 ms per layer" in text
    assert "GFLOP/s" not in text


def test_the_product_is_of_the_type_that_training_computes_in(tmp_path: Any) -> None:
    file = tmp_path / "bf16.json"
    file.write_text('{"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}')
    config = tiny_config(deepspeed={"config": str(file)})
    assert Product.of(config, vocab_size=VOCAB).dtype == "bfloat16"


# -------------------------------------------------------------------------------------- the advice


@pytest.mark.parametrize("cut", [[1], [7], [2, 4], [1, 2, 3], [0, 4]])
@pytest.mark.parametrize("head_location", ["server", "client"])
def test_the_advised_cut_is_the_best_of_all_cuts(cut: list[int], head_location: str) -> None:
    config = config_of(cut, head_location=head_location, num_micro_batches=4, in_flight=2)
    # what a layer costs depends on the stage that it was measured in
    stages = [
        replace(cost, forward_s=cost.forward_s * (1 + 0.3 * index))
        for index, cost in enumerate(stage_costs(config))
    ]
    costs = take_apart(stages, config, vocab_size=VOCAB)

    def load(candidate: tuple[int, ...]) -> float:
        recut = costs.with_cut(candidate)
        first = 1 if cut[0] else 0
        if candidate[0] < first:
            return float("inf")
        return predict("streaming", recut, config).step_s

    best = min(load(c) for c in itertools.combinations(range(8), len(cut)))
    advised = best_cut(costs, config)
    # the simulator adds to the busiest process what a head at home makes others wait for
    assert load(advised) == pytest.approx(best, rel=1e-9 if head_location == "server" else 0.1)


def test_stages_that_are_taken_apart_and_put_together_are_the_measured_ones() -> None:
    config = config_of([3, 5], local_head="mlm+layer")
    stages = stage_costs(config)
    again = take_apart(stages, config, vocab_size=VOCAB).with_cut((3, 5))
    for before, after in zip(stages, again, strict=True):
        assert after.forward_s == pytest.approx(before.forward_s)
        assert after.backward_s == pytest.approx(before.backward_s)


def test_a_layer_costs_the_same_in_every_stage_of_even_speed_and_the_last_one_less() -> None:
    config = config_of([3])
    costs = take_apart(stage_costs(config), config, vocab_size=VOCAB)
    assert costs.layers_s[:-1] == pytest.approx([LAYER_S] * 7)
    assert costs.layers_s[-1] < LAYER_S


def test_an_unbalanced_pipeline_is_told_where_to_cut_and_what_to_expect() -> None:
    advice = report_of(config_of([1]))["advice"]
    assert "Stage 1 is the bottleneck of streaming" in advice[0]
    assert advice[1].startswith("Prediction, not measured: `pipeline.cut=[4]` instead of `[1]` (3")
    assert "3 layers from stage 1 to 0" in advice[1]
    now, then = (
        predict("streaming", stage_costs(config_of(cut)), config_of(cut)).step_s
        for cut in ([1], [4])
    )
    assert f"{now / then:.2f} x as fast" in advice[1]


def test_a_balanced_pipeline_is_left_alone() -> None:
    advice = report_of(config_of([4]))["advice"]
    assert any("No other cut into 2 stages" in sentence for sentence in advice)
    assert not any("Prediction, not measured" in sentence for sentence in advice)


def test_waiting_the_optimizer_and_more_micro_batches_are_named_where_they_matter() -> None:
    config = config_of([4], num_micro_batches=3)
    report = report_of(config)
    report["schedules"]["sequential"]["bubble_pct"] = 61.0
    report["schedules"]["streaming"]["stage_time_pct"][1]["optimizer_step"] = 12.0
    for cost in report["ideal"]["streaming"]["costs"]:
        cost["optimizer_s"] = 0.03
    advice = " ".join(advise(report["schedules"], report["ideal"], config, vocab_size=VOCAB))
    assert "wait for more than half of the time in sequential (61 %)" in advice
    assert "The optimizer takes up to 12 %" in advice
    more = [predict("1f1b", stage_costs(config), config, more_micro_batches=k) for k in (1, 2)]
    gain = 2 * more[0].step_s / more[1].step_s
    doubled = "with 6 micro-batches per local step, a batch twice as large"
    assert f"{doubled}, 1f1b makes {gain:.2f} x the tokens/s" in advice


def test_a_schedule_at_its_ideal_has_no_gap_to_explain_and_another_has() -> None:
    config = config_of([4])
    report = report_of(config)
    assert not any("misses its ideal" in sentence for sentence in report["advice"])
    report["ideal"]["streaming"]["reached_pct"] = 80.0
    report["schedules"]["streaming"]["stage_time_pct"][1]["other"] = 15.0
    advice = advise(report["schedules"], report["ideal"], config, vocab_size=VOCAB)
    assert "stage 1 spends 15 % of its time on text and between instructions" in advice[-1]
    report["schedules"]["streaming"]["stage_time_pct"][1]["other"] = 1.0
    report["schedules"]["streaming"]["step_s"] |= {"p10": 0.2, "p90": 0.5}
    advice = advise(report["schedules"], report["ideal"], config, vocab_size=VOCAB)
    assert "A step took 2.50 x as long at p90 as at p10" in advice[-1]


def test_stages_that_are_threads_get_no_advice_on_the_cut() -> None:
    config = config_of([1], colocate=True)
    report = report_of(config_of([1]))
    advice = advise(report["schedules"], report["ideal"], config, vocab_size=VOCAB)
    assert "The stages share one process" in advice[0]
    assert not any("pipeline.cut=" in sentence for sentence in advice)


# ---------------------------------------------------------------------------------------- the page


def test_the_page_answers_first_what_is_fastest_by_how_much_and_how_near_to_its_ideal() -> None:
    report = report_of(config_of([4]))
    text = headline(report)
    speed = report["schedules"]["streaming"]["tokens_per_s"]
    assert text.startswith(f"Streaming (local losses) is the fastest here: {speed:,.0f} tokens/s")
    assert "It reaches 100.0 % of what the simulator gives" in text
    page = to_html("t", blocks(report))
    assert page.index(text[:40]) < page.index("<h2>")
    assert "fedpipe throughput --config &#x27;a b&#x27;" in page
    for title in ("Where the time goes", "Peak memory by process", "What would help", "FLOP/s"):
        assert f"<h2>{title}</h2>" in page
    assert report["advice"][0] in terminal_text(report)


def test_a_schedule_that_beats_streaming_is_said_to() -> None:
    report = report_of(config_of([4]))
    report["schedules"]["stock"]["tokens_per_s"] *= 100
    report["ratios"]["streaming_vs_stock"] = {"p10": 0.2, "median": 0.25, "p90": 0.5}
    text = headline(report)
    assert text.startswith("1F1B (DeepSpeed PipelineEngine) is the fastest here")
    assert "4.00 x streaming (local losses) (p10 to p90: 2.00 to 5.00)" in text


def test_a_difference_within_the_spread_is_said_to_be() -> None:
    report = report_of(config_of([4]))
    for ratio in report["ratios"].values():
        ratio["p10"] = 0.9
    assert "which is within the spread" in headline(report)


def test_the_shares_of_every_process_are_in_the_table_and_make_up_its_time() -> None:
    text = to_markdown("t", blocks(report_of(config_of([4]))))
    section = text[text.index("## Where the time goes") :].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()[2:]]
    assert len(rows) == 4 * 2
    for row in rows:
        assert sum(map(float, row[-8:])) == pytest.approx(100, abs=0.5)


def test_a_trace_names_its_process_and_threads() -> None:
    config = config_of([4], head_location="client", num_client_stages=1)
    specs = stage_specs(scheduled(config, "streaming").pipeline, num_hidden_layers=8)
    cost = StageCost(forward_s=0.01, backward_s=0.01)
    stages = [window(cost, spec.stage_id, name="streaming", step_s=1.0, slow=1.0) for spec in specs]
    events = chrome_events(stages, name="streaming", config=config)
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == [
        "streaming (local losses)", "stage 0 (client)", "stage 1 (server)",
        "head of stage 1 (client)",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- the points


def test_the_points_are_one_table_the_fastest_first_within_each_schedule() -> None:
    points = [
        (
            Cell(
                name=f"cut={cut}",
                overrides=(f"pipeline.cut=[{cut}]",),
                config=config,
                run_dir=Path(f"cut={cut}"),
            ),
            report_of(config),
        )
        for cut in (1, 4, 6)
        for config in [config_of([cut])]
    ]
    table = points_table(points)
    streaming = table.rows[:3]
    assert streaming[0][1] == "[4]"
    speeds = [float(row[2].replace(",", "")) for row in streaming]
    assert speeds == sorted(speeds, reverse=True)
    first = [row[0] for row in table.rows[::3]]
    assert first == ["streaming", "1F1B", "sequential", "DeepSpeed's 1F1B"]
    fastest, slowest = points_headline(points).split(" The slowest, ")
    assert "at `pipeline.cut=[4]`" in fastest
    found = [s["tokens_per_s"] for _, report in points for s in report["schedules"].values()]
    assert slowest.startswith("sequential (fedpipe) at `pipeline.cut=[1]`, takes ")
    assert slowest.endswith(f" {max(found) / min(found):.2f} x as long.")
    page = to_markdown("t", points_blocks(points[:2], {"repeat": "again"}, num_points=3))
    assert "1 of 3 points are not measured" in page
    assert points[1][1]["advice"][0] in page
    found = content(points, {"host": "h"})
    assert [point["overrides"] for point in found["points"]] == [
        ["pipeline.cut=[1]"], ["pipeline.cut=[4]"], ["pipeline.cut=[6]"]
    ]  # fmt: skip
    assert found["points"][0]["report"]["ratios"]
