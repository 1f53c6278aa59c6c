"""``fedpipe consortium``: the coordinator of sites that share no cluster."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from fedpipe.commands import options
from fedpipe.commands.consortium import kits
from fedpipe.commands.consortium.config import ConsortiumConfig, ServerConfig
from fedpipe.commands.consortium.report import status_lines, write_consortium_report
from fedpipe.commands.consortium.run import Consortium, locate
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.errors import ConfigError
from fedpipe.run.run_dir import locked
from fedpipe.terminal import show


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe consortium``."""
    command.add_argument(
        "action",
        metavar="ACTION",
        choices=("init", "sign", "run", "status"),
        help="init: make the authority, the server's kit and an invitation per site; sign --request"
        " FILE: sign a site's request; run: hand weights out and take updates in until all outer"
        " rounds are done; status: say how far it is, and whom it waits for",
    )
    options.add_path(
        command, "--config", metavar="FILE", help="YAML, see docs/how-to/consortium.md"
    )
    options.add_path(command, "--request", metavar="FILE", help="of sign: what a site has sent")
    options.add_directory(command)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say."""
    consortium = locate(args.config, args.overrides, args.run_dir)
    if args.action == "init":
        return _init(consortium.config)
    if args.action == "sign":
        return _sign(consortium.config, args.request)
    if args.action == "status":
        for line in status_lines(consortium):
            show(line)
        return 0
    return coordinate(consortium)


def _init(config: ConsortiumConfig) -> int:
    """Make what the coordinator needs, and what every site needs to join."""
    server, folder = _server_of(config), Path(config.server.kits)
    kits.make_authority(folder, name=config.name, host=server.host, port=server.port)
    for site in config.federation.sites:
        invitation = kits.invite(
            folder, name=config.name, host=server.host, port=server.port, site=site
        )
        show(f"invitation  {invitation}, send it to {site}")
    show(f"authority   {kits.authority(folder)}")
    show(f"keys        in {folder}; nobody else may read it")
    return 0


def _sign(config: ConsortiumConfig, request: str | None) -> int:
    """Sign the request of a site."""
    _server_of(config)
    if request is None:
        raise ConfigError("--request: expected what a site has sent, got none. Name the file.")
    site, signed = kits.sign(
        Path(config.server.kits),
        Path(request),
        name=config.name,
        sites=config.federation.sites,
    )
    show(f"authority   {kits.authority(Path(config.server.kits))}")
    show(f"request     {kits.fingerprint_of(Path(request))}")
    show(f"signed      {signed}, send it to {site} once both fingerprints have been compared")
    return 0


def _server_of(config: ConsortiumConfig) -> ServerConfig:
    if not config.server.host:
        raise ConfigError(
            "server.host: expected the name of this machine as sites see it, got none. Sites that"
            " are reached by folders need no kits."
        )
    return config.server


def coordinate(consortium: Consortium) -> int:
    """Be the coordinator until all outer rounds are done.

    Returns:
        0 when they are, 75 when interrupted; the same command goes on.

    Raises:
        FedPipeError: What the user can mend.
    """
    signals = Signals()
    try:
        with signals.caught():
            consortium.begin()
            with locked(consortium.path):
                if consortium.num_done < consortium.num_rounds:
                    _train(consortium)
                model = consortium.export()
    except Interrupted:
        again = shlex.join(["fedpipe", "consortium", "run", "--run-dir", str(consortium.path)])
        show(f"interrupted; the sites work on. Go on with: {again}")
        return EXIT_INTERRUPTED
    show(f"model   {model}" if model else "model   none: a part of it stays with the clients")
    show(f"report  {write_consortium_report(consortium)}")
    return 0


def _train(consortium: Consortium) -> None:
    with consortium.exchange(show) as exchange:
        for index in range(consortium.num_done, consortium.num_rounds):
            consortium.train_round(index, exchange, show=show)
            consortium.export()
            write_consortium_report(consortium)
