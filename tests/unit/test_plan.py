"""The plan: golden text, and its numbers against the real stages, links and averaging."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpipe.commands.plan.plan import Plan, build_plan, render
from fedpipe.config.load import load_config
from fedpipe.config.schema import RunConfig
from fedpipe.errors import ConfigError
from fedpipe.families import FAMILIES

REPOSITORY = Path(__file__).parents[2]
LARGE = "launch/configs/large_8x16x4.yaml"


SIZES = (
    "model.hidden_size=256", "model.intermediate_size=1024", "data.sequence_length=128",
    "data.mask_probability=0.15", "pipeline.micro_batch_size=8", "pipeline.num_micro_batches=2",
)  # fmt: skip


def plan_of(*overrides: str) -> Plan:
    return build_plan(load_config(None, [*SIZES, *overrides]))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(REPOSITORY)
    return load_config(LARGE, [])


def test_quick_start_plan_is_the_recorded_one(golden: Callable[[str, str], None]) -> None:
    golden("plan_quickstart.txt", render(build_plan(load_config(None, []))) + "\n")


def test_bert_large_on_512_processes_is_the_recorded_one(
    golden: Callable[[str, str], None], large: RunConfig
) -> None:
    started = time.perf_counter()
    text = render(build_plan(large))
    assert time.perf_counter() - started < 2.0
    golden("plan_large_8x16x4.txt", text + "\n")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["pipeline.local_head=mlm+layer", "pipeline.cut=[0,1,2]"],
        ["pipeline.objective=end_to_end", "pipeline.schedule=1f1b", "model.family=bert"],
        ["pipeline.cut=[]"],
        *(
            [f"model.family={family}", "pipeline.local_head=mlm+layer", "pipeline.cut=[0,1,3]"]
            for family in FAMILIES
        ),
    ],
    ids=str,
)
def test_parameters_are_those_of_the_real_stages(overrides: list[str]) -> None:
    import torch

    from fedpipe.models.split import part_of
    from fedpipe.models.stage import Stage, trainable
    from fedpipe.models.weights import hf_config

    plan = plan_of("federation.average.aux_head=false", *overrides)
    config = hf_config(plan.shape, pad_id=1, cls_id=0, sep_id=2)
    for planned in plan.stages:
        with torch.device("meta"):
            stage = Stage(planned.spec, config)
        sizes = {name: p.numel() for name, p in trainable(stage).items()}
        assert planned.num_parameters == sum(sizes.values())
        averaged = [
            n
            for name, n in sizes.items()
            if part_of(name, stage.spec) != "aux_head" and name not in stage.copied
        ]
        assert planned.averaged_parameters == sum(averaged)


def test_bytes_of_a_step_are_activations_and_targets() -> None:
    plan = plan_of()
    sequences, tokens, hidden, masked = 16, 128, 256, 19
    (edge,) = plan.edges
    assert plan.config.data.num_masked == masked
    step = plan.messages_per_step * edge.bytes_forward
    assert step == sequences * (tokens * hidden * 4 + masked * 2 * 4)
    assert edge.bytes_backward == 0


def test_back_propagation_over_the_cut_sends_a_gradient_per_activation() -> None:
    (edge,) = plan_of("pipeline.objective=end_to_end", "pipeline.schedule=1f1b").edges
    assert edge.bytes_backward == edge.forward[0].nbytes == 8 * 128 * 256 * 4


def test_bf16_halves_the_activations_on_the_wire() -> None:
    (edge,) = plan_of(f"deepspeed.config={REPOSITORY / 'ds_configs' / 'bf16.json'}").edges
    (full,) = plan_of().edges
    assert edge.forward[0].dtype == "bfloat16"
    assert 2 * edge.forward[0].nbytes == full.forward[0].nbytes
    assert edge.forward[1] == full.forward[1]


def test_int8_on_the_wire_is_a_byte_per_element_and_a_scale_per_row() -> None:
    (edge,) = plan_of("pipeline.wire=[int8]").edges
    assert edge.forward[0].nbytes == 8 * 128 * (256 + 4)


def test_a_head_at_home_gets_masked_positions_and_no_labels_leave() -> None:
    cut, home = plan_of("pipeline.head_location=client").edges
    assert [t.name for t in cut.forward] == ["activations", "masked positions"]
    assert cut.forward[1].shape == (1, 8, 19) and not cut.backward
    assert [t.shape for t in (*home.forward, *home.backward)] == [(8, 19, 256)] * 2
    assert "and labels" not in render(plan_of("pipeline.head_location=client"))


@pytest.mark.parametrize("cut", ["[1]", "[2]", "[1,2,3]"])
def test_no_process_is_busier_than_always(cut: str) -> None:
    plan = plan_of("pipeline.head_location=client", f"pipeline.cut={cut}")
    assert all(0 <= ideal.bubble_pct < 100 for ideal in plan.ideal.values())


def test_fedavg_bytes_are_those_of_a_ring_all_reduce() -> None:
    for replicas in (1, 2, 5):
        for stage in plan_of(f"federation.num_replicas={replicas}").stages:
            payload = 4 * stage.averaged_parameters
            assert stage.fedavg_bytes == 2 * (replicas - 1) * payload // replicas


def test_the_plan_says_how_much_less_a_narrow_format_sends() -> None:
    sparse = plan_of("federation.wire=sparse", "federation.num_replicas=3")
    assert "sent per stage, rank and round, 107 times less than in float32" in render(sparse)
    assert "times less" not in render(plan_of())
    alone = render(plan_of("federation.wire=sparse", "federation.num_replicas=1"))
    assert "times less" not in alone and "largest changes" not in alone


def test_a_part_that_stays_is_not_sent_and_is_named() -> None:
    plan = plan_of("federation.average.embeddings=false")
    client = plan.stages[0]
    kept = client.num_parameters - client.averaged_parameters
    assert kept == plan.shape.embedding_parameters()
    assert "text, unmasked token ids, embeddings" in render(plan)


def test_one_stage_has_no_traffic_and_no_bubble() -> None:
    plan = plan_of("pipeline.cut=[]")
    assert plan.edges == ()
    assert "0 B forward, 0 B backward" in render(plan)
    assert all(ideal.bubble_pct == pytest.approx(0.0) for ideal in plan.ideal.values())
    assert "positions and labels" not in render(plan)


def test_stages_have_the_textbook_bubbles_of_their_shares() -> None:
    plan = plan_of("pipeline.num_micro_batches=8")
    # Of the last layer only keys and values are computed everywhere.
    slow, fast = (stage.cost_share_pct for stage in plan.stages)
    assert fast < 50.0 < slow
    assert plan.ideal["streaming"].bubble_pct == pytest.approx(100.0 - 50.0 * (slow + fast) / slow)
    # Over the cut only the last stage has a head, so 1F1B idles more than 1 / (M + 1).
    assert plan.ideal["1f1b"].bubble_pct > 100.0 / 9.0
    assert plan.ideal["sequential"].bubble_pct == pytest.approx(50.0)


def test_shares_follow_the_cut() -> None:
    shares = [stage.cost_share_pct for stage in plan_of("pipeline.cut=[1]").stages]
    assert shares[0] < 50.0 < shares[1]
    assert sum(shares) == pytest.approx(100.0)


def test_memory_grows_with_in_flight_micro_batches_and_shrinks_with_recomputation() -> None:
    end_to_end = ["pipeline.objective=end_to_end", "pipeline.num_micro_batches=8"]
    deep = plan_of(*end_to_end, "pipeline.schedule=1f1b").stages[0].activation_bytes
    shallow = plan_of(*end_to_end, "pipeline.schedule=sequential").stages[0].activation_bytes
    assert deep > shallow
    recomputed = plan_of("pipeline.activation_checkpointing=true").stages[0].activation_bytes
    assert recomputed < plan_of().stages[0].activation_bytes


def test_zero_shards_the_moments_over_the_clients_own_ranks(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    whole = plan_of("federation.data_parallel_degree=4").stages[0]
    sharded = plan_of("federation.data_parallel_degree=4", f"deepspeed.config={file}").stages[0]
    assert whole.state_bytes - sharded.state_bytes == whole.num_parameters * 2 * 4 * 3 // 4


def test_the_plan_says_what_muon_trains_with_half_the_moments() -> None:
    adamw, muon = plan_of(), plan_of("optimizer.name=muon")
    assert "Muon" not in render(adamw) and not any(s.muon_parameters for s in adamw.stages)
    shape, saved = muon.shape, []
    of_a_layer = 4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size
    for before, stage in zip(adamw.stages, muon.stages, strict=True):
        assert stage.muon_parameters == stage.spec.num_layers * of_a_layer
        saved.append(before.state_bytes - stage.state_bytes)
    assert saved == [4 * stage.muon_parameters for stage in muon.stages]
    assert "  muon     2 x 1.6 M parameters  " in render(muon)


def test_idle_replicas_threads_epochs_and_gradients_are_shown() -> None:
    text = render(plan_of("federation.num_replicas=3", "pipeline.colocate=true"))
    assert "3 processes = 3 replicas x 2 stages as threads x 1 data" in text
    assert "1 replica idle in turn 1 of 1" in text
    text = render(plan_of("federation.num_local_epochs=0.5", "federation.data_parallel_degree=2"))
    assert "0.5 local epochs" in text
    assert "gradients sent per stage, rank and step" in text


def test_a_model_smaller_than_its_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary and model disagree"):
        plan_of("model.vocab_size=100")


def test_the_plan_is_ascii_and_fits_a_wide_terminal(large: RunConfig) -> None:
    for text in (render(plan_of()), render(build_plan(large))):
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= 130
