"""Rounds of a federated fine-tuning: averages, many clients on few workers, resume, output."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedpipe.commands.finetune.export import export_finetuned
from fedpipe.commands.finetune.prepared import DATA, FinetuneSetup, TuningData
from fedpipe.commands.finetune.report import result_table, write_finetune_report
from fedpipe.commands.finetune.run import Finetuning
from fedpipe.commands.finetune.setup import set_up_finetune
from fedpipe.commands.finetune.turns import draw_round, plan_tuning_round
from fedpipe.commands.finetune.whole import WholeReplica
from fedpipe.distributed.comm import Comm
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import Moment, Watch
from fedpipe.errors import CheckpointError, ConfigError, CorpusError
from fedpipe.federation.cohort import Turn
from fedpipe.federation.loop import run_rounds
from fedpipe.models.lower import LowerLayers
from fedpipe.models.peft import lora_updates
from fedpipe.report.writer import read_metrics
from fedpipe.run.checkpoint import CheckpointWriter, Position
from fedpipe.run.run_dir import resolve
from tests.helpers.distributed import run_distributed
from tests.helpers.encoders import write_jsonl
from tests.helpers.tuned import small_folder, small_task

TIMES = ("seconds", "sync_s", "memory_bytes", "sync_bytes", "replica")
BASE = (
    "task.name=imdb", "task.max_length=12", "batch_size=8", "federation.num_clients=5",
    "federation.clients_per_round=3", "federation.num_replicas=1", "federation.num_rounds=4",
    "federation.num_local_epochs=1", "optimizer.lr=1e-2", "task.split=dirichlet",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tiny model and a tiny task."""
    root = tmp_path_factory.mktemp("base")
    model, task = small_folder(root / "model"), small_task(root / "task")
    return [*BASE, f"model.path={model}", f"task.data={task}"]


def set_up(
    run_dir: Path,
    base: list[str],
    *overrides: str,
    notify: Callable[[str], None] = lambda line: None,
) -> FinetuneSetup:
    own = {override.partition("=")[0] for override in overrides}
    kept = [override for override in base if override.partition("=")[0] not in own]
    asked = resolve("finetune", None, [*kept, *overrides], str(run_dir))
    return set_up_finetune(*asked, notify=notify)


def alone() -> ProcessEnv:
    return ProcessEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous="")


def run(
    setup: FinetuneSetup,
    emit: Callable[[str, Any], None] = lambda *_: None,
    *,
    stop: Moment | None = None,
) -> Position | None:
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}), Watch() as watch:
        if stop is not None:  # as the ranks agree upon when one is asked to
            watch.stop.freeze()
            watch.stop.settle(stop)
        return run_rounds(Finetuning, setup, env=alone(), emit=emit, watch=watch)


def _on_rank(env: ProcessEnv, setup: FinetuneSetup) -> None:
    run_rounds(Finetuning, setup, env=env, emit=lambda kind, value: None)


def records(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in TIMES}
        for r in found
        if not kinds or r["kind"] in kinds
    ]


def weights(run_dir: Path, round_id: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/round_{round_id:06d}/weights.safetensors")


@pytest.fixture
def replica(tmp_path: Path, base: list[str]) -> Any:
    comms: list[Comm] = []

    def make(*overrides: str) -> tuple[WholeReplica, CheckpointWriter]:
        setup = set_up(tmp_path / f"run{len(comms)}", base, *overrides)
        for comm in comms:
            comm.close()
        comms.append(
            Comm(Grid(num_stages=1, num_replicas=1, data_parallel_degree=1), alone(), edges=())
        )
        data = TuningData.load(setup.run_dir / DATA)
        made = WholeReplica(setup.config, data, comm=comms[-1], run_dir=setup.run_dir)
        return made, CheckpointWriter(setup.run_dir, comm=comms[-1], keep_last=1)

    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        yield make
        for comm in comms:
            comm.close()


def train(
    made: tuple[WholeReplica, CheckpointWriter], shares: dict[int, float], round_id: int = 0
) -> None:
    for client_id, share in shares.items():
        turn = Turn(
            client_id=client_id, replica_id=0, num_steps=3, num_examples=0, num_tokens=0,
            weight=share,
        )  # fmt: skip
        replica, writer = made
        replica.begin_turn(turn, round_id=round_id, last_round=None)
        replica.train(
            turn, range(3), round_id=round_id, seen=0, lr=lambda step: 1e-2,
            on_step=lambda stage_id, result: None, until=lambda step: 3,
        )  # fmt: skip
        replica.end_turn(turn, round_id=round_id, last_round=None, writer=writer)
    made[0].synchronize(len(shares))


def test_the_average_is_the_weighted_mean_of_what_clients_would_have_sent(replica: Any) -> None:
    sent = []
    for client_id in (0, 1):
        made = replica()
        train(made, {client_id: 1.0})
        sent.append({n: p.detach().clone() for n, p in made[0].parameters.items()})
    together = replica()
    train(together, {0: 0.25, 1: 0.75})
    for name, parameter in together[0].parameters.items():
        expected = 0.25 * sent[0][name] + 0.75 * sent[1][name]
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0)


def products(replica: WholeReplica) -> list[torch.Tensor]:
    return [u.weight.detach() + u.product() for u in lora_updates(replica.model)]


def test_the_product_average_is_the_mean_of_products_and_factors_is_not(replica: Any) -> None:
    sent = []
    for client_id in (0, 1):
        made = replica()
        train(made, {client_id: 1.0})
        sent.append(products(made[0]))
    expected = [0.25 * a + 0.75 * b for a, b in zip(*sent, strict=True)]
    frozen = [u.weight.detach().clone() for u in lora_updates(replica()[0].model)]

    def distance(made: tuple[WholeReplica, CheckpointWriter]) -> float:
        """Error of the averaged update, over the update."""
        off = zip(products(made[0]), expected, frozen, strict=True)
        return max(float((p - e).norm() / (e - w).norm()) for p, e, w in off)

    factors, exact = replica(), replica("method.lora_average=product")
    train(factors, {0: 0.25, 1: 0.75})
    assert distance(factors) > 0.05
    train(exact, {0: 0.25, 1: 0.75})
    assert distance(exact) < 1e-5
    for name, parameter in exact[0].parameters.items():  # A and B are averaged all the same
        torch.testing.assert_close(parameter, factors[0].parameters[name], atol=1e-6, rtol=0)
    assert exact[0].products.residual_numel(2) == 4 * 8 * (32 + 32)  # 4 matrices, rank 8


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_leaves_what_it_has_scored_and_says_what_it_sent(
    tmp_path: Path, base: list[str], name: str
) -> None:
    setup = set_up(
        tmp_path, base, f"method.name={name}", "federation.num_rounds=6", "optimizer.lr=3e-3",
        "federation.clients_per_round=5",
    )  # fmt: skip
    assert run(setup) is None
    score = records(tmp_path, "eval")[-1]["score"]
    assert name == "lora" or score > 0.9
    sent = {key: tensor.numel() for key, tensor in weights(tmp_path, 6).items()}
    if name == "lora":
        assert all("lora" in key or key.startswith("classifier") for key in sent)
    numel = sum(sent.values())
    assert {r["bytes_up"] for r in records(tmp_path, "traffic")} == {5 * numel * 4}
    assert f"{numel:,} trained" in (tmp_path / "plan.txt").read_text()
    assert "5 of 5 clients" in (tmp_path / "plan.txt").read_text()

    written = [path.name for path in export_finetuned(tmp_path)]
    assert written == (["adapter", "export"] if name == "lora" else ["export"])
    rows = [json.loads(x) for x in (Path(setup.config.task.data) / "imdb.test.jsonl").open()]
    assert accuracy(tmp_path / "export", rows) == pytest.approx(score)
    page = write_finetune_report(tmp_path).read_text()
    assert "label entropy" in page and (tmp_path / "scores.png").is_file()
    assert "accuracy" in result_table([tmp_path])


@torch.no_grad()
def accuracy(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Score a folder with transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    guesses = model(**batch).logits.argmax(-1).tolist()
    assert model.config.id2label == {0: "negative", 1: "positive"}
    return sum(g == row["label"] for g, row in zip(guesses, rows, strict=True)) / len(rows)


def test_a_tokenizer_that_pads_with_another_token_than_roberta_is_refused(
    tmp_path: Path, base: list[str]
) -> None:
    """Its positions begin after the padding token: they would all be shifted."""
    model = small_folder(tmp_path / "model", "roberta")  # of pad token 1; the tokenizer's is 0
    match = r"^model.path: expected a tokenizer that pads with token 1 .* begin, got 0\. Save"
    with pytest.raises(ConfigError, match=match):
        set_up(tmp_path / "run", base, f"model.path={model}")


def relabel(file: Path) -> None:
    """Let a head be that of other labels."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"label2id": {"no": 0, "yes": 1}}), encoding="utf-8")


def test_a_run_goes_on_from_an_adapter(tmp_path: Path, base: list[str]) -> None:
    run(set_up(tmp_path / "first", base, "federation.num_rounds=1"))
    export_finetuned(tmp_path / "first")
    adapter = f"method.path={tmp_path / 'first/adapter'}"
    run(set_up(tmp_path / "second", base, adapter, "federation.num_rounds=1", "optimizer.lr=1e-9"))
    after = weights(tmp_path / "second", 1)
    for key, tensor in weights(tmp_path / "first", 1).items():
        torch.testing.assert_close(tensor, after[key], atol=1e-6, rtol=0)
    relabel(tmp_path / "first/adapter/head_config.json")
    lines: list[str] = []
    set_up(tmp_path / "relabelled", base, adapter, notify=lines.append)
    assert (
        f"method.path: the head in {tmp_path / 'first/adapter'} has other labels, 'no, yes':"
        " it is not used, and the head of the task starts with random weights"
    ) in lines
    with pytest.raises(CheckpointError, match=r"^method.path: expected an adapter of method.name"):
        set_up(tmp_path / "third", base, adapter, "method.rank=4")
    other = small_folder(tmp_path / "other", "distilbert")
    with pytest.raises(CheckpointError, match=r"the adapter of another base model: set model.path"):
        set_up(tmp_path / "fourth", base, adapter, f"model.path={other}")


def test_bf16_is_what_the_model_computes_in_and_not_what_it_keeps(
    tmp_path: Path, base: list[str]
) -> None:
    last = {}
    for precision in ("auto", "fp32", "bf16"):
        run_dir = tmp_path / precision
        run(set_up(run_dir, base, f"model.precision={precision}"))
        assert {t.dtype for t in weights(run_dir, 4).values()} == {torch.float32}
        last[precision] = records(run_dir, "round")[-1]["loss"]
    assert last["auto"] == last["fp32"] != last["bf16"], "auto is fp32 on a CPU"
    assert last["bf16"] == pytest.approx(last["fp32"], rel=0.05)


def test_two_workers_train_the_same_model_as_one(tmp_path: Path, base: list[str]) -> None:
    scenario = ("scenario.dropout_share=0.3", "scenario.straggler_share=0.3",
                "federation.num_rounds=2", "federation.clients_per_round=5")  # fmt: skip
    one = set_up(tmp_path / "one", base, *scenario)
    run(one)
    two = set_up(tmp_path / "two", base, *scenario, "federation.num_replicas=2")
    run_distributed(_on_rank, 2, two)
    for name, tensor in weights(tmp_path / "one", 2).items():
        torch.testing.assert_close(tensor, weights(tmp_path / "two", 2)[name], atol=2e-5, rtol=0)
    mine, theirs = (records(tmp_path / name, "round") for name in ("one", "two"))
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert (a["clients"], a["dropped"]) == (b["clients"], b["dropped"])


def test_every_example_runs_through_the_lower_layers_once(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run_lower = LowerLayers.run

    def counted(lower: LowerLayers, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        runs.append(len(inputs["input_ids"]))
        return run_lower(lower, inputs)

    monkeypatch.setattr(LowerLayers, "run", counted)
    setup = set_up(tmp_path / "spared", base, "method.first_layer=1")
    run(setup)
    assert 96 < sum(runs) <= 96 + 48  # who is never drawn is scored only
    assert "embeddings and 1 layer run once per example" in (setup.run_dir / "plan.txt").read_text()
    spared = records(tmp_path / "spared", "round", "eval")

    monkeypatch.setattr(WholeReplica, "_lower_layers", lambda *_: nullcontext())
    run(set_up(tmp_path / "whole", base, "method.first_layer=1"))
    whole = records(tmp_path / "whole", "round", "eval")
    assert [r["loss"] for r in spared if "loss" in r] == pytest.approx(
        [r["loss"] for r in whole if "loss" in r], abs=1e-5
    )
    assert [r["score"] for r in spared if "score" in r] == pytest.approx(
        [r["score"] for r in whole if "score" in r]
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("federation.optimizer_state=keep", "federation.average.final_head=false",
         "scenario.dropout_share=0.3"),
        ("federation.server_optimizer.name=fedadam", "federation.server_optimizer.lr=0.1"),
        ("method.lora_average=product", "federation.clients_per_round=2"),
        ("method.first_layer=1",),
    ],
)  # fmt: skip
def test_a_run_that_was_killed_resumes_as_if_it_had_not_been(
    tmp_path: Path, base: list[str], overrides: tuple[str, ...]
) -> None:
    run(set_up(tmp_path / "whole", base, *overrides))

    class Killed(Exception):
        pass

    def kill(kind: str, record: Any) -> None:
        if kind == "round" and record["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        run(set_up(tmp_path / "cut", base, *overrides), emit=kill)
    resumed = set_up(tmp_path / "cut", [])
    assert resumed.checkpoint is not None and resumed.checkpoint.position.round_id == 2
    run(resumed)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    expected = weights(tmp_path / "whole", 4)
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "cut", 4).items())


def test_a_kept_head_stays_with_its_client(tmp_path: Path, base: list[str]) -> None:
    setup = set_up(
        tmp_path, base, "federation.average.final_head=false", "federation.num_rounds=2",
        "federation.clients_per_round=5",
    )  # fmt: skip
    run(setup)
    files = sorted((tmp_path / "clients").glob("*/*round_000001.pt"))
    assert len(files) == 5
    heads = [torch.load(f, weights_only=True)["kept"]["classifier.weight"] for f in files]
    assert not torch.equal(heads[0], heads[1])
    numel = sum(t.numel() for n, t in weights(tmp_path, 2).items() if "classifier" not in n)
    assert records(tmp_path, "traffic")[0]["client_bytes_up"] == numel * 4


@pytest.mark.parametrize(
    "rule",
    [("median",), ("trimmed_mean", "federation.aggregation.num_byzantine=1"),
     ("krum", "federation.aggregation.num_byzantine=1")],
)  # fmt: skip
def test_robust_rules_withstand_lost_clients(
    tmp_path: Path, base: list[str], rule: tuple[str, ...]
) -> None:
    run(
        set_up(
            tmp_path, base, f"federation.aggregation.rule={rule[0]}", *rule[1:],
            "federation.aggregation.weighting=uniform", "federation.clients_per_round=5",
            "scenario.dropout_share=0.2", "federation.num_rounds=3",
        )
    )  # fmt: skip
    rounds = records(tmp_path, "round")
    assert any(r["dropped"] for r in rounds)
    assert all(np.isfinite(list(t.flatten())).all() for t in weights(tmp_path, 3).values())


def test_a_round_whose_clients_are_all_lost_changes_nothing(
    tmp_path: Path, base: list[str]
) -> None:
    run(set_up(tmp_path, base, "scenario.dropout_share=0.97", "federation.num_rounds=2",
               "federation.clients_per_round=1"))  # fmt: skip
    rounds = records(tmp_path, "round")
    assert [r["clients"] for r in rounds] == [[], []]
    first, second = weights(tmp_path, 1), weights(tmp_path, 2)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        (("method.name=compacter",), ConfigError, r"^method.name: expected a method that bert has"),
        (("task.name=causal-lm",), ConfigError, r"^model.path: expected a model for causal-lm"),
        (("task.name=sentimant",), ConfigError, r"^task.name: expected one of causal-lm, imdb, "),
        (("model.path=nowhere",), ConfigError, r"^model.path: expected a Hugging Face folder with"),
        (("task.data=nowhere",), CorpusError, r"^task.data: expected a folder, hf:NAME or"),
        (("task.split=column", "task.column=ward"), CorpusError, r"^task.data: expected a column"),
        (("federation.server=shared", "federation.num_local_epochs=0"), ConfigError,
         r"^federation.server: expected replicated in"),
        (("federation.data_parallel_degree=2",), ConfigError, r"^federation.data_parallel_degree"),
        (("federation.average.embeddings=false",), ConfigError, r"^federation.average.embeddings"),
        (("method.first_layer=2",), ConfigError, r"^method.first_layer: expected a layer below 2"),
        (("method.lora_average=product", "method.name=ia3"), ConfigError,
         r"^method.lora_average: expected factors without method.name=lora"),
        (("method.lora_average=product", "federation.server_optimizer.name=fedadam"), ConfigError,
         r"^federation.server_optimizer.name: expected fedavg with method.lora_average=product"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_round(
    tmp_path: Path, base: list[str], overrides: tuple[str, ...], error: Any, match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        set_up(tmp_path, base, *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_bad_row_is_left_out_with_its_owner_and_said_and_many_are_refused(
    tmp_path: Path, base: list[str]
) -> None:
    task = small_task(tmp_path / "task")
    path = task / "imdb.train.jsonl"
    rows = path.read_text("utf-8")
    bad = '{"text": "good", "label": "meh", "site": "s0"}\n'
    path.write_text(bad + rows, encoding="utf-8")
    own = (f"task.data={task}", "task.split=column", "task.column=site", "federation.num_clients=5")
    set_up(tmp_path / "run", base, *own)
    plan = (tmp_path / "run/plan.txt").read_text("utf-8")
    expected = "1 of 97 rows; first: expected one of negative, positive as label of imdb, got 'meh'"
    assert f"left out of train: {expected} in imdb.train.jsonl:1." in plan
    data = TuningData.load(tmp_path / "run" / DATA)
    assert [fact.num_examples for fact in data.facts] == [20, 19, 19, 19, 19]
    path.write_text(6 * bad + rows, encoding="utf-8")
    with pytest.raises(
        CorpusError,
        match=r"^task.data: expected one of negative, positive as label .*:1\. .* 6 of 102 rows",
    ):
        set_up(tmp_path / "other", base, *own)


def test_sequences_beyond_what_the_model_was_trained_on_are_named(
    tmp_path: Path, base: list[str]
) -> None:
    folder = small_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(folder)
    lines: list[str] = []
    for length in (12, 8):
        own = (f"model.path={folder}", f"task.max_length={length}")
        set_up(tmp_path / str(length), base, *own, notify=lines.append)
    named = [line for line in lines if "task.max_length=8 may score better" in line]
    assert len(named) == 1


def test_a_directory_with_another_run_is_refused(tmp_path: Path, base: list[str]) -> None:
    run(set_up(tmp_path, base, "federation.num_rounds=1"))
    with pytest.raises(
        CheckpointError, match=r"of seed \(1 instead of 0\), method.rank \(4 instead of 8\)\."
    ):
        set_up(tmp_path, base, "federation.num_rounds=1", "seed=1", "method.rank=4")


def test_a_client_without_a_label_is_allowed_and_named(tmp_path: Path, base: list[str]) -> None:
    said: list[str] = []
    set_up(tmp_path, base, "task.split=label_sorted", notify=said.append)
    assert "without examples of some labels, such as client 0" in said[-1]


def small_texts(folder: Path, *, sizes: tuple[int, int] = (60, 20)) -> Path:
    """Write texts that repeat themselves, of three wards."""
    folder.mkdir(parents=True)
    words = ["bad poor dull", "good fine great", "worse better bad"]
    for split, size in zip(("train", "valid"), sizes, strict=True):
        rows = [
            {"text": f"{words[i % 3]} " * 3, "ward": f"ward {i % 3}"} for i in range(size)
        ]  # fmt: skip
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"texts.{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def test_a_language_model_is_tuned_on_the_texts_of_wards(tmp_path: Path, base: list[str]) -> None:
    model, texts = small_folder(tmp_path / "gpt2", "gpt2"), small_texts(tmp_path / "texts")
    setup = set_up(
        tmp_path / "run", base, f"model.path={model}", f"task.data={texts}", "task.name=causal-lm",
        "task.split=column", "task.column=ward", "federation.num_clients=3",
        "method.name=pfeiffer", "method.reduction_factor=4",
    )  # fmt: skip
    run(setup)
    losses = [r["score"] for r in records(tmp_path / "run", "eval")]
    assert losses[-1] < losses[0]
    last = records(tmp_path / "run", "eval")[-1]
    assert last["worst"] == max(last["clients"].values())
    assert [path.name for path in export_finetuned(tmp_path / "run")] == ["adapter"]


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        (("task.data={nowhere}",), CorpusError, r"^task.data: expected a folder with a file \*tr"),
        (("task.column=site", "task.split=column"), CorpusError,
         r"^task.data: expected a column 'site' in .*texts.train.jsonl:1, got text, ward"),
        (("federation.average.final_head=false",), ConfigError,
         r"^federation.average.final_head: expected true with task.name=causal-lm"),
        (("federation.num_clients=4", "task.column=ward", "task.split=column"), CorpusError,
         r"^task.column: expected at least 4 values of 'ward' \(federation.num_clients\), got 3"),
        (("model.path={bert}",), ConfigError, r"it reads text in both directions"),
        (("task.max_length=64",), ConfigError, r"^task.max_length: expected at most 40 \(the posi"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_learnt_from_are_refused(
    tmp_path: Path, base: list[str], overrides: tuple[str, ...], error: Any, match: str
) -> None:
    model, texts = small_folder(tmp_path / "gpt2", "gpt2"), small_texts(tmp_path / "texts")
    long = {"text": "bad " * 60, "ward": "ward 0"}
    with open(texts / "texts.train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    places = {"nowhere": tmp_path / "nowhere", "bert": small_folder(tmp_path / "bert")}
    own = [f"model.path={model}", f"task.data={texts}", "task.name=causal-lm",
           "federation.num_clients=3"]  # fmt: skip
    asked = [override.format(**places) for override in overrides]
    keys = {override.partition("=")[0] for override in asked}
    kept = [override for override in own if override.partition("=")[0] not in keys]
    with pytest.raises(error, match=match):
        set_up(tmp_path / "run", base, *kept, *asked)


def test_damaged_texts_and_other_formats_are_refused(tmp_path: Path, base: list[str]) -> None:
    model, texts = small_folder(tmp_path / "gpt2", "gpt2"), small_texts(tmp_path / "texts")
    (texts / "texts.train.jsonl").write_text('{"text": "bad"}\n[]\n', encoding="utf-8")
    own = (f"model.path={model}", f"task.data={texts}", "task.name=causal-lm")
    with pytest.raises(CorpusError, match=r"^task.data: expected a JSON object per line, got"):
        set_up(tmp_path / "run", base, *own)
    tables = tmp_path / "sst2"
    tables.mkdir()
    for split in ("train", "test"):
        (tables / f"{split}.tsv").write_text("sentence\tlabel\ngood\t1\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"^task.column: expected JSON lines or CSV, got GLUE"):
        set_up(tmp_path / "run", base, f"task.data={tables}", "task.name=sst2",
               "task.split=column", "task.column=site")  # fmt: skip


def test_a_model_that_transformers_does_not_know_is_refused(
    tmp_path: Path, base: list[str]
) -> None:
    model = small_folder(tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"model_type": "elsewhere"}))
    with pytest.raises(ConfigError, match=r"^model.path: expected a config.json of transformers"):
        set_up(tmp_path / "run", base, f"model.path={model}")
    (model / "config.json").write_text(json.dumps(content | {"vocab_size": 5}))
    with pytest.raises(CorpusError, match=r"^model.path: expected a tokenizer of the model's 5 to"):
        set_up(tmp_path / "run", base, f"model.path={model}")


def test_a_run_without_a_checkpoint_has_nothing_to_export(tmp_path: Path, base: list[str]) -> None:
    set_up(tmp_path, base)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint to export, got none"):
        export_finetuned(tmp_path)


def test_a_client_may_have_nothing_held_out_but_not_all_of_them(
    tmp_path: Path, base: list[str]
) -> None:
    rows = [{"text": "good", "label": i % 2, "site": f"s{i % 3}"} for i in range(12)]
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "imdb.train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    overrides = [f"task.data={folder}", "task.split=column", "task.column=site",
                 "federation.num_clients=3", "federation.clients_per_round=2",
                 "federation.num_rounds=1"]  # fmt: skip
    test = [row for row in rows if row["site"] != "s1"]
    (folder / "imdb.test.jsonl").write_text("\n".join(map(json.dumps, test)), encoding="utf-8")
    run(set_up(tmp_path / "run", base, *overrides))
    (record,) = records(tmp_path / "run", "eval")
    assert record["clients"].keys() == {"0", "2"}
    assert record["mean"] == pytest.approx(np.mean([*record["clients"].values()]))
    test = [row | {"site": "elsewhere"} for row in rows]
    (folder / "imdb.test.jsonl").write_text("\n".join(map(json.dumps, test)), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"^task.split: expected held-out examples for at least"):
        set_up(tmp_path / "other", base, *overrides)


def _spoil(monkeypatch: pytest.MonkeyPatch, client_id: int, *, round_id: int = 1) -> None:
    """Let the second loss of a client be NaN in one round."""
    train, step = WholeReplica.train, WholeReplica._step
    steps: list[int] = []

    def train_and_count(replica: WholeReplica, turn: Turn, asked: range, **keywords: Any) -> Any:
        hit = (turn.client_id, keywords["round_id"]) == (client_id, round_id) and asked.start < 2
        steps[:] = [1 - asked.start] if hit else []
        return train(replica, turn, asked, **keywords)

    def step_or_nan(replica: WholeReplica, *arguments: Any) -> Any:
        loss, norm = step(replica, *arguments)
        left = steps.pop() if steps else -1
        if left > 0:
            steps.append(left - 1)
        return (loss * torch.nan, norm) if left == 0 else (loss, norm)

    monkeypatch.setattr(WholeReplica, "train", train_and_count)
    monkeypatch.setattr(WholeReplica, "_step", step_or_nan)


def test_a_client_whose_loss_is_nan_is_left_out_of_the_average_and_of_its_own_state(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedEx-LoRA with a head that stays: factors, products, head and moments forget the turn."""
    options = (
        "method.lora_average=product", "federation.average.final_head=false",
        "federation.optimizer_state=keep", "federation.num_rounds=2", "checkpoint.keep_last=2",
        "federation.clients_per_round=4", "federation.num_local_epochs=2",
    )  # fmt: skip
    setup = set_up(tmp_path / "run", base, *options)
    cohorts = [draw_round(setup.config, round_id, 5)[0] for round_id in (0, 1)]
    bad = next(client for client in cohorts[1] if client in cohorts[0])
    _spoil(monkeypatch, bad)
    run(setup)
    rounds = records(tmp_path / "run", "round")
    assert [r["refused"] for r in rounds] == [
        [], [{"client": bad, "stage": 0, "step": 1, "what": "loss"}]
    ]  # fmt: skip
    shares = {
        r["client"]: r["weight"] for r in records(tmp_path / "run", "turn") if r["round"] == 1
    }
    assert shares[bad] == 0.0 and sum(shares.values()) == pytest.approx(1.0)
    kept = tmp_path / f"run/clients/client_{bad:04d}"
    before, after = (
        torch.load(kept / f"stage_00_data_00.round_{r:06d}.pt", weights_only=True) for r in (0, 1)
    )
    torch.testing.assert_close(after, before, atol=0, rtol=0)

    # The same round with a cohort that never had the client.
    without = set_up(tmp_path / "without", base, *options)
    _forget(monkeypatch, bad, round_id=1)
    run(without)
    for name, tensor in weights(tmp_path / "without", 2).items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(weights(tmp_path / "run", 2)[name], tensor, atol=1e-6, rtol=0)
    assert "Updates that were left out" in write_finetune_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("after", [2, 5], ids=["in the bad turn", "in a later turn"])
def test_a_refused_client_survives_a_stop_in_mid_round_bit_for_bit(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    options = (
        "method.lora_average=product", "federation.average.final_head=false",
        "federation.optimizer_state=keep", "federation.num_rounds=2",
        "federation.num_local_epochs=0", "federation.num_local_steps=4",
    )  # fmt: skip
    whole = set_up(tmp_path / "whole", base, *options)
    bad = draw_round(whole.config, 1, 5)[0][0]
    _spoil(monkeypatch, bad)
    run(whole)
    stopped = run(set_up(tmp_path / "stopped", base, *options), stop=(1, after))
    assert stopped == Position(round_id=1, step=after)
    assert run(set_up(tmp_path / "stopped", [])) is None
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    (refused,) = records(tmp_path / "whole", "round")[1]["refused"]
    assert (refused["client"], refused["step"]) == (bad, 1)
    expected = weights(tmp_path / "whole", 2)
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "stopped", 2).items())


def _forget(monkeypatch: pytest.MonkeyPatch, client_id: int, *, round_id: int) -> None:
    """Take a client out of the plan of a round."""
    from fedpipe.commands.finetune import run as module

    def planned(*arguments: Any, **keywords: Any) -> Any:
        plan = plan_tuning_round(*arguments, **keywords)
        if keywords["round_id"] != round_id:
            return plan
        turns = [turn for turn in plan.turns if turn.client_id != client_id]
        total = sum(turn.weight for turn in turns)
        shared = tuple(dataclasses.replace(t, weight=t.weight / total) for t in turns)
        return dataclasses.replace(plan, turns=shared)

    monkeypatch.setattr(module, "plan_tuning_round", planned)


def test_a_ner_task_of_ones_own_is_tuned_with_its_entity_types_and_its_owners(
    tmp_path: Path, base: list[str]
) -> None:
    """Wards own the sentences; good things and bad things are two types."""
    rng = np.random.default_rng(0)
    kinds = {"good": "Good", "great": "Good", "bad": "Bad", "poor": "Bad"}
    for split, size in (("train", 90), ("test", 30)):
        rows = []
        for index in range(size):
            words = rng.choice([*kinds, "fine", "dull"], size=5).tolist()
            tags = [f"B-{kinds[word]}" if word in kinds else "O" for word in words]
            rows.append({"word": words, "tag": tags, "ward": f"ward {index % 3}"})
        write_jsonl(tmp_path / f"things/{split}.jsonl", rows)
    text = "kind: ner\ncolumns: {words: word, tags: tag}\nlabels: [Good, Bad]\n"
    (tmp_path / "things/task.yaml").write_text(text, encoding="utf-8")
    lines: list[str] = []
    setup = set_up(
        tmp_path / "run", [o for o in base if not o.startswith("task.name")],
        f"task.data={tmp_path}/things", "task.split=column", "task.column=ward",
        "federation.num_clients=3", "federation.num_rounds=6", "method.name=full",
        notify=lines.append,
    )  # fmt: skip
    assert setup.config.task.name == "things"
    assert run(setup) is None
    scored = records(tmp_path / "run", "eval")[-1]
    assert scored["metric"] == "entity_f1" and scored["score"] > 0.9
    assert len(scored["clients"]) == 3
    labels = TuningData.load(tmp_path / "run" / DATA).task.labels
    assert labels == ("O", "B-Good", "I-Good", "B-Bad", "I-Bad")
    export_finetuned(tmp_path / "run")
    exported = json.loads((tmp_path / "run/export/config.json").read_text())
    assert [exported["id2label"][str(index)] for index in range(5)] == list(labels)
    write_finetune_report(tmp_path / "run")
    assert "things" in (tmp_path / "run/report.md").read_text("utf-8")
    # a file that names another task, and a name that is neither known nor described
    with pytest.raises(
        ConfigError, match=r"^task.name: expected things, the task of .*, got 'rte'"
    ):
        set_up(tmp_path / "a", base, f"task.file={tmp_path}/things", "task.name=rte")
    with pytest.raises(ConfigError, match=r"^task.name: expected one of causal-lm, .*things\?$"):
        set_up(tmp_path / "b", base, f"task.data={tmp_path}/things", "task.name=thing")


def test_a_rank_correlation_of_ones_own_task_is_the_score_of_a_fine_tuning(
    tmp_path: Path, base: list[str]
) -> None:
    for split, size in (("train", 40), ("test", 20)):
        words = ["bad", "dull", "fine", "great"]
        rows = "".join(f"{words[i % 4]},{i % 4}.5\n" for i in range(size))
        (tmp_path / f"{split}.csv").write_text(f"text,pain\n{rows}", encoding="utf-8")
    text = "name: pain\nkind: regression\ncolumns: {label: pain}\nmetric: spearman\n"
    (tmp_path / "pain.yaml").write_text(text, encoding="utf-8")
    own = [o for o in base if not o.startswith(("task.name", "task.data"))]
    setup = set_up(tmp_path / "run", own, f"task.file={tmp_path}/pain.yaml", "method.name=full")
    assert run(setup) is None
    scored = records(tmp_path / "run", "eval")[-1]
    assert scored["metric"] == "spearman" and 0 < scored["score"] <= 1
