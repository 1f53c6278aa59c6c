"""The run directory: checked and written once, before any process of the run starts. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedpipe import __version__
from fedpipe.config import load
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.schema import RunConfig
from fedpipe.data.cache import cache_root
from fedpipe.data.corpus import (
    PreparedData,
    Progress,
    identify,
    prepare,
    prepared_under,
)
from fedpipe.data.identity import file_digests, model_files
from fedpipe.errors import CheckpointError
from fedpipe.files import write_text
from fedpipe.run.checkpoint import CHECKPOINTS, Checkpoint, Position, find_latest, set_aside_later
from fedpipe.run.resume import (
    INPUTS_FILE,
    Inputs,
    check_config,
    check_deepspeed,
    check_inputs,
    has_begun,
    may_change,
    read_inputs,
)

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "submitit")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSetup:
    """What every process of a run needs to know; picklable, and handed to other hosts as JSON."""

    config: RunConfig
    run_dir: Path
    data_dir: str
    """Prepared corpus (see ``fedpipe.data.corpus``)."""
    checkpoint: Checkpoint | None
    """Where to resume, or None."""
    started_at: float
    """``time.monotonic()`` when the user's command began."""

    @property
    def hang_timeout_s(self) -> float:
        """Seconds without a sign of life after which a process is taken for hung."""
        return self.config.pipeline.hang_timeout_s

    def to_message(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        checkpoint = self.checkpoint and asdict(self.checkpoint) | {
            "path": str(self.checkpoint.path)
        }
        return {
            "config": load.to_dict(self.config), "run_dir": str(self.run_dir),
            "data_dir": self.data_dir, "checkpoint": checkpoint,
        }  # fmt: skip

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
        saved = message["checkpoint"]
        checkpoint = saved and Checkpoint(
            **saved | {"path": Path(saved["path"]), "position": Position(**saved["position"])}
        )
        return cls(
            config=config, run_dir=Path(message["run_dir"]), data_dir=str(message["data_dir"]),
            checkpoint=checkpoint or None, started_at=started_at,
        )  # fmt: skip


def prepared_text(directory: Path, config: RunConfig) -> PreparedData:
    """Return the text that a run has been trained on, whatever its files hold meanwhile.

    Args:
        directory: Of the run.
        config: Its configuration.

    Raises:
        FedPipeError: The cache does not hold it any more, and the files are others.
    """
    before = read_inputs(directory)
    found = prepared_under(before.prepared, root=cache_root(config)) if before else None
    if found is not None:
        return found
    check_same_content(directory, config)
    return prepare(config)


def resume_from(directory: Path, *, notify: Callable[[str], None]) -> Checkpoint | None:
    """Find the newest complete checkpoint of a run, and set aside what lies after it.

    Args:
        directory: Of the run.
        notify: Told where the run goes on, and of checkpoints that cannot be used.

    Returns:
        Where to go on; None for a run that has saved nothing.
    """
    checkpoint, passed_over = find_latest(directory)
    for line in passed_over:
        notify(f"warning: {line}; falling back to an earlier one")
    if checkpoint:
        for name in set_aside_later(directory, checkpoint.position):
            notify(f"kept as {directory / name} until the run has got as far again")
        notify(f"resuming {directory} from {checkpoint.path.name}")
    return checkpoint


def is_done(run_dir: Path, *, num_rounds: int) -> bool:
    """All rounds are trained, exported and reported."""
    trained = run_dir / CHECKPOINTS / Position(round_id=num_rounds).name
    return all(p.exists() for p in (trained, run_dir / "export", run_dir / "report.html"))


def inputs_of(config: RunConfig, *, progress: Progress | None = None) -> Inputs:
    """Find out what a run reads now: text, tokenizer and first weights.

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


def check_same_content(
    directory: Path, config: RunConfig, *, progress: Progress | None = None
) -> None:
    """Refuse to go on with other text, another tokenizer, first weights or DeepSpeed JSON.

    Args:
        directory: Of a run; one that has not begun may read what it likes.
        config: What it is to be gone on with.
        progress: Called while files are hashed.

    Raises:
        FedPipeError: The content is another one, or cannot be read.
    """
    if not has_begun(directory):
        return
    check_deepspeed(directory, deepspeed_config(config))
    if (before := read_inputs(directory)) is not None:
        check_inputs(directory, before, inputs_of(config, progress=progress))


def record_inputs(directory: Path, now: Inputs, *, notify: Callable[[str], None]) -> None:
    """Write down what a run begins with; one that has begun must have begun with the same.

    Args:
        directory: Of the run.
        now: What it reads.
        notify: Told where nobody knows what a run has begun with.

    Raises:
        CheckpointError: It has begun with something else.
    """
    if has_begun(directory):
        if (before := read_inputs(directory)) is not None:
            check_inputs(directory, before, now)
            return
        notify(
            f"warning: {directory} does not say what it began with: today's text and models are"
            f" taken for the same, and written down in {INPUTS_FILE}"
        )
    write_text(directory / INPUTS_FILE, now.to_json())


def resolve_config(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
) -> tuple[RunConfig, Path, bool]:
    """Find the configuration, the directory, and whether a run is there already; writes nothing.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None for ``runs/NAME``.
        preset: What the YAML is laid over, or None.

    Raises:
        FedPipeError: The configuration is wrong, or is not that of the run in the directory.
    """
    saved = os.path.join(run_dir, "config.yaml") if run_dir else ""
    # Without --config and --preset, the run's own file is what the overrides are applied to.
    base = saved if not (config_path or preset) and os.path.isfile(saved) else config_path
    name = "" if run_dir else load.read_config(base, overrides, preset=preset).name
    directory = Path(run_dir or Path("runs") / name)
    config = load.load_config(base, overrides, preset=preset)
    if os.path.isfile(directory / "config.yaml"):
        saved_config = load.read_config(str(directory / "config.yaml"), [])
        if has_begun(directory):
            config = _settled(config, saved_config)
            free = may_change("pretrain", [directory])
            check_config(directory, saved_config, config, may_change=free)
        return config, directory, True
    check_new(directory)
    return config, directory, False


def _settled(config: RunConfig, saved: RunConfig) -> RunConfig:
    """Take the cut of a run that has begun, where a configuration leaves it open."""
    cut = saved.pipeline.cut
    fits = config.pipeline.is_open and len(cut) == len(config.pipeline.cut)
    return load.with_cut(config, cut) if fits else config


def check_new(directory: Path) -> None:
    """Refuse to start a run where something else lies.

    Raises:
        CheckpointError: The path is a file, or a directory with other files.
    """
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise CheckpointError(
            f"--run-dir: expected a directory, got the file {directory}. Choose another path."
        )
    if os.path.isdir(directory) and not _is_new(directory):
        raise CheckpointError(
            f"--run-dir: expected a new, empty or fedpipe run directory, got {directory} "
            "with other files. Choose another directory."
        )


def _is_new(directory: Path) -> bool:
    """Whether a directory holds nothing but what a start that was killed early leaves behind."""
    ours = re.compile(r"logs|\.lock|\.writable|\..*\.part")
    return all(ours.fullmatch(path.name) for path in directory.iterdir())


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
    with open(run_dir / ".lock", "w", encoding="utf-8") as file:
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


def describe_environment() -> dict[str, Any]:
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
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
