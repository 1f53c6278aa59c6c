"""What the documents say can be done: links lead somewhere, commands and Python run."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe.data.tokenizer import SAMPLES
from tests.helpers import warm
from tests.helpers.guide import ROOT, blocks_of, commands

FOLDERS = ("benchmarks", "docs", "examples", "fedpipe", "launch", "slurm")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(p for d in FOLDERS for p in ROOT.glob(f"{d}/**/*.md"))])
ELSEWHERE = {ROOT / "docs/how-to/reproduce.md": "tests/e2e/test_reproduce.py"}
"""Guides whose commands another test runs."""
TUTORIAL = [ROOT / "docs/tutorial" / name for name in ("own-text.md", "evaluate.md")]
"""Read one after the other."""
GUIDES = [
    document
    for document in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if document not in (*ELSEWHERE, *TUTORIAL)
    and any(b.language in ("sh", "python") and not b.title for b in blocks_of(document))
]
GIVEN = {
    "docs/how-to/evaluate.md": [
        "fedpipe pretrain --run-dir runs/small",
        "fedpipe pretrain --run-dir runs/preset optimizer.lr=1e-3",
    ],
    "docs/reference/run-directory.md": ["fedpipe pretrain --run-dir runs/quickstart"],
}
"""What the reader of a guide has done before."""
LEFT = {
    "README.md": "runs/mine/export/config.json",
    "evaluate.md": "runs/difference/comparison.html",
    "export.md": "runs/quickstart/export/model.safetensors",
    "finetune.md": "runs/lost/adapter/adapter_config.json",
    "launchers.md": "runs/deepspeed/report.html",
    "sweep.md": "runs/sweep/sweep.md",
    "throughput.md": "runs/grid/throughput/report.html",
}
"""A file that must be there after a guide."""
SHRINK = {
    "pretrain": [
        "model.num_hidden_layers=4", "model.hidden_size=32", "model.num_attention_heads=2",
        "model.intermediate_size=64", "data.sequence_length=32", "pipeline.micro_batch_size=2",
        "pipeline.num_micro_batches=2", "federation.num_rounds=1", "federation.num_local_steps=3",
        "validation.max_blocks_per_client=2", "log.to=[]",
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
SHRINK["sweep"] = SHRINK["pretrain"]
SHRINK["throughput"] = ["--repetitions=2", "--steps=3", *SHRINK["pretrain"]]


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


def test_every_path_of_the_tour_and_of_the_code_map_exists() -> None:
    tour = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("\n## A guided tour in five files\n")
    )
    files = re.findall(r"^\d\. \[`(\S+)`\]", tour[1], re.MULTILINE)
    assert len(files) == 5
    code_map = (ROOT / "docs/explanation/code-map.md").read_text(encoding="utf-8")
    folders = re.findall(r"^\| `(\S+)` \|", code_map, re.MULTILINE)
    assert len(folders) > 10
    assert not [path for path in files + folders if not (ROOT / path).exists()]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def _shrunk(command: str) -> str:
    """Return a command with the keys that make its run small; a resumed run gets the same."""
    words = shlex.split(command)
    name = next((name for name in SHRINK if name in words or f"launch/{name}.py" in words), "")
    if not name or "--compare" in words:
        return command
    end = words.index("--grid") if "--grid" in words else len(words)
    swept = {word.split("=")[0] for word in words if word.startswith(("data.", "pipeline."))}
    words[end:end] = [word for word in SHRINK[name] if word.split("=")[0] not in swept]
    return shlex.join(words)


def _script(text: str) -> str:
    """Return a shell block with its trainings made small."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(("fedpipe ", "torchrun ", "deepspeed ")):
            # a unit test counts the parameters of every method
            lines += [_shrunk(c) for c in commands(line) if "--count" not in c]
        else:
            lines.append(line)
    return "\n".join(lines)


def _run(words: list[str], cwd: Path) -> None:
    """Run a program as a user of this checkout would."""
    bin_dir, own = Path(sys.executable).parent, cwd / "bin"
    own.mkdir(exist_ok=True)
    warm.write_command(own)
    env = os.environ | {
        "PATH": f"{own}:{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "COLUMNS": "200",
    }
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


def _follow(document: Path, place: Path) -> None:
    """Do what a document shows to every reader."""
    for name in ("launch", "ds_configs"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    for command in GIVEN.get(str(document.relative_to(ROOT)), []):
        _run(["bash", "-c", _shrunk(command)], place)
    for block in blocks_of(document):
        if block.title and block.language not in ("sh", "python", "text"):
            (place / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "sh" and not block.title:
            _run(["bash", "-euo", "pipefail", "-c", _script(block.text)], place)
        elif block.language == "python" and not block.title:
            _run([sys.executable, "-c", block.text], place)


def _own_text(place: Path) -> None:
    """Lay down what the README calls the reader's own text: two owners, two formats."""
    for part in ("train", "valid"):
        file = SAMPLES / f"bio_pmc.{part}.jsonl.gz"
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()[:8]
        (place / "north").mkdir(exist_ok=True)
        (place / "north" / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (place / "south" / part).mkdir(parents=True)
        (place / "south" / part / "notes.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    "document",
    [
        # The guides take minutes together: `make test` follows README and some of them.
        pytest.param(path, marks=[] if path.name == "README.md" else pytest.mark.matrix(sample=1))
        for path in GUIDES
    ],
    ids=[str(path.relative_to(ROOT)) for path in GUIDES],
)
def test_what_a_guide_shows_runs(document: Path, tmp_path: Path) -> None:
    if document.name == "README.md":
        _own_text(tmp_path)
    _follow(document, tmp_path)
    if name := LEFT.get(document.name):
        assert (tmp_path / name).is_file()
    if document.name == "finetune.md":
        report = (tmp_path / "runs/split/report.md").read_text(encoding="utf-8")
        assert "| stage 0 to 1 |" in report
    if document.name == "evaluate.md":
        table = (tmp_path / "runs/triage/evaluation.md").read_text(encoding="utf-8")
        assert "| triage | F1 | 4 | 1 |" in table and "task.yaml (own task)" in table
        report = (tmp_path / "runs/triage-clients/report.md").read_text(encoding="utf-8")
        assert "triage" in report


def test_the_tutorial_leads_from_text_to_a_scored_model(tmp_path: Path) -> None:
    for document in TUTORIAL:
        _follow(document, tmp_path)
    assert (tmp_path / "runs/own/export/config.json").is_file()
    assert (tmp_path / "runs/scores/evaluation.html").is_file()
