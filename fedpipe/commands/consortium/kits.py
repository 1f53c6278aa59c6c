"""Who belongs to a consortium: its authority, and the kits of server and sites. No torch.

Every participant makes its own private key. The coordinator's authority only signs: a request of a
site comes in, a signed kit goes out, and both may travel by e-mail, because neither holds a secret.
What is in the kits are files of NVFlare, made by its own tools.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

from fedpipe.config.tree import dump, parse, read_text
from fedpipe.errors import ConfigError
from fedpipe.files import replace_folder, write_text

if TYPE_CHECKING:
    from cryptography import x509

COORDINATOR = "coordinator"
"""Organisation of the server and of the driver in their certificates."""
DRIVER = f"{COORDINATOR}@consortium.local"
"""Name of the driver in its certificate; NVFlare wants the form of an e-mail address."""
_AUTHORITY, _PROFILE = "authority", "project.yaml"
SERVER_KIT, DRIVER_KIT = "server", "driver"
INVITATIONS, SIGNED = "invitations", "signed"
_LOCAL_FILES = ("resources.json", "authorization.json")
_CLOSED = {
    "submit_job": "any", "clone_job": "none", "manage_job": "any", "download_job": "none",
    "view": "any", "operate": "none", "shell_commands": "none", "byoc": "none",
    "server-predeployed-flwr": "none",
}  # fmt: skip
"""What the coordinator may do at a site: give it outer rounds, end them, see that it is there."""
_OURS = "fedpipe."
_MOST_BYTES = 2**20
"""Of the description in a request or in a signed kit."""
_NO_LOGS = ("site_log_streamer", "log_receiver")


class Invitation(TypedDict):
    """What a site has to know to ask for a kit; nothing of it is secret."""

    consortium: str
    site: str
    host: str
    port: int
    authority: str
    """SHA-256 of the certificate that signs kits; to be compared over another channel."""


def require_nvflare() -> None:
    """Refuse to go on without NVIDIA FLARE.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec("nvflare") is None:
        raise ConfigError(
            "nvflare: expected NVIDIA FLARE to be installed, got none. Run: pip install"
            ' "fedpipe[consortium]"'
        )


# -- at the coordinator ----------------------------------------------------------------------------


def make_authority(folder: Path, *, name: str, host: str, port: int) -> None:
    """Make the authority of a consortium and the coordinator's own kits, once.

    Args:
        folder: Of all that is made here.
        name: Of the consortium.
        host: At which sites reach the coordinator.
        port: The only one that it opens.

    Raises:
        ConfigError: What is there belongs to another consortium, host or port.
    """
    make_folder(folder, key="server.kits")
    folder.chmod(0o700)
    profile = folder / _PROFILE
    project = check_project(folder, name=name, host=host, port=port)
    if not profile.is_file():
        shutil.rmtree(folder / _AUTHORITY, ignore_errors=True)
        _tool(folder, "cert", "init", "--profile", _write(folder, project), "-o", _AUTHORITY)
        write_text(profile, dump(project))
    for kit, participant in (
        (SERVER_KIT, {"name": host, "type": "server", "org": COORDINATOR}),
        (DRIVER_KIT, {"name": DRIVER, "type": "admin", "org": COORDINATOR,
                      "role": "lead"}),
    ):  # fmt: skip
        if (folder / kit).is_dir():
            continue

        def make(aside: Path, participant: Mapping[str, str] = participant) -> None:
            request = _request(aside, name, participant)
            signed = aside / "kit.signed.zip"
            _sign(folder, request, signed)
            _package(aside, signed, fingerprint=authority(folder))

        replace_folder(folder / kit, make)
    _open_server(kit_of(folder / SERVER_KIT), folder)


def check_project(folder: Path, *, name: str, host: str, port: int) -> dict[str, Any]:
    """Return NVFlare's description of a consortium.

    Raises:
        ConfigError: What is in the folder belongs to another consortium, host or port.
    """
    project: dict[str, Any] = {
        "name": name,
        "scheme": "http",  # WebSocket over TLS
        "connection_security": "mtls",
        "server": {"host": host, "fed_learn_port": port, "admin_port": port},
    }
    profile = folder / _PROFILE
    made = parse(profile.read_text(), source=str(profile)).plain() if profile.is_file() else project
    if made != project:
        raise ConfigError(
            f"server: expected the consortium, host and port that the kits in {folder} were made"
            f" for ({made['name']}, {made['server']['host']}:{made['server']['fed_learn_port']}),"
            f" got {name}, {host}:{port}. Restore them, or make new kits in another folder"
            " (server.kits) and have all sites join again."
        )
    return project


def make_folder(folder: Path, *, key: str) -> None:
    """Make a folder that may be there already.

    Raises:
        ConfigError: A file lies in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"{key}: expected a folder, got {folder}, in whose place a file lies. Choose another."
        ) from None


def invite(folder: Path, *, name: str, host: str, port: int, site: str) -> Path:
    """Write what a site needs to ask for a kit; return the file."""
    invitation: Invitation = {
        "consortium": name, "site": site, "host": host, "port": port,
        "authority": authority(folder),
    }  # fmt: skip
    (folder / INVITATIONS).mkdir(exist_ok=True)
    file = folder / INVITATIONS / f"{site}.yaml"
    write_text(file, dump(dict(invitation)))
    return file


def sign(folder: Path, request: Path, *, name: str, sites: tuple[str, ...]) -> tuple[str, Path]:
    """Sign the request of a site.

    Args:
        folder: Of the authority.
        request: The file that the site has sent.
        name: Of the consortium.
        sites: Who may take part.

    Returns:
        The site's name, and the file to send back.

    Raises:
        ConfigError: It is no request, or not one of a site of this consortium.
    """
    asked = _asked(request)
    site = str(asked.get("name"))
    for key, found, expected in (
        ("consortium", asked.get("project"), (name,)),
        ("kind of participant", asked.get("cert_type"), ("client",)),
        ("site", site, sites),
    ):
        if found not in expected:
            raise ConfigError(
                f"{request}: expected a request whose {key} is {' or '.join(sorted(expected))}, got"
                f" {found}. Nothing is signed; ask the site for a request of its invitation."
            )
    authority(folder)
    (folder / SIGNED).mkdir(exist_ok=True)
    signed = folder / SIGNED / f"{site}.signed.zip"
    _sign(folder, request, signed)
    return site, signed


def authority(folder: Path) -> str:
    """Return the SHA-256 of the certificate that signs kits, as people compare it."""
    try:
        text = (folder / _AUTHORITY / "ca.json").read_text(encoding="utf-8")
        return str(json.loads(text)["rootCA_fingerprint"])
    except OSError:
        raise ConfigError(
            f"server.kits: expected the kits of the consortium, got none in {folder}. Make them"
            " with: fedpipe consortium init --config FILE"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"server.kits: expected the kits of the consortium, got damaged ones in {folder}."
            " Restore them from a backup."
        ) from None


def kit_of(folder: Path) -> Path:
    """Return the only kit below a folder: what has ``startup`` and ``local``."""
    found = sorted(path.parent for path in folder.glob("*/prod_*/*/startup"))
    if not found:
        raise ConfigError(
            f"{folder}: expected a kit, got none. Run fedpipe consortium init, or at a site"
            " fedpipe site join."
        )
    return found[-1]


# -- at a site -------------------------------------------------------------------------------------


def read_invitation(path: Path) -> Invitation:
    """Read what a coordinator has sent.

    Raises:
        ConfigError: It is no invitation.
    """
    found = parse(read_text(str(path), option="INVITATION"), source=str(path)).plain()
    missing = sorted(set(Invitation.__annotations__) - set(found))
    if missing:
        raise ConfigError(
            f"{path}: expected an invitation of a coordinator, got a file without {missing[0]}. Ask"
            " for what fedpipe consortium init has written for this site."
        )
    for key, kind in get_type_hints(Invitation).items():
        if type(found[key]) is not kind or not found[key]:
            what = "a whole number" if kind is int else "a text"
            raise ConfigError(
                f"{path}: expected {what} as {key}, got {found[key]!r}. Ask the coordinator for the"
                " invitation of this site again."
            )
    invitation: Invitation = found
    return invitation


def request_kit(folder: Path, invitation: Invitation) -> Path:
    """Make this site's private key, and the request that goes to the coordinator; return it.

    What was made for the same invitation before stays, because a kit fits one key only.
    """
    site = invitation["site"]
    participant = {"name": site, "type": "client", "org": organisation(site)}
    made = folder / "request" / f"{site}.request.zip"
    if made.is_file() and _asked(made).get("project") == invitation["consortium"]:
        return made
    return _request(folder, invitation["consortium"], participant)


def fingerprint_of(request: Path) -> str:
    """Return the SHA-256 of what a site asks to have signed, as people compare it."""
    digest = str(_asked(request).get("csr_sha256", "")).upper()
    return "SHA256:" + ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def install_kit(folder: Path, signed: Path, invitation: Invitation) -> Path:
    """Make the kit of a site from what the coordinator has signed, and close it.

    Args:
        folder: In which ``request_kit`` has made the private key.
        signed: The file that came back.
        invitation: Of the site.

    Returns:
        The kit's folder.

    Raises:
        ConfigError: It is signed by another authority, or for another site.
    """
    asked = _asked(signed)
    for key, found, expected in (
        ("consortium", asked.get("project"), invitation["consortium"]),
        ("site", asked.get("name"), invitation["site"]),
    ):
        if found != expected:
            raise ConfigError(
                f"{signed}: expected a kit whose {key} is {expected}, got {found}. Ask the"
                " coordinator for the one that answers this site's request."
            )
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: expected the private key of this site's request, got none. Begin again"
            " with: fedpipe site request INVITATION"
        )
    _package(folder, signed, fingerprint=invitation["authority"])
    kit = kit_of(folder)
    _close_site(kit)
    return kit


def certificate_end(kit: Path) -> datetime:
    """Return when the certificate of a kit ends."""
    return _certificate(kit).not_valid_after_utc


def check_certificate(kit: Path) -> None:
    """Refuse a certificate that is not valid now; NVFlare would wait for ever and say nothing.

    Raises:
        ConfigError: It has ended, or has not begun.
    """
    certificate, now = _certificate(kit), datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end < now:
        raise ConfigError(
            f"{kit}: expected a certificate that is valid, got one that ended on {end:%Y-%m-%d}."
            " Ask for a new kit: fedpipe site request, sign, join."
        )
    if now < begin:
        raise ConfigError(
            f"{kit}: expected a certificate that is valid, got one that begins at"
            f" {begin:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} here. Set the clock of"
            " this machine, or wait."
        )


def _certificate(kit: Path) -> x509.Certificate:
    from cryptography import x509

    try:
        (file,) = (kit / "startup").glob("[cs]*.crt")
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError:  # also where there is no such file
        raise ConfigError(
            f"{kit}: expected a kit with its certificate, got one without, or a damaged one. Make"
            " or join it again."
        ) from None


def organisation(site: str) -> str:
    """Return the name of a site's organisation in its certificate."""
    return re.sub(r"\W", "_", site)


# -- files of NVFlare ------------------------------------------------------------------------------


def _close_site(kit: Path) -> None:
    """Close what NVFlare leaves open: the coordinator's file commands, job logs, foreign code."""
    resources = _defaults(kit, "resources.json")
    resources["class_allow_list"] = [_OURS]
    resources["allow_log_streaming"] = False
    resources["components"] = _without_logs(resources)
    _write_local(kit, "resources.json", resources)
    roles = ("project_admin", "org_admin", "lead", "member")
    rights: dict[str, Any] = dict.fromkeys(roles, "none")
    rights["lead"] = _CLOSED
    _write_local(kit, "authorization.json", {"format_version": "1.0", "permissions": rights})


def _open_server(kit: Path, folder: Path) -> None:
    """Let the server run our controller, many jobs at a time, and keep its files here."""
    resources = _defaults(kit, "resources.json")
    resources["class_allow_list"] = [_OURS]
    storage = folder / "jobs"
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(
        storage.absolute() / "snapshots"
    )
    resources["components"] = _without_logs(resources)
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(storage.absolute())
        if component["id"] == "job_scheduler":
            component["args"] = {"max_jobs": 1000, "min_schedule_interval": 2.0}
    _write_local(kit, "resources.json", resources)


def _without_logs(resources: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [c for c in resources["components"] if c["id"] not in _NO_LOGS]


def _defaults(kit: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((kit / "local" / f"{name}.default").read_text())
    return content


def _write_local(kit: Path, name: str, content: Mapping[str, Any]) -> None:
    write_text(kit / "local" / name, json.dumps(content, indent=1) + "\n")


def _request(folder: Path, name: str, participant: Mapping[str, str]) -> Path:
    """Make a private key and a request; return the request."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    described = _write(folder, {"name": name, "participants": [dict(participant)]})
    _tool(folder, "cert", "request", "-p", described, "--out", "request", "--force")
    (request,) = (folder / "request").glob("*.request.zip")
    return request


def _sign(folder: Path, request: Path, signed: Path) -> None:
    _tool(
        folder, "cert", "approve", str(request.absolute()), "-c", _AUTHORITY,
        "--profile", _PROFILE, "--out", str(signed.absolute()), "--force",
    )  # fmt: skip


def _package(folder: Path, signed: Path, *, fingerprint: str) -> None:
    _tool(
        folder, "package", str(signed.absolute()), "--request-dir", "request",
        "--fingerprint", fingerprint, "-w", ".", "--force",
    )  # fmt: skip


def _asked(path: Path) -> dict[str, Any]:
    """Return who a request, or a signed one, is for.

    Raises:
        ConfigError: It is neither.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file, got none of this name. Check the path.")
    content = None
    try:
        with zipfile.ZipFile(path) as archive:
            for name in {"request.json", "signed.json"} & set(archive.namelist()):
                if archive.getinfo(name).file_size <= _MOST_BYTES:
                    content = json.loads(archive.read(name))
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError):
        pass  # NotImplementedError and RecursionError are a RuntimeError
    if isinstance(content, dict):
        return content
    raise ConfigError(
        f"{path}: expected a request or a signed kit, got another file. A request is what fedpipe"
        " site request has written; a signed kit is what fedpipe consortium sign has."
    )


def _write(folder: Path, content: Mapping[str, Any]) -> str:
    """Write a description for one of NVFlare's tools; return its name."""
    write_text(folder / "description.yaml", dump(content))
    return "description.yaml"


def _tool(folder: Path, *arguments: str) -> None:
    """Run a tool of NVFlare in a folder, which also takes its records.

    Raises:
        ConfigError: It refuses; its own words follow.
    """
    require_nvflare()
    command = [sys.executable, "-m", "nvflare.cli", "--format", "json", *arguments]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "HOME": str(folder.absolute())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return
    text = result.stdout + result.stderr
    try:
        said = json.loads(result.stdout.strip().splitlines()[-1])
        text = str(said.get("message") or said.get("error") or said)
    except (ValueError, IndexError, AttributeError):
        text = text.strip().splitlines()[-1] if text.strip() else "nothing"
    raise ConfigError(
        f"{folder}: expected NVFlare's {' '.join(arguments[:2])} to work, got: {text}. Mend that,"
        " then give the same command again."
    )
