"""A pre-training before any of its processes: checks, prepared text, run directory. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedpipe.commands.plan.plan import build_plan, render
from fedpipe.commands.plan.text_facts import render_text, text_facts
from fedpipe.config import load
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import Progress, check_sources, prepare
from fedpipe.files import write_text
from fedpipe.report.sinks import check_sinks
from fedpipe.report.summary import TEXT_FILE
from fedpipe.run.resume import DEEPSPEED_FILE
from fedpipe.run.run_dir import (
    RunSetup,
    check_same_content,
    check_writable,
    describe_environment,
    inputs_of,
    locked,
    record_inputs,
    resolve_config,
    resume_from,
)


def set_up(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    notify: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None = None,
    on_checked: Callable[[], object] = lambda: None,
    choose_cut: Callable[[RunConfig], tuple[int, ...]] = lambda even: tuple(even.pipeline.cut),
) -> RunSetup:
    """Resolve the configuration, refuse what cannot work, prepare the text, write the directory.

    Args:
        config_path: YAML, or None for the packaged quick start (a resumed run reads its own).
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None for ``runs/NAME``.
        preset: What the YAML is laid over, or None.
        notify: Shows a line to the user.
        progress: Shows the preparation of the text: (label, done, total).
        on_checked: Called when all cheap checks have passed, before the text is prepared.
        choose_cut: Called next where the cut is open.

    Returns:
        The setup.

    Raises:
        FedPipeError: Anything a user can get wrong.
    """
    started_at = time.monotonic()
    config, directory, resumed = resolve_config(config_path, overrides, run_dir, preset=preset)
    plan = reserve(config, directory, progress=progress)
    on_checked()
    if config.pipeline.is_open:
        config = load.with_cut(config, choose_cut(config))
        plan = reserve(config, directory)
    checkpoint = resume_from(directory, notify=notify) if resumed else None
    notify(plan)
    data = prepare(config, progress=progress)
    record_inputs(directory, inputs_of(config), notify=notify)
    facts = text_facts(data)
    notify(render_text(facts, config))
    write_text(directory / "plan.txt", f"{plan}\n{render_text(facts, config)}\n")
    write_text(directory / TEXT_FILE, json.dumps(facts, indent=1) + "\n")
    write_text(directory / "env.json", json.dumps(describe_environment(), indent=2) + "\n")
    return RunSetup(
        config=config,
        run_dir=directory,
        data_dir=data.directory,
        checkpoint=checkpoint,
        started_at=started_at,
    )


def reserve(config: RunConfig, directory: Path, *, progress: Progress | None = None) -> str:
    """Check a run and write its configuration down; whoever has the directory can then run it.

    Args:
        config: From ``resolve_config``.
        directory: Likewise.
        progress: Called while the files of a run that has begun are hashed.

    Returns:
        The plan for people.

    Raises:
        FedPipeError: Anything that a user can get wrong, except the text of a new run.
    """
    load.check(config)
    check_sinks(config.log.to)
    deepspeed_dict = deepspeed_config(config)
    check_sources(config)
    plan = render(build_plan(config))
    check_writable(directory)
    with locked(directory):  # of a running command: its checkpoints come and go
        pass
    check_same_content(directory, config, progress=progress)
    write_text(directory / "config.yaml", load.to_yaml(config))
    write_text(directory / DEEPSPEED_FILE, json.dumps(deepspeed_dict, indent=2) + "\n")
    write_text(directory / "plan.txt", plan + "\n")
    return plan
