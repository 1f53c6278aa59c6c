"""What a process of a local run does.

The heavy imports are inside: the fork server has made them (``PRELOAD``) before a rank is forked,
while the supervisor prepared the text without them.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from fedpipe import log
from fedpipe.distributed.env import ProcessEnv, threads_per_process
from fedpipe.errors import FedPipeError
from fedpipe.workflows.run_dir import RunSetup

PRELOAD = ("fedpipe.workflows.pretrain", "fedpipe.workflows.export", "fedpipe.metrics.report")
"""Modules that a rank needs and that take seconds to import."""


def run_worker(setup: RunSetup, env: ProcessEnv, pipe: Connection) -> None:
    """Run one rank; tell the parent through ``pipe``: records, then ("done" | "error", text).

    Args:
        setup: The run.
        env: This process' place in it.
        pipe: To the parent.
    """
    import torch

    from fedpipe.workflows.pretrain import pretrain

    _redirect_output(setup, env)
    random.seed(env.rank)
    torch.set_num_threads(threads_per_process(env.local_world_size))
    log.setup(rank=env.rank)

    def emit(kind: str, record: Any) -> None:
        pipe.send((kind, record))

    try:
        pretrain(setup, config=setup.config, env=env, emit=emit)
        if env.rank == 0:
            emit("note", "writing the model folder and the report")
            finish(setup)
        emit("done", None)
    except FedPipeError as error:
        emit("error", f"{type(error).__name__}: {error}")
        sys.exit(1)
    except BaseException as error:
        traceback.print_exc()
        emit("error", f"{type(error).__name__}: {error}")
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def finish(setup: RunSetup) -> None:
    """Export the model, let it fill in held-out words, write the report."""
    from fedpipe.data.blocks import load_prepared
    from fedpipe.metrics.report import write_report
    from fedpipe.workflows import export

    export.export_run(setup.run_dir)
    data = load_prepared(setup.data_dir)
    if data.valid:
        export.write_samples(setup.run_dir, setup.config, data)
    write_report(setup.run_dir)


def _redirect_output(setup: RunSetup, env: ProcessEnv) -> None:
    """Send everything that libraries print to RUN_DIR/logs; the console is the parent's."""
    folder = setup.run_dir / "logs"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(
        folder / f"rank_{env.rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
