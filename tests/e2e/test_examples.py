"""The examples run as they stand, and so does a script of one's own."""

from __future__ import annotations

import gzip
import json
import os
import re
from importlib import resources
from pathlib import Path

from tests.e2e.test_docs import SHRINK
from tests.helpers import warm

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: Path, *arguments: str, folder: Path) -> str:
    """Run a script in a folder; return what it prints."""
    environment = {
        **os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"), "MPLBACKEND": "agg",
    }  # fmt: skip
    printed, errors = folder / "printed", folder / "errors"
    with open(printed, "wb") as out, open(errors, "wb") as err:
        process = warm.Process(
            [str(script), *arguments], cwd=folder, env=environment, stdout=out, stderr=err
        )
    code, text = process.wait(600), printed.read_text("utf-8")
    assert code == 0, text + errors.read_text("utf-8")
    return text


def test_the_train_loop_shows_the_method_in_80_lines_without_fedpipe(tmp_path: Path) -> None:
    script = EXAMPLES / "train_loop.py"
    text = script.read_text("utf-8")
    assert len(text.splitlines()) <= 80
    assert not re.search(r"^(import|from) fedpipe", text, re.MULTILINE)
    printed = run(script, folder=tmp_path)
    losses = [[float(n) for n in re.findall(r"\d\.\d{3}", line)] for line in printed.splitlines()]
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first - 0.5, printed


def test_the_text_of_several_owners_becomes_a_model(tmp_path: Path) -> None:
    packaged = resources.files("fedpipe.data.samples").joinpath("bio_pmc.train.jsonl.gz")
    lines = gzip.decompress(packaged.read_bytes()).splitlines()[:12]
    texts = [" ".join(json.loads(line)["text"].split()) for line in lines]
    for name, part in (("north.txt", texts[:6]), ("south.txt", texts[6:])):
        (tmp_path / name).write_text("\n".join(part) + "\n", "utf-8")
    printed = run(EXAMPLES / "own_corpus.py", "north.txt", "south.txt", folder=tmp_path)
    assert printed.splitlines()[-1] == "runs/own-corpus/report.html"
    assert "The patient has a " in printed.splitlines()[-2]


def test_a_script_without_a_main_guard_trains_evaluates_and_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "import fedpipe\n"
        "open('started', 'a').write('x')\n"
        f"run = fedpipe.pretrain(overrides={SHRINK['pretrain']}, run_dir='run')\n"
        "again = fedpipe.pretrain(run_dir='run')\n"
        "assert again.directory == run.directory\n"
        "print(len(run.metrics('round')), run.report.is_file(), type(run.model).__name__)\n"
        "print(fedpipe.export(run))\n"
        f"scores = fedpipe.evaluate(run, overrides={SHRINK['evaluate']}, run_dir='scores')\n"
        "print(scores.metrics()['task'].tolist(), scores.report.is_file())\n"
        "config = {'model': {'path': run.directory / 'export'}, 'method': {'name': 'lora'}}\n"
        f"tuned = fedpipe.finetune(config, overrides={SHRINK['finetune']}, run_dir='tuned')\n"
        "print(tuned.metrics('eval')['metric'].tolist(), type(tuned.model).__name__)\n"
        "print('OMP_NUM_THREADS' in os.environ, 'DS_ACCELERATOR' in os.environ)\n",
        "utf-8",
    )
    printed = run(script, folder=tmp_path).splitlines()
    assert (tmp_path / "started").read_text("utf-8") == "x"
    for line in (
        "run is done: see run/report.html",
        "1 True RobertaForMaskedLM",
        "[PosixPath('run/export')]",
        "['ncbi-disease'] True",
        "['entity_f1'] RobertaForTokenClassification",
    ):
        assert line in printed, printed
    assert printed[-1] == "True False", "the environment is as it was"


def test_the_cells_of_the_notebook_run_one_after_the_other(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text("utf-8"))
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(sources), "utf-8")
    run(script, folder=tmp_path)
    assert (tmp_path / "runs/notebook/report.html").is_file()
