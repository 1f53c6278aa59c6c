"""``fedpipe pretrain`` as a user runs it: files, export, interruptions, damage and mistakes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpipe.report.writer import read_metrics
from tests.helpers.cli import REPOSITORY, Command, fedpipe

# What the tests count on is named, so that the quick start may change.
TINY = (
    "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "data.sequence_length=32", "pipeline.cut=[2]",
    "pipeline.micro_batch_size=8", "pipeline.num_micro_batches=2", "federation.num_clients=6",
    "federation.num_replicas=2", "federation.clients_per_round=2", "federation.num_rounds=2",
    "federation.num_local_steps=3", "checkpoint.every_rounds=1", "checkpoint.every_steps=1",
    "checkpoint.keep_last=2", "validation.every_rounds=1", "validation.max_blocks_per_client=4",
    "log.to=[tensorboard]", "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1",
)  # fmt: skip
ONE_REPLICA = ("federation.num_replicas=1", "federation.clients_per_round=2")
TIMES = ("seconds", "tokens_per_s", "sync_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds every run and the prepared text, which all of them share."""
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> tuple[str, ...]:
    """Of the run that most tests look at or repeat."""
    return (*TINY, f"data.cache_dir={folder / 'cache'}")


@pytest.fixture(scope="module")
def done(folder: Path, arguments: tuple[str, ...]) -> Path:
    """A run that nothing disturbed."""
    run_dir = folder / "done"
    command = Command("pretrain", "--run-dir", str(run_dir), *arguments, folder=folder)
    result = command.finish()
    assert result.code == 0, result.err
    assert result.err == ""
    command.assert_nothing_left()
    return run_dir


def _records(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that a repetition must repeat bit for bit."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in TIMES} for r in records if r["kind"] != "system"
    ]


def _checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("checkpoints/round_*"))


def _saved(run_dir: Path, name: str) -> Callable[[], bool]:
    """Whether the checkpoint ``name`` or a later one was made."""
    return lambda: any(found >= name for found in _checkpoints(run_dir))


# -- what a run leaves -----------------------------------------------------------------------------


def test_a_run_writes_every_file_of_the_contract(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names >= {
        "run.json", "config.yaml", "deepspeed.json", "inputs.json", "plan.txt", "env.json",
        "metrics.jsonl", "timeline.json",
        "samples.json", "text.json", "checkpoints", "export", "report.html", "report.md",
        "tensorboard", "logs",
    }  # fmt: skip
    assert any(name.endswith(".png") for name in names)
    assert _checkpoints(done)[-1] == "round_000002" and len(_checkpoints(done)) == 2
    assert (done / "checkpoints" / "latest").read_text() == "round_000002\n"
    assert {path.name for path in (done / "export").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md"
    }  # fmt: skip
    leftovers = [p for p in done.rglob("*") if p.name.endswith((".part", ".tmp", ".writable"))]
    assert leftovers == []


def test_the_record_holds_every_step_round_validation_and_the_traffic(done: Path) -> None:
    records = read_metrics(done / "metrics.jsonl")
    steps = [(r["round"], r["replica"], r["stage"], r["step"]) for r in records
             if r["kind"] == "step"]  # fmt: skip
    assert sorted(steps) == [
        (r, k, s, n) for r in range(2) for k in range(2) for s in range(2) for n in range(3)
    ]
    for kind in ("round", "eval", "traffic"):
        assert [r["round"] for r in records if r["kind"] == kind] == [0, 1], kind
    assert all(e["bytes_backward"] == 0 for r in records if r["kind"] == "traffic"
               for e in r["edges"])  # fmt: skip


def _exported_losses(run_dir: Path, exports: dict[int, Path]) -> dict[int, tuple[float, int]]:
    """client -> (summed loss, masked tokens), with nothing but transformers and the text."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from fedpipe.config.load import load_config
    from fedpipe.data.corpus import prepare
    from fedpipe.data.masking import validation_batch

    config = load_config(str(run_dir / "config.yaml"), [])
    data = prepare(config)
    result = {}
    for client_id, export in exports.items():
        model = AutoModelForMaskedLM.from_pretrained(export).eval()
        tokenizer = AutoTokenizer.from_pretrained(export)
        assert tokenizer.mask_token_id == data.mask_id
        assert tokenizer.model_max_length == config.data.sequence_length
        first = 2 if config.model.family == "roberta" else 0
        assert model.config.max_position_embeddings == config.data.sequence_length + first
        assert model.config.vocab_size == len(tokenizer)
        count = min(config.validation.max_blocks_per_client, data.valid[client_id].num_blocks)
        batch = validation_batch(data, config, client_id, first=0, count=count)
        ids, positions, labels = (
            torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.labels)
        )
        with torch.no_grad():
            logits = model(input_ids=ids).logits.double()
        scores = logits.log_softmax(-1).gather(1, positions[..., None].expand(-1, -1, 8192))
        loss = -scores.gather(2, labels[..., None])
        result[client_id] = (float(loss.sum()), loss.numel())
    return result


def _assert_export_has_the_validated_loss(run_dir: Path, exports: dict[int, Path]) -> None:
    losses = _exported_losses(run_dir, exports)
    last = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "eval"][-1]
    final = last["stages"][-1]
    assert {int(c) for c in final["clients"]} == set(losses)
    for client_id, (total, count) in losses.items():
        assert abs(final["clients"][str(client_id)] - total / count) < 1e-5
    tokens = sum(count for _, count in losses.values())
    assert last["tokens"] == tokens
    assert abs(final["loss"] - sum(total for total, _ in losses.values()) / tokens) < 1e-5


def test_the_exported_model_has_exactly_the_loss_that_was_validated(done: Path) -> None:
    _assert_export_has_the_validated_loss(done, dict.fromkeys(range(6), done / "export"))


def test_a_second_identical_command_says_it_is_done(
    done: Path, folder: Path, arguments: tuple[str, ...]
) -> None:
    before = (done / "metrics.jsonl").read_bytes()
    for repeated in ((), arguments):
        result = fedpipe("pretrain", "--run-dir", str(done), *repeated, folder=folder)
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{done} is done: see {done / 'report.html'}\n"
    assert (done / "metrics.jsonl").read_bytes() == before


# -- interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [11])
def test_a_killed_and_damaged_run_ends_with_the_same_losses_bit_for_bit(
    seed: int, done: Path, folder: Path, arguments: tuple[str, ...]
) -> None:
    """Killed at two random moments, then its newest checkpoint is damaged as well."""
    draw = random.Random(seed)
    run_dir = folder / f"killed_{seed}"
    moments = ("round_000000_step_000001", "round_000001_step_000001")
    for number, moment in enumerate(moments):
        resumed = arguments if number == 0 else ()
        command = Command("pretrain", "--run-dir", str(run_dir), *resumed, folder=folder)
        command.wait_for(_saved(run_dir, moment), moment)
        time.sleep(draw.uniform(0.0, 0.5))
        command.kill()
        command.assert_nothing_left()
    newest = run_dir / "checkpoints" / _checkpoints(run_dir)[-1]
    damaged = draw.choice(sorted(newest.iterdir()))
    os.truncate(damaged, damaged.stat().st_size // 2)

    result = fedpipe("pretrain", "--run-dir", str(run_dir), folder=folder)
    assert (result.code, result.err) == (0, ""), result.err
    assert f"warning: checkpoint {newest.name} is damaged: {damaged.name}" in result.out.replace(
        f"checkpoints/{newest.name}/", ""
    )
    assert f"resuming {run_dir} from round_" in result.out
    assert _records(run_dir) == _records(done)
    for name in ("stage_00.safetensors", "stage_01.safetensors"):
        file = Path("checkpoints", "round_000002", name)
        assert (run_dir / file).read_bytes() == (done / file).read_bytes()
    assert (run_dir / "report.html").is_file()


@pytest.fixture(scope="module")
def interrupted(folder: Path, arguments: tuple[str, ...]) -> Path:
    """A run that SIGTERM has stopped in its first round."""
    run_dir = folder / "interrupted"
    command = Command(
        "pretrain", "--run-dir", str(run_dir), *arguments, "federation.num_rounds=400",
        folder=folder,
    )  # fmt: skip
    command.wait_for(_saved(run_dir, "round_000000_step_000001"), "first checkpoint")
    os.kill(command.process.pid, signal.SIGTERM)
    result = command.finish()
    assert result.code == 75, result.out + result.err
    assert result.err == ""
    assert f"resume with: fedpipe pretrain --run-dir {run_dir}" in result.out
    command.assert_nothing_left()
    return run_dir


def test_sigterm_ends_with_75_and_leaves_no_process(interrupted: Path) -> None:
    assert _checkpoints(interrupted)


def test_a_run_in_use_refuses_a_second_command_and_a_killed_worker_is_named(
    interrupted: Path, folder: Path
) -> None:
    first = Command("pretrain", "--run-dir", str(interrupted), folder=folder)
    before = _checkpoints(interrupted)
    first.wait_for(lambda: "resuming" in first.output(), "start")
    first.wait_for(lambda: _checkpoints(interrupted) > before, "new checkpoint")
    files = {n: (interrupted / n).stat() for n in ("config.yaml", "env.json", "plan.txt")}
    second = fedpipe("pretrain", "--run-dir", str(interrupted), folder=folder)
    assert second.code == 2, second.out
    assert "expected a run that no other process works on, got" in second.error
    assert "in use" in second.error
    for name, status in files.items():
        assert (interrupted / name).stat().st_ino == status.st_ino, f"the second one wrote {name}"
    assert first.process.poll() is None, "the first one goes on"

    worker = next(p for p in first.descendants() if _rank_log(p) == "rank_00003.log")
    os.kill(worker, signal.SIGKILL)
    result = first.finish()
    assert result.code == 1, result.out + result.err
    for expected in (
        "LaunchError: rank 3 (stage 1, replica 1",
        " failed: killed by SIGKILL",
        f"Full log: {interrupted / 'logs' / 'rank_00003.log'}",
        f"with: fedpipe pretrain --run-dir {interrupted}",
    ):
        assert expected in result.error
    first.assert_nothing_left()


def _rank_log(pid: int) -> str:
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/1")).name
    except OSError:
        return ""


def test_workers_do_not_outlive_a_killed_supervisor(interrupted: Path, folder: Path) -> None:
    command = Command("pretrain", "--run-dir", str(interrupted), folder=folder)
    before = _checkpoints(interrupted)
    command.wait_for(lambda: _checkpoints(interrupted) > before, "new checkpoint")
    command.process.kill()
    command.process.wait()
    command.assert_nothing_left()


# -- other ways to train ---------------------------------------------------------------------------


def test_kept_embeddings_give_one_model_per_client(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    """With all stages in one process; killed inside the second round, where it can be exported."""
    run_dir = folder / "kept"
    command = Command(
        "pretrain", "--run-dir", str(run_dir), *arguments, *ONE_REPLICA,
        "federation.average.embeddings=false", "federation.optimizer_state=keep",
        "pipeline.colocate=true", "federation.num_clients=2", folder=folder,
    )  # fmt: skip
    # Each client makes 3 steps; the first one's turn is over and its file of round 0 is pruned.
    command.wait_for(_saved(run_dir, "round_000001_step_000005"), "step 5 of the second round")
    command.kill()
    exports = {c: run_dir / "export" / f"client_{c:04d}" for c in range(2)}
    for again in (("export",), ("pretrain",)):
        result = fedpipe(*again, "--run-dir", str(run_dir), folder=folder)
        assert (result.code, result.err) == (0, ""), result.err
        assert sorted((run_dir / "export").iterdir()) == list(exports.values())
    _assert_export_has_the_validated_loss(run_dir, exports)


def test_end_to_end_trains_another_family_and_exports_it(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    run_dir = folder / "end_to_end"
    result = fedpipe(
        "pretrain", "--run-dir", str(run_dir), *arguments, *ONE_REPLICA, "model.family=bert",
        "pipeline.objective=end_to_end", "pipeline.schedule=1f1b", "federation.num_rounds=1",
        "pipeline.cut=[1, 3]", folder=folder,
    )  # fmt: skip
    assert (result.code, result.err) == (0, ""), result.err
    assert json.loads((run_dir / "export" / "config.json").read_text())["model_type"] == "bert"
    _assert_export_has_the_validated_loss(run_dir, dict.fromkeys(range(6), run_dir / "export"))
    (traffic,) = (r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "traffic")
    assert all(e["bytes_backward"] > 0 for e in traffic["edges"])


def test_a_model_whose_head_stayed_at_home_is_exported_like_any_other(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    run_dir = folder / "head_at_home"
    result = fedpipe(
        "pretrain", "--run-dir", str(run_dir), *arguments, *ONE_REPLICA, "pipeline.cut=[1, 3]",
        "pipeline.head_location=client", "federation.num_rounds=1",
        folder=folder,
    )  # fmt: skip
    assert (result.code, result.err) == (0, ""), result.err
    _assert_export_has_the_validated_loss(run_dir, dict.fromkeys(range(6), run_dir / "export"))
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "No label left its client" in report


# -- mistakes --------------------------------------------------------------------------------------


def _refused(*arguments: str, folder: Path) -> str:
    result = fedpipe("pretrain", *arguments, folder=folder)
    assert result.code == 2, result.out + result.err
    return result.error


def test_resuming_with_another_value_names_the_key(done: Path, folder: Path) -> None:
    error = _refused("--run-dir", str(done), "optimizer.lr=0.5", "pipeline.cut=[1]", folder=folder)
    assert error.startswith(f"CheckpointError: {done}: expected the configuration of the run")
    assert "got other values of pipeline.cut ([1] instead of [2]), optimizer.lr (0.5 ins" in error


def test_resuming_with_an_edited_deepspeed_json_names_its_key(
    done: Path, folder: Path, tmp_path: Path
) -> None:
    for name in ("run.json", "config.yaml", "deepspeed.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    saved = json.loads((tmp_path / "deepspeed.json").read_text())
    saved["zero_optimization"] = {"stage": 1}
    (tmp_path / "deepspeed.json").write_text(json.dumps(saved))
    error = _refused("--run-dir", str(tmp_path), folder=folder)
    assert error.startswith(f"CheckpointError: {tmp_path}: expected the DeepSpeed JSON of the run")
    assert "got other values of zero_optimization in deepspeed.config." in error


def test_another_quick_start_does_not_resume_the_one_that_is_there(
    done: Path, tmp_path: Path
) -> None:
    """Without --run-dir too: `runs/quickstart` may hold a run with other overrides."""
    run_dir = tmp_path / "runs" / "quickstart"
    run_dir.mkdir(parents=True)
    for name in ("run.json", "config.yaml", "metrics.jsonl"):
        (run_dir / name).write_bytes((done / name).read_bytes())
    error = _refused(folder=tmp_path)
    assert "got other values of " in error and "model.hidden_size (" in error


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("foreign", "expected a new, empty or fedpipe run directory, got "),
        ("file", "expected a directory, got the file "),
        ("file/below", "expected a directory that can be written, got "),
        ("/proc/run", "expected a directory that can be written, got "),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused(
    where: str, expected: str, folder: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    error = _refused("--run-dir", str(tmp_path / where), *arguments, folder=folder)
    assert error.startswith(f"CheckpointError: --run-dir: {expected}")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "foreign", "thesis.tex"]


def test_a_start_that_was_killed_early_can_be_repeated(
    folder: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    for name in (".lock", ".writable", ".config.yaml.part"):
        (tmp_path / name).write_text("")
    error = _refused("--run-dir", str(tmp_path), *arguments, "data.train=[none.txt]", folder=folder)
    assert error.startswith("CorpusError: data.train")


def test_a_damaged_run_does_not_start_afresh(folder: Path, done: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "round_000001").mkdir(parents=True)
    for name in ("run.json", "config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    error = _refused("--run-dir", str(tmp_path), folder=folder)
    assert "expected an intact checkpoint, got none (checkpoint round_000001 is damaged" in error
    assert (tmp_path / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()


def test_a_client_with_less_than_a_block_is_named(
    folder: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "large.txt").write_text("a long report about the heart\n" * 50)
    (tmp_path / "small.txt").write_text("short\n")
    error = _refused(
        "--run-dir", str(tmp_path / "run"), *arguments, "data.partition=paths", "data.valid=[]",
        f"data.train=[{tmp_path / 'large.txt'}, {tmp_path / 'small.txt'}]",
        "federation.num_clients=2", folder=folder,
    )  # fmt: skip
    assert "30 tokens for each of 2 clients, got less for 1: client 1 2 tokens. Add" in error


def test_a_mistake_in_the_configuration_is_answered_at_once(tmp_path: Path) -> None:
    """With the output in a pipe: no process in the background may keep it open either."""
    fastest = min(_seconds_of_a_mistake(tmp_path) for _ in range(3))
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers.modeling_utils"], check=True)
    assert fastest < time.monotonic() - started, "as long as what a rank imports first"


def _seconds_of_a_mistake(folder: Path) -> float:
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "fedpipe", "pretrain", "federation.num_round=3"], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert result.returncode == 2
    assert "Did you mean federation.num_rounds?" in result.stderr
    return seconds
