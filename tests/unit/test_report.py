"""The report of a run: its claims, its figures, and what it survives."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fedpipe.commands.pretrain.report import write_report
from fedpipe.errors import CheckpointError
from fedpipe.report.document import Paragraph, Table
from fedpipe.report.drawing import spread
from fedpipe.report.plots import draw_loss
from fedpipe.report.sections import ledger, refused_section
from fedpipe.report.summary import RunSummary, smooth
from fedpipe.report.timeline_plot import middle_window, write_timeline_plot
from tests.helpers.records import make_events, make_records, make_run_dir

FIGURES = ("loss.png", "clients.png", "traffic.png", "timeline.png")
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reported local-loss run."""
    path = make_run_dir(tmp_path_factory.mktemp("runs") / "quick start")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    """Its HTML."""
    return (run_dir / "report.html").read_text(encoding="utf-8")


class _Nesting(HTMLParser):
    """Collects tags that are closed in the wrong order, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    parser = _Nesting()
    parser.feed(page)
    assert not parser.tags & {"script", "link", "iframe", "img"}
    references = [v for name, v in parser.attributes if name in ("src", "href", "xlink:href")]
    assert all(reference.startswith("#") for reference in references)


def test_the_page_is_well_nested_and_its_ids_are_unique(page: str) -> None:
    parser = _Nesting()
    parser.feed(page)
    assert (parser.wrong, parser.open) == ([], [])
    ids = [v for name, v in parser.attributes if name == "id" and re.match(r"[mp][0-9a-f]{8}", v)]
    assert len(ids) == len(set(ids))


def test_a_masked_word_that_looks_like_a_tag_is_text(run_dir: Path, page: str) -> None:
    assert "<td>&lt;b&gt;</td>" in page
    assert "&lt;i&gt;gene&lt;/i&gt;" in page
    assert "<b>" not in page
    assert "<b>" not in (run_dir / "report.md").read_text(encoding="utf-8")


def test_every_figure_is_in_the_page_and_beside_it(run_dir: Path, page: str) -> None:
    assert page.count("<svg ") == len(FIGURES)
    for name in FIGURES:
        data = (run_dir / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) > 10_000
        assert f"]({name})" in (run_dir / "report.md").read_text(encoding="utf-8")


def test_figures_take_the_colours_of_the_page(page: str) -> None:
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page
    style_end = page.index("</style>")
    assert "#1f2328" not in page[style_end:]


def test_the_headline_is_the_last_validation_of_every_stage(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    last = [r for r in make_records() if r["kind"] == "eval"][-1]
    for entry in last["stages"]:
        assert (
            f"validation loss, stage {entry['stage']}: **{entry['loss']:.3f}** "
            f"(perplexity {entry['perplexity']:,.1f}, "
            f"worst client {entry['worst_loss']:.3f} (client {entry['worst_client']}))"
        ) in text
    assert "tokens trained: **983,040** (in 6 rounds)" in text
    assert "tokens per second: **17,430**" in text
    assert "| 6 | " in text


def test_zero_backward_bytes_are_spelled_out(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "bytes backward: **0 B** (0 messages from a later stage to an earlier one)" in text
    assert "0 bytes travelled backward in 6 rounds" in text
    assert "| activations, stage 0 to 1 | out of the clients | 960 | 480 MiB | 512.0 |" in text
    assert "| gradients, stage 1 to 0 | into the clients | 0 | **0 B** | 0.0 |" in text


def test_gradients_that_travelled_are_not_called_zero(tmp_path: Path) -> None:
    write_report(make_run_dir(tmp_path, end_to_end=True))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "480 MiB of gradients travelled backward in 6 rounds (pipeline.objective is end" in text
    assert "bytes backward: **480 MiB** (960 messages" in text
    assert "local loss" not in text
    assert "validation loss, stage 0" not in text
    assert "validation loss, stage 1" in text


def test_words_plan_environment_and_command_are_in_the_report(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "| **patients** | patients 31 %, subjects 12 %, the 5 % | the 5 % |" in text
    assert "its first guess is right for 2 of 3" in text
    assert "loss of 6.610 nats" in text
    assert "stage 1  server   layers 2-3, lm_head" in text
    assert "| versions.torch | 2.13.0 |" in text
    assert f"--config '{run_dir}/config.yaml' --run-dir '{run_dir}-again'" in text
    assert "Chrome trace" in text


def test_a_run_with_nothing_but_metrics_has_a_report(tmp_path: Path) -> None:
    path = write_report(make_run_dir(tmp_path / "bare", complete=False))
    assert "fedpipe report: bare" in path.read_text(encoding="utf-8")
    assert (tmp_path / "bare" / "loss.png").is_file()
    assert not (tmp_path / "bare" / "timeline.png").exists()


def test_a_run_that_has_just_started_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind":"system","event":"start"}\n{"ki')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No local step has been recorded yet." in page


def test_a_run_without_a_validation_has_a_loss_figure_that_speaks_of_none(
    tmp_path: Path, page: str
) -> None:
    steps = [r for r in make_records(num_rounds=1) if r["kind"] == "step"][:3]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps))
    alone = write_report(tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "loss.png").is_file()
    assert "held-out text of all clients" in page
    assert "held-out text of all clients" not in alone
    draw, figure = draw_loss(RunSummary.load(tmp_path)), Figure()
    assert draw is not None
    draw(figure)
    (legend,) = [axes.get_legend() for axes in figure.axes]
    assert [text.get_text() for text in legend.get_texts()] == ["training, smoothed"]


def test_updates_that_were_left_out_are_listed_with_the_reason(tmp_path: Path) -> None:
    path = make_run_dir(tmp_path, complete=False)
    assert refused_section(RunSummary.load(path)) == []
    fault = {"client": 3, "stage": 1, "step": 4, "what": "grad_norm"}
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "round", "round": 6, "refused": [fault]}) + "\n")
    _, text, table = refused_section(RunSummary.load(path))
    assert isinstance(text, Paragraph) and text.text.startswith("1 update held numbers that are")
    why = "its gradient norm is not finite at local step 5, stage 1"
    assert isinstance(table, Table) and table.rows == (("7", "3", why),)


def test_losses_that_are_null_everywhere_leave_the_figure_out(tmp_path: Path) -> None:
    records = [
        {**r, "loss": None} if r["kind"] == "step" else r
        for r in make_records(num_rounds=1)
        if r["kind"] != "eval"
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_a_damaged_optional_file_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("fedpipe"), "propagate", True)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "timeline.json").write_text('{"traceEv')
    (tmp_path / "config.yaml").write_text("a: [1")
    write_report(tmp_path)
    warnings = sorted(record.getMessage() for record in caplog.records)
    assert len(warnings) == 2
    assert "config.yaml: left out of the report, it is not YAML" in warnings[0]
    assert "timeline.json: left out of the report, it is not JSON" in warnings[1]


def test_a_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected a metrics\.jsonl to report on, got .+\. Pass the"
    ):
        write_report(tmp_path)


def test_more_stages_and_clients_than_colours_are_drawn(tmp_path: Path) -> None:
    records = make_records(num_rounds=2, num_stages=9)
    for record in records:
        for entry in record.get("stages", []):
            entry["clients"] = {str(c): 5 + 0.01 * c for c in range(40)}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "client 39" in text
    assert "client 12<" not in text
    assert "activations, stage 7 to 8</td><td>inside the cluster" in text


def test_a_training_curve_has_one_point_per_step_and_ends_at_all_tokens(tmp_path: Path) -> None:
    run = RunSummary.load(make_run_dir(tmp_path, complete=False))
    tokens, losses = run.training_loss(1)
    assert len(tokens) == len(losses) == 6 * 20
    assert tokens[-1] == run.tokens == 983_040
    first = [r["loss"] for r in make_records() if r["kind"] == "step" and r["stage"] == 1][:2]
    assert losses[0] == pytest.approx(sum(first) / 2)


def test_smoothing_keeps_a_straight_line_and_both_ends() -> None:
    line = [float(value) for value in range(100)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([5.0]) == [5.0]
    assert max(smooth([0, 0, 0, 0, 10, 0, 0, 0, 0])) == pytest.approx(2.0)


def test_labels_are_moved_apart_no_further_than_needed() -> None:
    assert spread([1.0, 5.0], gap=1, low=0) == [1.0, 5.0]
    assert spread([4.0, 4.0, 4.0], gap=1, low=0) == [3.0, 4.0, 5.0]
    assert spread([0.0, 0.1, 9.0], gap=1, low=0) == [0.0, 1.0, 9.0]
    assert spread([], gap=1, low=0) == []


def test_the_timeline_shows_two_whole_steps_from_the_middle() -> None:
    events = make_events(num_steps=8)
    start, end = middle_window(events, num_steps=2)
    ends = [
        e["ts"] + e["dur"]
        for e in events
        if e["name"] == "optimizer_step" and (e["pid"], e["tid"]) == (0, 1)
    ]
    assert (start, end) in [(ends[2], ends[4]), (ends[3], ends[5])]


def test_the_timeline_avoids_the_pause_between_rounds() -> None:
    events = make_events(num_steps=8)
    steps = [e for e in events if e["name"] == "optimizer_step" and e["pid"] == 0]
    pause_after = sorted(e["ts"] for e in steps if e["tid"] == 1)[3]
    paused = [{**e, "ts": e["ts"] + (5e6 if e["ts"] > pause_after else 0)} for e in events]
    start, end = middle_window(paused, num_steps=2)
    assert end - start < 2e6


def test_the_timeline_shows_a_time_in_which_every_row_is_recorded() -> None:
    early = [e for e in make_events(num_steps=8) if (e["pid"], e["tid"]) != (0, 1)]
    length = max(e["ts"] + e["dur"] for e in early)
    late = [e for e in make_events(num_steps=8) if (e["pid"], e["tid"]) == (0, 1)]
    later = [{**e, "ts": e["ts"] + 0.5 * length} for e in late]
    start, end = middle_window(early + later, num_steps=2)
    assert end <= length and start >= min(e["ts"] for e in later)


def test_a_timeline_without_events_or_with_one_step_is_no_error(tmp_path: Path) -> None:
    assert write_timeline_plot([], tmp_path / "t.png") is None
    assert write_timeline_plot([{"ph": "M", "name": "process_name"}], tmp_path / "t.png") is None
    assert not (tmp_path / "t.png").exists()
    svg = write_timeline_plot(make_events(num_steps=1, end_to_end=True), tmp_path / "t.png")
    assert svg is not None
    assert "replica 1, stage 1" in svg
    assert ">backward<" in svg


def test_the_ledger_of_a_head_at_home_says_what_comes_home_and_that_no_label_leaves() -> None:
    edge = {"bytes_forward": 100, "messages_forward": 1, "bytes_backward": 0}
    home = {"bytes_forward": 20, "messages_forward": 1, "bytes_backward": 20}
    edges = [{"from": 0, "to": 1, **edge}, {"from": 1, "to": 2, **home}]
    traffic = {"kind": "traffic", "round": 0, "edges": edges, "collectives": {}}
    pipeline = {"cut": [2], "head_location": "client", "num_client_stages": 1}
    run = RunSummary(run_dir=Path(), records={"traffic": [traffic]}, config={"pipeline": pipeline})
    verdict, table = ledger(run)
    assert isinstance(verdict, Paragraph) and isinstance(table, Table)
    assert "No label left its client" in str(verdict.text)
    assert "none to a client's encoder" in str(verdict.text)
    assert [row[:2] for row in table.rows] == [
        ("activations, stage 0 to 1", "out of the clients"),
        ("gradients, stage 1 to 0", "into the clients"),
        ("masked positions' activations, stage 1 to 2", "into the clients"),
        ("masked positions' gradients, stage 2 to 1", "out of the clients"),
    ]
