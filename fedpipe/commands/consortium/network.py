"""How files get from a coordinator to its sites and back: by NVFlare. No torch.

The server is a process of NVFlare with the only open port. The driver, which is this process, has
an outer round's job run there: it starts our controller at the server and our executor at every
site. A job does not survive much, so the driver looks every few seconds whether each site that has
not answered is at work, and submits a further job for those that are connected but idle: sites that
come late, sites and servers that were started again, and all sites of a job that has failed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.commands.consortium.config import ServerConfig
from fedpipe.commands.consortium.controller import DECLINED, ORDERS, OuterRound
from fedpipe.commands.consortium.flare import server_command, wait_longer
from fedpipe.commands.consortium.kits import (
    COORDINATOR,
    DRIVER,
    DRIVER_KIT,
    SERVER_KIT,
    check_certificate,
    check_project,
    kit_of,
)
from fedpipe.commands.consortium.messages import ENVIRONMENT, TASK
from fedpipe.commands.consortium.run import CONNECTED
from fedpipe.commands.consortium.server import CONSORTIUM_DIR, REFUSED
from fedpipe.distributed.signals import end_with_parent
from fedpipe.errors import ConfigError, LaunchError
from fedpipe.files import write_text
from fedpipe.report.format import bytes_text
from fedpipe.run.ledger import LEDGER_FILE, Ledger
from fedpipe.run.outer import GLOBAL, GLOBAL_FACTS

SERVER_LOG = "server.log"
_LOOK_S = 2.0
_IDLE_S = 6.0
"""A site that is connected, but idle for so long, needs a job; a new job takes 4 s to begin."""
_MOST_IDLE_S = 300.0
_GATHER_S = 15.0
"""The first job of an outer round waits so long for sites that are not connected yet."""
_START_S = 60.0
_AGAIN_S = 5.0
_ANSWER_S = 60.0
_SITE_EXECUTOR = "fedpipe.commands.site.executor.SiteRound"


class Network:
    """A server of NVFlare, and the jobs of the outer round under way."""

    def __init__(
        self,
        config: ServerConfig,
        path: Path,
        *,
        consortium: str,
        num_rounds: int,
        show: Callable[[str], None],
    ) -> None:
        """Take what is needed; nothing is started.

        Args:
            config: The server's port, and where its kits are.
            path: Directory of the consortium.
            consortium: Name of the training, which begins with that of the consortium.
            num_rounds: Outer rounds.
            show: Shows a line.
        """
        self.config, self.path, self.show = config, path, show
        self.consortium, self.num_rounds = consortium, num_rounds
        self._server: subprocess.Popen[bytes] | None = None
        self._has_answered = self._is_full = False
        self._told: set[tuple[str, str]] = set()
        self._told_size = 0
        self._session: Any = None
        self._settings: dict[str, str] = {}
        self._folder = path
        self._began = self._looked = self._started = 0.0
        self._jobs: dict[str, set[str]] = {}
        """Of the outer round, by id: its sites."""
        self._pending = ""
        """The job that was submitted, and has not begun."""
        self._idle_since: dict[str, float] = {}
        self.connected: set[str] = set()

    # -- the server ----------------------------------------------------------------------------

    def open(self, settings: dict[str, str]) -> None:
        """Start the server.

        Raises:
            ConfigError: The kits are missing or have ended, or the port is taken.
            LaunchError: The server does not start.
        """
        self._settings = settings
        kits, name = Path(self.config.kits), self.consortium.rpartition("-")[0]
        for kit in (SERVER_KIT, DRIVER_KIT):
            check_certificate(kit_of(kits / kit))
        check_project(kits, name=name, host=self.config.host, port=self.config.port)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", self.config.port))
            except OSError as error:
                raise ConfigError(
                    f"server.port: expected a free port, got {self.config.port} ({error.strerror})."
                    " End what uses it, for example another coordinator of these kits."
                ) from None
        self._note_connected(set())
        self._start_server()
        self.show(f"server  port {self.config.port}, log {self.path / SERVER_LOG}")

    def _start_server(self) -> None:
        kit = kit_of(Path(self.config.kits) / SERVER_KIT)
        with open(self.path / SERVER_LOG, "ab") as log:
            self._server = subprocess.Popen(
                server_command(kit, org=COORDINATOR), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, cwd=kit, start_new_session=True, preexec_fn=end_with_parent,
                env={**os.environ, **ENVIRONMENT, CONSORTIUM_DIR: str(self.path.absolute())},
            )  # fmt: skip
        self._started, self._has_answered = time.monotonic(), False

    def close(self) -> None:
        """End the server; the agents of the sites wait for the next one."""
        self._leave()
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGTERM)
            self._server.wait()
            self._server = None

    def _leave(self) -> None:
        if self._session is not None:
            with contextlib.suppress(Exception):
                _elsewhere(self._session.close)
            self._session = None

    # -- an outer round ------------------------------------------------------------------------

    def hand_out(self, index: int, folder: Path, sites: Sequence[str]) -> None:
        """Write the orders of an outer round; ``attend`` sees that they get to the sites."""
        self._folder, self._began = folder, time.monotonic()
        self._jobs, self._pending, self._idle_since = {}, "", {}
        facts = json.loads((folder / GLOBAL_FACTS).read_text(encoding="utf-8"))
        (folder / ORDERS).mkdir(exist_ok=True)
        for site in sites:
            order = {
                "consortium": self.consortium, "round": index, "num_rounds": self.num_rounds,
                "settings": self._settings[site], "facts": facts,
            }  # fmt: skip
            write_text(folder / ORDERS / f"{site}.json", json.dumps(order) + "\n")

    def attend(self, waiting: Sequence[str]) -> None:
        """Look after server, jobs and sites, every other second."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        if self._server is not None and self._server.poll() is not None:
            if not self._has_answered:
                raise LaunchError(
                    f"expected NVFlare's server to start, got exit code {self._server.returncode}."
                    f" See the end of {self.path / SERVER_LOG}."
                )
            self.show(
                f"the server has ended with exit code {self._server.returncode}; starts again"
            )
            self._leave()
            self._start_server()
        self._tell_refused()
        self._tell_full(waiting)
        try:
            _elsewhere(lambda: self._look(waiting, now))
        except Exception as error:  # NVFlare has a dozen kinds for a server that is not there
            self._leave()
            if now - self._started > _START_S:
                raise LaunchError(
                    f"expected NVFlare's server to answer, got: {error}. See"
                    f" {self.path / SERVER_LOG}, then give the same command again."
                ) from error

    def _tell_refused(self) -> None:
        """Show whom the server has turned away, each once."""
        ledger = Ledger(self.path / LEDGER_FILE)
        if (size := ledger.size) == self._told_size:
            return
        self._told_size = size
        for line in ledger.read():
            who = (line["address"], line["why"]) if line["what"] == REFUSED else None
            if who is not None and who not in self._told:
                self._told.add(who)
                self.show(f"{time.strftime('%H:%M:%S')} {who[0]}: turned away: {who[1]}")

    def _tell_full(self, waiting: Sequence[str]) -> None:
        """Show once that updates have no room; it is the server's process that writes them."""
        needed = len(waiting) * (self._folder / GLOBAL).stat().st_size
        free = shutil.disk_usage(self.path).free
        if free < needed and not self._is_full:
            self.show(
                f"{self.path}: expected {bytes_text(needed)} of free space for updates, got"
                f" {bytes_text(free)}. Free space there; sites are asked again by themselves."
            )
        self._is_full = free < needed

    def _look(self, waiting: Sequence[str], now: float) -> None:
        session = self._connect()
        registered = session.get_system_info().client_info
        self._started, self._has_answered = now, True
        at_work = self._at_work(session) if registered else {}
        connected = at_work.keys()
        self._announce(set(connected))
        if self._pending and not self._has_begun(session):
            return
        for site in waiting:
            if site in connected and not at_work[site] & self._jobs.keys():
                self._idle_since.setdefault(site, now)
            else:
                self._idle_since.pop(site, None)
        if not self._jobs:  # the first one takes as many as it can
            if set(waiting) <= connected or (connected and now - self._began > _GATHER_S):
                self._submit(session, [s for s in waiting if s in connected])
            return
        due = [s for s in waiting if now - self._idle_since.get(s, now) > self._patience_s(s)]
        if due:
            self._submit(session, due)

    def _patience_s(self, site: str) -> float:
        """How long a site may be idle before it is asked again, longer every time."""
        asked = sum(site in sites for sites in self._jobs.values())
        return min(_IDLE_S * 1.5 ** max(asked - 1, 0), _MOST_IDLE_S)

    def _announce(self, connected: set[str]) -> None:
        for sites, what in (
            (connected - self.connected, "connected"), (self.connected - connected, "gone")
        ):  # fmt: skip
            if sites:
                self.show(f"{time.strftime('%H:%M:%S')} {', '.join(sorted(sites))}: {what}")
        if self.connected != connected:
            self._note_connected(connected)

    def _note_connected(self, sites: set[str]) -> None:
        """Write down who is connected, for whoever asks meanwhile; a full disk ends nothing."""
        self.connected = sites
        with contextlib.suppress(OSError):
            write_text(self.path / CONNECTED, json.dumps(sorted(sites)) + "\n")

    def _connect(self) -> Any:
        if self._session is None:
            from nvflare.fuel.flare_api.flare_api import new_secure_session

            silence = io.StringIO()  # it prints that it connects
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                self._session = new_secure_session(
                    DRIVER,
                    str(kit_of(Path(self.config.kits) / DRIVER_KIT)),
                    timeout=_AGAIN_S,
                    auto_login_max_tries=1,
                )
            wait_longer(self._session)
        return self._session

    def _at_work(self, session: Any) -> dict[str, set[str]]:
        """The jobs of each site that answers, as the sites say themselves.

        The server counts a site as connected for ten minutes after its link was cut.
        """
        found: dict[str, set[str]] = {}
        for line in session.get_client_job_status() or []:
            if line["status"] != "no_reply":
                found.setdefault(line["client_name"], set()).add(line.get("job_id", ""))
        return found

    def _has_begun(self, session: Any) -> bool:
        """Whether nothing is pending any more: the job runs, or has failed to."""
        try:
            status = str(session.get_job_meta(self._pending)["status"])
        except Exception:  # a server that was started again may not know it
            status = ""
        if status in ("SUBMITTED", "APPROVED", "DISPATCHED"):
            return False
        self._pending = ""
        return True

    def _submit(self, session: Any, sites: Sequence[str]) -> None:
        job = self.path / "jobs" / f"{self._folder.name}_{len(self._jobs)}"
        _write_job(job, str(self._folder.relative_to(self.path)), sites)
        job_id = session.submit_job(str(job.absolute()))
        self._pending = job_id
        self._jobs[job_id] = set(sites)
        for site in sites:
            self._idle_since.pop(site, None)
        if len(self._jobs) > 1:
            self.show(f"{time.strftime('%H:%M:%S')} asked again: {', '.join(sites)}")

    def _end(self, job_id: str) -> None:
        """End a job, and remove what the server keeps of one that has ended."""
        session = self._connect()
        if str(session.get_job_meta(job_id)["status"]) == "RUNNING":
            session.abort_job(job_id)
        else:
            session.delete_job(job_id)

    def take_in(self, site: str, index: int, folder: Path) -> bool:
        """Do nothing: the controller puts an update where the driver has just looked."""
        return False

    def declined(self, site: str, folder: Path) -> str:
        """Why a site sends no update, as it says itself."""
        try:
            return str(json.loads((folder / DECLINED).read_text(encoding="utf-8"))["why"])
        except FileNotFoundError:
            return ""

    def recall(self) -> None:
        """End the jobs of the outer round: an agent stops to wait, its run goes on."""
        for job_id in self._jobs:
            with contextlib.suppress(Exception):  # most of them have ended by themselves
                _elsewhere(partial(self._end, job_id))
        self._jobs, self._pending = {}, ""
        shutil.rmtree(self.path / "jobs", ignore_errors=True)


def _elsewhere(work: Callable[[], Any]) -> None:
    """Do something in a thread: NVFlare catches what a signal raises in the main one."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # raised again where it belongs
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {_ANSWER_S:.0f} s")
    if failed:
        raise failed[0]


def _write_job(folder: Path, round_folder: str, sites: Sequence[str]) -> None:
    """Write a job of NVFlare without any code; sites do not see the server's part."""
    shutil.rmtree(folder, ignore_errors=True)
    server = {"workflows": [{"id": TASK, "path": f"{OuterRound.__module__}.OuterRound",
                             "args": {"folder": round_folder, "sites": list(sites)}}]}  # fmt: skip
    site = {"executors": [{"tasks": [TASK], "executor": {"path": _SITE_EXECUTOR, "args": {}}}]}
    rest = {"format_version": 2, "components": [], "task_data_filters": [],
            "task_result_filters": []}  # fmt: skip
    meta = {
        "name": TASK, "resource_spec": {}, "min_clients": 1,
        "deploy_map": {"at_server": ["server"], "at_sites": list(sites)},
    }  # fmt: skip
    for path, content in (
        ("meta.json", meta),
        ("at_server/config/config_fed_server.json", rest | server),
        ("at_sites/config/config_fed_client.json", rest | site),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
