"""Write docs/reference/configuration.md: every key of every configuration, from the code.

Usage: ``python docs/configuration_reference.py``. Keys, types and defaults are those of the
dataclasses; the meaning of a key is the docstring below its field.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedpipe.commands.reproduce.config import ReproductionConfig
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.paths import is_path
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import dump

PAGE = Path(__file__).parent / "reference/configuration.md"
INTRODUCTION = """\
# Configuration

Every key that a configuration may have. `python docs/configuration_reference.py` writes this page from the code.

A configuration is a YAML file with the sections below. A value comes from the first of these places that has it: an override on the
command line (`section.key=value`), the file (`--config`), the preset (`--preset`), the default in the tables. Unknown keys, wrong types
and keys given twice are refused, with the file and the line. `RUN_DIR/config.yaml` lists every key of a run with its value.

Without a file and a preset, a command reads the packaged quick start, which sets some keys to other values than their defaults:
[quickstart.yaml](../../fedpipe/config/quickstart.yaml) and [finetune.yaml](../../fedpipe/config/finetune.yaml).
"""  # noqa: E501
CONFIGURATIONS = {
    "pre-training": (RunConfig, "Read by `plan`, `pretrain`, `throughput`, `sweep`, `evaluate`."),
    "fine-tuning": (FinetuneConfig, "Read by `finetune`."),
    "reproduction": (ReproductionConfig, "Read by `reproduce`."),
}  # fmt: skip
TYPES = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}


def page() -> str:
    """Return the page. A section that several configurations share is described once."""
    parts, described = [INTRODUCTION], {}
    for title, (config, text) in CONFIGURATIONS.items():
        parts += [f"## {title.capitalize()}\n\n{text}\n", *_table(config, "")]
        shared = []
        for name, section in _sections(config):
            if described.get(name) is section:
                shared.append(f"[{name}](#{name})")
            else:
                parts += _section(section, name, title if name in described else "")
                described.setdefault(name, section)
        if shared:
            parts.append(f"These sections are those of pre-training: {', '.join(shared)}.\n")
    return "\n".join(parts)


def _section(section: type, key: str, title: str = "") -> Iterator[str]:
    """Describe a section, then those inside it."""
    yield f"### {key}{f' ({title})' if title else ''}\n\n{_markdown(inspect.getdoc(section))}\n"
    yield from _table(section, f"{key}.")
    for name, inner in _sections(section):
        yield from _section(inner, f"{key}.{name}")


def _table(section: type, prefix: str) -> Iterator[str]:
    """Describe the keys of a section that are values."""
    kinds, meanings, defaults = _kinds(section), _meanings(section), section()
    rows = [
        f"| `{prefix}{field.name}` | {_type(kinds[field.name])} "
        f"| {_default(getattr(defaults, field.name))} | {_markdown(meanings[field.name])} |"
        for field in fields(section)
        if not is_dataclass(kinds[field.name])
    ]
    if rows:
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _sections(section: type) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name, kind in _kinds(section).items() if is_dataclass(kind))


def _kinds(section: type) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in fields(section)}


def _meanings(section: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and of those that it extends."""
    meanings: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                meanings[field.target.id] = inspect.cleandoc(text.value.value)
    return meanings


def _type(kind: Any) -> str:
    arguments = get_args(kind)
    if is_path(kind):
        return "path"
    if get_origin(kind) in (Union, UnionType):
        kinds = [_type(a) for a in arguments if a is not NoneType]
        return ", or ".join([*kinds, *["`null`"] * (NoneType in arguments)])
    if get_origin(kind) is tuple:
        return f"list: {_type(arguments[0])}"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    return TYPES[kind]


def _default(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return f"`{dump({'key': value}).removeprefix('key: ').strip()}`"


def _markdown(text: str | None) -> str:
    """Return a docstring as one paragraph."""
    words = re.sub(r"``(.+?)``", r"`\1`", " ".join((text or "").split()))
    return words.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
