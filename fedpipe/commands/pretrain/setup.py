"""Set a pre-training up before its processes start: checks, prepared text, run directory.

No torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

from fedpipe.commands.plan.plan import build_plan, render
from fedpipe.commands.plan.text_facts import render_text, text_facts
from fedpipe.config import load
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import Progress, check_sources, prepare
from fedpipe.files import write_text
from fedpipe.report.sinks import check_sinks
from fedpipe.report.summary import TEXT_FILE
from fedpipe.run.outer import UPDATE, check_position, newest_round
from fedpipe.run.run_dir import RunDir, RunSetup, describe_environment, inputs_of


def set_up(
    run: RunDir,
    config: RunConfig,
    *,
    notify: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None = None,
    on_checked: Callable[[], object] = lambda: None,
    choose_cut: Callable[[RunConfig], tuple[int, ...]] = lambda even: tuple(even.pipeline.cut),
) -> RunSetup:
    """Check a pre-training, write its directory and prepare its text.

    Args:
        run: Directory from ``resolve``.
        config: Configuration from ``resolve``.
        notify: Called with a line for the user.
        progress: Called with (label, done, total) while the text is prepared.
        on_checked: Called when all quick checks have passed, before the text is prepared.
        choose_cut: Called after ``on_checked`` if ``pipeline.cut`` is auto; returns the cut.

    Returns:
        The setup.

    Raises:
        FedPipeError: The user can correct the cause; no process of the run has been started.
    """
    started_at = time.monotonic()
    plan = reserve(run, config, progress=progress)
    on_checked()
    if config.pipeline.is_open:
        config = load.with_cut(config, choose_cut(config))
        plan = reserve(run, config)
    outer = newest_round(config) if config.outer.folder else None
    checkpoint = run.checkpoint(notify=notify)
    if outer:
        check_position(checkpoint, outer, run_dir=run.path)
    notify(plan)
    data = prepare(config, progress=progress)
    run.record_inputs(inputs_of(config), notify=notify)
    facts = text_facts(data)
    notify(render_text(facts, config))
    write_text(run.path / "plan.txt", f"{plan}\n{render_text(facts, config)}\n")
    write_text(run.path / TEXT_FILE, json.dumps(facts, indent=1) + "\n")
    write_text(run.path / "env.json", json.dumps(describe_environment(), indent=2) + "\n")
    return RunSetup(
        config=config,
        run_dir=run.path,
        data_dir=data.directory,
        checkpoint=checkpoint,
        started_at=started_at,
        outer=outer,
    )


def done_line(run: RunDir, config: RunConfig) -> str:
    """Say that a run has nothing to do now; empty where it has something to do.

    With ``outer.folder`` it has done all once the newest outer round has its update, and goes on
    when the next one arrives.
    """
    if config.outer.folder:
        outer = newest_round(config)
        ready = f"the update of outer round {outer.index + 1} is ready, {outer.path / UPDATE}"
        return f"{run.path}: {ready}" if outer.is_done else ""
    is_done = run.is_done(num_rounds=config.federation.num_rounds)
    return f"{run.path} is done: see {run.path / 'report.html'}" if is_done else ""


def reserve(run: RunDir, config: RunConfig, *, progress: Progress | None = None) -> str:
    """Check a run and write its configuration, so that another process can start the run.

    Args:
        run: Directory from ``resolve``.
        config: Configuration from ``resolve``.
        progress: Called while the files of a run with checkpoints are hashed.

    Returns:
        The plan as text.

    Raises:
        FedPipeError: The user can correct the cause; the text of a new run is checked later.
    """
    load.check(config)
    check_sinks(config.log.to)
    deepspeed_dict = deepspeed_config(config)
    check_sources(config)
    plan = render(build_plan(config))
    run.claim(deepspeed_dict, partial(inputs_of, config, progress=progress))
    run.write(load.to_yaml(config), deepspeed=deepspeed_dict, plan=plan)
    return plan
