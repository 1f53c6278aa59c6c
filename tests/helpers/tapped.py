"""What processes have handed to TLS, as the other end reads it: WebSocket messages, unmasked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.helpers.cli import REPOSITORY

HOST, USER = "ward-seven-login", "dr-verdigris"
"""What the machine and the user of tapped processes are called; only root can name a machine."""
_TAP = Path(__file__).parent / "tap"


def tap_into(folder: Path) -> dict[str, str]:
    """Return an environment in which Python writes down, in a folder, what it hands to TLS."""
    folder.mkdir()
    return {
        "FEDPIPE_TAP": str(folder), "PYTHONPATH": f"{_TAP}:{REPOSITORY}", "LOGNAME": USER,
        "USER": USER, "FEDPIPE_TAP_HOST": HOST,
    }  # fmt: skip


def read_tap(folder: Path) -> bytes:
    """Return all that was handed to TLS by all processes."""
    return b"\n".join(b"".join(_parts(path.read_bytes())) for path in sorted(folder.iterdir()))


def _parts(stream: bytes) -> Iterator[bytes]:
    """Yield the request that opens a WebSocket, and the content of every frame after it.

    Source: https://www.rfc-editor.org/rfc/rfc6455, section 5.2.
    """
    request, end, _ = stream.partition(b"\r\n\r\n")
    assert request.startswith(b"GET /") and end, "a connection that is no WebSocket"
    assert b"permessage-deflate" not in request, "compressed, so that nothing would be found"
    yield request
    at = len(request) + len(end)
    while at < len(stream):
        assert not stream[at] & 0x70, "an extension of WebSocket, so that nothing would be found"
        assert stream[at + 1] & 0x80, "a client masks what it sends"
        length, at = stream[at + 1] & 0x7F, at + 2
        if length >= 126:
            wide = 2 if length == 126 else 8
            length, at = int.from_bytes(stream[at : at + wide]), at + wide
        mask, at = stream[at : at + 4], at + 4
        masked = np.frombuffer(stream[at : at + length], np.uint8)
        yield (masked ^ np.resize(np.frombuffer(mask, np.uint8), len(masked))).tobytes()
        at += length
