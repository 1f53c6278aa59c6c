"""From a YAML file and ``section.key=value`` overrides to a checked ``RunConfig``, and back.

Precedence in one sentence: dataclass default < preset < YAML file < override. Unknown keys, wrong
types and keys given twice are refused with file and line.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial, reduce
from importlib import resources
from importlib.resources.abc import Traversable
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.model_shape import model_shape
from fedpipe.config.paths import expanded, is_path
from fedpipe.config.require import require
from fedpipe.config.schema import OpenCut, RunConfig
from fedpipe.config.tree import Node, dump, merge, parse, parse_override, read_text, wrap
from fedpipe.errors import ConfigError

PACKAGED_CONFIG = "quickstart.yaml"
"""What ``load_config`` reads when it is given neither preset nor file."""

_AUTO = re.compile(r"auto(?::([0-9]+))?")


def load_config(
    path: str | Node | None, overrides: Sequence[str], *, preset: str | None = None
) -> RunConfig:
    """Return the checked configuration of a run.

    Args:
        path: YAML file, or its tree where it was read before; without it and without a preset the
            packaged quick start is read.
        overrides: ``section.key=value`` each; the value is YAML.
        preset: One of ``preset_names()``; the file is laid over it.

    Returns:
        The configuration, with every default in place. Where it says ``pipeline.cut: auto``, two
        stages, or ``auto:N``, its cut is an ``OpenCut``; ``with_cut`` settles it.

    Raises:
        ConfigError: A key is unknown, given twice or of the wrong type, values do not fit, or there
            is no such preset.
    """
    config = read_config(path, overrides, preset=preset)
    check(config)
    return config


def read_config(
    path: str | Node | None, overrides: Sequence[str], *, preset: str | None = None
) -> RunConfig:
    """Return the configuration without the checks that need several sections or files.

    Arguments are those of ``load_config``.

    Returns:
        The configuration, with every default in place.

    Raises:
        ConfigError: A key is unknown, given twice or of the wrong type, or there is no such preset.
    """
    node = overridden(run_tree(path, preset=preset), overrides)
    return cast(RunConfig, build(RunConfig, node))


def with_cut(config: RunConfig, cut: tuple[int, ...]) -> RunConfig:
    """Return a configuration that is cut elsewhere."""
    return replace(config, pipeline=replace(config.pipeline, cut=cut))


def _stages_of_auto_cut(node: Node) -> int:
    """Stages that ``pipeline.cut: auto`` asks for; 0 where the cut is a list."""
    pipeline = node.value.get("pipeline") if isinstance(node.value, dict) else None
    cut = pipeline.value.get("cut") if pipeline and isinstance(pipeline.value, dict) else None
    if cut is None or not isinstance(cut.value, str):
        return 0
    found = _AUTO.fullmatch(cut.value)
    num_stages = int(found[1] or 2) if found else 0
    if num_stages < 2:
        raise _type_error(
            "pipeline.cut", "a list, auto or auto:N for N stages", cut, "Write [2], or auto."
        )
    return num_stages


def _evenly_cut(node: Node, num_stages: int) -> RunConfig:
    """Build a configuration with an open cut into so many stages."""
    cut = list(range(1, num_stages))
    node = merge(node, parse_override(f"pipeline.cut={cut}"))
    config = cast(RunConfig, _build(RunConfig, node, key=""))
    shape = model_shape(config, vocab_size=1)
    layers = shape.num_hidden_layers
    if num_stages > layers:
        return config  # too many: ``check`` says so
    even = OpenCut(stage * layers // num_stages for stage in range(1, num_stages))
    return with_cut(config, even)


def run_tree(path: str | Node | None, *, preset: str | None = None) -> Node:
    """Read file and preset once, for ``load_config`` with overrides of several runs.

    Arguments are those of ``load_config``.
    """
    packaged = resources.files("fedpipe.config").joinpath(PACKAGED_CONFIG)
    return lay_over(path, preset=preset, presets=_presets(), packaged=packaged)


def overridden(tree: Node, overrides: Sequence[str]) -> Node:
    """Lay overrides, ``section.key=value`` each, over a tree.

    Raises:
        ConfigError: One of them cannot be read.
    """
    return reduce(merge, map(parse_override, overrides), tree)


def lay_over(
    path: str | Node | None, *, preset: str | None, presets: Traversable, packaged: Traversable
) -> Node:
    """Lay a file over a preset.

    Args:
        path: YAML file, its tree, or None.
        preset: Name of a file of ``presets``, or None.
        presets: Folder of the packaged presets.
        packaged: File that is read without path and preset.

    Raises:
        ConfigError: A file cannot be read, or there is no such preset.
    """
    layers = [] if preset is None else [_read_preset(preset, presets)]
    if isinstance(path, Node):
        layers.append(path)
    elif path is not None:
        layers.append(parse(read_text(path), source=path))
    elif preset is None:
        layers.append(parse(packaged.read_text("utf-8"), source=packaged.name))
    return reduce(merge, layers)


def preset_names() -> list[str]:
    """Return the names of the packaged presets."""
    return names_of(_presets())


def names_of(presets: Traversable) -> list[str]:
    """Return the names of the presets in a folder."""
    return sorted(file.name.removesuffix(".yaml") for file in presets.iterdir())


def _presets() -> Traversable:
    return resources.files("fedpipe.config").joinpath("presets")


def _read_preset(name: str, presets: Traversable) -> Node:
    names = names_of(presets)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"--preset: expected one of {', '.join(names)}, got {name!r}.{hint or ' Choose one.'}"
        )
    file = presets.joinpath(f"{name}.yaml")
    return parse(file.read_text("utf-8"), source=file.name)


def from_dict(data: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Return the configuration that ``to_dict`` turned into plain data.

    Args:
        data: Nested dicts and lists, as from JSON.
        source: What to call it in errors.

    Returns:
        The configuration; what is missing takes its default.

    Raises:
        ConfigError: A key is unknown or of the wrong type.
    """
    return cast(RunConfig, build(RunConfig, wrap(data, source)))


def build(cls: type, node: Node) -> Any:
    """Return the configuration of a class of sections that a tree of values describes.

    Args:
        cls: A dataclass whose fields are sections and values.
        node: The values; what is missing takes its default.

    Raises:
        ConfigError: A key is unknown or of the wrong type, or values do not fit.
    """
    if cls is RunConfig and (num_stages := _stages_of_auto_cut(node)):
        return _evenly_cut(node, num_stages)
    return _build(cls, node, key="")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration of any class as nested dicts, lists and scalars."""
    return cast(dict[str, Any], _to_plain(config))


def to_yaml(config: Any) -> str:
    """Return a configuration of any class, with every default, as YAML that is read back equal."""
    return dump(to_dict(config))


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested sections, with their values."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, in the order of the schema, with both values.

    Args:
        a: A configuration.
        b: Another one of the same class.
    """
    flat_a, flat_b = dict(flatten(_to_plain(a))), dict(flatten(_to_plain(b)))
    return {key: (value, flat_b[key]) for key, value in flat_a.items() if value != flat_b[key]}


def check(config: RunConfig) -> None:
    """Refuse sections that do not fit together, reading no corpus and starting nothing.

    Args:
        config: A configuration whose single sections are valid.

    Raises:
        ConfigError: The cut, the model, the corpus list or the DeepSpeed JSON do not fit.
    """
    # A vocabulary of 1 fits every model: the tokenizer is read, and compared, with the corpus.
    shape = model_shape(config, vocab_size=1)
    _check_cut(config, num_layers=shape.num_hidden_layers)
    _check_masking(config)
    _check_paths(config)
    _check_federation(config)


def _check_cut(config: RunConfig, *, num_layers: int) -> None:
    cut = config.pipeline.cut
    possible = num_layers + (cut[:1] == (0,))
    if config.pipeline.num_stages > possible:
        raise ConfigError(
            f"pipeline.cut: expected at most {possible} stages (the model has {num_layers} layers),"
            f" got {config.pipeline.num_stages}. Remove cuts or raise model.num_hidden_layers."
        )
    if any(layer > num_layers - 1 for layer in cut):
        raise ConfigError(
            f"pipeline.cut: expected increasing layer indices in 1..{num_layers - 1} (the model has"
            f" {num_layers} layers), got {list(cut)}. Use smaller indices; 0 as the first one"
            " leaves only the embeddings on the client."
        )


def _check_masking(config: RunConfig) -> None:
    length, probability = config.data.sequence_length, max(config.data.mask_probabilities)
    # The first and the last token of a block are special and never masked.
    if round(length * probability) > length - 2:
        raise ConfigError(
            f"data.mask_probability: expected at most {(length - 2) / length:.2f} (a block has"
            f" {length - 2} ordinary tokens), got {probability}. Lower it; 0.15 is usual."
        )
    rounds = config.federation.num_rounds
    require(
        config.switch_round < rounds,
        "data.mask_switch",
        f"at most {(rounds - 1) / rounds:.3g} with federation.num_rounds={rounds}, where the last"
        " round begins",
        config.data.mask_switch,
        "Lower it, or raise federation.num_rounds: the share of masked tokens changes between"
        " rounds.",
    )


def _check_paths(config: RunConfig) -> None:
    if config.data.partition != "paths":
        return
    clients = config.federation.num_clients
    if len(config.data.train) != clients:
        raise ConfigError(
            f"data.train: expected {clients} entries, one per client (data.partition=paths), got"
            f" {len(config.data.train)}. Set federation.num_clients={len(config.data.train)} or"
            " list one file per client."
        )
    if len(config.data.valid) not in (0, clients):
        raise ConfigError(
            f"data.valid: expected {clients} entries, one per client (data.partition=paths), or"
            f" none, got {len(config.data.valid)}. List one file per client, or set data.valid=[]."
        )


def _check_federation(config: RunConfig) -> None:
    federation = config.federation
    if federation.server == "shared":
        _check_shared(config)
    if config.outer.folder:
        inner = config.outer.num_inner_rounds
        require(
            federation.num_rounds % inner == 0,
            "federation.num_rounds",
            f"a multiple of outer.num_inner_rounds ({inner})",
            federation.num_rounds,
            "It counts this site's rounds of all outer rounds.",
        )
    if not deepspeed_config(config).get("zero_optimization", {}).get("stage", 0):
        return
    way_out = (
        f"Remove zero_optimization from {config.deepspeed.config}: it shards the gradients that"
        " this changes."
    )
    server, mu, pipeline = federation.server, federation.fedprox_mu, config.pipeline
    at_home = pipeline.objective == "end_to_end" and pipeline.head_location == "client"
    tied = at_home and config.model.tie_word_embeddings is not False
    untied = "false with ZeRO, pipeline.objective=end_to_end and pipeline.head_location=client"
    expected = "replicated or sequential with ZeRO"
    require(server != "shared", "federation.server", expected, server, way_out)
    require(mu == 0, "federation.fedprox_mu", "0 with ZeRO", mu, way_out)
    require(not tied, "model.tie_word_embeddings", untied, True, way_out)
    require(
        config.optimizer.name != "muon",
        "optimizer.name",
        "adamw, adam or sgd with ZeRO",
        config.optimizer.name,
        f"Remove zero_optimization from {config.deepspeed.config}: it flattens the matrices.",
    )


def _check_shared(config: RunConfig) -> None:
    pipeline, average = config.pipeline, config.federation.average
    server_stages = pipeline.num_stages - pipeline.num_client_stages
    require(
        server_stages > 0,
        "federation.server",
        "replicated where no stage is the server's",
        "shared",
        "Add a cut, or lower pipeline.num_client_stages.",
    )
    heads_on_server = pipeline.head_location == "server"
    aux_heads = pipeline.objective == "local_loss" and server_stages > 1
    for name, on_server in (("final_head", True), ("aux_head", aux_heads)):
        require(
            getattr(average, name) or not (heads_on_server and on_server),
            f"federation.average.{name}",
            "true with federation.server=shared and pipeline.head_location=server",
            False,
            "What is shared cannot stay with a client.",
        )


def _build(cls: type, node: Node, *, key: str, root: type | None = None) -> Any:
    root = root or cls
    if not isinstance(node.value, dict):
        raise ConfigError(
            f"{key}: expected a section with keys, got {node.plain()!r} in {node.where}. Write"
            f" {key}.KEY=VALUE, or the keys indented below {key.rpartition('.')[2]}:."
        )
    hints = _type_hints(cls)
    names = [field.name for field in fields(cls)]
    values = {}
    for name, child in node.value.items():
        dotted = f"{key}.{name}" if key else name
        if name not in names:
            hint = _RENAMED.get(dotted) or _suggest(dotted, names, root)
            raise ConfigError(f"{dotted}: unknown key in {child.where}. {hint}")
        values[name] = _value(hints[name], child, key=dotted, root=root)
    return cls(**values)


def _value(kind: Any, node: Node, *, key: str, root: type) -> Any:
    if is_dataclass(kind):
        return _build(cast(type, kind), node, key=key, root=root)
    if is_path(kind):
        return expanded(_scalar(str, node, key=key), key=key)
    origin, arguments, value = get_origin(kind), get_args(kind), node.value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not NoneType]
        lists = [kind for kind in kinds if get_origin(kind) is tuple]
        kind = lists[0] if lists and isinstance(value, list) else kinds[0]
        return _value(kind, node, key=key, root=root)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            choices = ", ".join(str(argument) for argument in arguments)
            raise _type_error(key, f"one of {choices}", node, _closest_choice(value, arguments))
        return value
    if origin is tuple:
        if not isinstance(value, list):
            way_out = f"Write {key}=[{node.plain()}]." if value is not None else "Write []."
            raise _type_error(key, "a list", node, way_out)
        return tuple(
            _value(arguments[0], item, key=f"{key}[{index}]", root=root)
            for index, item in enumerate(value)
        )
    return _scalar(kind, node, key=key)


def _scalar(kind: type, node: Node, *, key: str) -> Any:
    value = node.value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # nan is not
            raise _type_error(key, "a finite number", node, "Write a number.")
        return float(value)
    if type(value) is kind:
        if isinstance(value, str) and "\0" in value:
            raise _type_error(key, "a text without NUL", node, "Remove it.")
        return value
    if value is None:
        raise _type_error(key, _EXPECTATION[kind], node, "Leave the key out for its default.")
    raise _type_error(key, _EXPECTATION[kind], node, _WAY_OUT[kind])


# Once for each class: it takes longer than all the rest.
_type_hints = cache(partial(get_type_hints, include_extras=True))


_EXPECTATION = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_WAY_OUT = {
    int: "Write digits only.",
    float: "Write for example 0.001 or 1e-3.",
    bool: "Write true or false.",
    str: "Put it in quotes.",
}


def _type_error(key: str, expectation: str, node: Node, way_out: str) -> ConfigError:
    value = "null" if node.value is None else repr(node.plain())
    return ConfigError(f"{key}: expected {expectation}, got {value} in {node.where}. {way_out}")


def _closest_choice(value: Any, choices: Sequence[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f"Did you mean {close[0]}?" if close else f"The default is {choices[0]}."


_RENAMED = {"log.tensorboard": "Write log.to=[tensorboard] for true, log.to=[] for false."}
"""Keys of earlier versions, and what to write now."""


def _suggest(dotted: str, siblings: Sequence[str], root: type) -> str:
    section, _, name = dotted.rpartition(".")
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"Did you mean {f'{section}.{close[0]}' if section else close[0]}?"
    everywhere = {key.rpartition(".")[2]: key for key in _all_keys(root)}
    close = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.75)
    if close:
        return f"Did you mean {everywhere[close[0]]}?"
    return f"Keys of {section or 'the file'}: {', '.join(siblings)}."


@cache
def _all_keys(root: type) -> tuple[str, ...]:
    return tuple(key for key, _ in flatten(_to_plain(root())))


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, OpenCut):
        return str(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value
