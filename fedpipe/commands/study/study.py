"""A study: many runs and one table. No torch.

A sweep, an evaluation, a grid of fine-tunings, a grid of measurements and a reproduction are
studies. ``pool`` runs their cells on this machine, and ``array`` runs them as jobs.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fedpipe.commands.study.report import short_names
from fedpipe.config import load
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node, dump, parse_override
from fedpipe.data.corpus import Progress, prepare
from fedpipe.distributed.signals import Signals
from fedpipe.distributed.topology import Grid
from fedpipe.errors import CheckpointError, ConfigError, FedPipeError
from fedpipe.report.console import RunConsole
from fedpipe.report.format import count
from fedpipe.run.resume import resumed_config
from fedpipe.run.run_dir import TITLES, Kind, RunDir

ONE_TASK = Grid(num_stages=1, num_replicas=1, data_parallel_degree=1)
"""Grid of a job with one task, which starts its processes itself."""
_MAX_NAME = 200
"""Largest number of characters in the name of a folder; file systems allow 255 bytes."""

MAX_CELLS = 1000

GridKeys = tuple[tuple[str, tuple[str, ...]], ...]
"""Dotted keys with their values, as YAML."""

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell(Generic[ConfigT]):
    """One run of a study."""

    name: str
    """Name of its folder and its log, such as ``cut=2_seed=0``."""
    run_dir: Path
    overrides: tuple[str, ...] = ()
    """``section.key=value``, one per key of the grid."""
    config: ConfigT
    """Whole configuration of the cell."""
    kind: Kind = "pretrain"
    """Kind of its directory."""

    @property
    def run(self) -> RunDir:
        """Run directory of the cell."""
        return RunDir.at(self.run_dir, self.kind)

    @property
    def is_done(self) -> bool:
        """Whether all rounds are trained, and the export and the report are written."""
        config: Any = self.config
        return self.run.is_done(num_rounds=config.federation.num_rounds)

    @property
    def grid(self) -> Grid:
        """Tasks of the job of the cell."""
        config: Any = self.config
        return Grid.from_config(config) if self.kind == "pretrain" else ONE_TASK

    @property
    def workers(self) -> int:
        """Number of processes that each task of the job starts itself."""
        config: Any = self.config
        tunes = self.kind == "finetune"
        return Grid.of(config.stages, config.federation).world_size if tunes else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place for a cell on this machine."""

    index: int
    """Index from 0; cells that run at the same time have different indices."""
    cores: frozenset[int]
    """Cores of the slot; slots share a core only if there are too few."""


class CellProcess(Protocol):
    """The process of a cell, which leads a process group."""

    @property
    def pid(self) -> int:
        """Process id."""

    @property
    def code(self) -> int | None:
        """Exit code; None while the process runs, and -9 if signal 9 killed it."""

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the end of the process; return False after the time limit."""


CellT = TypeVar("CellT", bound=Cell[Any])


class Study(ABC, Generic[CellT]):
    """Many runs and one table. Every cell has been checked."""

    task: ClassVar[str]
    """Name of the command: sweep, evaluate, finetune, throughput or reproduce."""
    noun: ClassVar[str] = "cell"
    """Word for a cell in messages."""
    job: ClassVar[str] = ""
    """Work of the job of a cell: the module of its ranks' program, or MODULE:FUNCTION."""
    in_foreground: ClassVar[bool] = False
    """Whether cells that run one after another run in this process, with their own display."""
    directory: Path
    cells: tuple[CellT, ...]

    @property
    def job_name(self) -> str:
        """Name of the jobs in the queue."""
        config: Any = self.cells[0].config
        return str(config.name)

    @property
    def max_parallel(self) -> int | None:
        """Number of cells that this machine can run at a time; None for any number."""
        return None

    @property
    @abstractmethod
    def page(self) -> Path:
        """Path of the report."""

    def pending(self) -> list[CellT]:
        """Return the cells that are not done, in their order."""
        return [cell for cell in self.cells if not cell.is_done]

    def prepare(self, cells: Sequence[CellT], *, progress: Progress | None = None) -> None:
        """Prepare the files that several of the cells read."""

    def reserve(self, cells: Sequence[CellT]) -> None:
        """Prepare the directories of cells before their jobs are submitted."""
        self.prepare(cells)

    def run(self, cell: CellT, *, console: RunConsole, signals: Signals) -> None:
        """Run a cell in the foreground.

        Raises:
            LaunchError: The cell failed.
            Interrupted: A signal asked the cell to stop, and it is saved.
        """
        raise NotImplementedError

    def start(self, cell: CellT, slot: Slot, log: Path) -> CellProcess:
        """Start the process of a cell in a session of its own; output goes to the log."""
        raise NotImplementedError

    def show_progress(self, running: Sequence[str], console: RunConsole) -> None:
        """Show the progress of the running cells."""

    @abstractmethod
    def write_tables(self) -> str:
        """Write the tables of finished cells; return the text for a terminal."""

    @abstractmethod
    def outcome(self, cell: CellT) -> str:
        """Return a text with the result of a finished cell."""

    def start_message(self, cell: CellT, number: int) -> str:
        """Return the line for the start of a cell in the foreground; ``number`` counts from 1."""
        return f"run     {number}/{len(self.cells)}  {cell.name}"

    def interruption_message(self, *, parallel: int = 1) -> str:
        """Return the line for a study that was interrupted."""
        done = len(self.cells) - len(self.pending())
        cells = count(len(self.cells), self.noun)
        command = self.resume_command(parallel=parallel)
        return f"interrupted after {done} of {cells}; resume with: {command}"

    def resume_command(self, *, parallel: int = 1) -> str:
        """Return the command that resumes the study."""
        several = ["--parallel", str(parallel)] if parallel > 1 else []
        return shlex.join(["fedpipe", self.task, "--run-dir", str(self.directory), *several])


def prepare_texts(cells: Iterable[Cell[RunConfig]], *, progress: Progress | None = None) -> None:
    """Prepare the text of cells once, before several cells that share it start.

    Args:
        cells: Cells that are to run.
        progress: Called while files are hashed, checked and tokenised.

    Raises:
        CorpusError: The text of a cell cannot be used; the cell is named.
    """
    seen = set()
    for cell in cells:
        config = cell.config
        what = (config.data, config.federation.num_clients, config.seed)
        if what not in seen:
            seen.add(what)
            with naming_cell(cell.name):
                prepare(config, progress=progress)


@contextmanager
def naming_cell(name: str) -> Iterator[None]:
    """Put the name of the cell in front of an error."""
    try:
        yield
    except FedPipeError as error:
        raise type(error)(f"cell {name}: {error}") from error


# -- a study of values on the command line ---------------------------------------------------------


def parse_grid(words: Sequence[str]) -> GridKeys:
    """Parse the keys of a grid and their values.

    Args:
        words: Words ``section.key=value,value``; a comma inside brackets or quotes is part of a
            value.

    Returns:
        The values of every key.

    Raises:
        ConfigError: There is no key or value, a key is given twice, a value is not YAML or a
            section, or there are too many cells.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = _split(text)
        if not (equals and all(key.split(".")) and all(values)):
            raise ConfigError(
                f"--grid: expected section.key=value,value, got {word!r}. Write for example "
                "pipeline.cut=[2],[4] or seed=0,1,2."
            )
        if key in grid:
            raise ConfigError(
                f"--grid: expected every key once, got {key} a second time. Write all its values "
                "in one place."
            )
        for value in values:
            _check_value(key, value)
        grid[key] = values
    size = math.prod(map(len, grid.values()))
    if size > MAX_CELLS:
        raise ConfigError(
            f"--grid: expected at most {MAX_CELLS:,} cells, got {size:,}. Split the sweep."
        )
    return tuple(grid.items())


def _check_value(key: str, value: str) -> None:
    node = parse_override(f"{key}={value}")
    for name in key.split("."):
        node = node.value[name]
    if isinstance(node.value, dict):
        raise ConfigError(
            f"--grid: expected keys that hold a value, got a section in {key}={value}. Write "
            f"{key}.KEY=VALUE,VALUE."
        )


def _split(text: str) -> tuple[str, ...]:
    """Split at the commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not (depth or quote):
            values.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1].strip(" ["):
            quote = letter  # one inside a word is an apostrophe
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        values[-1] += letter
    return tuple(value.strip() for value in values)


def check_grid(grid_keys: GridKeys, overrides: Sequence[str]) -> None:
    """Refuse a grid without keys, or with a key that an override sets.

    Raises:
        ConfigError: The grid is empty, or an override sets one of its keys.
    """
    if not grid_keys:
        raise ConfigError(
            "--grid: expected section.key=value,value of a new sweep, got none. Write for example "
            "--grid pipeline.cut=[2],[4] seed=0,1,2, or name the --run-dir of a sweep."
        )
    keys = {key for key, _ in grid_keys}
    for override in overrides:
        if (key := override.partition("=")[0]) in keys:
            raise ConfigError(
                f"--grid: expected keys that no override sets, got {key} in both. Remove {override}"
                " or take the key out of the grid."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs(Generic[ConfigT]):
    """How the runs of a grid of values are read and checked."""

    kind: Kind
    """Kind of the directory of a run."""
    study_kind: Kind
    """Kind of the directory of the study."""
    title: str
    """Word for all runs in messages."""
    home: str
    """Folder of the cells, in the directory of the study."""
    read_tree: Callable[..., Node]
    """Reads the tree of a configuration from a path and a preset."""
    read: Callable[[Node, Sequence[str]], ConfigT]
    """Builds a configuration from a tree and overrides, without checks across sections."""
    load: Callable[[Node, Sequence[str]], ConfigT]
    """Builds a configuration with all checks that a command makes before a run starts."""
    check_content: Callable[[RunDir, ConfigT], None]
    """Refuses to resume a run whose inputs have changed."""


def set_up_grid(
    runs: Runs[ConfigT],
    config_path: str | Node | None,
    overrides: Sequence[str],
    words: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
) -> tuple[RunDir, GridKeys, tuple[Cell[ConfigT], ...]]:
    """Find the directory, the grid and the cells of a study, and write them down.

    Every file is read once.

    Args:
        runs: How runs are read and checked.
        config_path: Path of a YAML file. None takes the configuration of the study in the
            directory, or the packaged one if the study is new.
        overrides: Values ``section.key=value`` of all cells.
        words: Grid for ``parse_grid``; empty for the grid of the study in the directory.
        run_dir: Directory of the study, or None for ``runs/NAME``.
        preset: Name of a packaged configuration that the YAML file overrides, or None.

    Raises:
        FedPipeError: The user can correct the cause; the message names a cell that cannot run.
            Nothing has been written.
    """
    config: Any
    asked = parse_grid(words)
    run = RunDir.at(run_dir, runs.study_kind) if run_dir else None
    saved = _read_saved(run) if run else None
    if saved and not (config_path or preset):
        base = saved[1]
    else:
        base = runs.read_tree(config_path, preset=preset)
    if run is None:
        first = [f"{key}={values[0]}" for key, values in asked]
        config = runs.read(base, [*overrides, *first])
        run = RunDir.at(Path("runs") / config.name, runs.study_kind)
        saved = _read_saved(run)
    asked = asked or (saved[0] if saved else ())
    check_grid(asked, overrides)
    cells = make_cells(
        asked, run.path / runs.home, lambda own: runs.load(base, [*overrides, *own]), kind=runs.kind
    )
    if saved and asked != saved[0]:
        raise CheckpointError(
            f"{run.path}: expected the grid of {runs.title} that is there,"
            f" {shlex.join(grid_words(saved[0]))}, got {shlex.join(grid_words(asked))}. Continue it"
            " with --run-dir alone, or choose a new --run-dir."
        )
    own_runs = [cell.run for cell in cells]
    if saved:
        cells = tuple(
            _resumed_cell(runs, saved[1], cell, own)
            for cell, own in zip(cells, own_runs, strict=True)
        )
    config = cells[0].config  # whose values of the grid's keys stand for all: each has its own
    content = {"grid": grid_words(asked), "config": load.to_dict(config)}
    run.make().write(dump(content))
    for cell, own in zip(cells, own_runs, strict=True):
        own.make().write(load.to_yaml(cell.config))
    return run, asked, cells


def grid_words(grid_keys: GridKeys) -> list[str]:
    """Return a grid as words of a command line."""
    return [f"{key}={','.join(values)}" for key, values in grid_keys]


def make_cells(
    grid_keys: GridKeys, home: Path, configure: Callable[[Sequence[str]], ConfigT], *, kind: Kind
) -> tuple[Cell[ConfigT], ...]:
    """Make a cell for every combination of the values of a grid.

    Args:
        grid_keys: Grid from ``parse_grid``.
        home: Folder of the cells.
        configure: Builds and checks a configuration from the overrides of a cell.
        kind: Kind of the directories of the cells.

    Returns:
        The cells; the last key varies fastest.

    Raises:
        FedPipeError: A cell cannot run, two cells are the same run, or the name of a folder is too
            long or belongs to two cells. The message names the cell.
    """
    keys = [key for key, _ in grid_keys]
    cells = []
    for values in itertools.product(*(values for _, values in grid_keys)):
        own = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        name = _folder_name(keys, values, kind=kind)
        with naming_cell(name):
            config = configure(own)
        cells.append(Cell(name=name, overrides=own, run_dir=home / name, config=config, kind=kind))
    _check_distinct(cells)
    return tuple(cells)


def _resumed_cell(
    runs: Runs[ConfigT], base: Node, cell: Cell[ConfigT], run: RunDir
) -> Cell[ConfigT]:
    """Return a cell of a study that exists; its directory ``run`` may have checkpoints."""
    with naming_cell(cell.name):
        own = run.saved if run.has_begun else None  # with what the study leaves open settled
        before = runs.read(own, ()) if own else runs.read(base, cell.overrides)
        config = resumed_config(run.path, before, cell.config, may_change=run.may_change)
        runs.check_content(run, config)
    return replace(cell, config=config)


def _read_saved(run: RunDir) -> tuple[GridKeys, Node] | None:
    """Read the grid and the configuration of the study in a directory; None for a new one."""
    if run.saved is None:
        return None
    content = run.saved.value
    words, config = content.get("grid"), content.get("config")
    if not (words and isinstance(words.value, list) and words.value and config) or not isinstance(
        config.value, dict
    ):
        raise CheckpointError(
            f"{run.config_file}: expected the grid and the configuration of {TITLES[run.kind]}, got"
            f" {sorted(content)}. Restore the file, or choose a new --run-dir."
        )
    return parse_grid([str(word) for word in words.plain()]), config


def _folder_name(keys: Sequence[str], values: Sequence[str], *, kind: Kind) -> str:
    parts = []
    for key, short, value in zip(keys, short_names(keys), values, strict=True):
        # "[2, 4]" is 2-4; what a file system or a shell could misread becomes a dash.
        text = re.sub(r"[^A-Za-z0-9.+-]+", "-", value.strip("[]'\" "))
        speaks = kind == "finetune" and key == "method.name"
        parts.append(text if speaks else f"{short}={text or 'none'}")
    return "_".join(parts)


def _check_distinct(cells: Iterable[Cell[Any]]) -> None:
    names: dict[str, Cell[Any]] = {}
    configs: dict[Any, Cell[Any]] = {}
    for cell in cells:
        if len(cell.name) > _MAX_NAME:
            raise ConfigError(
                f"cell {cell.name}: expected a folder name of at most {_MAX_NAME} characters, got "
                f"{len(cell.name)}. Use fewer keys or shorter values."
            )
        other = names.setdefault(cell.name, cell)
        if other is not cell:
            raise ConfigError(
                f"--grid: expected cells with folders of their own, got {cell.name} for both "
                f"{' '.join(other.overrides)} and {' '.join(cell.overrides)}. Change or remove one "
                "of the values."
            )
        other = configs.setdefault(cell.config, cell)
        if other is not cell:
            raise ConfigError(
                f"--grid: expected cells that differ, got the same configuration for {other.name} "
                f"and {cell.name}. Remove one of the values."
            )
