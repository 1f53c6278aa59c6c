"""Processes that begin where Python has imported torch, DeepSpeed and transformers already.

Those imports take five seconds of a core at every start of a command that trains, longer than the
training of a test. One process, the nursery, makes them once, and forks itself for every start.
What begins there is a process like any other, with a session, an environment and output of its own;
it imports fedpipe itself, and its fork server is a fork of it instead of another interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import forkserver, reduction, util
from pathlib import Path
from typing import Any, NoReturn

_REPOSITORY = Path(__file__).parents[2]
_PRELOAD = (
    "fedpipe.models.families",  # first: see there
    "fedpipe.commands.pretrain.run", "fedpipe.commands.finetune.run", "fedpipe.run.export",
    "fedpipe.cluster.rank", "adapters", "matplotlib.figure", "submitit", "rich.progress",
)  # fmt: skip
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(_REPOSITORY),
}  # fmt: skip


class Process:
    """A process that was started here, with what the tests use of ``subprocess.Popen``."""

    _nursery: socket.socket | None = None

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: Any,
        stderr: Any,
        name: str = "python",
    ) -> None:
        """Start ``python ARGUMENTS`` in a session of its own; they begin with -m or a script.

        Args:
            arguments: What follows the name of the interpreter.
            cwd: Working directory.
            env: Whole environment.
            stdout: File for the output.
            stderr: File for the errors.
            name: What the kernel calls it and what it forks, up to 15 characters.
        """
        if Process._nursery is None:
            Process._nursery = _begin()
        request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "name": name}
        self._status, theirs = socket.socketpair()
        files = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
        text = json.dumps(request).encode()
        reduction.sendfds(Process._nursery, files)
        Process._nursery.sendall(len(text).to_bytes(4, "big") + text)
        theirs.close()
        self.pid = int.from_bytes(_exactly(self._status, 4), "big")
        self.returncode: int | None = None

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end and return its exit code, that of a signal below zero."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired("python", timeout_s or 0.0)
            self.returncode = int.from_bytes(_exactly(self._status, 4), "big", signed=True)
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def _begin() -> socket.socket:
    ours, theirs = socket.socketpair()
    subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.warm", str(theirs.fileno())],
        cwd=_REPOSITORY, env=os.environ | _ENVIRONMENT, pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return ours


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = connection.recv(size - len(found))
        if not more:
            raise EOFError("the other end has gone")
        found += more
    return found


# -- the nursery -----------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> None:
    """Start what is asked for, and tell how each process has ended, until the tests end."""
    for name in _PRELOAD:
        import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedpipe"]:
        del sys.modules[name]  # a start imports them, because some read the environment
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not connection:
                    pid, status = key.data
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    try:
                        status.sendall(code.to_bytes(4, "big", signed=True))
                    except OSError:
                        pass  # nobody waits for it
                    status.close()
                    continue
                try:
                    files = reduction.recvfds(connection, 3)
                except (EOFError, OSError):
                    return
                request = json.loads(
                    _exactly(connection, int.from_bytes(_exactly(connection, 4), "big"))
                )
                pid = os.fork()
                if pid == 0:
                    _be(request, *files[:2])
                status = socket.socket(fileno=files[2])
                status.sendall(pid.to_bytes(4, "big"))
                for file in files[:2]:
                    os.close(file)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))


def _be(request: dict[str, Any], stdout: int, stderr: int) -> NoReturn:
    """Be the process that was asked for."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    Path("/proc/self/comm").write_text(request["name"][:15])
    util.spawnv_passfds = _fork_server
    first, *rest = request["arguments"]
    _end(lambda: _python(first, rest), finish=_as_the_interpreter)


def _python(first: str, rest: list[str]) -> None:
    sys.path[0] = os.getcwd() if first == "-m" else str(Path(first).parent)
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _as_the_interpreter() -> None:
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


_start_interpreter = util.spawnv_passfds


def _fork_server(path: Any, args: Sequence[Any], kept: Sequence[int]) -> int:
    """In the place of ``spawnv_passfds``: the fork server is a fork of the process itself."""
    command = os.fsdecode(args[-1])
    if "forkserver" not in command:  # the tracker of resources imports nothing
        return int(_start_interpreter(path, args, kept))
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        low = 3
        for file in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
            os.closerange(low, file)
            low = file + 1
        forkserver._forkserver.__init__()  # type: ignore[misc]  # its lock is held
        _end(lambda: exec(command, {"__name__": "__main__"}))
    return pid


def _end(work: Callable[[], object], *, finish: Callable[[], object] = lambda: None) -> NoReturn:
    """Do the work of a process, and end it."""
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        finish()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
