"""What is used of NVIDIA FLARE (nvflare 2.9), in the only module that has to follow its changes.

Its file transfer is documented, but no stable interface. A file is offered by the process that has
it and fetched in pieces of 5 MiB, so that a transfer goes on where the network has cut it.
No torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.streaming.file_downloader import add_file, download_file
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

from fedpipe.commands.consortium.kits import organisation
from fedpipe.commands.consortium.messages import Reference
from fedpipe.errors import FederationError
from fedpipe.files import sync
from fedpipe.run.outer import check_digest, digest_of

_OFFERED_S = 7 * 24 * 3600.0
"""How long an offer outlives the last piece that was fetched; it ends with its process anyway."""
_AGENT = "nvflare.private.fed.app.client.client_train"
_PIECE_S = 60.0
"""How long a piece may take before it is asked for again: 5 MiB at 0.7 Mbit/s."""


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
        FederationError: It did not arrive, or not as it was offered.
    """
    error, arrived = download_file(
        from_fqcn=reference["owner"],
        ref_id=reference["name"],
        per_request_timeout=_PIECE_S,
        cell=cell,
        location=str(path.parent),
        abort_signal=abort_signal,
    )
    try:
        if error or arrived is None:
            raise FederationError(f"{path.name}: expected the whole file, got: {error}.")
        check_digest(Path(arrived), reference["sha256"])
        sync(Path(arrived))
        os.replace(arrived, path)
        sync(path.parent)
    finally:
        if arrived is not None:
            Path(arrived).unlink(missing_ok=True)


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
    return _command(_AGENT, kit, "fed_client.json", f"uid={site}", f"org={organisation(site)}")


def _command(module: str, kit: Path, config: str, *settings: str) -> list[str]:
    return [
        sys.executable, "-u", "-m", module, "-m", str(kit.absolute()),
        "-s", config, "--set", "secure_train=true", *settings, "config_folder=",
    ]  # fmt: skip
