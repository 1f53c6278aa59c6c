"""Whatever the options: pre-training as in plain PyTorch, a stop without a trace, or a refusal."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpipe.commands.finetune.prepared import DATA, FinetuneSetup, TuningData
from fedpipe.commands.finetune.setup import set_up_finetune
from fedpipe.commands.finetune.turns import plan_tuning_round
from fedpipe.config.deepspeed import autocast_dtype, deepspeed_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData, load_prepared, save_manifest
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.watch import Moment
from fedpipe.errors import ConfigError
from fedpipe.federation.cohort import Turn, plan_round
from fedpipe.report.writer import read_metrics
from fedpipe.run.checkpoint import Position, find_latest
from fedpipe.run.run_dir import RunSetup, resolve
from tests.helpers.distributed import run_distributed
from tests.helpers.options import FINETUNE, PRETRAIN, Settings, file_of, show, world_size
from tests.helpers.reference import train_plainly
from tests.helpers.tiny import tiny_data
from tests.helpers.tuned import small_folder, small_task

STEP = ("round", "step", "client", "stage")
FINE, COARSE = 2e-5, 5e-3
"""Nats that a loss may be off: in float32, and where something is rounded to 8 bits or 16."""
TIMES = ("seconds", "tokens_per_s", "sync_s", "memory_bytes")


def _pretrain(env: ProcessEnv, setup: RunSetup, stop: Moment | None) -> Position | None:
    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.distributed.watch import Watch
    from fedpipe.federation.loop import run_rounds

    with Watch() as watch:
        if stop is not None:  # as the ranks agree upon when one is asked to
            watch.stop.freeze()
            watch.stop.settle(stop)
        return run_rounds(Pretraining, setup, env=env, emit=lambda kind, record: None, watch=watch)


def _run(
    config: RunConfig, data: PreparedData, run_dir: Path, stop: Moment | None = None
) -> Position | None:
    run_dir.mkdir(exist_ok=True)
    checkpoint, passed_over = find_latest(run_dir)
    assert passed_over == []
    setup = RunSetup(
        config=config, run_dir=run_dir, data_dir=data.directory, checkpoint=checkpoint,
        started_at=time.monotonic(),
    )  # fmt: skip
    ends = run_distributed(_pretrain, config.world_size, setup, stop, timeout_s=300.0)
    (end,) = set(ends)
    return end


def _records(run_dir: Path) -> list[dict[str, Any]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    records = [
        {k: v for k, v in r.items() if k not in TIMES} for r in records if r["kind"] != "system"
    ]
    return sorted(records, key=lambda r: [str(r.get(k)) for k in ("kind", *STEP)])


def _state(run_dir: Path) -> dict[str, Any]:
    """Everything that the last checkpoint holds, and the newest file of every client's stage.

    Older files of clients stay for as long as an earlier checkpoint needs them.
    """
    final, _ = find_latest(run_dir)
    assert final is not None
    files = [f for f in final.path.iterdir() if f.suffix == ".safetensors"]
    state: dict[str, Any] = {f.name: f.read_bytes() for f in files}
    newest = {}
    for file in sorted(run_dir.glob("clients/*/*.pt")):
        newest[file.parent.name, file.name.partition(".round_")[0]] = file
    for file in [*final.path.glob("*.pt"), *newest.values()]:
        state[str(file.relative_to(run_dir))] = torch.load(file, weights_only=True)
    return state


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and all(e is None or _is_empty(e) for e in value.values())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        # SGD without momentum leaves empty entries for parameters that it has stepped.
        a, b = ({k: v for k, v in d.items() if not _is_empty(v)} for d in (a, b))
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _tolerances(config: RunConfig) -> tuple[float, float]:
    """Nats that a loss may be off in the first round, and in later ones."""
    federation = config.federation
    formats = {*config.pipeline.wire, federation.wire, autocast_dtype(deepspeed_config(config))}
    if not formats & {"bf16", "int8", "sparse", "bfloat16"}:
        return FINE, FINE
    # fedadam and fedyogi divide a change by its own size, and so magnify what rounding leaves.
    magnified = federation.server_optimizer.name in ("fedadam", "fedyogi")
    return COARSE, 10 * COARSE if magnified else COARSE


def _assert_as_in_plain_pytorch(
    config: RunConfig, data: PreparedData, records: list[dict[str, Any]]
) -> None:
    (expected,) = run_distributed(train_plainly, 1, config, data, timeout_s=300.0)
    tolerances = _tolerances(config)
    steps = {
        tuple(r[k] for k in STEP): (r["loss"], r["grad_norm"])
        for r in records
        if r["kind"] == "step"
    }
    assert steps.keys() == expected.keys()
    for key in (key for key in expected if key[1] < 2):  # later ones amplify what rounding leaves
        (loss, norm), tolerance = expected[key], tolerances[key[0] > 0]
        found_loss, found_norm = steps[key]
        assert (found_loss is None) == (loss is None), key
        message = f"{dict(zip(STEP, key, strict=True))}: {steps[key]}, expected {expected[key]}"
        assert loss is None or math.isclose(found_loss, loss, abs_tol=tolerance), message
        assert math.isclose(found_norm, norm, rel_tol=50 * tolerance), message


def _check(settings: Settings, folder: Path) -> None:
    config = PRETRAIN.build(settings)
    if config.pipeline.compile and shutil.which("g++") is None:
        pytest.skip("torch compiles with a C++ compiler")
    federation = config.federation
    data = tiny_data(
        folder / "data", num_clients=federation.num_clients, length=config.data.sequence_length
    )
    save_manifest(data, Path(data.directory))
    data = load_prepared(data.directory)
    assert _run(config, data, folder / "undisturbed") is None
    records = _records(folder / "undisturbed")
    # A compiled stage draws its dropout from a generator of the compiler's own.
    if not (config.pipeline.compile and config.model.hidden_dropout_prob):
        _assert_as_in_plain_pytorch(config, data, records)

    last = federation.num_rounds - 1
    turns = plan_round(config, round_id=last, blocks_per_client=[s.num_blocks for s in data.train])
    longest = _longest(turns)
    if longest > 1:
        stop = last, longest - 1
        assert _run(config, data, folder / "stopped", stop) == Position(round_id=last, step=stop[1])
        assert _run(config, data, folder / "stopped") is None
        assert _records(folder / "stopped") == records
        assert _same(_state(folder / "stopped"), _state(folder / "undisturbed"))


def _longest(turns: Sequence[Turn]) -> int:
    """Local steps of the replica that makes the most of them in a round."""
    steps: Counter[int] = Counter()
    for turn in turns:
        steps[turn.replica_id] += turn.num_steps
    return max(steps.values(), default=0)


SINGLES = PRETRAIN.singles()
COVERING, REFUSED = PRETRAIN.recorded()


@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize("settings", SINGLES, ids=map(show, SINGLES))
def test_every_value_of_every_option(settings: Settings, tmp_path: Path) -> None:
    _check(settings, tmp_path)


@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize("settings", COVERING, ids=[f"row {i}" for i in range(len(COVERING))])
def test_every_two_values_together(settings: Settings, tmp_path: Path) -> None:
    _check(settings, tmp_path)


def test_every_pair_of_values_is_in_a_row_or_refused_by_name() -> None:
    """The rows are generated; FEDPIPE_RECORD=1 does so again. No choice is refused in itself."""
    usable = {show(choice) for choice, _ in PRETRAIN.choices}
    for key, given in PRETRAIN.values.items():
        for value in given:
            assert type(value) is int or show({key: value}) in usable, (key, value)
    assert not PRETRAIN.not_covered(COVERING, REFUSED), f"FEDPIPE_RECORD=1 pytest {__file__}"


# -- fine-tuning -----------------------------------------------------------------------------------


def _finetune(env: ProcessEnv, setup: FinetuneSetup, stop: Moment | None) -> Position | None:
    from fedpipe.commands.finetune.run import Finetuning
    from fedpipe.distributed.watch import Watch
    from fedpipe.federation.loop import run_rounds

    with Watch() as watch:
        if stop is not None:
            watch.stop.freeze()
            watch.stop.settle(stop)
        return run_rounds(Finetuning, setup, env=env, emit=lambda kind, record: None, watch=watch)


def _tune(
    run_dir: Path, overrides: Sequence[str] = (), stop: Moment | None = None
) -> tuple[FinetuneSetup, Position | None]:
    """Fine-tune, or go on with the run of a directory; return where it has stopped."""
    asked = resolve("finetune", None, overrides, str(run_dir))
    setup = set_up_finetune(*asked, notify=lambda line: None)
    ends = run_distributed(_finetune, world_size(setup.config), setup, stop, timeout_s=300.0)
    (end,) = set(ends)
    return setup, end


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tiny model of three layers with dropout, and a tiny task."""
    root = tmp_path_factory.mktemp("places")
    sizes = {"num_hidden_layers": 3, "hidden_size": 128}  # a 32nd is what Compacter leaves of it
    model = small_folder(root / "model", hidden_dropout_prob=0.1, **sizes)
    return [f"model.path={model}", f"task.data={small_task(root / 'task', sizes=(60, 24))}"]


def _check_tuning(settings: Settings, places: list[str], folder: Path) -> None:
    own = {key: file_of(key, v) if key == "deepspeed.config" else v for key, v in settings.items()}
    given = {**FINETUNE.base, **own}
    overrides = [*places, *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    setup, end = _tune(folder / "undisturbed", overrides)
    assert end is None
    lengths = TuningData.load(setup.run_dir / DATA).train_lengths()
    plans = [
        plan_tuning_round(setup.config, round_id=round_id, lengths=lengths)
        for round_id in range(setup.config.federation.num_rounds)
    ]
    longest, last = max((_longest(plan.turns), index) for index, plan in enumerate(plans))
    if longest > 1:
        stop = last, longest - 1
        _, end = _tune(folder / "stopped", overrides, stop)
        assert end == Position(round_id=last, step=longest - 1)
        assert _tune(folder / "stopped")[1] is None
        assert _records(folder / "stopped") == _records(folder / "undisturbed")
        assert _same(_state(folder / "stopped"), _state(folder / "undisturbed"))


TUNING_SINGLES = FINETUNE.singles()
TUNING_COVERING, TUNING_REFUSED = FINETUNE.recorded()
TUNING_ROWS = [f"row {i}" for i in range(len(TUNING_COVERING))]


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("settings", TUNING_SINGLES, ids=map(show, TUNING_SINGLES))
def test_every_value_of_every_option_of_fine_tuning(
    settings: Settings, places: list[str], tmp_path: Path
) -> None:
    _check_tuning(settings, places, tmp_path)


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("settings", TUNING_COVERING, ids=TUNING_ROWS)
def test_every_two_values_of_fine_tuning_together(
    settings: Settings, places: list[str], tmp_path: Path
) -> None:
    _check_tuning(settings, places, tmp_path)


def test_every_pair_of_values_of_fine_tuning_is_in_a_row_or_refused_by_name() -> None:
    """The rows are generated; values of two options are refused in themselves, and say so."""
    usable = {show(choice) for choice, _ in FINETUNE.choices}
    refused = {
        key
        for key, given in FINETUNE.values.items()
        for value in given
        if type(value) is not int and show({key: value}) not in usable
    }
    assert refused == {"federation.server", "optimizer.name"}
    for own in ({"clients_per_round": 2, "server": "shared"}, {"num_replicas": 1}):
        mode = {"server": "sequential"} | own
        settings = {f"federation.{key}": value for key, value in mode.items()}
        with pytest.raises(ConfigError, match=r"^federation.server: expected replicated in fine-"):
            FINETUNE.build(settings)
    with pytest.raises(ConfigError, match=r"^optimizer.name: expected adamw, adam or sgd in fine-"):
        FINETUNE.build({"optimizer.name": "muon"})
    wrong = FINETUNE.not_covered(TUNING_COVERING, TUNING_REFUSED)
    assert not wrong, f"FEDPIPE_RECORD=1 pytest {__file__}"
