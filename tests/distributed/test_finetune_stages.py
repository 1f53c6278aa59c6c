"""Fine-tuning that is cut into stages: through the engine of pre-training, on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import adapters
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedpipe.commands.finetune.export import export_finetuned, learnt
from fedpipe.commands.finetune.micro_batches import task_messages
from fedpipe.commands.finetune.prepared import DATA, FinetuneSetup, TuningData
from fedpipe.commands.finetune.report import write_finetune_report
from fedpipe.commands.finetune.run import Finetuning
from fedpipe.commands.finetune.staged import StagedReplica
from fedpipe.commands.finetune.turns import draw_round
from fedpipe.distributed.env import ProcessEnv
from fedpipe.errors import ConfigError
from fedpipe.federation.cohort import Turn
from fedpipe.federation.loop import run_rounds
from fedpipe.models.split import stage_specs
from fedpipe.models.tuned_stage import TunedStage
from fedpipe.pipeline.stage_engine import StageEngine
from fedpipe.run.checkpoint import Position
from tests.distributed.test_finetune import BASE, accuracy, records, run, set_up
from tests.helpers.distributed import run_distributed
from tests.helpers.tuned import small_folder, small_task

CUT = ("pipeline.cut=[1]", "pipeline.num_micro_batches=2", "pipeline.colocate=true")
PLAIN = ("federation.num_rounds=2", "optimizer.name=sgd", "optimizer.lr=0.1",
         "optimizer.max_grad_norm=0")  # fmt: skip
END_TO_END = ("pipeline.objective=end_to_end", "pipeline.schedule=1f1b")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tiny model without dropout and a tiny task."""
    root = tmp_path_factory.mktemp("base")
    model, task = small_folder(root / "model"), small_task(root / "task")
    return [*BASE, f"model.path={model}", f"task.data={task}"]


@pytest.fixture(scope="module")
def houlsby(tmp_path_factory: pytest.TempPathFactory, base: list[str]) -> Path:
    """A run of two stages that are threads of one process."""
    folder = tmp_path_factory.mktemp("houlsby")
    run(set_up(folder, base, *CUT, *PLAIN, "method.name=houlsby"))
    return folder


def stages(run_dir: Path, round_id: int = 2) -> list[dict[str, torch.Tensor]]:
    files = sorted((run_dir / f"checkpoints/round_{round_id:06d}").glob("stage_*.safetensors"))
    return [load_file(file) for file in files]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, atol: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=atol, rtol=0, msg=name)


def _on_rank(env: ProcessEnv, setup: FinetuneSetup) -> None:
    run_rounds(Finetuning, setup, env=env, emit=lambda kind, value: None)


def test_two_stages_in_two_processes_train_what_two_threads_train(
    tmp_path: Path, base: list[str], houlsby: Path
) -> None:
    apart = "pipeline.colocate=false"
    setup = set_up(tmp_path, base, *CUT[:2], apart, *PLAIN, "method.name=houlsby")
    run_distributed(_on_rank, 2, setup)
    for mine, theirs in zip(stages(tmp_path), stages(houlsby), strict=True):
        assert_close(mine, theirs, atol=1e-6)
    for one, other in zip(records(tmp_path, "turn"), records(houlsby, "turn"), strict=True):
        assert one["client"] == other["client"]
        assert one["stages"] == pytest.approx(other["stages"], abs=1e-5)
    assert records(tmp_path, "traffic") == records(houlsby, "traffic")
    assert records(tmp_path, "eval") == records(houlsby, "eval")


def test_the_clients_stage_does_not_learn_from_the_servers_loss(
    tmp_path: Path, base: list[str], houlsby: Path
) -> None:
    plain = TunedStage.loss

    def scaled(stage: TunedStage, *inputs: Any) -> torch.Tensor:
        return plain(stage, *inputs) * (5 if stage.spec.stage_id else 1)

    with mock.patch.object(TunedStage, "loss", scaled):
        run(set_up(tmp_path, base, *CUT, *PLAIN, "method.name=houlsby"))
    (client, server), (same, other) = stages(houlsby), stages(tmp_path)
    assert all(torch.equal(tensor, same[name]) for name, tensor in client.items())
    assert not torch.equal(server["classifier.weight"], other["classifier.weight"])
    edges = [edge for record in records(houlsby, "traffic") for edge in record["edges"]]
    assert edges and all(e["bytes_backward"] == 0 < e["bytes_forward"] for e in edges)
    setup = set_up(houlsby, [])
    data = TuningData.load(houlsby / DATA)
    specs = stage_specs(setup.config.stages, num_hidden_layers=2)
    (planned,) = task_messages(setup.config, specs, data, hidden_size=32)
    assert all(e["bytes_forward"] == e["messages_forward"] * planned.bytes_forward for e in edges)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_back_propagation_over_the_cut_trains_the_model_that_is_not_cut(
    tmp_path: Path, base: list[str], name: str
) -> None:
    method = (*PLAIN, f"method.name={name}")
    run(set_up(tmp_path / "whole", base, *method))
    run(set_up(tmp_path / "cut", base, *CUT, *END_TO_END, *method))
    whole, cut = (learnt(tmp_path / kind / "checkpoints/round_000002") for kind in ("whole", "cut"))
    assert_close(whole, cut, atol=2e-6)
    first = learnt(tmp_path / "whole/checkpoints/round_000001")
    assert max(float((first[n] - t).abs().max()) for n, t in whole.items()) > 1e-3
    (edge,) = records(tmp_path / "cut", "traffic")[0]["edges"]
    assert edge["bytes_backward"] > 0


def test_a_head_at_home_learns_the_same_and_no_label_leaves(
    tmp_path: Path, base: list[str], houlsby: Path
) -> None:
    home = "pipeline.head_location=client"
    run(set_up(tmp_path, base, *CUT, *PLAIN, home, "method.name=houlsby"))
    client, middle, head = stages(tmp_path)
    assert_close(client, stages(houlsby)[0], atol=1e-6)
    assert_close(middle | head, stages(houlsby)[1], atol=1e-6)
    plan = (tmp_path / "plan.txt").read_text()
    assert "stage 2  client   head" in plan and "stage 1 to 2: " in plan
    onwards = [
        next(edge for edge in records(folder, "traffic")[0]["edges"] if edge["to"] == 1)
        for folder in (tmp_path, houlsby)
    ]
    labels_and_weights = 2 * 4 * 4  # int32, of four examples
    sent = [edge["bytes_forward"] / edge["messages_forward"] for edge in onwards]
    assert sent[1] - sent[0] == labels_and_weights


def test_what_stages_have_learnt_is_read_by_the_libraries(
    tmp_path: Path, base: list[str], houlsby: Path
) -> None:
    """The scores are those that the run has written down."""
    full = ("method.name=full", "optimizer.lr=3e-3", "federation.clients_per_round=5")
    setup = set_up(tmp_path, base, *CUT, *full, "federation.num_rounds=12")
    run(setup)
    rows = [json.loads(x) for x in (Path(setup.config.task.data) / "imdb.test.jsonl").open()]
    assert [path.name for path in export_finetuned(tmp_path)] == ["export"]
    last = records(tmp_path, "eval")[-1]
    assert last["score"] > 0.9 and set(last["stages"]) == {"0", "1"}
    assert accuracy(tmp_path / "export", rows) == pytest.approx(last["score"])
    assert "stage 0 to 1" in write_finetune_report(tmp_path).read_text()

    assert [path.name for path in export_finetuned(houlsby)] == ["adapter"]
    model = AutoModelForSequenceClassification.from_pretrained(
        setup.config.model.path, num_labels=2
    )
    tokenizer = AutoTokenizer.from_pretrained(setup.config.model.path)
    adapters.init(model)
    model.load_adapter(str(houlsby / "adapter"), set_active=True)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        guesses = model.eval()(**batch).logits.argmax(-1).tolist()
    score = sum(g == row["label"] for g, row in zip(guesses, rows, strict=True)) / len(rows)
    assert score == pytest.approx(records(houlsby, "eval")[-1]["score"])
    weights = learnt(houlsby / "checkpoints/round_000002")
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in weights.items())


def test_stages_that_were_killed_resume_as_if_they_had_not_been(
    tmp_path: Path, base: list[str]
) -> None:
    kept = (*CUT, "federation.num_rounds=3", "federation.optimizer_state=keep",
            "federation.average.aux_head=false", "scenario.dropout_share=0.3")  # fmt: skip
    run(set_up(tmp_path / "whole", base, *kept))

    class Killed(Exception):
        pass

    def kill(kind: str, record: Any) -> None:
        if kind == "round" and record["round"] == 1:
            raise Killed

    with pytest.raises(Killed):
        run(set_up(tmp_path / "cut", base, *kept), emit=kill)
    resumed = set_up(tmp_path / "cut", [])
    assert resumed.checkpoint is not None and resumed.checkpoint.position.round_id == 1
    run(resumed)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    for mine, theirs in zip(
        stages(tmp_path / "cut", 3), stages(tmp_path / "whole", 3), strict=True
    ):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_head_at_home_drops_out_the_same_wherever_the_run_stops(
    tmp_path: Path, base: list[str]
) -> None:
    """Streamed, it lags behind the stage that shares its process."""
    model = small_folder(tmp_path / "model", hidden_dropout_prob=0.3)
    own = [*CUT, "pipeline.head_location=client", "federation.num_rounds=1", f"model.path={model}",
           "federation.num_local_epochs=0", "federation.num_local_steps=4"]  # fmt: skip
    run(set_up(tmp_path / "whole", base, *own))
    assert run(set_up(tmp_path / "stopped", base, *own), stop=(0, 6)) == Position(step=6)
    assert run(set_up(tmp_path / "stopped", [])) is None
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    for mine, theirs in zip(
        stages(tmp_path / "stopped", 1), stages(tmp_path / "whole", 1), strict=True
    ):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_family_that_cannot_be_cut_is_refused(tmp_path: Path, base: list[str]) -> None:
    other = small_folder(tmp_path / "other", "albert")
    with pytest.raises(ConfigError, match=r"^pipeline.cut: expected a model of roberta or bert"):
        set_up(tmp_path / "run", base, *CUT, f"model.path={other}")
    assert not (tmp_path / "run").exists()


def test_a_client_whose_loss_is_nan_on_one_stage_is_left_out_on_both(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two clients the other's weights are the average then."""
    loss, train, end_turn = StageEngine._loss, StagedReplica.train, StagedReplica.end_turn
    hosted: list[int] = []
    trained: dict[int, list[dict[str, torch.Tensor]]] = {}

    def train_and_note(replica: StagedReplica, turn: Turn, *more: Any, **keywords: Any) -> Any:
        hosted[:] = [turn.client_id]
        return train(replica, turn, *more, **keywords)

    def bad_loss(engine: StageEngine, batch: Any) -> Any:
        value = loss(engine, batch)
        return value * torch.nan if (engine.spec.stage_id, hosted) == (0, [bad]) else value

    def end_and_note(replica: StagedReplica, turn: Turn, **keywords: Any) -> None:
        trained[turn.client_id] = [
            {n: p.detach().clone() for n, p in engine.stage.named_parameters() if p.requires_grad}
            for engine in replica.stages
        ]
        end_turn(replica, turn, **keywords)

    monkeypatch.setattr(StageEngine, "_loss", bad_loss)
    monkeypatch.setattr(StagedReplica, "train", train_and_note)
    monkeypatch.setattr(StagedReplica, "end_turn", end_and_note)
    options = ("federation.num_rounds=1", "federation.clients_per_round=2")
    setup = set_up(tmp_path, base, *CUT, *PLAIN[1:], *options, "method.name=houlsby")
    bad, other = draw_round(setup.config, 0, 5)[0]
    run(setup)
    (record,) = records(tmp_path, "round")
    assert record["refused"] == [{"client": bad, "stage": 0, "step": 0, "what": "loss"}]
    assert np.isfinite(record["loss"])
    shares = {turn["client"]: turn["weight"] for turn in records(tmp_path, "turn")}
    assert shares == {bad: 0.0, other: 1.0}
    for averaged, own in zip(stages(tmp_path, 1), trained[other], strict=True):
        for name, tensor in averaged.items():
            torch.testing.assert_close(tensor, own[name], atol=1e-6, rtol=0, msg=name)
