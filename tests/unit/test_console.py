"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import os
import re
from typing import Any

import pytest

from fedpipe.report.console import RunConsole
from fedpipe.report.format import bytes_text, duration, number, tokens_per_s
from tests.helpers.records import make_records

CLOCK = r"\d\d:\d\d:\d\d"


def show(records: list[dict[str, Any]], **options: Any) -> str:
    stream = io.StringIO()
    settings = {"num_rounds": 6, "steps_per_round": 20, "num_stages": 2, "log_every": 10}
    console = RunConsole(**{**settings, "stream": stream, **options})
    for record in records:
        {"step": console.step, "round": console.round, "eval": console.evaluation}.get(
            record["kind"], lambda _: None
        )(record)
    console.close()
    return stream.getvalue()


def test_a_stream_that_is_no_terminal_gets_fixed_columns_in_ascii() -> None:
    lines = show(make_records()).splitlines()
    steps = [line for line in lines if " step " in line]
    pattern = (
        rf"{CLOCK} round \d/6 step \d\d/20  loss [ \d.]{{6}} [ \d.]{{6}}  "
        r"gnorm [ \d.]{5} [ \d.]{5}  tok/s [ \d,]{9}  clients \d \d"
    )
    assert all(re.fullmatch(pattern, line) for line in steps), steps
    assert len({len(line) for line in steps}) == 1
    assert "\x1b" not in "".join(lines)
    assert "".join(lines).isascii()


def test_there_is_one_line_per_log_every_steps_one_per_round_and_one_per_validation() -> None:
    lines = show(make_records(), log_every=5).splitlines()
    assert len([line for line in lines if " step " in line]) == 6 * 4
    assert len([line for line in lines if " trained 2 clients, 163,840 tokens " in line]) == 6
    assert len([line for line in lines if " validation " in line]) == 6


def test_a_step_line_has_the_mean_over_replicas_of_every_stage() -> None:
    records = [
        {"kind": "step", "round": 2, "step": 0, "client": client, "replica": replica,
         "stage": stage, "loss": loss, "grad_norm": 1.0, "tokens": 100, "seconds": 0.5}
        for replica, client, losses in ((0, 7, (4.0, 2.0)), (1, 3, (5.0, 3.0)))
        for stage, loss in enumerate(losses)
    ]  # fmt: skip
    text = show([*records, {**records[3], "step": 1}], log_every=2)
    assert re.fullmatch(
        rf"{CLOCK} round 3/6 step  2/20  loss  4.500  2.500  gnorm  1.00  1.00  "
        r"tok/s       400  clients 7 3\n",
        text,
    )


def test_clients_that_a_replica_hosts_in_turn_add_up_to_the_steps_of_a_round() -> None:
    turns = [
        {"kind": "step", "round": 0, "step": step, "client": client, "replica": 0, "stage": 1}
        for client in (4, 2)
        for step in range(10)
    ]
    lines = show(turns).splitlines()
    assert [re.search(r"step ([ \d]+/\d+)", line).group(1) for line in lines] == ["10/20", "20/20"]


def test_a_loss_that_is_null_is_a_dash_of_the_same_width() -> None:
    plain, headless = (
        [line for line in show(make_records(end_to_end=flag)).splitlines() if " step " in line]
        for flag in (False, True)
    )
    assert "loss      -  " in headless[0]
    assert len(headless[0]) == len(plain[0])
    validation = show(make_records(end_to_end=True)).splitlines()[3]
    assert re.search(r"validation  loss      -  \d\.\d{3}  ppl        -  1,\d{3}\.\d", validation)


@pytest.mark.parametrize("interactive", [False, True])
def test_records_without_any_value_are_shown_as_dashes(interactive: bool) -> None:
    empty = [{"kind": kind} for kind in ("step", "round", "eval")]
    nulls = [
        {"kind": "step", "round": None, "step": None, "client": None, "replica": None,
         "stage": 1, "loss": None, "tokens": None, "seconds": None},
        {"kind": "round", "round": 0, "clients": None, "loss": [None, None], "tokens": None},
        {"kind": "eval", "round": None, "stages": [{"stage": 1, "loss": float("nan")}]},
        {"kind": "eval", "round": 1, "stages": None},
    ]  # fmt: skip
    text = show(empty + nulls, interactive=interactive, log_every=1)
    assert "trained 0 clients, - tokens in - s (sync - s)" in text
    assert "validation  loss      -      -  ppl        -        -  worst - (client -)" in text


def test_preparing_prints_at_most_five_lines() -> None:
    stream = io.StringIO()
    console = RunConsole(num_rounds=1, steps_per_round=1, num_stages=1, stream=stream)
    for done in range(1001):
        console.preparing("tokenising documents", done, 1000)
    console.preparing("reading", 7, 0)
    lines = [line[9:] for line in stream.getvalue().splitlines()]
    quarters = ["0", "250", "500", "750", "1,000"]
    assert lines == [*(f"tokenising documents {q}/1,000" for q in quarters), "reading 7"]


def test_text_is_printed_as_it_is() -> None:
    for interactive in (False, True):
        stream = io.StringIO()
        console = RunConsole(
            num_rounds=1, steps_per_round=1, num_stages=1, stream=stream, interactive=interactive
        )
        console.text("  stage 0  [bold] embeddings :smile:\n  second")
        console.close()
        assert stream.getvalue() == "  stage 0  [bold] embeddings :smile:\n  second\n"


def test_a_terminal_shows_progress_losses_speed_and_hosted_clients() -> None:
    records = [r for r in make_records() if r["kind"] == "step" and r["round"] < 3]
    text = show(records, interactive=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = plain[plain.rindex("round 3/6") :]
    assert "step 20/20" in last
    assert " 50 %" in last
    assert re.search(r"elapsed 0:00:\d\d  left 0:00:\d\d", last)
    assert re.search(r"stage 0 \d\.\d{3} +stage 1 \d\.\d{3} +\d\d,\d{3} tok/s", last)
    assert re.search(r"clients replica 0 \d +replica 1 \d", last)


def test_a_pseudo_terminal_is_recognised() -> None:
    primary, secondary = os.openpty()
    with os.fdopen(primary, "rb", buffering=0) as seen, os.fdopen(secondary, "w") as terminal:
        console = RunConsole(num_rounds=1, steps_per_round=2, num_stages=1, stream=terminal)
        console.step({"round": 0, "step": 0, "replica": 0, "stage": 0, "loss": 1.5})
        console.close()
        os.set_blocking(primary, False)
        written = b"".join(iter(lambda: seen.read(4096), None))
    assert b"\x1b[" in written
    assert b"stage 0" in written


def test_numbers_for_people_have_units_and_dashes_for_nothing() -> None:
    assert [number(v, 2) for v in (1234.5, None, float("nan"), "x", True)] == (
        ["1,234.50", "-", "-", "-", "-"]
    )
    sizes = (0, 1023, 1024, 12.3 * 2**20, 480 * 2**20, 3 * 2**40, None)
    assert [bytes_text(v) for v in sizes] == (
        ["0 B", "1,023 B", "1.00 KiB", "12.3 MiB", "480 MiB", "3.00 TiB", "-"]
    )
    assert [duration(v) for v in (0.25, 59.9, 125, 7260, None)] == (
        ["0.2 s", "59.9 s", "2 min 5 s", "2 h 1 min", "-"]
    )
    assert [tokens_per_s(v) for v in (18240.4, 3.21, None)] == ["18,240", "3.2", "-"]
