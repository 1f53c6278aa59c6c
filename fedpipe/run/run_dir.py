"""The run directory: what it is, what it holds, what a resume may change. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, overload

from fedpipe import __version__
from fedpipe.config import load
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.finetune import FinetuneConfig, load_finetune
from fedpipe.config.load import load_config, read_config
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node, parse, read_text
from fedpipe.data.cache import cache_root
from fedpipe.data.corpus import (
    PreparedData,
    Progress,
    identify,
    prepare,
    prepared_under,
)
from fedpipe.data.digests import file_digests, model_files
from fedpipe.distributed.topology import Grid
from fedpipe.errors import CheckpointError
from fedpipe.files import retry_reads, write_text
from fedpipe.report.records import Environment
from fedpipe.report.writer import METRICS_FILE
from fedpipe.run.checkpoint import CHECKPOINTS, Checkpoint, Position, find_latest, set_aside_after
from fedpipe.run.outer import OuterRound
from fedpipe.run.resume import (
    DEEPSPEED_FILE,
    INPUTS_FILE,
    MAY_CHANGE,
    PATHS,
    Inputs,
    check_deepspeed,
    check_inputs,
    resumed_config,
)

VERSION = 1
"""Of run directories; raised where an older fedpipe could not read what a newer one writes."""
RUN_FILE = "run.json"
_LOCK = ".lock"

Kind = Literal[
    "pretrain",
    "finetune",
    "sweep",
    "finetune grid",
    "evaluation",
    "evaluation cell",
    "reproduction",
    "comparison",
    "consortium",
]
"""What a directory is. A measurement is made in the directory of a pre-training."""
TITLES: dict[Kind, str] = {
    "pretrain": "a pre-training",
    "finetune": "a fine-tuning",
    "sweep": "a sweep",
    "finetune grid": "a grid of fine-tunings",
    "evaluation": "an evaluation",
    "evaluation cell": "a cell of an evaluation",
    "reproduction": "a reproduction",
    "comparison": "a comparison of evaluations",
    "consortium": "a consortium",
}
"""For people."""
_CONFIG_FILES: dict[Kind, str] = {
    "sweep": "sweep.yaml", "finetune grid": "grid.yaml", "evaluation": "evaluation.yaml",
    "reproduction": "reproduce.yaml",
}  # fmt: skip
"""Where the configuration of a kind is not in ``config.yaml``."""
_ADVICE: dict[Kind, str] = {"evaluation": "; --model names what is evaluated"}
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "submitit")


class Setup(Protocol):
    """What every process of a run needs to know; picklable, and handed to other hosts as JSON."""

    @property
    def config(self) -> Any:
        """A ``RunConfig`` or a ``FinetuneConfig``."""

    @property
    def run_dir(self) -> Path:
        """It exists."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where to resume, or None."""

    @property
    def grid(self) -> Grid:
        """The processes."""

    @property
    def hang_timeout_s(self) -> float:
        """Seconds without a sign of life after which a process is taken for hung."""

    def to_message(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSetup:
    """The setup of a pre-training."""

    config: RunConfig
    run_dir: Path
    data_dir: str
    """Prepared corpus (see ``fedpipe.data.corpus``)."""
    checkpoint: Checkpoint | None
    """Where to resume, or None."""
    started_at: float
    """``time.monotonic()`` when the user's command began."""
    outer: OuterRound | None = None
    """What to train for, where there are other sites."""

    @property
    def grid(self) -> Grid:
        """See ``Setup``."""
        return Grid.from_config(self.config)

    @property
    def hang_timeout_s(self) -> float:
        """See ``Setup``."""
        return self.config.pipeline.hang_timeout_s

    def to_message(self) -> dict[str, Any]:
        """See ``Setup``."""
        checkpoint = self.checkpoint and self.checkpoint.to_message()
        return {
            "config": load.to_dict(self.config),
            "run_dir": str(self.run_dir),
            "data_dir": self.data_dir,
            "checkpoint": checkpoint,
            "outer": self.outer and self.outer.to_message(),
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any], *, started_at: float) -> RunSetup:
        """Make it again from ``to_message``; a clock counts on its own host only.

        Args:
            message: Of another rank.
            started_at: When this process began.

        Raises:
            ConfigError: The message was made by another version.
        """
        config = load.from_dict(message["config"], source="the message of rank 0")
        saved, outer = message["checkpoint"], message["outer"]
        return cls(
            config=config,
            run_dir=Path(message["run_dir"]),
            data_dir=str(message["data_dir"]),
            checkpoint=Checkpoint.from_message(saved) if saved else None,
            started_at=started_at,
            outer=OuterRound(**outer) if outer else None,
        )


class RunDir:
    """A directory that fedpipe works in: what it is, what it holds, and whether it is done.

    ``run.json`` in it says what it is. It is written when the directory is made and read once.
    """

    def __init__(self, path: Path, kind: Kind, *, is_new: bool) -> None:
        """Take what ``at`` or ``open`` has found out; nothing is written."""
        self.path, self.kind = path, kind
        self.is_new = is_new
        """Nothing is there yet; ``make`` makes it."""

    @classmethod
    def at(cls, path: str | Path, *kinds: Kind) -> RunDir:
        """Find the directory of a command: one that is there, or a new one of the first kind.

        Args:
            path: As the user names it.
            kinds: What the command can go on with.

        Raises:
            CheckpointError: Something else lies there, or what another version of fedpipe wrote.
        """
        path = Path(path)
        found = _read_kind(path)
        if found is None:
            _check_new(path)
            return cls(path, kinds[0], is_new=True)
        if found not in kinds:
            raise CheckpointError(
                f"--run-dir: expected a new directory or that of {TITLES[kinds[0]]}, got that of"
                f" {TITLES[found]}, {path}. Choose another directory{_ADVICE.get(kinds[0], '')}."
            )
        return cls(path, found, is_new=False)

    @classmethod
    def open(cls, path: str | Path, *kinds: Kind) -> RunDir:
        """Open a directory that is there.

        Args:
            path: As the user names it.
            kinds: What it may be; without any, it may be anything.

        Raises:
            CheckpointError: It is not there, or is another one.
        """
        path = Path(path)
        found = _read_kind(path)
        if found is None:
            raise CheckpointError(
                f"--run-dir: expected the directory of a run, got {str(path)!r} without a"
                f" {RUN_FILE}. Name one that fedpipe {kinds[0] if kinds else 'pretrain'} wrote."
            )
        if kinds and found not in kinds:
            raise CheckpointError(
                f"--run-dir: expected the directory of {' or '.join(TITLES[k] for k in kinds)}, got"
                f" that of {TITLES[found]}, {path}. {_way_to_run(path, kinds)}"
            )
        return cls(path, found, is_new=False)

    def make(self) -> RunDir:
        """Make the directory if it is new, and try whether it can be written.

        Raises:
            CheckpointError: It cannot.
        """
        check_writable(self.path)
        if self.is_new:
            content = {"kind": self.kind, "version": VERSION}
            write_text(self.path / RUN_FILE, json.dumps(content) + "\n")
            self.is_new = False
        return self

    # -- what it holds -----------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """Where its configuration is."""
        return self.path / _CONFIG_FILES.get(self.kind, "config.yaml")

    @cached_property
    def _text(self) -> str | None:
        """Of its configuration, read once."""
        there = not self.is_new and self.config_file.exists()
        return read_text(str(self.config_file)) if there else None

    @cached_property
    def saved(self) -> Node | None:
        """Its configuration as it was when this was first asked for; None where there is none.

        Raises:
            CheckpointError: A run that has begun has lost it.
        """
        if self._text is not None:
            return parse(self._text, source=str(self.config_file))
        if self.has_begun:
            raise CheckpointError(
                f"{self.config_file}: expected the configuration of the run, got no such file."
                " Restore it, or choose a new --run-dir."
            )
        return None

    @property
    def has_begun(self) -> bool:
        """Whether there are metrics or checkpoints, which depend on the configuration."""
        return any((self.path / name).exists() for name in (METRICS_FILE, CHECKPOINTS))

    def is_done(self, *, num_rounds: int) -> bool:
        """Whether all rounds of a run are trained, and everything made of them is written."""
        trained = Path(CHECKPOINTS, Position(round_id=num_rounds).name)
        made = ("report.html",) if self.kind == "finetune" else ("export", "report.html")
        return all((self.path / name).exists() for name in (trained, *made))

    @property
    def inputs(self) -> Inputs | None:
        """What a run began with; None where that was not written down."""
        try:
            return Inputs.from_json((self.path / INPUTS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def checkpoint(self, *, notify: Callable[[str], None]) -> Checkpoint | None:
        """Find the newest complete checkpoint of a run, and set aside what lies after it.

        Args:
            notify: Told where the run goes on, and of checkpoints that cannot be used.

        Returns:
            Where to go on; None for a run that has saved nothing.
        """
        checkpoint, passed_over = find_latest(self.path)
        for line in passed_over:
            notify(f"warning: {line}; falling back to an earlier one")
        if checkpoint:
            for name in set_aside_after(self.path, checkpoint.position):
                notify(f"kept as {self.path / name} until the run has got as far again")
            notify(f"resuming {self.path} from {checkpoint.path.name}")
        return checkpoint

    # -- what a resume may change ------------------------------------------------------------

    @property
    def may_change(self) -> tuple[str, ...]:
        """Keys of ``MAY_CHANGE`` that may have other values when the run is resumed.

        Where a run that has begun has no ``inputs.json``, its paths must stay the same.
        """
        known = self.inputs is not None or not self.has_begun
        command = "finetune" if self.kind == "finetune" else "pretrain"
        return tuple(key for key in MAY_CHANGE[command] if known or key not in PATHS[command])

    def check_content(self, deepspeed: Mapping[str, Any], inputs: Callable[[], Inputs]) -> None:
        """Refuse to go on with other text, models or DeepSpeed JSON than a run has begun with.

        Args:
            deepspeed: What DeepSpeed is given now; empty where it is given nothing.
            inputs: Finds out what is read now; called where a run has begun.

        Raises:
            FedPipeError: The content is another one, or cannot be read.
        """
        if not self.has_begun:
            return
        check_deepspeed(self.path, deepspeed)
        if (before := self.inputs) is not None:
            check_inputs(self.path, before, inputs())

    def claim(self, deepspeed: Mapping[str, Any], inputs: Callable[[], Inputs]) -> None:
        """Make the directory for a run that may go on here; arguments as of ``check_content``.

        Raises:
            FedPipeError: It cannot be written, another command is at work in it, or it has begun
                with other content.
        """
        self.make()
        with locked(self.path):  # of a running command: its checkpoints come and go
            pass
        self.check_content(deepspeed, inputs)

    def record_inputs(self, now: Inputs, *, notify: Callable[[str], None]) -> None:
        """Write down what a run begins with; one that has begun must have begun with the same.

        Args:
            now: What it reads.
            notify: Told where nobody knows what the run has begun with.

        Raises:
            CheckpointError: It has begun with something else.
        """
        if self.has_begun:
            if (before := self.inputs) is not None:
                check_inputs(self.path, before, now)
                return
            notify(
                f"warning: {self.path} does not say what it began with: today's text and models are"
                f" taken for the same, and written down in {INPUTS_FILE}"
            )
        write_text(self.path / INPUTS_FILE, now.to_json())

    def write(
        self, config: str, *, deepspeed: Mapping[str, Any] | None = None, plan: str | None = None
    ) -> None:
        """Write what a run is: its configuration, the JSON for DeepSpeed and the plan.

        Args:
            config: As YAML.
            deepspeed: What DeepSpeed is given; None where it is given nothing.
            plan: For people.
        """
        if config != self._text:  # nothing is renamed over the file of a run at work
            write_text(self.config_file, config)
        if deepspeed is not None:
            write_text(self.path / DEEPSPEED_FILE, json.dumps(deepspeed, indent=2) + "\n")
        if plan is not None:
            write_text(self.path / "plan.txt", plan + "\n")


def _read_kind(path: Path) -> Kind | None:
    """Read what a directory is; None where it has no ``run.json``.

    Raises:
        CheckpointError: It is that of another version, damaged, or cannot be read.
    """
    file = path / RUN_FILE
    try:
        text = retry_reads(lambda: file.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise CheckpointError(
            f"--run-dir: expected a directory with a {RUN_FILE} that can be read, got {file}"
            f" ({error.strerror}). Choose another directory, or make the file readable."
        ) from None
    try:
        content = json.loads(text)
        kind, version = str(content["kind"]), int(content["version"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise CheckpointError(
            f"{file}: expected the kind and the version of a directory, got {text.strip()[:60]!r}."
            " Restore the file, or choose another --run-dir."
        ) from None
    if version != VERSION or kind not in TITLES:
        raise CheckpointError(
            f"--run-dir: expected a directory of version {VERSION}, got {kind} of version {version}"
            f" in {path}. Use the version of fedpipe that wrote it (see env.json there), or choose"
            " another directory."
        )
    return kind


def _way_to_run(path: Path, kinds: Sequence[Kind]) -> str:
    """Say what to name instead of a directory: a run of one of some kinds in it, if it has any."""
    for file in sorted([*path.glob(f"*/{RUN_FILE}"), *path.glob(f"*/*/{RUN_FILE}")]):
        with contextlib.suppress(CheckpointError):
            if _read_kind(file.parent) in kinds:
                return f"Name one of its runs, for example {file.parent}."
    return "Choose another directory."


def _check_new(path: Path) -> None:
    """Refuse to start where something else lies.

    Raises:
        CheckpointError: The path is a file, or a directory with other files.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise CheckpointError(
            f"--run-dir: expected a directory, got the file {path}. Choose another path."
        )
    # What a start that was killed early leaves behind is nothing.
    ours = re.compile(r"logs|\.lock|\.writable|\..*\.part")
    if os.path.isdir(path) and not all(ours.fullmatch(file.name) for file in path.iterdir()):
        raise CheckpointError(
            f"--run-dir: expected a new, empty or fedpipe run directory, got {path} with other"
            f" files. Choose another directory. A run without {RUN_FILE} is of an older version of"
            " fedpipe, and only that version can resume it."
        )


@overload
def resolve(
    kind: Literal["pretrain"],
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | RunDir | None,
    *,
    preset: str | None = None,
) -> tuple[RunDir, RunConfig]: ...
@overload
def resolve(
    kind: Literal["finetune"],
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | RunDir | None,
    *,
    preset: str | None = None,
) -> tuple[RunDir, FinetuneConfig]: ...
def resolve(
    kind: Literal["pretrain", "finetune"],
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | RunDir | None,
    *,
    preset: str | None = None,
) -> tuple[RunDir, RunConfig | FinetuneConfig]:
    """Find the directory and the configuration of a run, reading every file once; write nothing.

    Args:
        kind: Of the run.
        config_path: YAML, or its tree where it was read before, or None for that of the run in the
            directory, else the packaged one.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None for ``runs/NAME``.
        preset: What the YAML is laid over, or None.

    Returns:
        The directory, and the configuration: of a run that has begun, one that it can go on with.

    Raises:
        FedPipeError: The configuration is wrong, or is not that of the run in the directory.
    """
    load: Callable[..., Any] = load_finetune if kind == "finetune" else load_config
    run = RunDir.at(run_dir, kind) if isinstance(run_dir, str) else run_dir
    # Without --config and --preset, the run's own file is what the overrides are applied to.
    own = run.saved if run and not (config_path or preset) else None
    config = load(own or config_path, overrides, preset=preset)
    run = run or RunDir.at(Path("runs") / config.name, kind)
    if run.has_begun:
        # What the run read may lie elsewhere now, so it is not checked.
        read: Callable[..., Any] = load_finetune if kind == "finetune" else read_config
        config = resumed_config(run.path, read(run.saved, []), config, may_change=run.may_change)
    return run, config


def may_change_in_all(runs: Iterable[RunDir]) -> tuple[str, ...]:
    """Return the keys whose values may change in every one of several pre-trainings."""
    kept = [set(run.may_change) for run in runs]
    return tuple(key for key in MAY_CHANGE["pretrain"] if all(key in own for own in kept))


def resume_hint(task: str, run: RunDir | None) -> str:
    """Say how an interrupted command is resumed.

    Args:
        task: The command.
        run: Its directory, which may not have its configuration yet; None before it is known.
    """
    if run is None or not run.config_file.is_file():
        return "nothing was started: give the same command again"
    return f"resume with: fedpipe {task} --run-dir {shlex.quote(str(run.path))}"


def prepared_text(directory: Path, config: RunConfig) -> PreparedData:
    """Return the text that a run has been trained on, whatever its files hold meanwhile.

    Args:
        directory: Of the run.
        config: Its configuration.

    Raises:
        FedPipeError: The cache does not hold it any more, and the files are others.
    """
    run = RunDir.open(directory, "pretrain")
    found = prepared_under(run.inputs.prepared, root=cache_root(config)) if run.inputs else None
    if found is not None:
        return found
    run.check_content(deepspeed_config(config), partial(inputs_of, config))
    return prepare(config)


def inputs_of(config: RunConfig, *, progress: Progress | None = None) -> Inputs:
    """Find out what a pre-training reads now: text, tokenizer and first weights.

    Args:
        config: The run.
        progress: Called while files are hashed.

    Raises:
        CorpusError: A file cannot be read.
    """
    identity = identify(config, progress=progress)
    files = dict(identity.files)
    if config.model.path:
        paths = model_files(Path(config.model.path))
        files["model.path"] = file_digests(paths, key="model.path", root=cache_root(config))
    return Inputs(prepared=identity.key, files=files)


def check_writable(directory: Path) -> None:
    """Make a directory that only its owner can read, and try whether it can be written.

    One that exists keeps its permissions.

    Raises:
        CheckpointError: It cannot.
    """
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"--run-dir: expected a directory that can be written, got {directory} "
            f"({error.strerror}). Choose another directory."
        ) from None


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep every other command out of a run directory.

    Raises:
        CheckpointError: Another command is at work there, or the file system has no locks.
    """
    with open(run_dir / _LOCK, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(
                    f"--run-dir: expected a file system that can lock a file, got {run_dir} on one"
                    f" that cannot ({error.strerror}). Choose a directory on another, or have it"
                    " mounted with locks (on NFS: a lock service, or the option local_lock=flock)."
                ) from None
            raise CheckpointError(
                f"--run-dir: expected a run that no other process works on, got {run_dir} in use. "
                "Wait for it, stop it, or choose another directory."
            ) from None
        yield


def is_locked(run_dir: Path) -> bool:
    """Whether a command is at work in a directory; see ``locked``."""
    try:
        with open(run_dir / _LOCK, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def describe_environment() -> Environment:
    """Versions, host and commit: what a stranger needs to repeat the run."""
    return {
        "fedpipe": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "command": " ".join(["fedpipe", *sys.argv[1:]]),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
