"""Writes down all that this process hands to TLS; Python imports it from PYTHONPATH by itself."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import ssl
from typing import Any

_FOLDER = os.environ.get("FEDPIPE_TAP", "")
_NEW_NAMES = 0x04000000  # CLONE_NEWUTS
_numbers = itertools.count()


def _tap(kind: Any, name: str) -> None:
    original = getattr(kind, name)

    def write(self: Any, data: Any, *arguments: Any) -> Any:
        written = original(self, data, *arguments)
        if not hasattr(self, "tapped"):
            file = f"{os.getpid()}_{next(_numbers)}"
            self.tapped = open(os.path.join(_FOLDER, file), "wb", buffering=0)  # noqa: SIM115
        # sendall returns None, all others the number of bytes that they have taken
        self.tapped.write(bytes(memoryview(data).cast("B")[:written]))
        return written

    setattr(kind, name, write)


if _FOLDER:
    if os.geteuid() == 0:  # a name that is found in nothing but itself, for this process alone
        ctypes.CDLL(None).unshare(_NEW_NAMES)
        socket.sethostname(os.environ["FEDPIPE_TAP_HOST"])
    _tap(ssl.SSLObject, "write")
    for _name in ("write", "send", "sendall"):
        _tap(ssl.SSLSocket, _name)
