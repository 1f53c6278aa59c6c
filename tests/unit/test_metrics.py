"""The record of a run, its sinks and the log."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe import log
from fedpipe.errors import CheckpointError
from fedpipe.report.writer import MetricsWriter, read_metrics
from tests.helpers.records import make_records

STEP = {"kind": "step", "round": 0, "step": 0, "replica": 0, "stage": 0, "tokens": 10}


def test_every_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    records = make_records(num_rounds=2)
    writer = MetricsWriter(tmp_path)
    writer.write(records[:7])
    writer.write(records[7:])
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == records


def test_a_batch_is_in_the_file_as_soon_as_write_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write([STEP])
    assert read_metrics(tmp_path / "metrics.jsonl") == [STEP]
    assert writer.offset == (tmp_path / "metrics.jsonl").stat().st_size
    writer.close()
    writer.close()


def test_a_torn_last_line_is_left_out_and_cut_off_before_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(STEP) + '\n{"kind":"ste', encoding="utf-8")
    assert read_metrics(path) == [STEP]
    writer = MetricsWriter(tmp_path)
    writer.write([STEP])
    writer.close()
    assert read_metrics(path) == [STEP, STEP]


def test_a_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"step"}\n[1,2]\n{"kind":"step"}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: expected a JSON object, got '\[1"):
        read_metrics(path)


def test_truncate_and_append_give_the_file_of_an_uninterrupted_run(tmp_path: Path) -> None:
    records = make_records(num_rounds=3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    whole = MetricsWriter(tmp_path / "whole")
    whole.write(records)
    whole.close()

    first = MetricsWriter(tmp_path / "resumed")
    first.write(records[:50])
    first.flush()
    checkpoint = first.offset
    first.write([{"kind": "step", "loss": 1.0}, *records[50:80]])
    first.close()
    second = MetricsWriter(tmp_path / "resumed")
    second.truncate(checkpoint)
    second.write(records[50:])
    second.close()

    expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == expected


def test_a_file_shorter_than_the_checkpoint_counts_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write([STEP])
    with pytest.raises(CheckpointError, match="expected at least the 5000 bytes that the checkpoi"):
        writer.truncate(5000)


def test_an_offset_inside_a_record_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write([STEP])
    with pytest.raises(CheckpointError, match="expected a record to end at byte 5, got the middle"):
        writer.truncate(5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [STEP]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    nested = {"loss": [math.nan, 1.0], "stages": [{"clients": {"0": math.inf}}], "lr": -math.inf}
    writer = MetricsWriter(tmp_path, sinks=["tensorboard"])
    writer.write([{"kind": "round", **nested}, {**STEP, "loss": math.nan}])
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert first["loss"] == [None, 1.0]
    assert first["stages"] == [{"clients": {"0": None}}]
    assert (first["lr"], second["loss"]) == (None, None)


def _tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_the_losses_of_every_stage_against_tokens(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, sinks=["tensorboard"])
    writer.write(make_records(num_rounds=2))
    writer.close()
    scalars = _tensorboard(tmp_path)
    assert len(scalars["train/loss/stage_00"]) == len(scalars["train/loss/stage_01"]) == 80
    assert scalars["train/loss/stage_01"][-1][0] == 80 * 4096
    assert [step for step, _ in scalars["eval/loss/stage_01"]] == [40 * 4096, 80 * 4096]
    assert [value for _, value in scalars["traffic/0_to_1/bytes_backward"]] == [0, 0]
    assert "round/tokens_per_s" in scalars


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, sinks=["tensorboard"])
    first.write([{**STEP, "loss": 1.0}, {**STEP, "loss": 2.0}])
    checkpoint = first.offset
    first.write([{**STEP, "loss": 99.0}, {**STEP, "loss": 98.0}])
    first.close()
    second = MetricsWriter(tmp_path, sinks=["tensorboard"])
    second.truncate(checkpoint)
    second.write([{**STEP, "loss": 3.0}])
    second.close()
    assert _tensorboard(tmp_path)["train/loss/stage_00"] == [(10, 1.0), (20, 2.0), (30, 3.0)]


def test_writer_console_and_log_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fedpipe import log; log.setup()\n"
        "from fedpipe.report.console import RunConsole\n"
        "from fedpipe.report.writer import MetricsWriter\n"
        "from fedpipe.commands.pretrain import report\n"
        "late = {'torch', 'transformers', 'deepspeed', 'datasets', 'matplotlib', 'rich', 'numpy'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
        "w = MetricsWriter(sys.argv[1]); w.write([{'kind': 'step'}]); w.close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.fixture
def _restored_loggers() -> object:
    names = ("fedpipe", "DeepSpeed", "transformers", "datasets")
    loggers = [logging.getLogger(name) for name in names]
    before = [(lg.level, lg.propagate, lg.handlers[:], lg.filters[:]) for lg in loggers]
    yield
    for lg, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        lg.setLevel(level)
        lg.propagate, lg.handlers, lg.filters = propagate, handlers, filters


@pytest.mark.usefixtures("_restored_loggers")
class TestLog:
    """The fedpipe logger."""

    def test_a_line_starts_with_the_time_and_the_rank(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        log.setup(rank=0)
        log.setup(rank=0)
        logging.getLogger("fedpipe.somewhere").info("first\nsecond")
        logging.getLogger("fedpipe.somewhere").warning("look")
        lines = capsys.readouterr().err.splitlines()
        assert [line[8:] for line in lines] == [" r0 first", "    second", " r0 WARNING: look"]

    def test_other_ranks_speak_from_warning_on(self, capsys: pytest.CaptureFixture[str]) -> None:
        log.setup(rank=3)
        logging.getLogger("fedpipe.x").info("progress")
        logging.getLogger("fedpipe.x").warning("trouble")
        assert capsys.readouterr().err[8:] == " r3 WARNING: trouble\n"

    def test_a_traceback_follows_its_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        log.setup()
        try:
            raise KeyError("gone")
        except KeyError:
            logging.getLogger("fedpipe.x").exception("failed")
        error = capsys.readouterr().err
        assert error[8:].startswith(" ERROR: failed\n")
        assert "KeyError: 'gone'" in error

    def test_the_root_logger_is_left_alone(self) -> None:
        root = logging.getLogger()
        before = (root.level, root.handlers[:])
        log.setup("DEBUG")
        assert (root.level, root.handlers) == before

    def test_deepspeed_stays_quiet_though_its_import_sets_its_own_level(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        log.setup()
        library = logging.getLogger("DeepSpeed")
        library.setLevel(logging.INFO)
        library.addHandler(logging.StreamHandler(sys.stdout))
        library.warning("chatter")
        library.error("trouble")
        assert capsys.readouterr().out == "trouble\n"
        log.setup("DEBUG")
        library.info("chatter")
        assert "chatter" in capsys.readouterr().out
