"""The process that imports what ranks need, once, and that they are forked from. No torch here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker, util
from typing import Any

from fedpipe.cluster.worker import PRELOAD
from fedpipe.distributed.env import num_gpus
from fedpipe.distributed.signals import STOP_SIGNALS
from fedpipe.errors import LaunchError

_LONGEST_SOCKET = 107
"""Bytes of a path in sockaddr_un (unix(7)), the last one being zero."""
_SOCKET_NAME = len("/pymp-12345678/listener-12345678")
"""What multiprocessing appends to the directory for temporary files."""
_USERS_THREADS = os.environ.get("OMP_NUM_THREADS", "")
"""What the user asks for; the server gets a default that this process then has, too."""


def num_threads(num_cores: int) -> int:
    """Return the threads of a process that has so many cores: as many, or what the user says."""
    asked = int(_USERS_THREADS) if _USERS_THREADS.isdigit() else 0
    return asked or num_cores


def fork_server(preload: Sequence[str] = PRELOAD) -> Any:
    """Start importing torch, DeepSpeed and transformers, once, beside the supervisor's own work.

    Args:
        preload: Modules; those of the first call count.

    Returns:
        The context that forks ranks from the server; called again, the same one.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not num_gpus():  # DeepSpeed probes for accelerators otherwise
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Whoever asks torch for a GPU in the server must not open the driver: no child survives that.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    _find_room_for_sockets()
    resource_tracker.ensure_running()  # it changes the mask, so not below
    # A terminal and a scheduler send signals to all processes of a run. The server must outlive
    # them; its children inherit the mask and take it off when they can stop in order.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _find_room_for_sockets() -> None:
    """Let multiprocessing keep its sockets where their path is short enough for the system.

    Raises:
        LaunchError: There is no such place.
    """
    usual = tempfile.tempdir
    for folder in (*_usual_folder(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) + _SOCKET_NAME > _LONGEST_SOCKET:
            continue
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # makes a folder, and remembers it for this process and its own
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = usual
    raise LaunchError(
        f"TMPDIR: expected a writable directory whose path has at most"
        f" {_LONGEST_SOCKET - _SOCKET_NAME} bytes, got {os.environ.get('TMPDIR', '')!r}. Set"
        " TMPDIR=/tmp and make room there: a socket's path cannot be longer."
    )


def _usual_folder() -> list[str]:
    """Directory for temporary files, if there is any that can be written."""
    try:
        return [tempfile.gettempdir()]
    except FileNotFoundError:
        return []
