"""What a process of a local run does.

The heavy imports are inside: the fork server has made them (``PRELOAD``) before a rank is forked,
while the supervisor prepared the text without them.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from fedpipe import log
from fedpipe.cluster.ranks import Setup
from fedpipe.distributed.activity import Activity
from fedpipe.distributed.binding import bind
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.signals import StopSignals
from fedpipe.distributed.watch import Quiet, Watch
from fedpipe.errors import FedPipeError
from fedpipe.files import system_errors_named
from fedpipe.run.run_dir import RunSetup
from fedpipe.terminal import prepare_output

PRELOAD = (
    "fedpipe.commands.pretrain.run",
    "fedpipe.run.export",
    "fedpipe.commands.pretrain.report",
)
"""Modules that a rank needs and that take seconds to import."""
FINETUNE_PRELOAD = (
    "fedpipe.models.modeling",  # first: see there
    "fedpipe.commands.finetune.run",
    "fedpipe.commands.finetune.finish",
)
"""The same of a fine-tuning."""


Emit = Callable[[str, Any], None]
"""Sends (kind, value) to the supervisor."""


def run_rank(
    task: str, setup: Setup, env: ProcessEnv, pipe: Connection, threads: int, *args: Any
) -> None:
    """Run one rank's task; what it emits, and at worst ("error", text), goes to the supervisor.

    Args:
        task: "pretrain", "throughput" or "finetune".
        setup: The run.
        env: This process' place in it.
        pipe: To the supervisor.
        threads: That torch computes with.
        *args: For the task.
    """
    import torch

    _die_with_parent()
    sending = threading.Lock()

    def emit(kind: str, value: Any) -> None:
        with sending:  # stages may be threads, and the watch is one
            pipe.send((kind, value))

    def report(activity: Activity) -> None:
        emit("activity", activity)

    try:
        with system_errors_named():
            _redirect_output(setup, env)
        prepare_output()
        random.seed(env.rank)
        bind(env)
        torch.set_num_threads(threads)  # the fork server has imported torch already, with one
        log.setup(rank=env.rank)
        with Watch(signals=StopSignals(), report=Quiet(report)) as watch:
            _TASKS[task](setup, env, emit, watch, *args)
    except BaseException as error:
        emit("error", f"{type(error).__name__}: {error}")
        if not isinstance(error, FedPipeError):
            with suppress(OSError):  # the log may lie on the disk that is full
                traceback.print_exc()
        sys.exit(1)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


@system_errors_named()
def _pretrain(setup: RunSetup, env: ProcessEnv, emit: Emit, watch: Watch) -> None:
    from fedpipe.commands.pretrain.run import pretrain

    stopped_at = pretrain(setup, env=env, emit=emit, watch=watch)
    if stopped_at is not None:
        emit("stopped", f" after {stopped_at}")
    elif env.rank == 0:
        emit("note", "writing the model folder and the report")
        finish(setup)


@system_errors_named()
def _throughput(setup: RunSetup, env: ProcessEnv, emit: Emit, watch: Watch, settings: Any) -> None:
    from fedpipe.commands.throughput.measure import measure
    from fedpipe.data.blocks import load_prepared

    data = load_prepared(setup.data_dir)
    measurement = measure(setup.config, data, env=env, settings=settings, emit=emit)
    if measurement is not None:
        emit("measurement", measurement)


@system_errors_named()
def _finetune(setup: Any, env: ProcessEnv, emit: Emit, watch: Watch) -> None:
    from fedpipe.commands.finetune.finish import export_finetuned
    from fedpipe.commands.finetune.report import write_finetune_report
    from fedpipe.commands.finetune.run import finetune

    stopped_at = finetune(setup, env=env, emit=emit, watch=watch)
    if stopped_at is not None:
        emit("stopped", f" after {stopped_at}")
    elif env.rank == 0:
        export_finetuned(setup.run_dir)
        write_finetune_report(setup.run_dir)


_TASKS: dict[str, Callable[..., None]] = {
    "pretrain": _pretrain,
    "throughput": _throughput,
    "finetune": _finetune,
}


def finish(setup: RunSetup) -> None:
    """Export the model, let it fill in held-out words, write the report."""
    from fedpipe.commands.pretrain.report import write_report
    from fedpipe.data.blocks import load_prepared
    from fedpipe.run import export

    export.export_run(setup.run_dir)
    data = load_prepared(setup.data_dir)
    if data.valid:
        export.write_samples(setup.run_dir, setup.config, data)
    write_report(setup.run_dir)


def _die_with_parent() -> None:
    """Ask Linux to kill this rank with the fork server, which ends with the supervisor."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _redirect_output(setup: Setup, env: ProcessEnv) -> None:
    """Send everything that libraries print to RUN_DIR/logs; the console is the parent's."""
    folder = setup.run_dir / "logs"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(
        folder / f"rank_{env.rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
