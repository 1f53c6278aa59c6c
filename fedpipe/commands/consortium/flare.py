"""What is used of NVIDIA FLARE (nvflare 2.9), in the only module that has to follow its changes.

Its file transfer is documented, but no stable interface. A file is offered by the process that has
it and fetched in pieces of 5 MiB, so that a transfer goes on where the network has cut it.
No torch.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from nvflare.fuel.f3.streaming.download_service import Consumer, download_object
from nvflare.fuel.f3.streaming.file_downloader import add_file
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from fedpipe.commands.consortium.kits import organisation
from fedpipe.commands.consortium.messages import PIECE_S, Reference
from fedpipe.errors import FederationError
from fedpipe.files import sync
from fedpipe.run.outer import check_digest, digest_of

_OFFERED_S = 7 * 24 * 3600.0
"""How long an offer outlives the last piece that was fetched; it ends with its process anyway."""
_FOR_EVER = 2**31
_SITE_S, _SERVER_S = 3.0, 20.0
"""How long a server waits for a site, and a driver for the server."""


def offer(cell: Any, path: Path, *, receivers: int) -> tuple[Any, Reference]:
    """Let other processes fetch a file.

    Args:
        cell: Of this process.
        path: The file; it must not change.
        receivers: How many will fetch it; 0 where that is open.

    Returns:
        What has to live as long as the offer, and what the other end has to know.
    """
    source = ObjectDownloader(cell=cell, timeout=_OFFERED_S, num_receivers=receivers)
    reference: Reference = {
        "owner": cell.get_fqcn(),
        "name": add_file(source, str(path)),
        "sha256": digest_of(path),
        "bytes": path.stat().st_size,
    }
    return source, reference


def fetch(cell: Any, reference: Reference, path: Path, *, abort_signal: Any) -> None:
    """Fetch a file that is complete or absent.

    Args:
        cell: Of this process.
        reference: From the ``offer`` of the other end.
        path: Where it belongs.
        abort_signal: Ends the transfer.

    Raises:
        ConnectionError: It did not arrive.
        FederationError: It is another one than was offered.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "xb") as file:
            pieces = _Pieces(file, reference["bytes"])
            download_object(
                from_fqcn=reference["owner"],
                ref_id=reference["name"],
                consumer=pieces,
                per_request_timeout=PIECE_S,
                cell=cell,
                abort_signal=abort_signal,
                max_retries=_FOR_EVER,  # who knows how long a link is down
            )
        if pieces.error:
            raise ConnectionError(f"{path.name}: expected the whole file, got: {pieces.error}.")
        check_digest(aside, reference["sha256"])
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


class _Pieces(Consumer):
    """Writes the pieces of a file, and no more of them than were announced."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        super().__init__()
        self._file, self._left = file, num_bytes
        self.error = "nothing"

    def consume(self, ref_id: str, state: dict[str, Any], data: bytes) -> dict[str, Any]:
        """Write a piece; the state says where the next one begins."""
        self._left -= len(data)
        if self._left < 0 or not data:
            raise FederationError("other pieces than those of a file of the announced size")
        self._file.write(data)
        return state

    def download_completed(self, ref_id: str) -> None:
        """Note that all have come."""
        self.error = ""

    def download_failed(self, ref_id: str, reason: str) -> None:
        """Note why they have not."""
        self.error = reason


def wait_longer(session: Any) -> None:
    """Let the driver's session wait longer for the server than the server waits for its sites.

    NVFlare's own session gives up first, so that of all sites nothing is known while one is silent.
    """
    session.set_timeout(_SITE_S)
    cell = session.api.cell
    ask = cell.send_request
    cell.send_request = lambda **request: ask(**request | {"timeout": _SERVER_S})


def server_command(kit: Path, *, org: str) -> list[str]:
    """Return the command of a coordinator's server.

    Args:
        kit: Its folder with ``startup`` and ``local``.
        org: In its certificate.
    """
    return _command("fedpipe.commands.consortium.server", kit, "fed_server.json", f"org={org}")


def agent_command(kit: Path, *, site: str) -> list[str]:
    """Return the command of the process of a site that waits for outer rounds.

    Args:
        kit: Its folder with ``startup`` and ``local``.
        site: Its name, which is its organisation's too.
    """
    module, org = "fedpipe.commands.site.client", organisation(site)
    return _command(module, kit, "fed_client.json", f"uid={site}", f"org={org}")


def _command(module: str, kit: Path, config: str, *settings: str) -> list[str]:
    return [
        sys.executable, "-u", "-m", module, "-m", str(kit.absolute()),
        "-s", config, "--set", "secure_train=true", *settings, "config_folder=",
    ]  # fmt: skip
