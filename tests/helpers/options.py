"""The options of a command and their combinations, derived from the schema.

Every field of a configuration that a rank reads is an option. Its values come from its type: each
choice, both truth values, the neighbours of a whole number, half of a number. A value that others
must accompany gets the fewest that the configuration accepts, found by following what its own
refusals name. ``covering`` makes configurations that hold every pair of values between them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedpipe.config import load
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import wrap
from fedpipe.distributed.topology import Grid
from fedpipe.errors import ConfigError

Settings = dict[str, Any]
"""Dotted key -> value, where it is not the base's."""
Refused = tuple[Settings, Settings, str]
"""Two values that are refused together, and the key that the refusal names first."""

FILES = {"deepspeed.config": ("zero", "bf16", "zero and bf16")}
"""Values of texts that name a file: its name in the folder ``deepspeed``."""
LARGEST_WORLD = 8
"""Processes of a configuration that was not asked for more."""
GOLDEN = Path(__file__).parents[1] / "golden"
_DEEPEST = 4
_KEY = re.compile(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*")
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")


class Options:
    """The options of one command."""

    def __init__(
        self,
        configure: Callable[[dict[str, Any]], Any],
        base: Settings,
        *,
        record: str,
        elsewhere: tuple[str, ...],
        alone: Mapping[str, Settings] | None = None,
        further: Mapping[str, list[Any]] | None = None,
    ) -> None:
        """Derive nothing yet.

        Args:
            configure: Makes a checked configuration of nested values; refuses with ConfigError.
            base: Values, where they are not the defaults.
            record: File of ``GOLDEN`` that holds what ``covering`` returned last.
            elsewhere: Beginnings of keys that no rank reads.
            alone: Options that take minutes: tried with everything else as it is, and once more
                with these settings.
            further: Values that the type of an option does not say.
        """
        self._configure, self.base, self._record = configure, base, GOLDEN / record
        self._elsewhere, self._alone, self._further = elsewhere, alone or {}, further or {}

    def build(self, settings: Mapping[str, Any]) -> Any:
        """Return the checked configuration.

        Raises:
            ConfigError: It is refused.
        """
        tree: dict[str, Any] = {}
        for key, value in (self.base | dict(settings)).items():
            *sections, name = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = file_of(key, value) if key in FILES else value
        return self._configure(tree)

    @cached_property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """The values of every option that are not the base's."""
        found: dict[str, tuple[Any, ...]] = {}
        for key, kind, value in _leaves(self.build({})):
            if not key.startswith(self._elsewhere):
                others: Any = FILES.get(key) or self._further.get(key) or _others(kind, value)
                distinct = [v for v in others if v != _plain(value)]
                if distinct:
                    found[key] = tuple(_first_of_its_kind(distinct))
        return found

    def complete(self, wanted: Settings) -> tuple[Settings | None, str]:
        """Find the fewest settings beside some wanted ones with which they are accepted.

        Returns:
            Both together, or None if there are none; and what refuses the wanted ones alone.
        """
        refusal = ""
        queue, seen = deque([wanted]), {_identity(wanted)}
        while queue:
            settings = queue.popleft()
            try:
                self.build(settings)
                return settings, refusal
            except ConfigError as error:
                refusal = refusal or str(error)
                if len(settings) - len(wanted) == _DEEPEST:
                    continue
                for key, value in self._ways_out(str(error)):
                    further = settings | {key: value}
                    if key not in settings and _identity(further) not in seen:
                        seen.add(_identity(further))
                        queue.append(further)
        return None, refusal

    def _ways_out(self, refusal: str) -> Iterator[tuple[str, Any]]:
        """Values of the options that a refusal names: their own, and numbers that it names."""
        numbers = sorted({int(number) for number in _NUMBER.findall(refusal)})
        for key in dict.fromkeys(_KEY.findall(refusal)):
            of_key = self.values.get(key, ())
            yield from ((key, value) for value in of_key)
            if any(type(value) is int for value in of_key):
                yield from ((key, number) for number in numbers if number not in of_key)

    @cached_property
    def choices(self) -> list[tuple[Settings, Settings]]:
        """Every value of every option, alone and with the settings that it needs."""
        found = []
        for key, given in self.values.items():
            for value in given:
                settings, refusal = self.complete({key: value})
                if settings is None:  # a number out of range: the refusal says what the range is
                    own = attrgetter(key)(self.build({}))
                    numbers = {int(n) for n in _NUMBER.findall(refusal)} - {value, own}
                    ranges = (self.complete({key: number})[0] for number in sorted(numbers))
                    settings = next((s for s in ranges if s is not None), None)
                if settings is not None:
                    found.append(({key: settings[key]}, settings))
        return found

    def singles(self) -> list[Settings]:
        """Return the configurations of ``choices``, and of ``alone`` a second time, each once."""
        found = [settings for _, settings in self.choices]
        found += [
            settings | again
            for settings in found
            for key, again in self._alone.items()
            if key in settings
        ]
        return _first_of_its_kind(found)

    def all_pairs(self) -> list[tuple[Settings, Settings]]:
        """Return every two values of different options."""
        pairs = itertools.combinations(self._paired(), 2)
        return [(a, b) for a, b in pairs if a.keys() != b.keys()]

    def _paired(self) -> list[Settings]:
        alone = _first_of_its_kind([choice for choice, _ in self.choices])
        return [choice for choice in alone if not choice.keys() & set(self._alone)]

    def covering(self) -> tuple[list[Settings], list[Refused]]:
        """Find configurations that hold every pair between them; greedy, the same at every call.

        Returns:
            The configurations; the pairs that are refused.
        """
        left, refused = {}, []
        for a, b in self.all_pairs():
            settings, refusal = self.complete(a | b)
            if settings is None:
                refused.append((a, b, self.named(refusal)))
            else:
                left[pair(a, b)] = settings
        leading: dict[str, list[Any]] = {}
        for choice in self._paired():
            for key, value in choice.items():
                leading.setdefault(key, []).append(value)
        draw, rows = random.Random(0), []
        while left:
            row = dict(left[min(left)])
            for key in draw.sample(sorted(leading), len(leading)):
                if key not in row:
                    row |= self._most_useful(key, leading[key], row, left)
            rows.append(row)
            for held in held_by(row):
                left.pop(held, None)
        return rows, refused

    def _most_useful(
        self, key: str, given: list[Any], row: Settings, left: Mapping[Any, Any]
    ) -> Settings:
        """The value that adds the most missing pairs to a configuration, as far as it fits in."""
        gains = [
            (sum(pair({key: value}, {k: v}) in left for k, v in row.items()), index)
            for index, value in enumerate(given)
        ]
        for gain, index in sorted(gains, reverse=True):
            if gain and self._accepted(row | {key: given[index]}):
                return {key: given[index]}
        return {}

    def _accepted(self, settings: Settings) -> bool:
        try:
            return world_size(self.build(settings)) <= LARGEST_WORLD
        except ConfigError:
            return False

    def named(self, refusal: str) -> str:
        """Return the first option that a refusal names; "" for none."""
        return next((key for key in _KEY.findall(refusal) if key in self.values), "")

    def recorded(self) -> tuple[list[Settings], list[Refused]]:
        """Read what ``covering`` returned last; FEDPIPE_RECORD=1 calls it again, for seconds."""
        if os.environ.get("FEDPIPE_RECORD") == "1":
            rows, refused = self.covering()
            entries = [
                *({"row": r} for r in rows),
                *({"refused": [a, b], "by": k} for a, b, k in refused),
            ]
            self._record.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        entries = [json.loads(line) for line in self._record.read_text().splitlines()]
        rows = [entry["row"] for entry in entries if "row" in entry]
        return rows, [(*entry["refused"], entry["by"]) for entry in entries if "refused" in entry]

    def not_covered(self, rows: Sequence[Settings], refused: Sequence[Refused]) -> list[str]:
        """Return what is wrong with rows that are to hold every pair, and with the refusals."""
        held: set[tuple[str, str]] = set().union(*map(held_by, rows))
        held |= {pair(a, b) for a, b, _ in refused}
        wrong = [
            f"{show(a)} and {show(b)} are in no row"
            for a, b in self.all_pairs()
            if pair(a, b) not in held
        ]
        for row in rows:
            self.build(row)
        for a, b, key in refused:
            settings, refusal = self.complete(a | b)
            if settings is not None or not key or self.named(refusal) != key:
                wrong.append(f"{show(a | b)}: expected a refusal that names {key}, got {refusal}")
        return wrong


def world_size(config: Any) -> int:
    """Return the processes of a configuration of either class."""
    if isinstance(config, RunConfig):
        return config.world_size
    return Grid.of(config.stages, config.federation).world_size


def _pretraining(tree: dict[str, Any]) -> RunConfig:
    config = load.from_dict(tree)
    load.check(config)
    return config


def _finetuning(tree: dict[str, Any]) -> FinetuneConfig:
    config: FinetuneConfig = load.build(FinetuneConfig, wrap(tree, "config"))
    return config


def file_of(key: str, name: str) -> str:
    """Return the path of one of ``FILES``."""
    return str(Path(__file__).parent / key.partition(".")[0] / f"{name}.json")


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(section))
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], value


def _others(kind: Any, value: Any) -> list[Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        kind = next(a for a in arguments if a is not NoneType)
        return _others(kind, value) if value is not None or kind is bool else []
    if origin is Literal:
        return list(arguments)
    if origin is tuple:
        (element, _) = arguments
        if get_origin(element) is Literal:
            return [[choice] for choice in get_args(element)]
        halves = [_others(element, v)[0] for v in value]  # of whole numbers, one less
        return [halves] if element is float else [list(value[:-1]), halves, [*value, value[-1] + 1]]
    if kind is bool:
        return [True, False]
    if kind is int:
        return [value - 1, value + 1]
    if kind is float:
        return [value / 2 if value else 0.25]
    return []


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _first_of_its_kind(given: list[Any]) -> list[Any]:
    return [v for i, v in enumerate(given) if not any(v is w or v == w for w in given[:i])]


def _identity(settings: Settings) -> str:
    return str(sorted(settings.items()))


def held_by(row: Settings) -> set[tuple[str, str]]:
    """Return the pairs in a configuration."""
    return {pair(dict([a]), dict([b])) for a, b in itertools.combinations(row.items(), 2)}


def pair(a: Settings, b: Settings) -> tuple[str, str]:
    """Name two choices, in one order."""
    first, second = sorted((show(a), show(b)))
    return first, second


def show(settings: Settings) -> str:
    """Write settings as overrides on a command line."""
    return " ".join(f"{key}={value}" for key, value in settings.items()).replace("'", "")


PRETRAIN = Options(
    _pretraining,
    {
        "model.hidden_size": 16, "model.num_hidden_layers": 3, "model.num_attention_heads": 2,
        "model.intermediate_size": 32, "model.hidden_dropout_prob": 0.1,
        "model.attention_probs_dropout_prob": 0.1, "model.max_position_embeddings": 40,
        "data.sequence_length": 16, "data.partition": "iid",
        "pipeline.cut": [1], "pipeline.micro_batch_size": 2, "pipeline.num_micro_batches": 2,
        "federation.num_clients": 5, "federation.num_replicas": 2,
        "federation.clients_per_round": 3, "federation.num_rounds": 2,
        "federation.num_local_steps": 2, "optimizer.lr": 1e-2, "optimizer.warmup_ratio": 0.25,
        "log.to": [],
    },
    record="options.jsonl",
    elsewhere=(
        "name", "log.", "evaluation.",  # other commands and what is shown
        "data.train", "data.valid", "data.text_column", "data.tokenizer", "data.partition",
        "data.dirichlet_alpha", "data.cache_dir", "data.num_workers",  # read before a rank starts
        "pipeline.hang_timeout_s",  # read by who watches the ranks
        "outer.",  # needs weights of other sites: tests/distributed/test_outer.py
        "model.size",  # sizes that the base has of its own
    ),
    further={"data.mask_probability": [0.075, [0.15, 0.4]]},
    alone={  # takes a compiler minutes, and draws dropout from a generator of its own
        "pipeline.compile": {
            "model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0,
        },
    },
)  # fmt: skip
"""Three clients on two replicas of two stages: a replica hosts a second client in a round."""

FINETUNE = Options(
    _finetuning,
    {
        "task.name": "imdb", "task.max_length": 12, "method.dropout": 0.1, "batch_size": 8,
        "federation.num_clients": 5, "federation.num_replicas": 2,
        "federation.clients_per_round": 3, "federation.num_rounds": 2,
        "federation.num_local_steps": 2, "optimizer.lr": 1e-2, "optimizer.warmup_ratio": 0.25,
        "log.to": [],
    },
    record="finetune_options.jsonl",
    elsewhere=(
        "name", "log.", "hang_timeout_s", "task.", "model.path", "method.path",
        "optimizer.muon.",  # which is refused
    ),
    further={"pipeline.cut": [[1], [1, 2]], "method.reduction_factor": [4.0]},
)  # fmt: skip
"""Three clients on two whole models; cuts make up to three stages of each."""
