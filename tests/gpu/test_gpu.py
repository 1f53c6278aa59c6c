"""What GPUs compute against what a CPU computes. Not run where there is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedpipe.distributed.env import num_gpus
from fedpipe.report.writer import read_metrics
from tests.helpers.cli import fedpipe
from tests.helpers.runs import ONE_PROCESS, TINY

CPU, GPU = ({"DS_ACCELERATOR": name} for name in ("cpu", "cuda"))
EXACT = ("model.hidden_dropout_prob=0", "federation.num_local_steps=3")
"""Dropout draws from another generator on a GPU."""
MODES = (
    (),
    ("pipeline.head_location=client",),
    ("pipeline.objective=end_to_end", "pipeline.schedule=1f1b"),
)


def _losses(folder: Path, name: str, *arguments: str, environment: Any) -> list[Any]:
    """Train; return round, step, stage and loss of every step."""
    run_dir = folder / name
    overrides = [*TINY, f"data.cache_dir={folder / 'cache'}"]
    given = {argument.partition("=")[0] for argument in arguments}
    kept = [override for override in overrides if override.partition("=")[0] not in given]
    result = fedpipe(
        "pretrain", "--run-dir", str(run_dir), *kept, *arguments, folder=folder,
        environment=environment,
    )  # fmt: skip
    assert result.code == 0, result.err
    return [
        (r["round"], r["step"], r["client"], r["stage"], r["loss"])
        for r in read_metrics(run_dir / "metrics.jsonl")
        if r["kind"] == "step"
    ]


def _assert_close(found: list[Any], expected: list[Any]) -> None:
    assert [key for *key, _ in found] == [key for *key, _ in expected]
    pairs = [(a, b) for (*_, a), (*_, b) in zip(found, expected, strict=True) if b is not None]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], abs=1e-3)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_stages_that_share_a_gpu_learn_what_they_learn_on_a_cpu(
    mode: tuple[str, ...], tmp_path: Path
) -> None:
    expected = _losses(tmp_path, "cpu", *EXACT, *mode, *ONE_PROCESS, environment=CPU)
    found = _losses(tmp_path, "gpu", *EXACT, *mode, *ONE_PROCESS, environment=GPU)
    _assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_stages_on_a_gpu_each_learn_what_they_learn_on_a_cpu(
    mode: tuple[str, ...], tmp_path: Path
) -> None:
    if num_gpus({**os.environ, **GPU}) < 2:
        pytest.skip("there is one GPU")
    expected = _losses(tmp_path, "cpu", *EXACT, *mode, environment=CPU)
    _assert_close(_losses(tmp_path, "gpu", *EXACT, *mode, environment=GPU), expected)
