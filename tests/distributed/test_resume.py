"""Runs that are gone on with where what they read has moved, been touched, or become another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from fedpipe.cluster.rank import RunRequest
from fedpipe.commands.finetune.command import find_grid
from fedpipe.commands.finetune.export import export_finetuned
from fedpipe.commands.finetune.prepared import FinetuneSetup
from fedpipe.commands.finetune.run import Finetuning
from fedpipe.commands.finetune.setup import set_up_finetune
from fedpipe.commands.pretrain import ranks
from fedpipe.commands.pretrain.command import pipeline_run, pretrain
from fedpipe.commands.pretrain.setup import set_up
from fedpipe.commands.reproduce.setup import Reproduction, plan_reproduction
from fedpipe.commands.study.study import Cell
from fedpipe.commands.study.sweep import Sweep, set_up_sweep
from fedpipe.commands.throughput.command import throughput
from fedpipe.commands.throughput.report import ThroughputSettings
from fedpipe.config.finetune import FinetuneConfig, load_finetune
from fedpipe.config.schema import RunConfig
from fedpipe.data import cache
from fedpipe.distributed.env import ProcessEnv
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.federation.loop import run_rounds
from fedpipe.report.writer import read_metrics
from fedpipe.run.resume import INPUTS_FILE, MAY_CHANGE
from fedpipe.run.run_dir import (
    RunDir,
    RunSetup,
    inputs_of,
    prepared_text,
    resolve,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.tuned import describe_task, small_folder, small_task

TIMES = ("seconds", "tokens_per_s", "sync_s", "memory_bytes")
SIZES = (
    "model.family=bert", "data.sequence_length=32", "data.partition=iid",
    "pipeline.cut=[1]", "pipeline.colocate=true", "pipeline.micro_batch_size=4",
    "pipeline.num_micro_batches=1", "federation.num_clients=2", "federation.num_replicas=1",
    "federation.clients_per_round=2", "federation.num_rounds=2", "federation.num_local_steps=2",
    "log.to=[]",
)  # fmt: skip
TUNING = (
    "task.name=opinions", "task.max_length=12", "batch_size=8", "pipeline.cut=[1]",
    "pipeline.colocate=true", "federation.num_clients=2", "federation.clients_per_round=2",
    "federation.num_replicas=1", "federation.num_rounds=2",
)  # fmt: skip


class _Killed(Exception):
    pass


def write_texts(folder: Path) -> Path:
    """Write texts, and a model with its tokenizer; nothing in them says where they are."""
    small_folder(folder / "model")
    shutil.copytree(folder / "model", folder / "tokenizer")
    for name in ("train", "valid"):
        (folder / name).mkdir()
    words = ["bad poor dull worse", "good fine great better", "poor fine bad good"]
    for name, line in zip("abc", words, strict=True):
        (folder / "train" / f"{name}.txt").write_text(f"{line} {line}\n" * 60)
    (folder / "valid" / "d.txt").write_text("good great bad poor dull fine\n" * 40)
    (folder / "engine.json").write_text('{"zero_optimization": {"stage": 0}}')
    return folder


def places(folder: Path) -> dict[str, str]:
    """What a pre-training is told of where ``write_texts`` has written."""
    return {
        "data.train": f"[{folder}/train/*.txt]", "data.valid": f"[{folder}/valid/*.txt]",
        "data.tokenizer": str(folder / "tokenizer"), "model.path": str(folder / "model"),
        "deepspeed.config": str(folder / "engine.json"), "data.cache_dir": str(folder / "cache"),
    }  # fmt: skip


def options(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def go_on(run_dir: Path, *overrides: str, notify: Any = None) -> RunSetup:
    run, config = resolve("pretrain", None, overrides, str(run_dir))
    return set_up(run, config, notify=notify or (lambda line: None))


def outcome(run_dir: Path) -> tuple[list[str], dict[str, bytes]]:
    """Every record without wall times, and the last weights."""
    lines = [
        str(sorted((k, v) for k, v in record.items() if k not in TIMES))
        for record in read_metrics(run_dir / "metrics.jsonl")
        if record["kind"] != "system"
    ]
    last = max((run_dir / "checkpoints").glob("round_*"))
    assert last.name == "round_000002"
    return sorted(lines), {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


def until_round(number: int) -> Callable[[str, Any], None]:
    """Kill a run as it has trained a round, before that is saved."""

    def emit(kind: str, record: Any) -> None:
        if kind == "round" and record["round"] == number:
            raise _Killed

    return emit


def _pretrain(env: ProcessEnv, setup: RunSetup, number: int) -> None:
    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.federation.loop import run_rounds

    try:
        run_rounds(Pretraining, setup, env=env, emit=until_round(number))
    except _Killed:
        return


def train(setup: RunSetup, *, killed_in_round: int = -1) -> None:
    run_distributed(_pretrain, 1, setup, killed_in_round)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A run of two rounds; not exported."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(go_on(run_dir, *SIZES, *options(places(texts))))
    return run_dir


def test_whatever_may_change_does_not_change_a_run(
    texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(texts, tmp_path / "here")
    run_dir = tmp_path / "run"
    train(go_on(run_dir, *SIZES, *options(places(here))), killed_in_round=1)
    for path in here.rglob("*"):
        path.touch()
    go_on(run_dir)
    here.rename(tmp_path / "there")
    shutil.rmtree(tmp_path / "there/cache")
    changes = places(tmp_path / "there") | {"pipeline.hang_timeout_s": "7"}
    # tests/distributed/test_outer.py moves the folder of a site.
    assert changes.keys() == set(MAY_CHANGE["pretrain"]) - {"outer.folder"}
    resumed = go_on(run_dir, *options(changes))
    assert resumed.checkpoint is not None and resumed.hang_timeout_s == 7
    train(resumed)
    assert outcome(run_dir) == outcome(undisturbed)


def written(run_dir: Path) -> dict[Path, int]:
    """When every file of a run was written, but for its lock."""
    return {
        path: path.stat().st_mtime_ns
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def correct(path: Path) -> None:
    """Replace a word by another one, and copy the time as well."""
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"poor", b"peer", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def exchange(folder: Path) -> None:
    for source, target in ("az", "ba", "zb"):
        (folder / f"{source}.txt").rename(folder / f"{target}.txt")


OTHER_CONTENT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "corrected": (lambda f: correct(f / "train/a.txt"), r"data\.train \(a\.txt has changed\)"),
    "gone": (lambda f: (f / "train/b.txt").unlink(), r"data\.train \(b\.txt is gone\)"),
    "new": (
        lambda f: (f / "train/e.txt").write_text("dull fine\n" * 40),
        r"data\.train \(e\.txt is new\)",
    ),
    "exchanged": (
        lambda f: exchange(f / "train"),
        r"data\.train \(the same files in another order\)",
    ),
    "held out": (lambda f: correct(f / "valid/d.txt"), r"data\.valid \(d\.txt has changed\)"),
    "tokenizer": (
        lambda f: correct(f / "tokenizer/tokenizer.json"),
        r"data\.tokenizer \(tokenizer\.json has changed\)",
    ),
    "weights": (
        lambda f: small_folder(f / "model", seed=1),
        r"model\.path \(model\.safetensors has changed\)",
    ),
    "two": (
        lambda f: [correct(f / "train/a.txt"), small_folder(f / "model", seed=1)],
        r"data\.train \(a\.txt has changed\), model\.path \(model\.safetensors has changed\)",
    ),
}


@pytest.mark.parametrize("case", OTHER_CONTENT)
def test_a_run_that_has_begun_refuses_other_content_and_names_the_files(
    texts: Path, undisturbed: Path, tmp_path: Path, case: str
) -> None:
    change, named = OTHER_CONTENT[case]
    change(shutil.copytree(texts, tmp_path / "texts"))
    before = written(undisturbed)
    with pytest.raises(
        CheckpointError,
        match=rf"expected the content that the run began with, got another one of {named}\. Rest",
    ):
        go_on(undisturbed, *options(places(tmp_path / "texts")))
    assert written(undisturbed) == before


def test_no_command_takes_a_finished_run_for_one_of_other_text(
    texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    (run_dir / "export").mkdir()
    (run_dir / "report.html").touch()
    correct(shutil.copytree(texts, tmp_path / "texts") / "train/a.txt")
    arguments = (None, options(places(tmp_path / "texts")), str(run_dir))
    request = RunRequest(overrides=arguments[1], run_dir=arguments[2])
    for command in (
        lambda: pretrain(*arguments), lambda: pipeline_run(ranks.PROGRAM, request),
        lambda: throughput(*arguments, settings=ThroughputSettings()),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"got another one of data\.train \(a\.txt has"):
            command()


def test_text_that_is_prepared_in_another_way_is_refused(
    texts: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    with pytest.raises(CheckpointError, match=r"got the same files prepared in another way\. Go"):
        go_on(undisturbed)


def test_a_run_that_has_not_said_what_it_began_with_says_so_once(
    texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    (run_dir / INPUTS_FILE).unlink()
    moved = options(places(shutil.copytree(texts, tmp_path / "texts")))
    with pytest.raises(CheckpointError, match=r"got other values of model\.path \(.*, data\.train"):
        go_on(run_dir, *moved)
    said: list[str] = []
    for overrides in ([], moved):
        go_on(run_dir, *overrides, notify=said.append)
    (warning,) = (line for line in said if line.startswith("warning: "))
    assert f"{run_dir} does not say what it began with" in warning


def test_a_finished_model_is_exported_with_the_text_of_its_run(
    texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Whoever changes text while a run trains on it still gets what was trained."""
    here = shutil.copytree(texts, tmp_path / "texts")
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    config = go_on(run_dir, *options(places(here))).config
    used = prepared_text(run_dir, config)
    correct(here / "train/a.txt")
    assert prepared_text(run_dir, config) == used
    shutil.rmtree(here / "cache")
    with pytest.raises(
        CheckpointError, match=r"got another one of data\.train \(a\.txt has changed"
    ):
        prepared_text(run_dir, config)


def begin(config: RunConfig, run_dir: Path) -> None:
    run = RunDir.open(run_dir, "pretrain")
    run.record_inputs(inputs_of(config), notify=lambda line: None)
    (run_dir / "metrics.jsonl").touch()


def test_a_sweep_does_not_mix_cells_of_two_texts(texts: Path, tmp_path: Path) -> None:
    here = shutil.copytree(texts, tmp_path / "here")

    def sweep(*overrides: str) -> Sweep:
        return set_up_sweep(None, overrides, [], str(tmp_path / "sweep"), preset=None)

    first = set_up_sweep(
        None, [*SIZES, *options(places(here))], ["seed=0,1"], str(tmp_path / "sweep"), preset=None
    )
    begin(first.cells[1].config, first.cells[1].run_dir)
    there = here.rename(tmp_path / "there")
    moved = sweep(*options(places(there)))
    assert moved.cells[0].config.data.train == (f"{there}/train/*.txt",)
    correct(there / "train/c.txt")
    with pytest.raises(CheckpointError, match=r"^cell seed=1: .* of data\.train \(c\.txt has cha"):
        sweep()


def test_a_reproduction_does_not_mix_runs_of_two_texts(texts: Path, tmp_path: Path) -> None:
    here = shutil.copytree(texts, tmp_path / "here")

    def plan(folder: Path) -> Reproduction:
        own = [o for o in options(places(folder)) if o.startswith(("data.train", "data.valid"))]
        return plan_reproduction(
            "fedbiobert", None, [*own, f"data.cache_dir={folder}/cache"], str(tmp_path / "run"),
            data=None, seeds=None,
        )  # fmt: skip

    first = plan(here)
    first.write()
    cell = first.cells[0]
    begin(cell.config, cell.run_dir)
    there = here.rename(tmp_path / "there")
    plan(there).write()
    correct(there / "train/c.txt")
    with pytest.raises(CheckpointError, match=rf"^cell {cell.name}: .*\(c\.txt has changed\)"):
        plan(there)


# -- fine-tuning -----------------------------------------------------------------------------------


def tuning_places(folder: Path) -> dict[str, str]:
    return {
        "model.path": str(folder / "model"), "task.data": str(folder / "task"),
        "task.file": str(folder / "task/task.yaml"), "method.path": str(folder / "adapter"),
        "deepspeed.config": str(folder / "engine.json"),
    }  # fmt: skip


def tune_on(run_dir: Path, *overrides: str, notify: Any = None) -> FinetuneSetup:
    run, config = resolve("finetune", None, overrides, str(run_dir))
    return set_up_finetune(run, config, notify=notify or (lambda line: None))


def tune(setup: FinetuneSetup, *, killed_in_round: int = -1) -> None:
    alone = ProcessEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous="")
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        try:
            run_rounds(Finetuning, setup, env=alone, emit=until_round(killed_in_round))
        except _Killed:
            return


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a task, an adapter to start from and a DeepSpeed JSON."""
    folder = tmp_path_factory.mktemp("tuning")
    small_folder(folder / "model")
    small_task(folder / "task")
    describe_task(folder / "task")
    (folder / "engine.json").write_text('{"zero_optimization": {"stage": 0}}')
    begin_from = tune_on(
        folder / "run", *TUNING, "federation.num_rounds=1",
        *(o for o in options(tuning_places(folder)) if not o.startswith("method.path")),
    )  # fmt: skip
    tune(begin_from)
    export_finetuned(folder / "run")
    (folder / "run/adapter").rename(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tuning: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    tune(tune_on(run_dir, *TUNING, *options(tuning_places(tuning))))
    return run_dir


def test_whatever_may_change_does_not_change_a_fine_tuning(
    tuning: Path, tuned: Path, tmp_path: Path
) -> None:
    here, run_dir = shutil.copytree(tuning, tmp_path / "here"), tmp_path / "run"
    tune(tune_on(run_dir, *TUNING, *options(tuning_places(here))), killed_in_round=1)
    for path in here.rglob("*"):
        path.touch()
    tune_on(run_dir)
    changes = tuning_places(here.rename(tmp_path / "there")) | {"hang_timeout_s": "7"}
    assert changes.keys() == set(MAY_CHANGE["finetune"]) - {"federation.num_replicas"}
    resumed = tune_on(run_dir, *options(changes))
    assert resumed.checkpoint is not None and resumed.hang_timeout_s == 7
    tune(resumed)
    assert outcome(run_dir) == outcome(tuned)


def flip(path: Path) -> None:
    """Give the first example the other label; size and time stay."""
    status, (first, rest) = path.stat(), path.read_text().split("\n", 1)
    row = json.loads(first)
    path.write_text(json.dumps(row | {"label": 1 - row["label"]}) + "\n" + rest)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: flip(f / "task/imdb.test.jsonl"), r"task\.data \(imdb\.test\.jsonl has ch.*\)"),
        (
            lambda f: describe_task(f / "task", labels="[1, 0]"),
            r"task\.file \(task\.yaml has changed\)",
        ),
        (
            lambda f: small_folder(f / "model", seed=1),
            r"model\.path \(model\.safetensors has changed\)",
        ),
        (
            lambda f: correct(f / "model/tokenizer.json"),
            r"model\.path \(tokenizer\.json has changed\)",
        ),
        (
            lambda f: (f / "adapter/README.md").write_text("another"),
            r"method\.path \(README\.md is new\)",
        ),
        (
            lambda f: (f / "engine.json").write_text('{"zero_optimization": {"stage": 1}}'),
            r"zero_.*optimization in deepspeed\.config",
        ),
    ],
    ids=["labels", "task file", "weights", "tokenizer", "adapter", "deepspeed"],
)  # fmt: skip
def test_a_fine_tuning_that_has_begun_refuses_other_content_and_names_it(
    tuning: Path, tuned: Path, tmp_path: Path, change: Callable[[Path], Any], named: str
) -> None:
    change(shutil.copytree(tuning, tmp_path / "tuning"))
    before = written(tuned)
    with pytest.raises(CheckpointError, match=rf"expected the .*, got .* of {named}\. Restore"):
        tune_on(tuned, *options(tuning_places(tmp_path / "tuning")))
    assert written(tuned) == before


WHOLE = (*(o for o in TUNING if not o.startswith("pipeline.")), "federation.num_clients=5")


def _tune_on_rank(env: ProcessEnv, setup: FinetuneSetup) -> None:
    run_rounds(Finetuning, setup, env=env, emit=lambda kind, record: None)


@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize(
    "mode",
    [
        ("method.lora_average=product",),
        (
            "method.name=full", "federation.server_optimizer.name=fedyogi",
            "federation.optimizer_state=keep", "federation.average.final_head=false",
        ),
        (
            "federation.aggregation.rule=krum", "federation.aggregation.num_byzantine=1",
            "federation.aggregation.weighting=uniform",
        ),
        ("pipeline.cut=[1]", "pipeline.colocate=true"),
    ],
    ids=["product", "fedyogi, kept", "krum", "cut"],
)  # fmt: skip
def test_a_fine_tuning_goes_on_with_another_number_of_replicas(
    tuning: Path, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    """The sums of a round are added up in another order, and that is all."""
    own = [
        *WHOLE, "federation.clients_per_round=5", f"model.path={tuning}/model",
        f"task.data={tuning}/task", *mode,
    ]  # fmt: skip
    tune(tune_on(tmp_path / "one", *own))
    tune(tune_on(tmp_path / "run", *own), killed_in_round=1)
    resumed = tune_on(tmp_path / "run", "federation.num_replicas=2")
    assert resumed.checkpoint is not None
    run_distributed(_tune_on_rank, 2, resumed)
    for file in (tmp_path / "one/checkpoints/round_000002").glob("*.safetensors"):
        resumed_weights = load_file(tmp_path / "run/checkpoints/round_000002" / file.name)
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(resumed_weights[name], tensor, atol=2e-5, rtol=0)


def test_replicas_that_owe_what_they_have_rounded_off_are_not_counted_anew(
    tuning: Path, tmp_path: Path
) -> None:
    own = (
        *WHOLE, f"model.path={tuning}/model", f"task.data={tuning}/task", "federation.wire=int8",
        "federation.num_replicas=2",
    )  # fmt: skip
    run_distributed(_tune_on_rank, 2, tune_on(tmp_path, *own, "federation.num_rounds=1"))
    for replicas in (1, 4):
        with pytest.raises(
            CheckpointError,
            match=rf"values of federation\.num_replicas \({replicas} instead of 2\)",
        ):
            tune_on(tmp_path, f"federation.num_replicas={replicas}")


def test_a_grid_applies_what_may_change_and_refuses_the_rest_by_name(
    tuning: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(tuning, tmp_path / "tuning")
    file = tmp_path / "tuning.yaml"
    file.write_text("seed: 3\n")
    own = [*WHOLE, f"model.path={here}/model", f"task.data={here}/task"]

    def cells(
        *overrides: str, axes: tuple[str, ...] = (), config: Path | None = None
    ) -> tuple[Cell[FinetuneConfig], ...]:
        path = str(config) if config else None
        found = find_grid(path, overrides, axes, str(tmp_path / "grid"), preset=None)
        assert found is not None
        return found.cells

    axes = ("method.name=lora,full",)
    grid = cells(*own, axes=axes, config=file)
    begun = tmp_path / "grid" / grid[1].name
    tune(tune_on(begun, "federation.num_rounds=2"), killed_in_round=1)
    for asked in ({}, {"axes": axes}, {"axes": axes, "config": file}):
        cells(*(own if "config" in asked else ()), "hang_timeout_s=7", **asked)
        again = cells("hang_timeout_s=9", "federation.num_replicas=2")
        configs = [load_finetune(str(cell.run_dir / "config.yaml"), []) for cell in again]
        assert configs == [cell.config for cell in again]
        assert [c.hang_timeout_s for c in configs] == [9, 9]
        assert [c.federation.num_replicas for c in configs] == [2, 2]
        assert [c.method.name for c in configs] == ["lora", "full"]
    with pytest.raises(
        CheckpointError, match=r"^cell lora: .* of batch_size \(4 instead of 8\)\. Resume"
    ):
        cells("batch_size=4")
    with pytest.raises(ConfigError, match=r"^--grid: expected keys .*, got method\.name in both"):
        cells("method.name=full")
    file.write_text("seed: 4\n")
    with pytest.raises(CheckpointError, match=r"^cell lora: .* of seed \(4 instead of 3\)"):
        cells(*own, "federation.num_replicas=2", "hang_timeout_s=9", axes=axes, config=file)
    flip(here / "task/imdb.train.jsonl")
    with pytest.raises(CheckpointError, match=r"^cell full: .* of task\.data \(imdb\.train\.jsonl"):
        cells()
