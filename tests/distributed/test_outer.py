"""Outer rounds: sites that share no cluster, and weights and updates in folders between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpipe.data.corpus import prepare
from fedpipe.pipeline.optimizer import learning_rate
from fedpipe.report.writer import read_metrics
from fedpipe.run.outer import GLOBAL, GLOBAL_FACTS, UPDATE, UPDATE_FACTS, digest_of
from fedpipe.run.tensor_file import Layout, TensorFile, write_tensors
from fedpipe.run.update import decode, write_global
from tests.helpers.cli import Command, fedpipe
from tests.helpers.reference import Reference
from tests.helpers.runs import after_rounds
from tests.helpers.sites import MODEL, Consortium, Site, make_sites

LONG = ("federation.num_local_steps=60",)
"""A round that a test can end a run in the middle of."""


def _saved(command: Command, site: Site, name: str) -> None:
    """Wait until a run has saved a checkpoint."""
    state = site.run_dir / "checkpoints" / name / "state.json"
    command.wait_for(state.is_file, name)


def _plainly(consortium: Consortium, num_outer: int) -> list[dict[str, torch.Tensor]]:
    """Hierarchical FedAvg, each site in plain PyTorch: the weights before every outer round."""
    references = [Reference(s.config(), prepare(s.config())) for s in consortium.sites]
    weights = {n: torch.from_numpy(w) for n, w in consortium.weights(0).items()}
    found = [weights]
    for index in range(num_outer):
        changes, tokens = [], []
        for reference in references:
            inner = reference.config.outer.num_inner_rounds
            for of_stage in reference.weights:
                of_stage.update({n: weights[n].clone() for n in of_stage if n in weights})
            rounds = range(index * inner, (index + 1) * inner)
            reference.run(rounds)
            trained = {n: w for of_stage in reference.weights for n, w in of_stage.items()}
            changes.append({n: trained[n] - w for n, w in weights.items()})
            tokens.append(sum(t.num_tokens for r in rounds for t in reference.turns(r)))
        weights = {
            n: w + sum(t / sum(tokens) * c[n] for t, c in zip(tokens, changes, strict=True))
            for n, w in weights.items()
        }
        found.append(weights)
    return found


def test_sites_that_exchange_folders_are_hierarchical_fedavg_in_plain_pytorch(
    tmp_path: Path,
) -> None:
    consortium = Consortium(tmp_path, make_sites(tmp_path, 2, 1))
    consortium.run(2)
    expected = _plainly(consortium, 2)
    for index in (1, 2):
        weights = consortium.weights(index)
        for name, tensor in expected[index].items():
            np.testing.assert_allclose(weights[name], tensor.numpy(), atol=2e-6, err_msg=name)
        moved = max(float((w - expected[0][n]).abs().max()) for n, w in expected[index].items())
        assert moved > 1e-3


def test_the_first_update_is_what_an_ordinary_run_learns_bit_for_bit(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, [site := make_sites(tmp_path, 2)[0]])
    consortium.begin()
    consortium.hand_out(0)
    assert site.train().code == 0
    ordinary = site.folder / "ordinary"
    command = ("pretrain", "--run-dir", str(ordinary), *MODEL, *site.settings)
    finished = fedpipe(*command, "checkpoint.keep_last=9", folder=site.folder)
    assert finished.code == 0, finished.err
    update = TensorFile(site.round(0) / UPDATE)
    start = consortium.weights(0)
    stages = sorted((ordinary / "checkpoints" / "round_000002").glob("stage_*.safetensors"))
    trained = {n: f.read(n) for f in map(TensorFile, stages) for n in f.layouts}
    for name in update.layouts:
        assert np.array_equal(update.read(name), trained[name] - start[name]), name


def test_an_update_is_the_same_whenever_its_run_is_killed_or_moved(tmp_path: Path) -> None:
    settings = ("federation.optimizer_state=keep", "checkpoint.every_steps=1")
    undisturbed, disturbed = (
        Consortium(folder, make_sites(folder, 2, settings=settings))
        for folder in (tmp_path / "a", tmp_path / "b")
        if folder.mkdir() is None
    )
    undisturbed.run(2)
    site = disturbed.sites[0]
    disturbed.begin()
    for index in range(2):
        disturbed.hand_out(index)
        command = site.start()
        after_rounds(command, site.run_dir, 2 * index + 1)
        command.kill()
        site.move_inbox(f"outer_{index}")
        assert site.train().code == 0
        expected = undisturbed.sites[0].files(index)
        assert site.files(index) == expected
        # Killed between the two files of the update: the same again.
        (site.round(index) / UPDATE_FACTS).unlink()
        (site.round(index) / f".{UPDATE}.part").write_bytes(b"half")
        assert site.train().code == 0
        assert site.files(index) == expected
        again = site.train()
        assert again.code == 0
        ready = f"the update of outer round {index + 1} is ready, {site.round(index) / UPDATE}"
        assert again.out == f"{site.run_dir}: {ready}\n"
        assert site.files(index) == expected
        disturbed.advance(index)


def test_a_job_of_several_processes_leaves_the_update_of_a_local_run(tmp_path: Path) -> None:
    settings = ("pipeline.colocate=false",)
    consortium = Consortium(tmp_path, make_sites(tmp_path, 2, 2, settings=settings))
    here, job = consortium.sites
    job.settings = here.settings
    consortium.begin()
    consortium.hand_out(0)
    assert here.train().code == 0
    command = ("submit", "pretrain", "--cluster", "local", "--follow")
    arguments = (*command, "--run-dir", str(job.run_dir), *job.overrides())
    for _ in range(2):  # a second time there is nothing to do
        finished = fedpipe(*arguments, folder=job.folder)
        assert finished.code == 0, finished.err
        assert job.files(0) == here.files(0)
    assert "the update of outer round 1 is ready" in finished.out


def test_a_site_that_misses_outer_rounds_goes_on_with_the_newest(tmp_path: Path) -> None:
    settings = (
        "federation.num_rounds=8", "federation.optimizer_state=keep", "checkpoint.every_steps=20",
        *LONG,
    )  # fmt: skip
    consortium = Consortium(tmp_path, [site := make_sites(tmp_path, 2, settings=settings)[0]])
    consortium.begin()
    consortium.hand_out(0)
    command = site.start()  # it ends in the middle of the round after its first one
    _saved(command, site, "round_000001")
    command.kill()
    layouts = TensorFile(consortium.round(0) / GLOBAL).layouts
    newest = iter(consortium.weights(0).values())
    write_global(consortium.round(3), 3, layouts, newest, config=site.config())
    consortium.hand_out(3)
    assert site.train().code == 0
    state = json.loads((site.run_dir / "checkpoints/round_000008/state.json").read_text())
    assert state["skipped"] == [[1, 6]]
    records = read_metrics(site.run_dir / "metrics.jsonl")
    rounds = [r for r in records if r["kind"] == "round"]
    assert [r["round"] for r in rounds] == [0, 6, 7]
    assert site.facts(3)["tokens"] == sum(r["tokens"] for r in rounds[1:])
    for record in (r for r in records if r["kind"] == "step"):  # the consortium's place counts
        step = 60 * record["round"] + record["step"]
        assert record["lr"] == learning_rate(site.config().optimizer, step, total_steps=480)


Change = Callable[[Path, Site], None]


def _facts(**changed: object) -> Change:
    def change(folder: Path, site: Site) -> None:
        path = folder / GLOBAL_FACTS
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def _tensors(edit: Callable[[dict[str, np.ndarray]], None]) -> Change:
    def change(folder: Path, site: Site) -> None:
        file = TensorFile(folder / GLOBAL)
        tensors = {name: file.read(name) for name in file.layouts}
        edit(tensors)
        kinds = {"float32": "F32", "float64": "F64"}
        layouts = {n: Layout(kinds[t.dtype.name], t.shape) for n, t in tensors.items()}
        write_tensors(folder / GLOBAL, layouts, iter(tensors.values()))
        _facts(sha256=digest_of(folder / GLOBAL))(folder, site)

    return change


_BIAS = "bert.encoder.layer.1.output.dense.bias"


def _spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors[_BIAS][3] = np.nan


def _truncate(folder: Path, site: Site) -> None:
    content = (folder / GLOBAL).read_bytes()
    (folder / GLOBAL).write_bytes(content[:-100])
    _facts(sha256=digest_of(folder / GLOBAL))(folder, site)


@pytest.mark.matrix(sample=3)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_facts(sha256="0" * 64), "expected SHA-256 000000000000"),
        (_facts(version=2), "expected version 1, got 2"),
        (_facts(round=5), "expected round 0"),
        (_facts(cut=[0, 1]), "expected pipeline.cut"),
        (_facts(vocabulary="1" * 64), "expected data.tokenizer"),
        (_facts(num_inner_rounds=3), "expected outer.num_inner_rounds 2"),
        (lambda folder, site: (folder / GLOBAL_FACTS).write_text("{"), "no JSON that says so"),
        (lambda folder, site: (folder / GLOBAL).unlink(), "No such file"),
        (lambda folder, site: shutil.rmtree(folder), "expected the weights of an outer round"),
        (_truncate, "as its header says"),
        (_tensors(lambda t: t.pop(_BIAS)), f"no {_BIAS}"),
        (_tensors(lambda t: t.update(more=t[_BIAS])), "a tensor more that it does not have"),
        (_tensors(lambda t: t.update({_BIAS: t[_BIAS][:-1]})), f"{_BIAS} as F32[31] instead of"),
        (_tensors(lambda t: t.update({_BIAS: t[_BIAS].astype(float)})), "as F64[32] instead of"),
        (_tensors(_spoil), "NaN or infinity in stage 1"),
    ],
)
def test_weights_that_are_not_this_models_are_refused_by_name(
    tmp_path: Path, change: Change, expected: str
) -> None:
    consortium = Consortium(tmp_path, [site := make_sites(tmp_path, 1)[0]])
    consortium.begin()
    consortium.hand_out(0)
    change(site.round(0), site)
    finished = site.train()
    assert finished.code == 2, finished.out + finished.err
    assert expected in finished.error
    assert not (site.round(0) / UPDATE).exists()


def test_another_base_in_the_middle_of_an_outer_round_is_refused(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, [site := make_sites(tmp_path, 1, settings=LONG)[0]])
    consortium.begin()
    consortium.hand_out(0)
    command = site.start()
    _saved(command, site, "round_000001")
    command.kill()
    _tensors(lambda t: t.update({_BIAS: t[_BIAS] + 1}))(site.round(0), site)
    assert "expected the weights that" in site.train().error


@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize(("wire", "share", "left"), [("int8", 1.05, 0.02), ("sparse", 0.03, 1.0)])
def test_what_narrow_updates_round_off_is_sent_later(
    wire: str, share: float, left: float, tmp_path: Path
) -> None:
    settings = ("federation.num_rounds=6", "checkpoint.keep_last=9", f"outer.wire={wire}")
    consortium = Consortium(tmp_path, [site := make_sites(tmp_path, 1, settings=settings)[0]])
    consortium.run(2)
    sent: dict[str, np.ndarray] = {}
    changed: dict[str, np.ndarray] = {}
    for index in range(2):
        base, update = consortium.weights(index), TensorFile(site.round(index) / UPDATE)
        layouts = {n: Layout("F32", t.shape) for n, t in base.items()}
        stages = (site.run_dir / f"checkpoints/round_{2 * index + 2:06d}").glob("stage_*")
        trained = {n: f.read(n) for f in map(TensorFile, stages) for n in f.layouts}
        for name, start in base.items():
            decoded = decode(
                update.read(name), layouts[name], wire, site.config().federation.density
            )
            sent[name] = sent.get(name, 0) + decoded
            changed[name] = changed.get(name, 0) + (trained[name] - start)
        size = (site.round(index) / UPDATE).stat().st_size
        header = 8192
        assert size < share * sum(t.size for t in base.values()) + header
    residual = TensorFile(site.run_dir / "outer_residual_000001.safetensors")
    for name, total in changed.items():
        np.testing.assert_allclose(sent[name] + residual.read(name), total, atol=1e-6)
        assert np.abs(residual.read(name)).max() <= left * np.abs(total).max() + 1e-6
