"""What leaves a client in real runs: the plan's bytes are the ledger's, and no label is in them."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpipe.commands.plan.plan import build_plan
from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData, save_manifest
from fedpipe.data.masking import MaskedBatch
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.topology import Grid
from fedpipe.models.split import StageRole
from fedpipe.report.writer import read_metrics
from fedpipe.run.run_dir import RunSetup
from tests.helpers.distributed import run_distributed
from tests.helpers.sniffer import Secrets, Sniffer
from tests.helpers.tiny import tiny_config, tiny_data

VOCAB = 8192
"""The packaged tokenizer's, from which the plan counts parameters."""
SMALLEST_SECRET = 1000
"""The text has no smaller id, so that no position, count or length looks like one."""
HOME = {"head_location": "client"}
ONE = {"num_replicas": 1}
SEQUENTIAL = {"objective": "end_to_end", "schedule": "sequential"}
Sections = dict[str, dict[str, Any]]


def _config(sections: Sections) -> RunConfig:
    base: Sections = {
        "model": {"vocab_size": VOCAB},
        "data": {"mask_probability": 0.4},  # 6 of 16 tokens
        "federation": {"num_rounds": 1, "num_local_steps": 2},
    }
    return tiny_config(**{k: base.get(k, {}) | sections.get(k, {}) for k in base | sections})


def _data(folder: Path) -> PreparedData:
    """Blocks of ids that nothing else can be taken for."""
    data = tiny_data(folder)
    rng = np.random.default_rng(11)
    for shard in (*data.train, *data.valid):
        blocks = rng.integers(SMALLEST_SECRET, VOCAB, (shard.num_blocks, shard.sequence_length))
        blocks[:, 0], blocks[:, -1] = data.cls_id, data.sep_id
        blocks.astype(shard.dtype).tofile(shard.path)
    return dataclasses.replace(data, vocab_size=VOCAB)


def _setup(config: RunConfig, folder: Path) -> RunSetup:
    data = _data(folder / "data")
    save_manifest(data, Path(data.directory))
    run_dir = folder / "run"
    run_dir.mkdir()
    return RunSetup(
        config=config, run_dir=run_dir, data_dir=data.directory, checkpoint=None,
        started_at=time.monotonic(),
    )  # fmt: skip


def _pretrain(env: ProcessEnv, setup: RunSetup) -> None:
    from fedpipe.commands.pretrain.run import Pretraining
    from fedpipe.federation.loop import run_rounds

    run_rounds(Pretraining, setup, env=env, emit=lambda kind, record: None)


# ----------------------------------------------------------------------------------- the ledger

MODES: dict[str, Sections] = {
    "head on the server": {},
    "U-shape": {"pipeline": HOME},
    "U-shape, heads of two server stages": {
        "pipeline": HOME | {"cut": [1, 2]},
        "federation": ONE,
    },
    "U-shape, back-propagation": {"pipeline": HOME | SEQUENTIAL, "federation": ONE},
    "FedBERT": {
        "pipeline": HOME | SEQUENTIAL | {"cut": [0]},
        "federation": ONE | {"server": "sequential"},
    },
    "FedBERT as published": {
        "data": {"padded_length": 18},
        "pipeline": HOME | SEQUENTIAL | {"cut": [0], "wire": ["fp32"]},
        "federation": ONE | {"server": "sequential"},
    },
    "padded, head on the server": {"data": {"padded_length": 18}, "federation": ONE},
    "back-propagation to the client": {
        "pipeline": {"objective": "end_to_end", "schedule": "1f1b"},
        "federation": ONE,
    },
    "int8": {"pipeline": HOME | {"wire": ["int8"]}, "federation": {"wire": "int8"}},
    "sparse": {"federation": {"wire": "sparse", "density": 0.03, "num_replicas": 3}},
    "a format per edge": {"pipeline": HOME | {"wire": ["bf16", "int8"]}, "federation": ONE},
    "parts that stay": {
        "pipeline": HOME,
        "federation": {"average": {"embeddings": False, "aux_head": False, "final_head": False}},
    },
    "a robust rule": {
        "federation": {"aggregation": {"rule": "median", "weighting": "uniform"}},
    },
    "a shared server": {"pipeline": HOME, "federation": {"server": "shared"}},
    "two ranks inside a client": {
        "pipeline": HOME,
        "federation": ONE | {"data_parallel_degree": 2},
    },
    "a share of masked tokens that changes": {
        "data": {"mask_probability": [0.4, 0.2], "mask_switch": 0.3},
        "pipeline": HOME | {"cut": [1, 2], "wire": ["int8"]},
        "federation": ONE | {"num_rounds": 3},
    },
    "two client stages": {
        "pipeline": HOME | {"cut": [1, 2], "num_client_stages": 2},
        "federation": ONE,
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_says_what_the_ledger_of_a_run_counts(mode: str, tmp_path: Path) -> None:
    config = _config(MODES[mode])
    setup = _setup(config, tmp_path)
    run_distributed(_pretrain, config.world_size, setup)
    plan, federation = build_plan(config), config.federation
    records = [r for r in read_metrics(setup.run_dir / "metrics.jsonl") if r["kind"] == "traffic"]
    assert len(records) == federation.num_rounds
    turns = federation.clients_per_round * federation.num_local_steps * plan.messages_per_step
    for measured in records:
        messages = {  # a later one takes the place of an earlier one
            (t.entry, t.peer, t.what): t.nbytes or 0
            for t in sorted(plan.transfers, key=lambda t: t.first_round)
            if t.when == "micro-batch" and t.first_round <= measured["round"]
        }
        planned: Counter[str] = Counter()
        for (entry, *_), nbytes in messages.items():
            planned[entry] += turns * nbytes
        crossing = {int(entry.partition("/")[2]) for entry in planned}
        assert crossing
        for index in crossing:
            edge = measured["edges"][index]
            for direction in ("forward", "backward"):
                assert edge[f"bytes_{direction}"] == planned[f"{direction}/{index}"], edge

    ranks = federation.num_replicas * federation.data_parallel_degree
    own = sum(
        t.nbytes or 0 for t in plan.transfers if (t.entry, t.direction) == ("fedavg", "leaves")
    )
    servers = [stage for stage in plan.stages if stage.spec.role is StageRole.SERVER]
    assert measured["collectives"]["fedavg"] == ranks * (own + sum(s.fedavg_bytes for s in servers))


# ---------------------------------------------------------------------------------- the sniffer


def _sniffed(env: ProcessEnv, setup: RunSetup) -> dict[str, Any]:
    """Pre-train; return what the search of everything that a client has sent came to."""
    sniffer = Sniffer()
    sniffer.install()
    batches: list[MaskedBatch] = []
    secrets = Secrets(smallest=SMALLEST_SECRET)
    _overhear(batches, secrets)
    _pretrain(env, setup)
    is_client = bool(batches)  # only a first stage reads text
    if not is_client:
        return {}
    messages = [sent for sent in sniffer.sent if sent.operation == "send"]
    positions = {tuple(row) for batch in batches for row in batch.positions.tolist()}
    rows = [
        tuple(row)
        for message in messages
        if message.dtype.startswith("torch.int")
        for row in message.numbers().reshape(-1, message.shape[-1]).tolist()
    ]
    return {
        "secrets": len(secrets),
        "found": Counter(
            (sent.operation, name) for sent in sniffer.sent for name in secrets.find(sent)
        ),
        "operations": Counter(sent.operation for sent in sniffer.sent),
        "shapes": {(m.dtype, m.shape) for m in messages},
        "integers": {"positions" if row in positions else "other" for row in rows},
    }


def _overhear(batches: list[MaskedBatch], secrets: Secrets) -> None:
    """Note every batch that this process masks, and what of it nobody else may see."""
    from fedpipe.data import masking

    mask_blocks = masking.mask_blocks

    def overheard(blocks: np.ndarray, **keywords: Any) -> MaskedBatch:
        batch = mask_blocks(blocks, **keywords)
        batches.append(batch)
        secrets.add("labels", batch.labels)
        secrets.add("text", blocks)
        secrets.add("input ids", batch.input_ids)
        return batch

    masking.mask_blocks = overheard


def _clients(sections: Sections, folder: Path) -> list[dict[str, Any]]:
    config = _config(sections)
    results = [r for r in run_distributed(_sniffed, config.world_size, _setup(config, folder)) if r]
    assert len(results) == config.federation.num_replicas
    for client in results:
        assert client["secrets"] > 100, "there is something to find"
        assert client["operations"]["gather"] > 3, "records were sent"
        assert client["operations"]["send"] > 10, "messages were sent"
    return results


@pytest.mark.parametrize(
    "sections",
    [
        {"pipeline": HOME | {"cut": [1]}},
        {"pipeline": HOME | {"wire": ["int8"]}, "federation": {"wire": "int8"}},
        {"pipeline": HOME | SEQUENTIAL},
    ],
    ids=["local loss", "int8", "back-propagation"],
)
def test_no_label_and_no_token_id_is_in_anything_that_a_client_sends(
    sections: Sections, tmp_path: Path
) -> None:
    for client in _clients(sections, tmp_path):
        assert not client["found"]
        assert client["integers"] == {"positions"}


def test_a_client_sends_its_activations_and_masked_gradients_and_no_other_tensor(
    tmp_path: Path,
) -> None:
    sections = {"pipeline": HOME}
    transfers = build_plan(_config(sections)).transfers
    leaving = {
        t.form
        for t in transfers
        if t.direction == "leaves" and (t.when == "micro-batch" or "opens" in t.what)
    }
    for client in _clients(sections, tmp_path):
        assert not client["found"]
        # the validation's messages have the same shapes
        sent = {f"{shape} {dtype.removeprefix('torch.')}" for dtype, shape in client["shapes"]}
        assert sent == leaving


def test_the_same_search_finds_the_labels_that_go_to_a_head_on_the_server(tmp_path: Path) -> None:
    for client in _clients({}, tmp_path):
        assert ("send", "labels") in client["found"]
        assert client["integers"] == {"positions", "other"}


def _padding(env: ProcessEnv) -> list[bytes]:
    """What is sent beyond the values themselves where another rank's are longer."""
    from fedpipe.distributed.comm import Comm

    sniffer = Sniffer()
    sniffer.install()
    grid = Grid(num_stages=2, num_replicas=1, data_parallel_degree=1)
    comm = Comm(grid, env, edges=())
    value = "x" * (1 if env.rank else 4000)
    for _ in range(100):  # what memory holds that nobody uses any more
        torch.full((4000 + len(pickle.dumps("")),), 7, dtype=torch.uint8)
    comm.gather(value)
    comm.agree(False, message=value)
    content = pickle.dumps(value)
    sent = [s.payload for s in sniffer.sent if len(s.payload) > 4000]
    comm.close()
    assert len(sent) == 2 and all(payload.startswith(content) for payload in sent)
    return [payload[len(content) :] for payload in sent]


def test_what_pads_a_value_to_the_length_of_others_is_zero() -> None:
    _, short = run_distributed(_padding, 2)
    assert all(len(padding) > 3900 and not any(padding) for padding in short)
