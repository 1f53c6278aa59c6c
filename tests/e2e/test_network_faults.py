"""A consortium over the network where something goes wrong, or where somebody wants too much.

Where the claim is not about training, updates are placed where the run of a site would leave them.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from tokenizers import Tokenizer

from fedpipe.commands.consortium.kits import (
    Invitation,
    install_kit,
    kit_of,
    read_invitation,
    sign,
)
from fedpipe.commands.consortium.network import _write_job as write_job
from fedpipe.commands.consortium.run import locate
from fedpipe.data.tokenizer import tokenizer_info
from fedpipe.errors import ConfigError
from fedpipe.run.ledger import Ledger
from fedpipe.run.outer import UPDATE_FACTS
from tests.helpers.cli import REPOSITORY, fedpipe
from tests.helpers.network import Network
from tests.helpers.tapped import HOST, USER, read_tap, tap_into

SITES = ("alpha", "beta", "gamma")
RARE = ("quizzaciously", "zyzzogeton", "frumenticus", "muzjiks", "xylobalsamum", "wyvernkeep")
"""Words that are in the text of one site only."""
ANOTHER = "nvflare.app_common.executors.client_api_launcher_executor.ClientAPILauncherExecutor"
"""A class that starts whatever command a job names."""


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Network:
    network = Network(tmp_path_factory.mktemp("consortium"), SITES)
    network.provision()
    network.begin()
    return network


@pytest.fixture
def network(provisioned: Network, tmp_path: Path) -> Iterator[Network]:
    fresh = provisioned.fresh(tmp_path / "network")
    yield fresh
    fresh.close()


# -- sites that do not do what they should ---------------------------------------------------------


@pytest.fixture(scope="module")
def rough(provisioned: Network, tmp_path_factory: pytest.TempPathFactory) -> Network:
    """Two outer rounds in which nobody but alpha does what it should; all that leaves is tapped."""
    folder = tmp_path_factory.mktemp("rough")
    network = provisioned.fresh(folder / "network")
    rng = random.Random(1)
    for name in ("alpha.jsonl", "alpha-held-out.jsonl"):
        rows = [json.dumps({"text": " ".join(rng.choices(RARE, k=60))}) for _ in range(40)]
        (network.folder / name).write_text("\n".join(rows) + "\n")
    (network.folder / "beta.jsonl").unlink()
    network.place("gamma", 0, value=float("nan"))
    network.place("beta", 1)  # of weights that are alpha's no more
    network.place("gamma", 1)
    network.start(environment=tap_into(network.folder / "tap"))
    finished = network.coordinate().finish()
    network.close()
    assert finished.code == 0, finished.err
    (network.folder / "said").write_text(finished.out)
    return network


def test_an_outer_round_goes_on_without_a_site_whose_run_fails_or_whose_update_is_bad(
    rough: Network,
) -> None:
    said = (rough.folder / "said").read_text()
    for index, left_out in enumerate(
        (
            {
                "beta": "beta declines: the site's run has failed 3 times.",
                "gamma": "the update of gamma: expected finite numbers, got NaN or infinity in",
            },
            {
                "beta": "the update of beta: expected SHA-256 of its base",
                "gamma": "the update of gamma: expected SHA-256 of its base",
            },
        )
    ):
        record = rough.record(index)
        assert list(record["sites"]) == ["alpha"]
        for site, why in left_out.items():
            assert record["refused"][site].startswith(why)
            assert why in said
    assert str(rough.folder / "beta") not in said, "where a site has its files is not said"


def test_the_log_of_a_site_says_why_its_run_has_failed(rough: Network) -> None:
    lines = [line for line in rough.log("beta").splitlines() if "exit code 2" in line]
    assert len(lines) == 3
    for line in lines:
        assert "CorpusError: data.train: expected a file" in line and "beta.jsonl" in line


def test_nothing_but_weights_and_numbers_leaves_a_site(rough: Network) -> None:
    left = read_tap(rough.folder / "tap")
    assert b"bert.embeddings.word_embeddings.weight" in left, "updates have left, readable here"
    assert b"train_loss" in left
    assert b"the site's run has failed 3 times." in left
    lower = left.lower()
    for word in RARE:
        assert word.encode() not in lower
    secrets = (str(rough.folder), "beta.jsonl", HOST, USER, str(REPOSITORY), sys.prefix, _address())
    for secret in secrets:
        assert secret.encode() not in left, secret
    runs = list(_token_runs(rough))
    assert len(runs) > 200
    found = [kind for kind, run in runs if run in left]
    assert not found
    kind, run = runs[7]
    assert run in left + b"..." + run, kind


def _address() -> str:
    """Return the address of this machine in its own network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))
        return str(probe.getsockname()[0])


def _token_runs(network: Network) -> Iterator[tuple[str, bytes]]:
    """Yield what six tokens in a row of alpha's text look like, as numbers of any size."""
    pretrain = locate(str(network.folder / "consortium.yaml"), [], None).pretrain
    directory = Path(tokenizer_info(pretrain).directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for name in ("alpha.jsonl", "alpha-held-out.jsonl"):
        for line in (network.folder / name).read_text().splitlines():
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            for begin in (0, len(ids) // 2):
                for kind in ("<i2", "<i4", "<i8"):
                    yield kind, np.array(ids[begin : begin + 6], kind).tobytes()


# -- what goes on by itself, or once somebody has done what he was asked to ------------------------


def a_site_is_away_and_an_update_comes_twice(network: Network) -> None:
    for site in ("alpha", "beta"):
        for index in range(2):
            network.place(site, index)
    network.place("gamma", 0, cut=1)
    network.place("gamma", 1, value=float("inf"))
    network.start("alpha", "gamma")
    coordinator = network.coordinate("federation.deadline_s=20")
    folder = network.folder / "run/rounds/round_000000"
    arrived = [folder / "updates" / site / UPDATE_FACTS for site in ("alpha", "gamma")]
    coordinator.wait_for(lambda: all(file.is_file() for file in arrived), "two updates")
    coordinator.kill()
    arrived[0].unlink()
    coordinator = network.coordinate("federation.deadline_s=20")
    coordinator.wait_for((folder / "round.json").is_file, "the end of the outer round")
    network.start("beta")
    finished = coordinator.finish()
    assert finished.code == 0, finished.err
    first, second = (network.record(index) for index in range(2))
    assert (list(first["sites"]), first["absent"]) == (["alpha"], ["beta"])
    assert "beta: no answer before the deadline" in finished.out
    assert "instead of F32[8192, 32]" in first["refused"]["gamma"]
    assert "NaN or infinity" in second["refused"]["gamma"]
    assert sorted(second["sites"]) == ["alpha", "beta"]
    sent = [line["sha256"] for line in network.ledger("alpha", "sent") if line["round"] == 0]
    assert len(sent) == 2 and len(set(sent)) == 1


def the_disk_of_a_site_is_full(network: Network) -> None:
    for index in range(2):
        network.place("alpha", index)
    with _small_disk(network.folder / "alpha") as fill:
        network.start("alpha")
        coordinator = network.coordinate("federation.deadline_s=1")
        network.wait_for(lambda: "No space left on device" in network.log("alpha"), "a line")
        fill.unlink()
        finished = coordinator.finish()
        network.close()
        assert finished.code == 0, finished.err
        assert all(list(network.record(index)["sites"]) == ["alpha"] for index in range(2))
        assert len(network.ledger("alpha", "sent")) == 2


def the_disk_of_the_coordinator_is_full(network: Network) -> None:
    for index in range(2):
        network.place("alpha", index)
    with _small_disk(network.folder / "run") as fill:
        network.start("alpha")
        coordinator = network.coordinate("federation.deadline_s=1")
        line = "of free space for updates, got "
        coordinator.wait_for(lambda: line in coordinator.output(), "a line")
        network.wait_for(lambda: bool(network.ledger("alpha", "sent")), "an update that has left")
        fill.unlink()
        finished = coordinator.finish()
        assert finished.code == 0, finished.err
        assert all(list(network.record(index)["sites"]) == ["alpha"] for index in range(2))
        assert len(network.ledger("run", "received")) == 2


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """Move a folder to a file system of its own, and yield the file that fills it."""
    aside = folder.with_name(f"{folder.name}-aside")
    folder.rename(aside)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        fill = folder / "fill"
        fill.write_bytes(bytes(shutil.disk_usage(folder).free - 600 * 2**10))
        yield fill
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


SCENARIOS: dict[str, Callable[[Network], None]] = {
    "a site is away, and an update comes twice": a_site_is_away_and_an_update_comes_twice,
    "the disk of a site is full": the_disk_of_a_site_is_full,
    "the disk of the coordinator is full": the_disk_of_the_coordinator_is_full,
}


@pytest.mark.matrix(sample=0)  # half a minute each, so only `make test-all` takes them
@pytest.mark.parametrize("what", SCENARIOS)
def test_no_more_is_lost_than_the_part_of_one_site_in_one_outer_round(
    network: Network, what: str
) -> None:
    SCENARIOS[what](network)


# -- what a site has closed ------------------------------------------------------------------------


def test_a_coordinator_reads_no_file_of_a_site_and_starts_no_code_but_that_of_fedpipe(
    network: Network,
) -> None:
    consortium = locate(str(network.folder / "consortium.yaml"), [], str(network.folder / "run"))
    consortium.begin()
    network.start("alpha")
    with consortium.exchange(lambda line: None) as exchange:
        network.wait_for(lambda: "alpha" in _connected(exchange), "a connection of alpha")
        session = exchange._connect()
        file = "startup/fed_client.json"
        for read in (
            lambda: session.ls_target("alpha"),
            lambda: session.cat_target("alpha", file=file),
            lambda: session.head_target("alpha", file=file),
            lambda: session.tail_target("alpha", file=file),
            lambda: session.grep_target("alpha", pattern="server", file=file),
            lambda: session.get_working_directory("alpha"),
            lambda: session.get_client_env(["alpha"]),
        ):
            answer = read()
            assert "invalid_request" in json.dumps(answer), answer
        jobs = {}
        for what, spoil in (("code", _with_code), ("class", _with_another_class)):
            job = network.folder / what
            write_job(job, "rounds/round_000000", ["alpha"])
            spoil(job)
            jobs[what] = session.submit_job(str(job))
        network.wait_for(lambda: all(_has_ended(session, job) for job in jobs.values()), "an end")
    log = (network.folder / "run/server.log").read_text()
    assert "alpha: NVFLARE_ERROR: BYOC not permitted" in log, "the site does not take it"
    texts = [file.read_text() for file in (network.folder / "alpha").rglob("log_fl.txt")]
    assert any(f"Component '{ANOTHER}' at config path" in text for text in texts)
    assert not (network.folder / "here").exists()


def _connected(exchange: Any) -> set[str]:
    """Whom the server knows; nobody before it answers."""
    try:
        return {client.name for client in exchange._connect().get_system_info().client_info}
    except Exception:  # one of a dozen kinds
        exchange._leave()
        return set()


def _with_code(job: Path) -> None:
    """Let a job bring a class of its own, under a name that the site would start."""
    code = job / "at_sites/custom/fedpipe_more.py"
    code.parent.mkdir()
    code.write_text("from pathlib import Path\nPath('../../../here').touch()\n")
    _change_executor(job, "fedpipe_more.Reader")


def _with_another_class(job: Path) -> None:
    _change_executor(job, ANOTHER)


def _change_executor(job: Path, path: str) -> None:
    file = job / "at_sites/config/config_fed_client.json"
    config = json.loads(file.read_text())
    config["executors"][0]["executor"]["path"] = path
    file.write_text(json.dumps(config))


def _has_ended(session: Any, job: str) -> bool:
    return str(session.get_job_meta(job)["status"]).startswith("FINISHED")


# -- who is who ------------------------------------------------------------------------------------


def test_whoever_is_not_who_he_says_is_turned_away_and_written_down(
    provisioned: Network, network: Network
) -> None:
    own, now = _authority(network.folder / "kits/authority"), datetime.now(UTC)
    other = _another_authority(own)
    _sign_again(network, "alpha", other, until=now + timedelta(days=1))
    _trust(network, "alpha", other)
    for name in ("client.crt", "client.key"):
        shutil.copy(
            kit_of(provisioned.folder / "beta/kit") / "startup" / name,
            kit_of(network.folder / "gamma/kit") / "startup" / name,
        )
    _sign_again(network, "beta", own, until=now + timedelta(days=5000))
    early = fedpipe("site", "start", "--site-dir", "beta", folder=network.folder)
    assert (early.code, early.out) == (2, "")
    assert "got one that begins at 20" in early.error and "Set the clock" in early.error
    _sign_again(network, "beta", own, until=now - timedelta(days=1))
    ended = fedpipe("site", "start", "--site-dir", "beta", folder=network.folder)
    assert (ended.code, ended.out) == (2, "")
    assert f"got one that ended on {now - timedelta(days=1):%Y-%m-%d}" in ended.error

    coordinator = network.coordinate()
    network.start("alpha", "gamma")
    for line in (
        "beta: turned away: it has the certificate of beta, and says that it is gamma",
        "127.0.0.1: turned away: it ends the handshake, as a site does that trusts another",
    ):
        coordinator.wait_for(lambda line=line: line in coordinator.output(), "a refusal")
    said = network.tool("site", "status", "--site-dir", "alpha")
    assert "got: CERTIFICATE_VERIFY_FAILED. Compare the authority of both" in said
    _trust(network, "alpha", own)
    for site, why in (
        ("alpha", "certificate signature failure"),
        ("beta", "certificate has expired"),
    ):
        said = network.tool("site", "status", "--site-dir", site)
        assert "got: it does not take this site's certificate. Compare" in said
        line = f"127.0.0.1: turned away: TLS says: {why}"
        coordinator.wait_for(lambda line=line: line in coordinator.output(), "a refusal")
    coordinator.kill()
    assert "connected" not in coordinator.output()
    assert len(network.ledger("run", "refused")) >= 3


def test_nothing_is_signed_or_joined_that_was_not_asked_for(network: Network) -> None:
    kits = network.folder / "kits"
    request = network.folder / "alpha.request.zip"
    for key, value, expected in (
        ("cert_type", "admin", "expected a request whose kind of participant is client, got admin"),
        ("project", "lung", "expected a request whose consortium is heart, got lung"),
        ("name", "delta", "expected a request whose site is alpha or beta or gamma, got delta"),
    ):
        with pytest.raises(ConfigError, match=expected):
            sign(kits, _with(request, key, value), name="heart", sites=SITES)
    signed, folder = network.folder / "alpha.signed.zip", network.folder / "alpha/kit"
    invitation = read_invitation(network.folder / "alpha/invitation.yaml")
    for key, value, expected in (
        ("project", "lung", "expected a kit whose consortium is heart, got lung"),
        ("name", "beta", "expected a kit whose site is alpha, got beta"),
    ):
        with pytest.raises(ConfigError, match=expected):
            install_kit(folder, _with(signed, key, value), invitation)
    stranger: Invitation = {**invitation, "authority": "SHA256:" + ":".join(["00"] * 32)}
    with pytest.raises(ConfigError, match="expected NVFlare's package"):
        install_kit(folder, signed, stranger)


def test_a_site_that_joins_again_trains_what_it_had_given_up(network: Network) -> None:
    attempts = network.folder / "alpha/runs/heart/outer/round_000000/attempts"
    attempts.parent.mkdir(parents=True)
    attempts.write_text("2\n2\n2\n")
    said = network.as_shown("at site alpha: join")
    assert "outer rounds train on this machine" in said
    assert not attempts.exists()


def test_an_update_counts_once_in_each_training_that_it_was_sent_in(network: Network) -> None:
    ledger = Ledger(network.folder / "alpha/ledger.jsonl")
    for training in ("heart-1", "heart-1", "heart-2"):  # which may begin with the same weights
        ledger.write("sent", {"consortium": training, "round": 0, "sha256": "00"})
    said = network.tool("site", "status", "--site-dir", "alpha", site="alpha")
    assert "3 lines, none changed; 2 updates sent" in said


def _with(archive: Path, key: str, value: str) -> Path:
    """Copy a request or a signed kit, with another value in what it says of itself."""
    changed = archive.with_name(f"changed-{archive.name}")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name in ("request.json", "signed.json"):
                content = json.dumps(json.loads(content) | {key: value}).encode()
            new.writestr(name, content)
    return changed


Authority = tuple[x509.Certificate, Any]


def _authority(folder: Path) -> Authority:
    key = serialization.load_pem_private_key((folder / "rootCA.key").read_bytes(), None)
    return x509.load_pem_x509_certificate((folder / "rootCA.pem").read_bytes()), key


def _another_authority(own: Authority) -> Authority:
    """An authority of another consortium that has the same name."""
    key = rsa.generate_private_key(65537, 2048)
    until = own[0].not_valid_after_utc
    return _certificate(own[0], key.public_key(), (own[0], key), until=until), key


def _trust(network: Network, site: str, authority: Authority) -> None:
    """Let a site take a server for the coordinator's that this authority has signed."""
    file = kit_of(network.folder / site / "kit") / "startup/rootCA.pem"
    file.write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))


def _certificate(
    like: x509.Certificate, public_key: Any, issuer: Authority, *, until: datetime
) -> x509.Certificate:
    """Sign a certificate again, with the issuer's key, for another time."""
    builder = x509.CertificateBuilder(
        issuer[0].subject, like.subject, public_key, x509.random_serial_number(),
        until - timedelta(days=3700), until,
    )  # fmt: skip
    for extension in like.extensions:
        if not isinstance(extension.value, x509.AuthorityKeyIdentifier | x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(issuer[1], hashes.SHA256())


def _sign_again(network: Network, site: str, authority: Authority, *, until: datetime) -> None:
    """Give a site another certificate for its own name and key."""
    file = kit_of(network.folder / site / "kit") / "startup/client.crt"
    own = x509.load_pem_x509_certificate(file.read_bytes())
    signed = _certificate(own, own.public_key(), authority, until=until)
    file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
