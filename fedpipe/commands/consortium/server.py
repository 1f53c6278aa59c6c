"""The server process of NVFlare, which also writes down whom it has turned away. No torch.

asyncio drops a failed handshake without a word, so that nothing would tell of a site with another
consortium's certificate, of one whose certificate has ended, or of a stranger. NVFlare says in its
log that a site has come with the certificate of another site, and nowhere else.
"""

from __future__ import annotations

import os
import runpy
import ssl
import time
from asyncio import sslproto
from pathlib import Path
from typing import Any

from fedpipe.run.ledger import LEDGER_FILE, Ledger

CONSORTIUM_DIR = "FEDPIPE_CONSORTIUM"
"""Environment variable with the directory of the consortium."""
SERVER = "nvflare.private.fed.app.server.server_train"
REFUSED = "refused"
"""Kind of the line in the coordinator's ledger."""
_NO_TRUST = "it ends the handshake, as a site does that trusts another authority"
_AGAIN_S = 60.0
"""The same address is written down again only after this, because an agent dials for ever."""


def note_refused(ledger: Ledger) -> None:
    """Write a line for every connection of this process that is turned away, from now on.

    Args:
        ledger: Of the coordinator.
    """
    from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver

    protocol: Any = sslproto.SSLProtocol
    complete, match = protocol._on_handshake_complete, CellIdentityResolver.require_match
    noted: dict[tuple[str, str], float] = {}

    def note(address: str, why: str) -> None:
        now = time.monotonic()
        if now - noted.get((address, why), -_AGAIN_S) >= _AGAIN_S:
            noted[address, why] = now
            ledger.write(REFUSED, {"address": address, "why": why})

    def completed(self: Any, error: BaseException | None) -> None:
        if error is not None and self._server_side:
            address = str((self._transport.get_extra_info("peername") or ["unknown"])[0])
            why = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error
            note(address, f"TLS says: {why}" if isinstance(error, ssl.SSLError) else _NO_TRUST)
        complete(self, error)

    def matched(self: Any, name: str, peer: str, description: str) -> None:
        try:
            match(self, name, peer, description)
        except ValueError:
            note(peer, f"it has the certificate of {peer}, and says that it is {name}")
            raise

    protocol._on_handshake_complete = completed
    CellIdentityResolver.require_match = matched


if __name__ == "__main__":
    note_refused(Ledger(Path(os.environ[CONSORTIUM_DIR]) / LEDGER_FILE))
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
