"""The folder of a site: its kit, its policy, what crosses, and the run that trains. No torch.

``join`` makes the folder. The agent of NVFlare starts a process per outer round, which calls
``Site.answer``: it begins or takes up the site's own run, waits for the update, and says what may
leave. It keeps nothing in memory, so it may be killed and called again at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from fedpipe.cluster.slurm import refusal_in
from fedpipe.commands.consortium.messages import ENVIRONMENT, Order, check_order
from fedpipe.commands.site.config import (
    METRICS,
    SiteConfig,
    check_limits,
    read_site,
    run_config,
)
from fedpipe.config.load import to_yaml
from fedpipe.config.tree import Node, read_text
from fedpipe.distributed.signals import EXIT_INTERRUPTED
from fedpipe.errors import ConfigError, FederationError, SchedulerError, error_in
from fedpipe.files import system_errors_named, write_text
from fedpipe.printable import printable
from fedpipe.report.format import bytes_text
from fedpipe.run.ledger import LEDGER_FILE, Ledger, described
from fedpipe.run.outer import (
    GLOBAL,
    GLOBAL_FACTS,
    UPDATE,
    UPDATE_FACTS,
    GlobalFacts,
    UpdateFacts,
    check_digest,
    check_facts,
    check_global,
    has_arrived,
    read_facts,
    round_name,
)
from fedpipe.run.tensor_file import TensorFile

SITE_FILE, PROFILE_FILE, INVITATION_FILE = "site.yaml", "profile.yaml", "invitation.yaml"
JOB_FILE = "logs/job.json"
"""The SLURM job of a run, below its directory."""
RUNS = "runs"
"""Holds a folder per consortium: configuration, outer rounds and the directory of the run."""
LOG_FILE, RUN_LOG, ATTEMPTS = "site.log", "run.log", "attempts"
CAME = "came"
"""When the order of an outer round came, by the clock of the agent's machine."""
_MOST_NOTED = 2000
"""Characters of a line for the site's own people; some of them are a coordinator's."""
_ATTEMPTS = 3
"""Failures of the run after which an outer round is given up."""
_LOOK_S = 0.5
_AGAIN_S = 30.0
"""So long after a scheduler has not answered it is asked again."""
_MOST_SAID = 1000
"""Characters of a line of the run's log that are repeated."""
_KEEP = 'trap : TERM; codes=$1; wait=$2; shift 2; sleep $wait && "$@"; echo $? >> "$codes"'
"""Waits, runs a command, and writes down how it has ended, also when nobody waits for it."""

Fetch = Callable[[Path], None]
"""Brings the weights of an outer round to a path; raises ``ConnectionError`` where it cannot."""


class Declined(FederationError):
    """Why a site sends no update; the text leaves the site, so it has no path and no host."""


class Site:
    """The folder of a site that has joined a consortium."""

    def __init__(self, path: Path) -> None:
        """Open the folder."""
        self.path = path
        self.ledger = Ledger(path / LEDGER_FILE)
        self._told_unanswered = False

    @cached_property
    def _read(self) -> tuple[SiteConfig, Node]:
        file = self.path / SITE_FILE
        if not file.is_file():
            raise ConfigError(
                f"--site-dir: expected the folder of a site that has joined, got {self.path}. Join"
                " with: fedpipe site join KIT --config site.yaml"
            )
        return read_site(read_text(str(file), option=SITE_FILE), source=str(file))

    @property
    def config(self) -> SiteConfig:
        """What the site has decided."""
        return self._read[0]

    def note(self, text: str) -> None:
        """Write a line for the site's own people."""
        with open(self.path / LOG_FILE, "a", encoding="utf-8") as file:
            line = " ".join(printable(text[:_MOST_NOTED]).split())
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def forget_failures(self) -> None:
        """Let outer rounds that were given up train again: what made their runs fail is mended."""
        for attempts in self.path.glob(f"{RUNS}/*/outer/*/{ATTEMPTS}"):
            attempts.unlink()

    # -- an outer round ------------------------------------------------------------------------

    def answer(self, order: Order, *, fetch: Fetch, is_over: Callable[[], bool]) -> Path | None:
        """Train an outer round, or find that it is trained already.

        Args:
            order: Of the coordinator.
            fetch: Brings the weights.
            is_over: Whether nobody waits for the answer any more; the run goes on.

        Returns:
            The folder of the outer round with its update; None when it was over before, or the
            weights did not arrive.

        Raises:
            Declined: The site sends nothing.
        """
        label = "an order that cannot be read"
        try:
            with _declining():
                check_order(order)
            label = _label(order)
            with system_errors_named():
                folder = self._take_in(order, fetch, label)
                if not self._train(folder, label, is_over):
                    return None
                self._check_gate(folder)
            del self._read  # the policy may have changed meanwhile
            if self.config.dry_run:
                self.note(f"{label}: it would send {self._said(folder)}")
                raise Declined("dry run: nothing is sent.")
        except Declined as declined:
            self._note_declined(order, declined, f"{label}: declines: {declined}")
            raise
        except ConnectionError as error:
            self.note(f"{label}: {error}; the coordinator will ask again")
            return None
        except Exception as error:  # whatever it is, the coordinator must hear of it
            why = Declined("the site cannot train this outer round; its own log says why.")
            text = f"{label}: declines: {type(error).__name__}: {error}"
            self._note_declined(order, why, text)
            raise why from error
        return folder

    def facts_to_send(self, folder: Path) -> UpdateFacts:
        """Return what goes with an update; numbers that ``sends.metrics`` does not name stay."""
        facts: dict[str, Any] = read_facts(folder / UPDATE_FACTS, UpdateFacts)
        kept = {name: type(facts[name])() for name in METRICS if name not in self._sent}
        return cast(UpdateFacts, facts | kept)

    def note_sent(self, folder: Path, order: Order) -> None:
        """Write down that an update leaves the site, before it does."""
        facts = self.facts_to_send(folder)
        self._write("sent", order, facts["sha256"], described(folder / UPDATE), facts)
        self.note(f"{_label(order)}: sends {self._said(folder)}")

    @property
    def _sent(self) -> tuple[str, ...]:
        return self.config.sends.metrics

    def _said(self, folder: Path) -> str:
        facts: dict[str, Any] = dict(self.facts_to_send(folder))
        numbers = (f"{name} {_rounded(facts[name])}" for name in self._sent)
        size = bytes_text((folder / UPDATE).stat().st_size)
        return ", ".join((f"a change of {size}", f"tokens {facts['tokens']:,}", *numbers))

    def _note_declined(self, order: Order, declined: Declined, text: str) -> None:
        """Write down that a reason leaves the site, and what the site's own people have to know."""
        self.note(text)
        which = {key: order.get(key) for key in ("consortium", "round")}
        self.ledger.write("declined", which | {"why": str(declined)})

    def _write(self, what: str, order: Order, sha256: str, file: Any, facts: Any = None) -> None:
        content = {
            "consortium": order["consortium"], "round": order["round"], "sha256": sha256, **file,
        }  # fmt: skip
        self.ledger.write(what, content | ({"facts": facts} if facts else {}))

    def _take_in(self, order: Order, fetch: Fetch, label: str) -> Path:
        """Check an order, and bring its weights; return the folder of the outer round."""
        run = self.path / RUNS / order["consortium"]
        inbox = run / "outer"
        folder = inbox / round_name(order["round"])
        config = run_config(order["settings"], self._read[1], folder=str(inbox))
        with _declining():
            if config.federation.num_rounds != order["num_rounds"] * config.outer.num_inner_rounds:
                raise FederationError("expected settings for as many outer rounds as the order's.")
            check_limits(self.config, config, num_bytes=order["file"]["bytes"])
        check_facts(order["facts"], GlobalFacts, source=folder / GLOBAL_FACTS)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / GLOBAL_FACTS).is_file():
            fetch(folder / GLOBAL)
            check_global(folder, order["facts"], index=order["round"], config=config)
            self._write("received", order, order["facts"]["sha256"], described(folder / GLOBAL))
            facts = {k: v for k, v in order["facts"].items() if k in GlobalFacts.__annotations__}
            write_text(folder / GLOBAL_FACTS, json.dumps(facts, indent=1) + "\n")
            size = bytes_text(order["file"]["bytes"])
            self.note(f"{label}: weights have arrived, {size}")
        elif read_facts(folder / GLOBAL_FACTS, GlobalFacts)["sha256"] != order["facts"]["sha256"]:
            raise Declined("this site has trained this outer round from other weights.")
        write_text(run / "pretrain.yaml", to_yaml(config))
        return folder

    def _train(self, folder: Path, label: str, is_over: Callable[[], bool]) -> bool:
        """Begin or take up the run until the update is there; False when nobody waits for it."""
        came = folder / CAME
        if not came.is_file():
            write_text(came, f"{time.time()}\n")
        began = float(came.read_text(encoding="utf-8"))
        while not has_arrived(folder):
            # None while the run is alive, also for an earlier outer round that is over.
            with _held(folder.parent.parent / ".run.lock") as lock:
                if lock is not None and not has_arrived(folder):
                    self._start(folder, lock, label)
            if is_over():
                return False
            if time.time() - began > self.config.accepts.max_seconds:
                self._stop(folder)
                raise Declined(f"not done within {self.config.accepts.max_hours} hours.")
            time.sleep(_LOOK_S)
        return True

    def _start(self, folder: Path, lock: int, label: str) -> None:
        """Start the run in a session of its own; it holds the lock as long as it lives."""
        attempts = folder / ATTEMPTS
        failed = attempts.read_text().split() if attempts.is_file() else []
        why = _last_line(folder / RUN_LOG) if failed else ""
        is_unanswered = isinstance(error_in(why), SchedulerError)
        if is_unanswered:  # no failure of the run, which has not begun
            failed[-1] = str(EXIT_INTERRUPTED)
            write_text(attempts, "\n".join(failed) + "\n")
            if not self._told_unanswered:
                again = f"asked again every {_AGAIN_S:.0f} s until this outer round is over"
                self.note(f"{label}: the scheduler does not answer, and is {again}: {why}")
            self._told_unanswered = True
        elif failed:
            self.note(f"{label}: the run has ended with exit code {failed[-1]}: {why}")
        failures = [code for code in failed if code != str(EXIT_INTERRUPTED)]
        if len(failures) >= _ATTEMPTS:
            way_out = "Mend that, then stop and start the agent, or give site join again."
            self.note(f"{label}: given up. {way_out}")
            if refusal := refusal_in(why):
                raise Declined(f"the site's SLURM does not take the job: {refusal}.")
            raise Declined(f"the site's run has failed {len(failures)} times.")
        run = folder.parent.parent
        profile = self.path / PROFILE_FILE
        task = ["submit", "pretrain", "--profile", str(profile), "--follow"]
        command = [
            sys.executable, "-m", "fedpipe", *(task if profile.is_file() else ["pretrain"]),
            "--config", str(run / "pretrain.yaml"), "--run-dir", str(run / "run"),
        ]  # fmt: skip
        wait_s = f"{_AGAIN_S if is_unanswered else 0:.0f}"
        log = open(folder / RUN_LOG, "a", encoding="utf-8")  # noqa: SIM115
        with log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _KEEP, "sh", str(attempts), wait_s, *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                pass_fds=(lock,), cwd=run,
                env={name: v for name, v in os.environ.items() if name not in ENVIRONMENT},
            )  # fmt: skip
        write_text(folder / "pid", f"{process.pid}\n")
        if not is_unanswered:
            how = "as a SLURM job" if profile.is_file() else "on this machine"
            again = " again" if failed else ""
            self.note(f"{label}: trains {how}{again}; see {folder / RUN_LOG}")

    def _stop(self, folder: Path) -> None:
        """Ask the run to save and end, and take its job out of the queue."""
        job = folder.parent.parent / "run" / JOB_FILE
        with contextlib.suppress(OSError, ValueError, KeyError):
            subprocess.run(["scancel", str(json.loads(job.read_text())["job_id"])], check=False)
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int((folder / "pid").read_text()), signal.SIGTERM)

    def _check_gate(self, folder: Path) -> None:
        """Let nothing out but tensors that came in."""
        update, base = TensorFile(folder / UPDATE), TensorFile(folder / GLOBAL)
        check_digest(folder / UPDATE, read_facts(folder / UPDATE_FACTS, UpdateFacts)["sha256"])
        if further := sorted(update.layouts.keys() ^ base.layouts.keys()):
            raise FederationError(
                f"{folder / UPDATE}: expected the tensors that came in, got a difference in"
                f" {further[0]}. Nothing is sent."
            )


def _rounded(value: Any) -> Any:
    """Return a number, or the numbers of all stages, for people."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def _label(order: Order) -> str:
    return f"{order['consortium']} outer round {order['round'] + 1}/{order['num_rounds']}"


@contextlib.contextmanager
def _declining() -> Iterator[None]:
    """Tell the coordinator of a refusal in its own words, which may leave the site."""
    try:
        yield
    except FederationError as error:
        raise Declined(str(error)) from None


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:_MOST_SAID] if lines else "it has said nothing"


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int | None]:
    """Try to lock a file; yield its descriptor, or None while another process has it.

    A child that inherits the descriptor has the lock until it ends, whatever happens to us.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except BlockingIOError:
            is_ours = False
        yield descriptor if is_ours else None
    finally:
        os.close(descriptor)
