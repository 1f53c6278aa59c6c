"""Processes that begin where Python has imported torch, DeepSpeed and transformers already.

Those imports take five seconds of a core at every start of a command that trains, longer than the
training of a test. One process, the nursery, makes them once, and forks itself for every start.
What begins there is a process like any other, with a session, an environment and output of its own;
it imports fedpipe itself, and its fork server is a fork of it instead of another interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from multiprocessing import forkserver, reduction, util
from pathlib import Path
from typing import Any, NoReturn

_REPOSITORY = Path(__file__).parents[2]
_PRELOAD = (
    "fedpipe.models.weights",  # first: see there
    "fedpipe.commands.pretrain.run", "fedpipe.commands.finetune.run", "fedpipe.run.export",
    "fedpipe.cluster.rank", "adapters", "matplotlib.figure", "submitit", "rich.progress",
)  # fmt: skip
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(_REPOSITORY),
}  # fmt: skip


_SCRIPT = """\
#!{python} -SE
import array, json, os, socket, sys
text = json.dumps({{
    "arguments": ["-m", "fedpipe", *sys.argv[1:]], "cwd": os.getcwd(), "env": dict(os.environ),
    "name": "fedpipe",
}}).encode()
nursery = socket.socket(socket.AF_UNIX)
nursery.connect({address!r})
files = array.array("i", [1, 2])
nursery.sendmsg([bytes([2])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
nursery.sendall(len(text).to_bytes(4, "big") + text)
nursery.recv(4, socket.MSG_WAITALL)
code = int.from_bytes(nursery.recv(4, socket.MSG_WAITALL), "big", signed=True)
sys.exit(code if code >= 0 else 128 - code)
"""


def write_command(folder: Path) -> None:
    """Write a program ``fedpipe`` that starts here, for a PATH."""
    file = folder / "fedpipe"
    file.write_text(_SCRIPT.format(python=sys.executable, address=_nursery()), encoding="utf-8")
    file.chmod(0o755)


class Process:
    """A process that was started here, with what the tests use of ``subprocess.Popen``."""

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
        request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "name": name}
        text = json.dumps(request).encode()
        self._status = socket.socket(socket.AF_UNIX)
        self._status.connect(_nursery())
        reduction.sendfds(self._status, [stdout.fileno(), stderr.fileno()])
        self._status.sendall(len(text).to_bytes(4, "big") + text)
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


@cache
def _nursery() -> str:
    """Return the address of the nursery of this process, which ends with it."""
    folder = tempfile.mkdtemp(prefix="nursery-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = f"{folder}/socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive, _held_open = os.pipe()
    files = (listener.fileno(), alive)
    subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.warm", *map(str, files)],
        cwd=_REPOSITORY, env=os.environ | _ENVIRONMENT, pass_fds=files,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    listener.close()
    os.close(alive)
    return address


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = connection.recv(size - len(found))
        if not more:
            raise EOFError("the other end has gone")
        found += more
    return found


# -- the nursery -----------------------------------------------------------------------------------


def _serve(listener: socket.socket, alive: int) -> None:
    """Start what is asked for, and tell how each process has ended, until the tests end."""
    for name in _PRELOAD:
        with contextlib.suppress(ImportError):  # adapters does not work with transformers 5.x
            import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedpipe"]:
        del sys.modules[name]  # a start imports them, because some read the environment
    with selectors.DefaultSelector() as selector:
        selector.register(alive, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == alive:
                    return
                if key.fileobj is listener:
                    pid, caller = _start(listener.accept()[0])
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, caller))
                    continue
                pid, caller = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                selector.unregister(key.fileobj)
                os.close(key.fd)
                with caller, contextlib.suppress(OSError):  # it may not wait
                    caller.sendall(code.to_bytes(4, "big", signed=True))


def _start(caller: socket.socket) -> tuple[int, socket.socket]:
    files = reduction.recvfds(caller, 2)
    request = json.loads(_exactly(caller, int.from_bytes(_exactly(caller, 4), "big")))
    pid = os.fork()
    if pid == 0:
        _be(request, *files)
    caller.sendall(pid.to_bytes(4, "big"))
    for file in files:
        os.close(file)
    return pid, caller


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
    _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
