"""Rules that the code keeps: import levels, one caller of torch.distributed, no print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted((REPOSITORY / "fedpipe").rglob("*.py"))
LEVELS = (
    ("printable",),
    ("errors",),
    ("files",),
    ("log", "terminal", "config"),
    ("distributed",),
    ("data", "models", "metrics"),
    ("pipeline", "federation", "checkpoint"),
    ("workflows",),
    ("launcher",),
    ("options",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMM = "fedpipe/distributed/comm.py"
LIGHT = (
    "__init__", "__main__", "cli", "options", "errors", "files", "printable", "log", "terminal",
    "config/load", "config/tree",
    "config/schema", "config/federation", "config/finetune", "config/reproduce", "config/require",
    "config/deepspeed", "config/model_shape",
    "distributed/topology", "distributed/env", "distributed/binding",
    "models/split", "pipeline/messages", "pipeline/schedule", "pipeline/timeline",
    "workflows/plan", "workflows/finetune/grid", "launcher/finetune", "data/tokenizer",
)  # fmt: skip
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "tokenizers", "matplotlib"}


def relative(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, ``from a import b`` as ``a.b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: absolute imports only"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def package(name: str) -> str:
    """``fedpipe.config.load`` belongs to ``config``; ``fedpipe`` itself to nothing."""
    return name.split(".")[1] if name.count(".") else ""


@pytest.mark.parametrize("file", MODULES, ids=relative)
def test_imports_point_to_lower_levels_only(file: Path) -> None:
    own = relative(file).removesuffix(".py").split("/")[1]
    wrong = []
    for line, name in imports(ast.walk(tree(file))):
        other = package(name)
        if not name.startswith("fedpipe.") or other in (own, "__version__"):
            continue
        assert other in LEVEL, f"{relative(file)}:{line}: {other} has no level in LEVELS"
        if own == "__init__" or LEVEL[other] >= LEVEL[own]:
            wrong.append(f"{relative(file)}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_level() -> None:
    found = {relative(file).removesuffix(".py").split("/")[1] for file in MODULES}
    assert found - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("file", [f for f in MODULES if relative(f) != COMM], ids=relative)
def test_only_comm_talks_to_other_processes(file: Path) -> None:
    banned = ("torch.distributed", "deepspeed.comm")
    names = [name for _, name in imports(ast.walk(tree(file)))]
    assert not [n for n in names if any(f"{n}.".startswith(f"{b}.") for b in banned)]
    for node in ast.walk(tree(file)):
        # torch.distributed.x without an import of its own
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in banned)


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    body = tree(REPOSITORY / "fedpipe" / f"{name}.py").body
    top = {imported.split(".")[0] for _, imported in imports(iter(body))}
    assert not top & HEAVY


@pytest.mark.parametrize("file", MODULES, ids=relative)
def test_nothing_prints(file: Path) -> None:
    calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("file", MODULES, ids=relative)
def test_every_module_is_ascii(file: Path) -> None:
    assert file.read_text(encoding="utf-8").isascii()
