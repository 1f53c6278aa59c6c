"""The distributions: a wheel and a source archive, each of which runs outside the repository."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fedpipe

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=64", "pipeline.cut=[1]", "pipeline.micro_batch_size=2",
    "federation.num_rounds=1", "federation.num_local_steps=2", "federation.num_replicas=1",
    "validation.max_blocks_per_client=2", "log.to=[]",
]  # fmt: skip


def _run(*words: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def _build(what: str, source: Path, out: Path) -> Path:
    """Have setuptools build a ``wheel`` or an ``sdist`` of a source tree into an empty folder."""
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
    out.mkdir()
    _run(sys.executable, "-c", code, cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built from a copy of the tree: building writes beside its input."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "fedpipe", source / "fedpipe", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    return _build("sdist", source, folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from what the source archive holds and nothing else."""
    folder = sdist.parents[1]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return _build("wheel", source, folder / "wheel")


def test_source_archive_and_wheel_hold_every_file_of_the_package(wheel: Path) -> None:
    packed = zipfile.ZipFile(wheel)
    files = [
        path for path in (REPOSITORY / "fedpipe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]  # fmt: skip
    names = {path.relative_to(REPOSITORY).as_posix(): path for path in files}
    assert set(names) == {name for name in packed.namelist() if name.startswith("fedpipe/")}
    assert [n for n, path in names.items() if packed.read(n) != path.read_bytes()] == []


def test_the_wheel_names_version_and_licence(wheel: Path) -> None:
    folder = f"fedpipe-{fedpipe.__version__}.dist-info"
    packed = zipfile.ZipFile(wheel)
    metadata = packed.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {fedpipe.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert packed.read(f"{folder}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()


def test_an_installed_wheel_runs_the_quick_start_outside_the_repository(
    wheel: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The libraries are this environment's. Its own fedpipe is not seen: a path that a .pth file
    # adds comes last, and the .pth files in it are not read.
    (packages,) = (venv / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")

    where = _run(venv / "bin/python", "-c", "print(__import__('fedpipe').__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(venv)
    command = venv / "bin/fedpipe"
    assert _run(command, "plan", cwd=tmp_path).startswith(f"fedpipe {fedpipe.__version__}  ")
    assert _run(command, "plan", "--preset", "fedbert", cwd=tmp_path)
    _run(command, "pretrain", "--run-dir", "run", *TINY, cwd=tmp_path)
    assert (tmp_path / "run/export/model.safetensors").is_file()
