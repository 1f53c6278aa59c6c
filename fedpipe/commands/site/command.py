"""``fedpipe site``: an institution joins a consortium, and its agent trains outer rounds."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from fedpipe.cluster.profile import load_profile
from fedpipe.commands import options
from fedpipe.commands.consortium.kits import (
    Invitation,
    certificate_end,
    fingerprint_of,
    install_kit,
    kit_of,
    make_folder,
    read_invitation,
    request_kit,
)
from fedpipe.commands.site.agent import (
    KIT,
    agent_pid,
    check_connection,
    keep_agent,
    start_agent,
    stop_agent,
)
from fedpipe.commands.site.config import settled
from fedpipe.commands.site.site import INVITATION_FILE, LOG_FILE, PROFILE_FILE, SITE_FILE, Site
from fedpipe.config.tree import read_text
from fedpipe.distributed.signals import Interrupted
from fedpipe.errors import ConfigError, FedPipeError
from fedpipe.files import write_text
from fedpipe.report.format import count
from fedpipe.terminal import show

_ACTIONS = ("request", "join", "start", "stop", "status", "policy")
_LAST_LINES = 5


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe site``."""
    command.add_argument(
        "action",
        metavar="ACTION",
        choices=_ACTIONS,
        help="request INVITATION: make this site's private key, and the request that goes to the"
        " coordinator; join KIT: take the signed kit and the site's own policy; start, stop: the"
        " agent that waits for outer rounds; status: what it does; policy: what it accepts and lets"
        " out",
    )
    command.add_argument(
        "file", metavar="FILE", nargs="?", help="the invitation of request, or the kit of join"
    )
    options.add_path(
        command,
        "--site-dir",
        metavar="DIR",
        default="site",
        help="folder of the site; default: site",
    )
    options.add_path(
        command, "--config", metavar="FILE", help="site.yaml of join: data, policy, see the guide"
    )
    options.add_path(
        command,
        "--profile",
        metavar="FILE",
        help="of join: outer rounds are SLURM jobs on such nodes; see slurm/profiles",
    )
    command.add_argument(
        "--foreground",
        action="store_true",
        help="of start: do not go into the background, for systemd and containers",
    )
    command.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say."""
    if (args.file is None) == (args.action in ("request", "join")):
        what = {"request": "an invitation", "join": "a signed kit"}.get(args.action, "nothing")
        raise ConfigError(
            f"fedpipe site {args.action}: expected {what} after it, got {args.file or 'nothing'}."
            " See fedpipe site --help."
        )
    folder = Path(args.site_dir)
    if args.action == "request":
        return _request(folder, Path(args.file))
    invitation = _invitation(folder)
    if args.action == "join":
        return _join(folder, Path(args.file), invitation, args.config, args.profile)
    site = Site(folder)
    site.config  # noqa: B018 - a policy that cannot be read stops everything
    if args.action == "start":
        return _start(site, invitation, foreground=args.foreground)
    if args.action == "stop":
        show("the agent is stopped; what trains goes on" if stop_agent(site) else "no agent")
    elif args.action == "policy":
        show((folder / SITE_FILE).read_text(encoding="utf-8").rstrip())
    else:
        _status(site, invitation)
    return 0


def _invitation(folder: Path) -> Invitation:
    if not (folder / INVITATION_FILE).is_file():
        raise ConfigError(
            f"--site-dir: expected the folder of a site, got {folder}. Begin with: fedpipe site"
            " request INVITATION"
        )
    return read_invitation(folder / INVITATION_FILE)


def _request(folder: Path, file: Path) -> int:
    invitation = read_invitation(file)
    make_folder(folder, key="--site-dir")
    if (folder / KIT).is_dir() and agent_pid(Site(folder)) is not None:
        raise ConfigError(
            f"{folder}: expected no agent at work, got one. Stop it: fedpipe site stop"
        )
    request = request_kit(folder / KIT, invitation)
    shutil.copyfile(file, folder / INVITATION_FILE)
    show(f"private key  stays in {request.parent}")
    show(f"authority    {invitation['authority']}")
    show(f"request      {fingerprint_of(request)}")
    show(f"send         {request} to the coordinator, and compare both fingerprints in a call")
    return 0


def _join(
    folder: Path, signed: Path, invitation: Invitation, config: str | None, profile: str | None
) -> int:
    if config is None:
        raise ConfigError(
            "--config: expected the site's own policy, got none. See docs/how-to/consortium.md for"
            " a site.yaml."
        )
    policy = settled(read_text(config), source=config)
    nodes = read_text(profile, option="--profile") if profile is not None else None
    if profile is not None:
        load_profile(profile)
    kit = install_kit(folder / KIT, signed, invitation)
    write_text(folder / SITE_FILE, policy)
    if nodes is None:
        (folder / PROFILE_FILE).unlink(missing_ok=True)
    else:
        write_text(folder / PROFILE_FILE, nodes)
    Site(folder).forget_failures()
    show(f"site         {invitation['site']} of {invitation['consortium']}, in {folder}")
    show(f"certificate  until {certificate_end(kit):%Y-%m-%d}")
    show(f"outer rounds train {'on this machine' if nodes is None else 'as SLURM jobs'}")
    if agent_pid(Site(folder)) is None:
        show(f"start with   fedpipe site start --site-dir {shlex.quote(str(folder))}")
    else:
        show("the agent    goes on; the policy holds from now on")
    return 0


def _start(site: Site, invitation: Invitation, *, foreground: bool) -> int:
    if foreground:
        try:
            keep_agent(site, invitation, show)
        except Interrupted:
            show("the agent is stopped; what trains goes on")
        return 0
    pid = start_agent(site, invitation)
    show(f"agent        process {pid}, waits for outer rounds of {invitation['consortium']}")
    try:
        check_connection(site, invitation)
        show(f"coordinator  {invitation['host']}:{invitation['port']} answers")
    except FedPipeError as error:
        show(f"coordinator  {error}")
    show(f"log          {site.path / LOG_FILE}")
    return 0


def _status(site: Site, invitation: Invitation) -> None:
    pid = agent_pid(site)
    show(f"site         {invitation['site']} of {invitation['consortium']}, in {site.path}")
    show(f"authority    {invitation['authority']}")
    show(f"certificate  until {certificate_end(kit_of(site.path / KIT)):%Y-%m-%d}")
    start = f"does not run; start it: fedpipe site start --site-dir {shlex.quote(str(site.path))}"
    show(f"agent        {f'process {pid}' if pid else start}")
    if site.config.dry_run:
        show("dry run      nothing is sent")
    try:
        check_connection(site, invitation)
        show(f"coordinator  {invitation['host']}:{invitation['port']} answers")
    except FedPipeError as error:
        show(f"coordinator  {error}")
    try:
        lines = list(site.ledger.read())
        left = {(x["consortium"], x["sha256"]) for x in lines if x["what"] == "sent"}
        show(
            f"ledger       {count(len(lines), 'line')}, none changed;"
            f" {count(len(left), 'update')} sent"
        )
    except FedPipeError as error:
        show(f"ledger       {error}")
    log = site.path / LOG_FILE
    if log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]:
            show(f"  {line}")
