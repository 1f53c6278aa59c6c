"""The agent of a site: it waits for outer rounds, dials out only, and never trains. No torch.

It is the client process of NVFlare, kept alive by a small process of ours. What it starts for an
outer round survives it: the site's run goes on, and is taken up again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable

from fedpipe.commands.consortium.kits import (
    Invitation,
    check_certificate,
    kit_of,
    require_nvflare,
)
from fedpipe.commands.consortium.messages import ENVIRONMENT
from fedpipe.commands.site.site import Site
from fedpipe.distributed.signals import Signals, end_with_parent
from fedpipe.errors import FederationError
from fedpipe.run.run_dir import is_locked, locked

AGENT_LOG, PID_FILE = "agent.log", "agent.pid"
KIT = "kit"
_AGAIN_S, _MOST_S = 2.0, 60.0
"""The agent is started again after so long, and after twice as long each time it fails at once."""
_HEALTHY_S = 60.0
_REACH_S = 10.0
_JOBS = "????????-????-????-????-????????????"
"""Names of the folders in which NVFlare has its part of an outer round."""
_STOP_S = 20.0
_NO_PAGE = "GET / HTTP/1.1\r\nHost: fedpipe\r\nConnection: close\r\n\r\n"
"""The server has an answer to this: that it has no such page."""


def keep_agent(site: Site, invitation: Invitation, show: Callable[[str], None]) -> None:
    """Run the agent until a signal comes, and start it again whenever it ends.

    Args:
        site: Its folder.
        invitation: Names the coordinator.
        show: Shows a line.

    Raises:
        FederationError: An agent of this site is at work already.
        Interrupted: A signal has come.
    """
    require_nvflare()
    _check_alone(site)
    from fedpipe.commands.consortium.flare import agent_command
    from fedpipe.commands.site.executor import SITE_DIR

    kit = kit_of(site.path / KIT)
    check_certificate(kit)
    command = agent_command(kit, site=invitation["site"])
    environment = {**os.environ, **ENVIRONMENT, SITE_DIR: str(site.path.absolute())}
    signals, wait_s = Signals(), _AGAIN_S
    with locked(site.path), signals.caught():
        (site.path / PID_FILE).write_text(f"{os.getpid()}\n")
        site.forget_failures()
        for job in kit.glob(_JOBS):  # NVFlare keeps the folder of every outer round for ever
            shutil.rmtree(job, ignore_errors=True)
        try:
            while True:
                began = time.monotonic()
                with open(site.path / AGENT_LOG, "a", encoding="utf-8") as log:
                    agent = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=kit,
                        env=environment, start_new_session=True, preexec_fn=end_with_parent,
                    )  # fmt: skip
                try:
                    code = agent.wait()
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(agent.pid, signal.SIGTERM)
                    agent.wait()
                wait_s = _AGAIN_S if time.monotonic() - began > _HEALTHY_S else wait_s
                show(f"the agent has ended with exit code {code}; again in {wait_s:.0f} s")
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _MOST_S)
        finally:
            (site.path / PID_FILE).unlink(missing_ok=True)


def start_agent(site: Site, invitation: Invitation) -> int:
    """Start the agent in the background; return the number of its process.

    Raises:
        FederationError: It ends at once, or there is one already.
    """
    _check_alone(site)
    command = [
        sys.executable, "-m", "fedpipe", "site", "start", "--foreground",
        "--site-dir", str(site.path),
    ]  # fmt: skip
    with open(site.path / AGENT_LOG, "a", encoding="utf-8") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + _REACH_S
    while agent_pid(site) != process.pid and time.monotonic() < deadline:
        if process.poll() is not None:
            text = (site.path / AGENT_LOG).read_bytes()[begin:].decode(errors="replace")
            raise FederationError(text.strip().splitlines()[-1].partition(": ")[2] or text)
        time.sleep(0.1)
    return process.pid


def _check_alone(site: Site) -> None:
    if pid := agent_pid(site):
        raise FederationError(
            f"--site-dir: expected the folder of a site without an agent at work, got {site.path}"
            f" of process {pid}. It waits for outer rounds already; fedpipe site stop ends it."
        )


def stop_agent(site: Site) -> bool:
    """End the agent; return whether there was one. The site's run goes on."""
    pid = agent_pid(site)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while agent_pid(site) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    return True


def agent_pid(site: Site) -> int | None:
    """Return the number of the process that keeps the agent; None while there is none.

    The file alone says nothing: after a crash the number may be that of somebody else's process.
    """
    try:
        pid = int((site.path / PID_FILE).read_text())
    except (OSError, ValueError):
        return None
    return pid if pid > 0 and is_locked(site.path) else None


def check_connection(site: Site, invitation: Invitation) -> None:
    """Connect as the agent does, but ask for nothing that disturbs an agent which is at work.

    Raises:
        FederationError: There is no way to the coordinator, or one of the two does not trust the
            other.
    """
    kit, host, port = kit_of(site.path / KIT), invitation["host"], invitation["port"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # NVFlare checks the name in the certificate instead
    context.load_verify_locations(kit / "startup/rootCA.pem")
    context.load_cert_chain(kit / "startup/client.crt", kit / "startup/client.key")
    whom = f"the coordinator at {host}:{port}"
    try:
        with (
            socket.create_connection((host, port), timeout=_REACH_S) as raw,
            context.wrap_socket(raw) as secure,
        ):
            secure.sendall(_NO_PAGE.encode())
            answer = secure.recv(1)  # where a certificate that is not accepted shows, too
            refusal = "" if answer else "it does not take this site's certificate"
    except ssl.SSLError as error:
        refusal = str(error.reason or error)
    except OSError as error:
        raise FederationError(
            f"expected a way to {whom}, got: {error.strerror or error}. Its server runs"
            " during a training only. If one is under way, have outbound connections to that port"
            " opened. An agent tries again by itself."
        ) from None
    if refusal:
        raise FederationError(
            f"expected {whom} to be of this site's consortium, got: {refusal}. Compare the"
            " authority of both (fedpipe site status), and join again with a new kit."
        )
