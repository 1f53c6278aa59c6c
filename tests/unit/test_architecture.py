"""Rules that the code keeps: import levels, one caller of torch.distributed, no print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted((REPOSITORY / "fedpipe").rglob("*.py"))
LEVELS = (
    ("printable",),
    ("errors",),
    ("files",),
    ("families",),
    ("log", "terminal", "config"),
    ("distributed",),
    ("data", "models", "report"),
    ("run",),
    ("pipeline",),
    ("federation",),
    ("cluster",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMM = "fedpipe/distributed/comm.py"
LIGHT = (
    "__init__", "__main__", "cli", "errors", "files", "printable", "log", "terminal",
    "config/load", "config/tree",
    "config/schema", "config/federation", "config/finetune", "config/require",
    "config/deepspeed", "config/model_shape",
    "distributed/topology", "distributed/env", "distributed/binding",
    "models/split", "pipeline/messages", "pipeline/schedule", "pipeline/timeline",
    "commands/options", "commands/export", "commands/report", "commands/plan/command",
    "commands/plan/plan", "commands/pretrain/command",
    "commands/finetune/command", "commands/throughput/command", "commands/study/sweep",
    "commands/evaluate/command", "commands/reproduce/command", "commands/reproduce/config",
    "commands/submit/command", "data/tokenizer",
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


def test_imports_point_to_lower_levels_only() -> None:
    wrong = []
    for file in MODULES:
        parts = relative(file).removesuffix(".py").split("/")[1:]
        own = parts[0]
        if own == "__init__":
            continue
        for line, name in imports(ast.walk(tree(file))):
            other = package(name)
            if not name.startswith("fedpipe.") or other in (own, "__version__"):
                continue
            if LEVEL.get(other, len(LEVELS)) >= LEVEL[own]:
                wrong.append(f"{relative(file)}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_level() -> None:
    found = {relative(file).removesuffix(".py").split("/")[1] for file in MODULES}
    assert found - {"__init__"} <= set(LEVEL)


def test_only_comm_talks_to_other_processes() -> None:
    banned = ("torch.distributed", "deepspeed.comm")
    wrong = []
    for file in MODULES:
        if relative(file) == COMM:
            continue
        names = [(line, name) for line, name in imports(ast.walk(tree(file)))]
        names += [  # torch.distributed.x without an import of its own
            (node.lineno, ast.unparse(node))
            for node in ast.walk(tree(file))
            if isinstance(node, ast.Attribute)
        ]
        wrong += [
            f"{relative(file)}:{line}: {name}"
            for line, name in names
            if any(f"{name}.".startswith(f"{b}.") for b in banned)
        ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_nothing_heavy_at_the_top() -> None:
    wrong = []
    for name in LIGHT:
        body = tree(REPOSITORY / "fedpipe" / f"{name}.py").body
        top = {imported.split(".")[0] for _, imported in imports(iter(body))}
        wrong += [f"{name} imports {heavy}" for heavy in sorted(top & HEAVY)]
    assert not wrong, "\n".join(wrong)


def test_nothing_prints() -> None:
    wrong = [
        f"{relative(file)}:{node.lineno}"
        for file in MODULES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_is_ascii() -> None:
    wrong = [relative(f) for f in MODULES if not f.read_text(encoding="utf-8").isascii()]
    assert not wrong, "\n".join(wrong)
