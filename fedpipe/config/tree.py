"""YAML with places: every value knows its file and line, or that an override set it.

YAML is read by its 1.2 core rules (``1e-3`` is a number, ``on`` is a word), which PyYAML's own are
not. Keys given twice are refused: PyYAML keeps the last one without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedpipe.config.half_files import check_fetched
from fedpipe.errors import ConfigError

_MOST_VALUES = 100_000
"""A few hundred characters with aliases of aliases can stand for more values than memory holds."""
OVERRIDE = "an override"
"""Place of a value that no file holds."""


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by the rules of YAML 1.2."""

    num_values = 0
    """That were converted; an alias is converted wherever it stands."""


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would read as something else; lists stay on one line."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _regex, _first in (
        ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
        ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
        (
            "float",
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
            list("-+0123456789."),
        ),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_regex), _first)


def _represent_list(dumper: _Dumper, data: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _represent_list)


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the YAML and where it stands."""

    value: Any
    """A scalar, a list of nodes or a dict of nodes."""
    where: str
    """``file:line``, or ``an override``."""

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def read_text(path: str, *, option: str = "--config") -> str:
    """Return the text of a configuration file.

    Args:
        path: YAML file.
        option: What it was given as, for errors.

    Returns:
        Its text.

    Raises:
        ConfigError: It cannot be read or is not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{option}: expected a readable YAML file, got {path!r} ({error.strerror}). Check the"
            " path"
            + (", or leave --config out for the quick start." if "config" in option else ".")
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{option}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset"
            f" {error.start} of {path}. Save the file as UTF-8."
        ) from error
    check_fetched(path, key=option)
    return text


def parse(text: str, *, source: str) -> Node:
    """Return the tree of a YAML document whose root is a mapping.

    Args:
        text: The document; an empty one has no keys.
        source: What to call it in errors.

    Returns:
        Its values, each with file and line.

    Raises:
        ConfigError: It is not YAML, its root is no mapping or a key is given twice.
    """
    try:
        tree = _compose(text, source=source, key="")
    except _NotYamlError as error:
        raise ConfigError(
            f"{source}:{error.line}: expected YAML, got an error: {error}. Check quotes, brackets"
            " and indentation of that line and the one before."
        ) from error
    if tree.value is None:
        return Node({}, source)
    if not isinstance(tree.value, dict):
        raise ConfigError(
            f"{tree.where}: expected sections such as 'model:' with indented keys, got"
            f" {tree.plain()!r}. See the packaged quickstart.yaml for an example."
        )
    return tree


def parse_override(override: str) -> Node:
    """Return the tree of ``section.key=value``.

    Args:
        override: Dotted key and YAML value.

    Returns:
        Nested mappings that hold the one value.

    Raises:
        ConfigError: There is no ``=``, no key, or the value is not YAML.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"{override}: expected section.key=value, got {override!r}. Write for example"
            " federation.num_rounds=3."
        )
    try:
        node = _compose(text, source=OVERRIDE, key=dotted)
    except _NotYamlError as error:
        raise ConfigError(
            f"{dotted}: expected a YAML value, got {text!r} ({error}). Quote it for the shell, or"
            " put quotes around a text."
        ) from error
    for name in reversed(dotted.split(".")):
        node = Node({name: node}, OVERRIDE)
    return node


def merge(base: Node, top: Node) -> Node:
    """Return ``base`` with the values of ``top``; mappings are merged key by key."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for name, node in top.value.items():
        merged[name] = merge(merged[name], node) if name in merged else node
    return Node(merged, base.where)


def wrap(data: Any, source: str) -> Node:
    """Return plain data as a tree whose values all stand in one place."""
    if isinstance(data, Mapping):
        return Node({str(key): wrap(value, source) for key, value in data.items()}, source)
    if isinstance(data, (list, tuple)):
        return Node([wrap(item, source) for item in data], source)
    return Node(os.fspath(data) if isinstance(data, os.PathLike) else data, source)


def dump(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML that ``parse`` reads back exactly."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


class _NotYamlError(Exception):
    """What the YAML parser found, and where."""

    def __init__(self, message: object, *, line: int) -> None:
        super().__init__(" ".join(str(message).split()))
        self.line = line


def _compose(text: str, *, source: str, key: str) -> Node:
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return Node(None, source) if root is None else _convert(loader, root, source, key=key)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise _NotYamlError(problem, line=mark.line + 1 if mark else 1) from error
    except (ValueError, RecursionError) as error:
        # A tag such as !!int in front of a word, or an anchor inside itself.
        raise _NotYamlError(error, line=1) from error
    finally:
        if loader is not None:
            loader.dispose()


def _convert(loader: _Loader, node: yaml.Node, source: str, *, key: str) -> Node:
    where = _place(node, source)
    loader.num_values += 1
    if loader.num_values > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values, aliases written out")
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(loader, item, source, key=key) for item in node.value], where)
    if not isinstance(node, yaml.MappingNode):
        return Node(loader.construct_object(node), where)
    result: dict[str, Node] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        dotted = f"{key}.{name}" if key else name
        if name in result:
            raise ConfigError(
                f"{dotted}: expected once, got a second time in {_place(key_node, source)} (first"
                f" in {result[name].where}). Remove one."
            )
        value = _convert(loader, value_node, source, key=dotted).value
        # A section starts on the line after its key: errors name the line of the key.
        result[name] = Node(value, _place(key_node, source))
    return Node(result, where)


def _place(node: yaml.Node, source: str) -> str:
    return source if source == OVERRIDE else f"{source}:{node.start_mark.line + 1}"
