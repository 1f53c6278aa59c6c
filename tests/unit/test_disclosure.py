"""What leaves a client, by arithmetic: which tensors, in which mode, and what the page says."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from fedpipe.commands.plan.disclosure import Transfer, markdown, per_step
from fedpipe.commands.plan.plan import Plan, build_plan
from fedpipe.config.load import load_config, preset_names

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/explanation/what-leaves-a-client.md"
AT_HOME = "pipeline.head_location=client"
END_TO_END = ("pipeline.objective=end_to_end", "pipeline.schedule=1f1b")


def plan_of(*overrides: str, preset: str | None = None) -> Plan:
    return build_plan(load_config(None, overrides, preset=preset))


def crossing(plan: Plan, direction: str, when: str = "micro-batch") -> list[str]:
    return [t.what for t in plan.transfers if (t.direction, t.when) == (direction, when)]


def weights(plan: Plan) -> list[Transfer]:
    return [t for t in plan.transfers if t.entry == "fedavg" and t.direction == "leaves"]


def test_with_the_head_on_the_server_labels_leave_and_nothing_comes_back() -> None:
    plan = plan_of()
    assert crossing(plan, "leaves") == ["activations", "masked positions and labels"]
    assert crossing(plan, "enters") == []
    assert plan.stays == ["text", "unmasked token ids", "weight gradients", "optimizer moments"]


def test_with_the_head_at_home_no_label_leaves_and_only_masked_positions_return() -> None:
    plan = plan_of(AT_HOME)
    home = "masked positions' activations", "masked positions' gradients"
    assert crossing(plan, "leaves") == ["activations", "masked positions", home[1]]
    assert crossing(plan, "enters") == [home[0]]
    assert plan.stays == ["text", "token ids", "labels", "weight gradients", "optimizer moments"]
    assert not any("labels" in t.what for t in plan.transfers)


@pytest.mark.parametrize("head", ["server", "client"])
def test_back_propagation_over_the_cut_brings_gradients_of_every_position_in(head: str) -> None:
    plan = plan_of(*END_TO_END, f"pipeline.head_location={head}")
    assert "gradients" in crossing(plan, "enters")
    assert "gradients" not in crossing(plan_of(f"pipeline.head_location={head}"), "enters")


def test_messages_between_a_clients_own_stages_do_not_leave_it() -> None:
    plan = plan_of("pipeline.cut=[1,2]", "pipeline.num_client_stages=2", AT_HOME)
    assert {t.entry for t in plan.transfers} == {
        "forward/1",
        "forward/2",
        "backward/2",
        "fedavg",
        "",
    }
    assert {t.peer for t in plan.transfers if t.entry.startswith("forward")} == {"server stage 2"}


def test_a_model_that_is_the_clients_alone_sends_weights_and_records_only() -> None:
    plan = plan_of("pipeline.num_client_stages=2")
    assert {t.when for t in plan.transfers} == {"local step", "round", "start", "validation"}
    assert "labels" in plan.stays


def test_held_out_text_crosses_as_training_text_does_but_brings_no_gradient() -> None:
    plan = plan_of(AT_HOME)
    for direction in ("leaves", "enters"):
        held_out = crossing(plan, direction, "validation batch")
        training = [what for what in crossing(plan, direction) if "gradients" not in what]
        assert held_out == [f"{what} of held-out text" for what in training]
    assert crossing(plan_of("data.valid=[]"), "leaves", "validation batch") == []


def test_parts_that_are_not_averaged_do_not_leave() -> None:
    off = [f"federation.average.{p}=false" for p in ("embeddings", "final_head")]
    (only,) = weights(plan_of(AT_HOME, *off))
    assert only.what == "weights: client_layers, aux_head"
    everything = plan_of(AT_HOME, "federation.average={embeddings: false, client_layers: false, "
                         "aux_head: false, final_head: false}")  # fmt: skip
    assert weights(everything) == []
    assert {"embeddings", "client_layers", "aux_head", "final_head"} <= set(everything.stays)


def test_server_weights_are_not_the_clients() -> None:
    assert not any("server_layers" in t.what for t in plan_of().transfers)
    assert not any("final_head" in t.what for t in plan_of().transfers)
    assert any("final_head" in t.what for t in plan_of(AT_HOME).transfers)


@pytest.mark.parametrize(("wire", "share"), [("bf16", 0.5), ("int8", 0.25)])
def test_a_narrow_wire_shrinks_activations_gradients_and_weights(wire: str, share: float) -> None:
    base = (AT_HOME, "model.size=base")  # whole blocks travel: what is small is rounded up
    wide, narrow = plan_of(*base), plan_of(
        *base, f"pipeline.wire=[{wire}]", f"federation.wire={wire}"
    )  # fmt: skip
    for before, after in zip(wide.transfers, narrow.transfers, strict=True):
        if before.when == "start" or before.nbytes == 8:  # a verdict is one number
            continue
        if before.nbytes and "positions" != before.what.split()[-1] and "int32" not in before.form:
            assert after.nbytes == pytest.approx(share * before.nbytes, rel=0.035), before.what


def test_one_replica_hands_weights_on_without_a_message() -> None:
    sequential, alone = plan_of(preset="fedbert"), plan_of("federation.num_replicas=1")
    assert {(t.nbytes, t.peer) for t in weights(sequential)} == {
        (0, "the next client, in the same process")
    }
    assert {t.nbytes for t in weights(alone)} == {0}


def test_a_clients_own_ranks_multiply_its_messages() -> None:
    two = plan_of("federation.data_parallel_degree=2")
    one = plan_of()
    pairs = zip(one.transfers, two.transfers, strict=True)
    assert all(2 * per_step(a, one.config) == per_step(b, two.config) for a, b in pairs)
    assert two.stays == one.stays


def test_the_u_shape_in_int8_moves_less_than_an_eighth_of_fedbioberts_bytes() -> None:
    plan = plan_of("pipeline.wire=[int8]", preset="fedbiobert-4-8")
    moved = sum(per_step(t, plan.config) for t in plan.transfers)
    published = 3 * 16 * 512 * 768 * 4  # forwards, back, and the gradient: fp32, every position
    assert published == 75_497_472
    assert moved < published / 8


@pytest.mark.parametrize("name", preset_names())
def test_a_published_system_keeps_its_labels(name: str) -> None:
    assert "labels" in plan_of(preset=name).stays


# ------------------------------------------------------------------------------------- the page

_TABLE = re.compile(r"(<!-- fedpipe plan([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _table(arguments: str) -> str:
    words = shlex.split(arguments)
    preset = words[words.index("--preset") + 1] if "--preset" in words else None
    plan = plan_of(*(word for word in words if "=" in word), preset=preset)
    return markdown(plan.transfers, plan.stays, config=plan.config)


def test_the_tables_of_the_page_are_the_plans_own() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = _TABLE.sub(lambda m: f"{m[1]}{_table(m[2])}\n{m[4]}", text)
    if os.environ.get("FEDPIPE_RECORD") == "1":
        PAGE.write_text(made, encoding="utf-8")
        text = made
    assert len(_TABLE.findall(text)) == text.count("| | what |") == text.count("<!-- end -->") >= 7
    assert text == made, (
        f"{PAGE.name} is old. If this is wanted: FEDPIPE_RECORD=1 pytest {__file__}"
    )
