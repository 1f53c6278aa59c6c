"""What the documents say can be done: links lead somewhere, commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.helpers.encoders import bert
from tests.helpers.guide import ROOT, commands_of, first_commands

FOLDERS = ("benchmarks", "docs", "examples", "fedpipe", "launch", "slurm")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(p for d in FOLDERS for p in ROOT.glob(f"{d}/**/*.md"))])
SHRINK = {
    "pretrain": [
        "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
        "model.intermediate_size=64", "data.sequence_length=32", "pipeline.micro_batch_size=2",
        "pipeline.num_micro_batches=2", "federation.num_rounds=1", "federation.num_local_steps=3",
        "validation.max_blocks_per_client=2", "log.to=[]", "pipeline.cut=[2]",
    ],
    "evaluate": [
        "evaluation.num_epochs=1", "evaluation.max_train_examples=32",
        "evaluation.max_test_examples=16",
    ],
    "finetune": [
        "task.max_length=16", "task.max_train_examples=48", "task.max_test_examples=24",
        "federation.num_rounds=1", "federation.num_local_epochs=0", "federation.num_local_steps=2",
    ],
}  # fmt: skip
"""Added to every command that trains: the command is tested, not the model."""


def _commands() -> list[str]:
    """Commands of the README's section "Use it", then those of the guide to evaluation, in order.

    Later ones use earlier ones' runs.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Use it\n")[1]
    return first_commands(readme) + commands_of("docs/how-to/evaluate.md")


def _anchors(document: Path) -> set[str]:
    """What a link may name after ``#``: the headings, as GitHub and MkDocs write them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {h.replace(" ", "-") for h in plain} | {re.sub(r"[- ]+", "-", h) for h in plain}


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    dead = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)", text):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            if "://" in link:
                continue
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                dead.append(f"{document.relative_to(ROOT)}: {link}")
    assert not dead, "\n".join(dead)


def test_every_path_of_the_code_map_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Map of the code\n")[1].split("\n## ")[0]
    paths = re.findall(r"^(\S+)  ", section, re.MULTILINE)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def _run(words: list[str], cwd: Path) -> None:
    """Run a command as a user of this checkout would."""
    bin_dir = Path(sys.executable).parent
    env = os.environ | {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "COLUMNS": "200",
    }
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    commands = _commands()
    assert len(commands) >= 9
    resumable: set[str] = set()
    for command in commands:
        words = shlex.split(command)
        run_dir = words[words.index("--run-dir") + 1] if "--run-dir" in words else ""
        trains = any(name in command for name in ("pretrain", "throughput", "sweep"))
        if trains and run_dir not in resumable:
            end = words.index("--grid") if "--grid" in words else len(words)
            words[end:end] = SHRINK["pretrain"]
        known = run_dir and run_dir in resumable
        if words[1] == "evaluate" and "--compare" not in words and not known:
            words += SHRINK["evaluate"]
        resumable.add(run_dir)
        _run(words, tmp_path)
    assert (tmp_path / "runs/small/export/config.json").is_file()
    assert (tmp_path / "runs/bench/throughput/report.json").is_file()
    assert (tmp_path / "runs/difference/comparison.html").is_file()


def test_the_example_of_a_task_of_ones_own_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs/how-to/evaluate.md").read_text(encoding="utf-8")
    example = re.search(r"## Your own labelled task\n.*?```sh\n(.*?)```", text, re.DOTALL)
    assert example is not None
    bert(tmp_path / "runs/small/export")
    shrunk = example.group(1).rstrip() + f" {' '.join(SHRINK['finetune'])}\n"
    _run(["bash", "-euc", shrunk.replace("max_length=16", "max_length=32")], tmp_path)
    table = (tmp_path / "runs/triage/evaluation.md").read_text(encoding="utf-8")
    assert "| triage | F1 | 4 | 1 |" in table and "task.yaml (own task)" in table
    assert "triage" in (tmp_path / "runs/triage-clients/report.md").read_text(encoding="utf-8")


def test_the_commands_of_the_guide_to_fine_tuning_run(tmp_path: Path) -> None:
    commands = commands_of("docs/how-to/finetune.md")
    for command in (c for c in commands if "--count" not in c):  # which a unit test calls
        words = shlex.split(command)
        end = words.index("--grid") if "--grid" in words else len(words)
        words[end:end] = SHRINK["finetune"]
        _run(words, tmp_path)
    assert (tmp_path / "runs/finetune/report.html").is_file()
    assert (tmp_path / "runs/lost/adapter/adapter_config.json").is_file()
    assert "| stage 0 to 1 |" in (tmp_path / "runs/split/report.md").read_text(encoding="utf-8")
