"""Coordinator and site do not trust each other, nor what others have left in their folders."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import yaml
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.streaming.download_service import ProduceRC

from fedpipe.commands.consortium import controller, kits
from fedpipe.commands.consortium.config import read_consortium, settings_for
from fedpipe.commands.consortium.controller import DECLINED, ORDERS, OuterRound
from fedpipe.commands.consortium.exchange import Folders
from fedpipe.commands.consortium.flare import fetch
from fedpipe.commands.consortium.kits import Invitation
from fedpipe.commands.consortium.messages import ANSWER, Order, Reference, content
from fedpipe.commands.consortium.run import UPDATES, locate
from fedpipe.commands.consortium.server import CONSORTIUM_DIR
from fedpipe.commands.site.agent import PID_FILE, agent_pid, keep_agent, start_agent, stop_agent
from fedpipe.commands.site.config import run_config
from fedpipe.commands.site.site import LOG_FILE, SITE_FILE, Declined, Site
from fedpipe.config.model_shape import ModelShape, model_shape
from fedpipe.config.tree import dump, wrap
from fedpipe.errors import ConfigError, FederationError
from fedpipe.families import FAMILIES
from fedpipe.run.ledger import Ledger
from fedpipe.run.outer import (
    GLOBAL,
    GLOBAL_FACTS,
    UPDATE,
    UPDATE_FACTS,
    UpdateFacts,
    digest_of,
    has_arrived,
    round_name,
)
from fedpipe.run.run_dir import locked
from fedpipe.run.tensor_file import Layout, write_tensors
from fedpipe.run.update import write_global
from tests.helpers.network import PRETRAIN
from tests.helpers.tuned import small_folder

LAYOUTS = {"a.weight": Layout("F32", (3, 4)), "b.bias": Layout("F32", (5,))}
LOGS = (LOG_FILE, "ledger.jsonl")


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_an_agent_is_a_process_that_holds_the_sites_lock(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    site = Site(tmp_path)
    for stale in (str(stranger.pid), "0", "-1", "1", "", "four", str(10**30)):
        (tmp_path / PID_FILE).write_text(stale)
        assert stop_agent(site) is False
    assert stranger.poll() is None
    with locked(tmp_path):
        (tmp_path / PID_FILE).write_text(str(os.getpid()))
        assert agent_pid(site) == os.getpid()
        for start in (start_agent, partial(keep_agent, show=print)):
            refusal = rf"^--site-dir: .* without an agent at work, got .* process {os.getpid()}\."
            with pytest.raises(FederationError, match=refusal):
                start(site, cast(Invitation, {}))
        (tmp_path / PID_FILE).write_text("-1")
        assert agent_pid(site) is None
    assert agent_pid(site) is None


def test_a_ledger_has_no_half_line_when_the_disk_is_full(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write("sent", {"round": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="ledger.jsonl"):
            ledger.write("sent", {"round": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.write("sent", {"round": 1})
    assert [line["round"] for line in ledger.read()] == [0, 1]


# -- a model of the coordinator's ------------------------------------------------------------------


def _described(folder: Path, family: str, **changed: Any) -> tuple[ModelShape, ModelShape]:
    """The model that a coordinator has as a folder, and the one that a site makes of its words."""
    small_folder(folder, "bert")
    fields = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    kind = FAMILIES[family]
    own = {kind.keys[key][0]: value for key, value in fields.items()}
    own |= {"intermediate_size": 64, "vocab_size": 15, "pad_token_id": 0}
    config = kind.config_class()(**own, **changed)
    kind.masked_lm_class()(config).save_pretrained(folder)
    pretrain = {
        "model": {"family": family, "path": str(folder)}, "pipeline": {"cut": [1]},
        "data": {"tokenizer": str(folder), "sequence_length": 16},
    }  # fmt: skip
    tree = wrap({"federation": {"sites": ["alpha"]}, "pretrain": pretrain}, "tests")
    _, run = read_consortium(tree, source="tests")
    own_part = wrap({"data": {"tokenizer": str(folder)}}, "tests")
    at_site = run_config(dump(settings_for("alpha", run)), own_part, folder="outer")
    return model_shape(run, vocab_size=15), model_shape(at_site, vocab_size=15)


def test_sites_compute_what_the_folder_says_that_the_coordinator_begins_with(
    tmp_path: Path,
) -> None:
    here, there = _described(
        tmp_path, "bert", hidden_act="relu", layer_norm_eps=0.1, hidden_dropout_prob=0.3,
        type_vocab_size=3, classifier_dropout=0.2,
    )  # fmt: skip
    assert here.config["hidden_act"] == "relu" and here.config["layer_norm_eps"] == 0.1
    assert there.config == {**here.config, "classifier_dropout": None}  # of a fine-tuned model


def test_a_folder_that_sites_could_not_compute_is_refused(tmp_path: Path) -> None:
    here, there = _described(tmp_path, "modernbert", norm_eps=0.1)
    assert here.config == there.config
    for fields in ({"local_rope_theta": 9.0}, {"classifier_activation": "relu"}):
        ((name, value),) = fields.items()
        expected = rf"^pretrain.model.path: expected {name} .* in {tmp_path}/config.json, .*{value}"
        with pytest.raises(ConfigError, match=expected):
            _described(tmp_path, "modernbert", **fields)


# -- an order, at a site ---------------------------------------------------------------------------


def _tensors(fill: float) -> Iterator[np.ndarray]:
    return (np.full(layout.shape, fill, dtype=np.float32) for layout in LAYOUTS.values())


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The weights of an outer round, and the order that goes with them."""
    folder = tmp_path_factory.mktemp("coordinator")
    tree = {"federation": {"sites": ["alpha"], "num_rounds": 2}, "pretrain": PRETRAIN}
    _, run = read_consortium(wrap(tree, "tests"), source="tests")
    facts = write_global(folder, 0, LAYOUTS, _tensors(1.0), config=run)
    size = (folder / GLOBAL).stat().st_size
    return folder / GLOBAL, {
        "consortium": "heart-1", "round": 0, "num_rounds": 2, "facts": dict(facts),
        "settings": dump(settings_for("alpha", run)),
        "file": {"owner": "server", "name": "R1", "sha256": facts["sha256"], "bytes": size},
    }  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site that has joined."""
    folder = tmp_path / "alpha"
    folder.mkdir()
    policy = {"accepts": {"max_parameters": 10**6, "max_steps": 100}}
    own = {"federation": {"num_clients": 2}, "checkpoint": {"keep_last": 7}}
    (folder / SITE_FILE).write_text(dump(policy | {"pretrain": own}))
    return Site(folder)


def _answer(site: Site, order: Any, weights: Path) -> Path | None:
    def fetch(path: Path) -> None:
        shutil.copy(weights, path)

    return site.answer(order, fetch=fetch, is_over=lambda: True)


def _trained(site: Site, order: dict[str, Any]) -> Path:
    """Leave an update as the site's run does."""
    folder = site.path / "runs" / order["consortium"] / "outer" / round_name(order["round"])
    folder.mkdir(parents=True)
    write_tensors(folder / UPDATE, LAYOUTS, _tensors(0.5))
    facts: dict[str, Any] = dict.fromkeys(UpdateFacts.__annotations__, 0)
    facts |= {"version": 1, "sha256": digest_of(folder / UPDATE)}
    (folder / UPDATE_FACTS).write_text(json.dumps(facts))
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in LOGS
    }


def _with(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(order: dict[str, Any]) -> None:
        *sections, name = key.split(".")
        for section in sections:
            order = order[section]
        order[name] = value

    return change


def _settings(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(order: dict[str, Any]) -> None:
        settings = yaml.safe_load(order["settings"])
        _with(key, value)(settings)
        order["settings"] = yaml.safe_dump(settings)

    return change


_BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_OWN_LOG = "the site cannot train this outer round; its own log says why."


@pytest.mark.parametrize(
    ("spoil", "told", "noted"),
    [
        *(
            (_with("consortium", name), "with a consortium that can be used", "")
            for name in ("..", ".", "", "../x", "a/b", ".ssh", "a" * 300, "\u0661", "x\n2026", 7)
        ),
        *(
            (_with("round", index), "with a round that can be used", "")
            for index in (-1, 2, 10**30, "0", True, 0.0, None)
        ),
        (_with("num_rounds", 10**30), "for as many outer rounds as the order's", ""),
        (_with("num_rounds", "2"), "with a num_rounds that can be used", ""),
        (_with("settings", ["x"]), "with a settings that can be used", ""),
        (_with("settings", "a: ["), _OWN_LOG, "settings:1: expected YAML"),
        (_with("settings", "x"), _OWN_LOG, "expected sections such as"),
        (_with("settings", _BOMB), _OWN_LOG, "more than 100,000 values, aliases written out"),
        (_with("settings", "a: " + "[" * 9000), _OWN_LOG, "expected YAML"),
        (_with("settings", ""), "for as many outer rounds", ""),
        (_settings("hack", 1), _OWN_LOG, "hack: unknown key"),
        (_settings("hack\n2026-01-01 00:00:00 sent", 1), _OWN_LOG, "hack 2026-01-01"),
        (_settings("outer", None), "for as many outer rounds", ""),
        (_settings("outer.folder", "/etc"), _OWN_LOG, "outer.folder: expected no value from"),
        (_settings("data.train", ["/etc/passwd"]), _OWN_LOG, "data.train: expected no value"),
        (_settings("deepspeed", {"config": "/x"}), _OWN_LOG, "deepspeed.config: expected no"),
        (_settings("checkpoint", {"keep_last": 1}), _OWN_LOG, "checkpoint.keep_last: expected no"),
        (_settings("evaluation", {"tasks": []}), _OWN_LOG, "evaluation.tasks: expected no value"),
        (_settings("log", None), _OWN_LOG, "log: expected no value"),
        (_settings("model.path", "/etc"), _OWN_LOG, "model.path: expected no value"),
        (_settings("federation.num_local_steps", "4"), _OWN_LOG, "expected a whole number"),
        (_settings("federation.num_local_steps", 51), "at most 100 steps", "got 102"),
        (_settings("federation.num_local_epochs", 9.0), "expected federation.num_local_steps", ""),
        (_settings("model.num_hidden_layers", 10**9), "at most 1,000,000 parameters", ""),
        (_with("file.bytes", 4 * 10**6 + 4), "at most 1,000,000 parameters", "got 1,000,001"),
        (_with("file.bytes", -1), "with a file that can be used", ""),
        (_with("file.bytes", True), "with a file that can be used", ""),
        (_with("file", None), "with a file that can be used", ""),
        (_with("facts", []), "with a facts that can be used", ""),
        (_with("facts.sha256", "f" * 64), _OWN_LOG, "expected SHA-256 ffffffffffff"),
        (_with("facts.cut", [2]), _OWN_LOG, "expected pipeline.cut [1]"),
        (_with("facts.vocabulary", "0" * 64), _OWN_LOG, "expected data.tokenizer"),
        (_with("facts.round", 0), _OWN_LOG, "expected round 1"),
        (_with("facts.version", 2), _OWN_LOG, "expected version 1, got 2"),
        (lambda order: order.clear(), "with a consortium that can be used", ""),
    ],
)
def test_an_order_that_cannot_be_trusted_is_declined_and_leaves_nothing_behind(
    site: Site,
    coordinator: tuple[Path, dict[str, Any]],
    spoil: Callable[[dict[str, Any]], None],
    told: str,
    noted: str,
) -> None:
    weights, order = coordinator
    trained = _trained(site, order)
    assert _answer(site, order, weights) == trained
    before = _contents(site.path.parent)
    spoilt = copy.deepcopy(order)
    spoilt["round"] = spoilt["facts"]["round"] = 1
    spoil(spoilt)
    with pytest.raises(Declined) as declined:
        _answer(site, content(json.dumps(spoilt)), weights)
    assert told in str(declined.value)
    assert str(site.path) not in str(declined.value)
    *_, last = (site.path / LOG_FILE).read_text().splitlines()
    assert (noted or told) in last
    after = _contents(site.path.parent)
    after.pop(f"alpha/runs/heart-1/outer/round_000001/{GLOBAL}", None)  # refused, and not announced
    assert after == before
    assert _answer(site, order, weights) == trained


def test_an_outer_round_is_trained_from_the_weights_that_it_began_with(
    site: Site, coordinator: tuple[Path, dict[str, Any]]
) -> None:
    weights, order = coordinator
    folder = _trained(site, order)
    assert _answer(site, order, weights) == folder
    before = _contents(site.path)
    other = copy.deepcopy(order)
    other["facts"]["sha256"] = other["file"]["sha256"] = "f" * 64
    with pytest.raises(Declined, match="from other weights"):
        _answer(site, other, weights)
    assert _contents(site.path) == before
    assert set(json.loads((folder / GLOBAL_FACTS).read_text())) == set(order["facts"])
    received, declined = site.ledger.read()
    assert (received["what"], received["sha256"]) == ("received", digest_of(weights))
    assert (declined["what"], declined["round"]) == ("declined", 0)
    assert "from other weights" in declined["why"]


def test_a_text_that_is_no_message_of_ours_holds_nothing() -> None:
    assert content('{"round": 1}') == {"round": 1}
    for text in (None, b"{}", "", "[]", "[" * 10**5, "{", '{"a": "' + "x" * 2**20 + '"}'):
        assert content(text) == {}


def _decide(site: Site, **changes: Any) -> Site:
    policy = yaml.safe_load((site.path / SITE_FILE).read_text())
    (site.path / SITE_FILE).write_text(dump(policy | changes))
    return Site(site.path)


def test_a_dry_run_shows_what_it_would_send_and_sends_a_reason_only(
    site: Site, coordinator: tuple[Path, dict[str, Any]]
) -> None:
    weights, order = coordinator
    site = _decide(site, dry_run=True)
    _trained(site, order)
    with pytest.raises(Declined) as declined:
        _answer(site, order, weights)
    assert str(declined.value) == "dry run: nothing is sent."
    assert "it would send a change of" in (site.path / LOG_FILE).read_text()
    assert [line["what"] for line in site.ledger.read()] == ["received", "declined"]


def test_a_site_gives_up_and_ends_its_run_when_an_outer_round_takes_too_long(
    site: Site, coordinator: tuple[Path, dict[str, Any]]
) -> None:
    weights, order = coordinator
    site = _decide(site, accepts={"max_hours": 1e-6})
    with pytest.raises(Declined) as declined:
        site.answer(
            cast(Order, order),
            fetch=lambda path: cast(None, shutil.copy(weights, path)),
            is_over=lambda: False,
        )
    assert str(declined.value) == "not done within 1e-06 hours."
    (file,) = site.path.glob("runs/*/outer/*/pid")
    for _ in range(200):
        try:
            os.killpg(int(file.read_text()), 0)
        except ProcessLookupError:
            return
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.1)
    raise AssertionError("the run goes on")


def test_the_limit_of_hours_is_counted_by_the_clock_of_the_agent_alone(
    site: Site, coordinator: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, order = coordinator
    site = _decide(site, accepts={"max_hours": 1})
    monkeypatch.setattr(Site, "_start", lambda *_: None)

    def ask() -> Path | None:
        looks = iter((False, True))
        return Site(site.path).answer(
            cast(Order, order),
            fetch=lambda path: cast(None, shutil.copy(weights, path)),
            is_over=lambda: next(looks),
        )

    assert ask() is None
    (folder,) = site.path.glob("runs/*/outer/*")
    for file in folder.iterdir():  # by a file server's clock
        os.utime(file, times=2 * (time.time() - 9 * 3600,))
    assert ask() is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    with pytest.raises(Declined, match=r"^not done within 1\.0 hours\.$"):
        ask()


def test_a_run_that_goes_on_for_an_earlier_outer_round_is_waited_for(
    site: Site,
    coordinator: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, order = coordinator
    begun, end = tmp_path / "begun", tmp_path / "end"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho >> {begun}\nwhile ! [ -e {end} ]; do sleep 0.1; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert _answer(site, order, weights) is None
    later = copy.deepcopy(order)
    later["round"] = later["facts"]["round"] = 1
    looks = iter((False,) * 3 + (True,))
    fetched = site.answer(
        cast(Order, later),
        fetch=lambda path: cast(None, shutil.copy(weights, path)),
        is_over=lambda: next(looks),
    )
    assert fetched is None
    assert len(begun.read_text()) == 1
    end.touch()
    with suppress(Declined):  # this program leaves no update
        site.answer(
            cast(Order, later),
            fetch=lambda path: None,
            is_over=lambda: len(begun.read_text()) > 1,
        )
    assert len(begun.read_text()) > 1


# -- answers, at the coordinator -------------------------------------------------------------------


class _Round(OuterRound):
    """Whose sites answer at once, with the texts that they are given."""

    texts: dict[str, object]

    def broadcast(self, task: Any, fl_ctx: Any, *, targets: list[str], min_responses: int) -> None:
        for site in targets:
            result = {ANSWER: self.texts[site]}
            self._note(SimpleNamespace(client=SimpleNamespace(name=site), result=result), fl_ctx)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "with a facts that can be used"),
        (7, "with a facts that can be used"),
        ('{"facts": {}, "file": {"owner": 7}}', "with a file that can be used"),
        ({"declined": "no\x1b[31m" + "!" * 600}, r"no\x1b[31m!!!!"),
        ({"declined": ["a", 1]}, "['a', 1]"),
        ({"facts": ["sha256"]}, "with a facts that can be used"),
        ({"facts": {"sha256": "f" * 64}}, "with a file that can be used"),
        ({"facts": {"version": 2}}, "expected version 1, got 2"),
        ({"file": {"bytes": 10**9}}, "with a file that can be used"),
        ({"file": {"sha256": "f" * 64}}, "with a file that can be used"),
        ({"file": {"sha256": None}}, "with a file that can be used"),
    ],
)
def test_an_answer_that_cannot_be_used_concerns_its_own_site_only(
    tmp_path: Path,
    coordinator: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    text: Any,
    why: str,
) -> None:
    weights, order = coordinator
    folder = tmp_path / "rounds" / round_name(0)
    (folder / ORDERS).mkdir(parents=True)
    shutil.copy(weights, folder)
    update = tmp_path / UPDATE
    write_tensors(update, LAYOUTS, _tensors(0.5))
    facts: dict[str, Any] = dict.fromkeys(UpdateFacts.__annotations__, 0)
    facts |= {"version": 1, "sha256": digest_of(update)}
    file = {"owner": "a", "name": "b", "sha256": digest_of(update), "bytes": update.stat().st_size}
    good = {"facts": facts, "file": file}
    if isinstance(text, dict):
        spoilt = good | {
            key: value if isinstance(value, (str, list)) else good[key] | value
            for key, value in text.items()
        }
        text = json.dumps(spoilt)
    job = _Round(folder=f"rounds/{round_name(0)}", sites=["alpha", "beta", "gamma"])
    job.texts = {"alpha": text, "beta": json.dumps(good), "gamma": json.dumps(good)}
    for site in job.sites:
        (folder / ORDERS / f"{site}.json").write_text(json.dumps(order))

    def fetch(cell: Any, reference: Any, path: Path, *, abort_signal: Any) -> None:
        if path.parent.name == "gamma":
            raise ConnectionError("gone")
        shutil.copy(update, path)

    monkeypatch.setenv(CONSORTIUM_DIR, str(tmp_path))
    monkeypatch.setattr(controller, "offer", lambda *_, **__: (None, order["file"]))
    monkeypatch.setattr(controller, "fetch", fetch)
    engine = SimpleNamespace(get_cell=lambda: None)
    job.control_flow(Signal(), SimpleNamespace(get_engine=lambda: engine))
    assert has_arrived(folder / UPDATES / "beta")
    assert not has_arrived(folder / UPDATES / "alpha")
    refused = json.loads((folder / UPDATES / "alpha" / DECLINED).read_text())["why"]
    assert why in refused and len(refused) < 510
    assert list((folder / UPDATES / "gamma").iterdir()) == []  # it is asked again
    (line,) = Ledger(tmp_path / "ledger.jsonl").read()
    assert (line["site"], line["sha256"]) == ("beta", facts["sha256"])


class _Cell:
    """Serves a file in pieces, as the other end of a transfer that may lie."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = iter(pieces)

    def register_request_cb(self, **_: Any) -> None:
        pass

    def send_request(self, **_: Any) -> Any:
        piece = next(self.pieces, None)
        status = ProduceRC.EOF if piece is None else ProduceRC.OK
        payload = {"status": status, "data": piece, "state": {"received_bytes": 1}}
        return new_cell_message({MessageHeaderKey.RETURN_CODE: CellReturnCode.OK}, payload)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([b"abcd", b"ef"], None),
        ([b"abcd", b"efg"], ConnectionError),
        ([b"abcd"] * 10**6, ConnectionError),
        ([b""] * 10**6, ConnectionError),
        ([b"abcd", "ef"], ConnectionError),
        ([b"abcd"], FederationError),
        ([b"abcd", b"eg"], FederationError),
        ([], FederationError),
    ],
)
def test_a_file_is_fetched_up_to_its_announced_size_and_is_the_announced_one_or_absent(
    tmp_path: Path, pieces: list[bytes], error: type[Exception] | None
) -> None:
    reference: Reference = {
        "owner": "site-1", "name": "R1", "sha256": hashlib.sha256(b"abcdef").hexdigest(), "bytes": 6
    }  # fmt: skip
    path = tmp_path / UPDATE
    cell = _Cell(pieces)
    with pytest.raises(error) if error else nullcontext():
        fetch(cell, reference, path, abort_signal=Signal())
    assert [p.name for p in tmp_path.iterdir()] == ([] if error else [UPDATE])
    if error is ConnectionError and len(pieces) == 10**6:
        assert len(list(cell.pieces)) >= 10**6 - 2


# -- requests, at the coordinator ------------------------------------------------------------------


def _zip(entries: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return buffer.getvalue()


_ASKS = {"project": "heart", "cert_type": "client", "name": "alpha"}


def _asks(**changed: object) -> bytes:
    return _zip({"request.json": json.dumps(_ASKS | changed)})


@pytest.mark.parametrize(
    ("request_file", "why"),
    [
        (_asks(name="../alpha"), "a request whose site is alpha or beta, got ../alpha"),
        (_asks(name=["alpha"]), "a request whose site is alpha or beta"),
        (_asks(project=["heart"]), "a request whose consortium is heart"),
        (_asks(cert_type={"client": 1}), "a request whose kind of participant is client"),
        (_asks(cert_type="admin"), "a request whose kind of participant is client, got admin"),
        (_asks(cert_type="server"), "a request whose kind of participant is client, got server"),
        (_asks(more=" " * 2**20), "a request or a signed kit, got another file"),
        (_zip({"request.json": "[1]"}), "a request or a signed kit, got another file"),
        (_zip({"request.json": "[" * 10**5}), "a request or a signed kit, got another file"),
        (_asks()[:60] + b"\xff" * 9 + _asks()[69:], "a request or a signed kit, got another file"),
        (_asks().replace(b"\x08\x00", b"\x63\x00"), "a request or a signed kit, got another"),
        (_asks()[:-30], "a request or a signed kit, got another file"),
        (b"", "a request or a signed kit, got another file"),
        (None, "expected a file, got none of this name"),
    ],
)
def test_a_request_that_cannot_be_trusted_is_not_signed(
    tmp_path: Path, request_file: bytes | None, why: str
) -> None:
    path = tmp_path / "alpha.request.zip"
    if request_file is not None:
        path.write_bytes(request_file)
    with pytest.raises(ConfigError) as refused:
        kits.sign(tmp_path / "kits", path, name="heart", sites=("alpha", "beta"))
    assert why in str(refused.value)
    assert not (tmp_path / "kits").exists()


# -- what people write, and what lies in folders ---------------------------------------------------

_INVITATION = {"consortium": "c", "site": "s", "host": "h", "port": 1, "authority": "a"}


def _invite(folder: Path, **changed: object) -> Callable[[], object]:
    (folder / "invitation.yaml").write_text(dump(_INVITATION | changed))
    return lambda: kits.read_invitation(folder / "invitation.yaml")


def _joins(folder: Path) -> Callable[[], object]:
    (folder / "signed.zip").write_bytes(_zip({"signed.json": '{"project": "c", "name": "s"}'}))
    invitation = _invite(folder)()
    return lambda: kits.install_kit(folder / "kit", folder / "signed.zip", invitation)  # type: ignore[arg-type]


def _signs(folder: Path, ca: str | None) -> Callable[[], object]:
    (folder / "authority").mkdir()
    (folder / "request.zip").write_bytes(_asks())
    if ca is not None:
        (folder / "authority" / "ca.json").write_text(ca)
    return lambda: kits.sign(folder, folder / "request.zip", name="heart", sites=("alpha",))


def _ends(folder: Path, certificate: str | None) -> Callable[[], object]:
    (folder / "startup").mkdir()
    if certificate is not None:
        (folder / "startup" / "client.crt").write_text(certificate)
    return lambda: kits.certificate_end(folder)


def _makes(folder: Path, name: str) -> Callable[[], object]:
    (folder / "file").touch()
    return lambda: kits.make_folder(folder / name, key="--site-dir")


def _reads(folder: Path, content: bytes) -> Callable[[], object]:
    (folder / SITE_FILE).write_bytes(content)
    return lambda: Site(folder).config


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (lambda f: _invite(f, site=None), "expected a text as site, got None"),
        (lambda f: _invite(f, host=["h"]), "expected a text as host"),
        (lambda f: _invite(f, authority=""), "expected a text as authority"),
        (lambda f: _invite(f, port="1"), "expected a whole number as port, got '1'"),
        (_joins, "expected the private key of this site's request, got none"),
        (lambda f: _signs(f, None), "server.kits: expected the kits of the consortium, got none"),
        (lambda f: _signs(f, "{"), "server.kits: expected the kits of the consortium, got damaged"),
        (
            lambda f: _signs(f, "[]"),
            "server.kits: expected the kits of the consortium, got damaged",
        ),
        (lambda f: _ends(f, None), "expected a kit with its certificate"),
        (lambda f: _ends(f, "junk"), "expected a kit with its certificate"),
        (lambda f: _makes(f, "file"), "--site-dir: expected a folder"),
        (lambda f: _makes(f, "file/below"), "--site-dir: expected a folder"),
        (lambda f: _reads(f, b"pretrain:"), "pretrain: expected keys that a site decides"),
        (lambda f: _reads(f, b"pretrain: [1]"), "pretrain: expected keys that a site decides"),
        (lambda f: _reads(f, b"\xff"), "site.yaml: expected UTF-8 text"),
    ],
)
def test_a_damaged_file_is_named_with_a_way_out(
    tmp_path: Path, attempt: Callable[[Path], Callable[[], object]], expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        attempt(tmp_path)()
    assert expected in str(refused.value)


def test_a_site_that_is_reached_over_the_network_is_asked_for_steps(tmp_path: Path) -> None:
    tree = {"server": {"host": "h"}, "federation": {"sites": ["alpha"]}, "pretrain": PRETRAIN}
    (tmp_path / "c.yaml").write_text(dump(tree))
    locate(str(tmp_path / "c.yaml"), [], str(tmp_path / "run"))
    for override, expected in (
        (
            "pretrain.federation.num_local_epochs=2",
            "pretrain.federation.num_local_epochs: expected",
        ),
        ("federation.sites=[server]", "federation.sites: expected"),
        ("name=he art", "name: expected up to 64 letters"),
        ("name=../x", "name: expected the name of one folder"),
    ):
        with pytest.raises(ConfigError, match=expected):
            locate(str(tmp_path / "c.yaml"), [override], str(tmp_path / "run"))


def test_a_sites_folder_is_read_up_to_the_size_of_an_update_and_not_through_links(
    tmp_path: Path, coordinator: tuple[Path, dict[str, Any]]
) -> None:
    weights, order = coordinator
    base, exchange = tmp_path / "rounds" / round_name(0), Folders(tmp_path / "exchange")
    base.mkdir(parents=True)
    for name in (GLOBAL, GLOBAL_FACTS):
        shutil.copy(weights.with_name(name), base)
    exchange.hand_out(0, base, ["alpha"])
    inbox, ours = tmp_path / "exchange/alpha" / round_name(0), base / UPDATES / "alpha"

    def send(size: int | None = None) -> bool:
        write_tensors(inbox / UPDATE, LAYOUTS, _tensors(0.5))
        if size is not None:
            os.truncate(inbox / UPDATE, size)
        facts = dict.fromkeys(UpdateFacts.__annotations__, 0) | {"version": 1}
        facts["sha256"] = digest_of(inbox / UPDATE)  # type: ignore[assignment]
        (inbox / UPDATE_FACTS).write_text(json.dumps(facts))
        return exchange.take_in("alpha", 0, ours)

    assert not send(2 * weights.stat().st_size + 1)
    assert not ours.exists()
    assert send()
    shutil.rmtree(ours)
    inbox.rename(tmp_path / "elsewhere")
    inbox.symlink_to(tmp_path / "elsewhere")
    assert not exchange.take_in("alpha", 0, ours)
    inbox.unlink()
    inbox.touch()
    with pytest.raises(ConfigError, match="exchange: expected a folder"):
        exchange.hand_out(0, base, ["alpha"])
