"""What files hold cannot command a terminal or a page, and only its owner can read it."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpipe import log
from fedpipe.data.corpus import prepare
from fedpipe.errors import CorpusError
from fedpipe.printable import printable
from fedpipe.report.console import RunConsole
from fedpipe.report.document import Code, Heading, Paragraph, Table, to_html, to_markdown
from fedpipe.report.sections import samples_text
from fedpipe.run.run_dir import check_writable
from tests.helpers.corpora import run_maker

EVIL = "a\x1b[2J\x1b]0;owned\x07b\x9b31mc\rd\u202ee\ud800f\x00"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07b\x9b31mc\rd\u202ee\ud800f\x00"


def test_controls_are_shown_and_words_of_all_languages_stay() -> None:
    assert printable(EVIL) == SHOWN
    words = "caf\u00e9 \u65e5\u672c\u8a9e \u0e44\u0e17\u0e22 \U0001f600\tone\ntwo \\ `"
    assert printable(words) == words
    assert printable("5\u00a0mg,\u2009daily") == "5 mg, daily"


@pytest.mark.parametrize("interactive", [False, True])
def test_nothing_that_is_shown_commands_the_terminal(tmp_path: Path, interactive: bool) -> None:
    samples = {"examples": [{
        "text": EVIL, "truth": EVIL, "truth_probability": 0.1, "truth_unigram": 0.1,
        "model": [[EVIL, 0.1]], "unigram": [[EVIL, 0.1]],
    }]}  # fmt: skip
    (tmp_path / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    stream = io.StringIO()
    console = RunConsole(
        num_rounds=1, steps_per_round=1, num_stages=1, stream=stream, interactive=interactive
    )
    console.text(EVIL)
    console.preparing(f"fetch {EVIL}", 1, 2)
    console.text(samples_text(tmp_path))
    console.close()
    text = stream.getvalue()
    record = logging.makeLogRecord({"msg": EVIL, "levelno": logging.WARNING})
    assert log._Prefix(rank=0).format(record).endswith(SHOWN)
    # The live display has commands of its own, but none of the text's.
    assert not any(command in text for command in ("\x1b[2J", "\x1b]", "\x9b", "\x07", "\u202e"))
    assert "owned" in text and "\x1b" not in samples_text(tmp_path)


def test_without_an_example_no_headline_is_shown(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"examples": []}', encoding="utf-8")
    assert samples_text(tmp_path) == ""


def test_errors_quote_files_and_owners_in_printable_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2Jb"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a", "ward": "\\u001b[2J"}\n{}\n', encoding="utf-8")
    run = run_maker(tmp_path)
    with pytest.raises(CorpusError, match=r"expected a column 'text' in .*a\\x1b\[2Jb/a.jsonl:2"):
        prepare(run(train=(str(folder / "a.jsonl"),), num_clients=1))
    (folder / "a.jsonl").write_text('{"text": "a", "ward": "\\u001b[2J"}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match=r"client 0 \(\\x1b\[2J\) \d tokens"):
        prepare(run(train=(str(folder / "a.jsonl"),), num_clients=1))


def test_reports_hold_neither_commands_nor_tags_of_the_text() -> None:
    evil = f"{EVIL} <script>alert(1)</script>"
    blocks = [
        Heading(text=evil), Paragraph(text=f"{evil} `a<b`"), Code(text=f"```\n{evil}\n````"),
        Table(columns=(evil,), rows=((evil,),)),
    ]  # fmt: skip
    page, markdown = to_html(evil, blocks), to_markdown(evil, blocks)
    for text in (page, markdown):
        assert text == printable(text)
    assert "<script" not in page
    code = f"`````\n```\n{SHOWN} <script>alert(1)</script>\n````\n`````"
    assert code in markdown
    assert "<script" not in markdown.replace(code, "")
    assert "`a<b`" in markdown


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_only_the_owner_can_read_prepared_text_and_runs(tmp_path: Path, open_umask: None) -> None:
    prepared = Path(prepare(run_maker(tmp_path)()).directory)
    check_writable(tmp_path / "runs" / "mine")
    for folder in (prepared, tmp_path / "cache", tmp_path / "runs" / "mine"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
