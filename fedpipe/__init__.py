"""fedpipe: federated pre-training of BERT-like models over a pipeline of locally trained stages.

The commands are functions here, for notebooks and scripts::

    import fedpipe

    run = fedpipe.pretrain({"name": "mine", "data": {"train": ["notes/*.jsonl"]}})
    run.metrics("round")  # a pandas table
    run.model  # a transformers model

A configuration is a dict of sections, the path of a YAML file, or None for the packaged quick
start. What a user can mend is a ``FedPipeError`` in one line, as on the command line. Nothing heavy
is imported before a function needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.distributed.env import kept_environment
from fedpipe.errors import CheckpointError, FedPipeError
from fedpipe.files import system_errors_named

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedpipe.commands.plan.plan import Plan
    from fedpipe.config.tree import Node

__version__ = "0.2.0"
__all__ = ["FedPipeError", "Run", "evaluate", "export", "finetune", "plan", "pretrain"]

Config = Mapping[str, Any] | str | Path | None
"""Sections, or the path of a YAML file, or None for the packaged quick start."""


class Run:
    """A directory that one of the functions, or commands, has left behind."""

    def __init__(self, directory: str | Path) -> None:
        """Take a directory; its files are read when they are asked for."""
        self.directory = Path(directory)

    def __repr__(self) -> str:
        """Name the directory."""
        return f"Run({str(self.directory)!r})"

    def metrics(self, kind: str | None = None) -> pandas.DataFrame:
        """Return what was recorded, as a table.

        Args:
            kind: Only records of this kind, for example step, round or eval; None takes all.

        Returns:
            A row for each record of ``metrics.jsonl``; of an evaluation, a row for each training;
            of a consortium, a row for each site in each outer round that is over.

        Raises:
            CheckpointError: Nothing was recorded yet.
        """
        import pandas

        from fedpipe.report.writer import METRICS_FILE, read_metrics

        if self._kind == "evaluation":
            content = json.loads((self.directory / "evaluation.json").read_text("utf-8"))
            return pandas.json_normalize(content["cells"])
        if self._kind == "consortium":
            from fedpipe.commands.consortium.report import site_rows
            from fedpipe.commands.consortium.run import locate

            return pandas.DataFrame(site_rows(locate(None, [], str(self.directory))))
        records = read_metrics(self.directory / METRICS_FILE)
        return pandas.DataFrame([r for r in records if kind in (None, r["kind"])])

    @property
    def model(self) -> PreTrainedModel:
        """The trained model, of the class that its export names."""
        import transformers

        folder = self._exported()
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = getattr(transformers, config["architectures"][0])
        return kind.from_pretrained(folder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the model was trained with."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self._exported())

    @property
    def report(self) -> Path:
        """The page that describes the run."""
        name = "evaluation.html" if self._kind == "evaluation" else "report.html"
        return self.directory / name

    @property
    def _kind(self) -> str:
        from fedpipe.run.run_dir import RunDir

        return RunDir.open(self.directory, "pretrain", "finetune", "evaluation", "consortium").kind

    def _exported(self) -> Path:
        folder = self.directory / "export"
        if not (folder / "config.json").is_file():
            own = sorted(path.parent.name for path in folder.glob("*/config.json"))
            found = f"a model for each client: {', '.join(own)}" if own else "none"
            raise CheckpointError(
                f"{folder}: expected one exported model, got {found}. Load a folder with"
                " transformers, or an adapter with the adapters library."
            )
        return folder


def plan(
    config: Config = None, *, preset: str | None = None, overrides: Sequence[str] = ()
) -> Plan:
    """Work out what a pre-training will be; start nothing.

    Args:
        config: Sections, the path of a YAML file, or None for the packaged quick start.
        preset: Name of a published system that the configuration is laid over.
        overrides: ``section.key=value`` each, which win over the configuration.

    Returns:
        The plan; as text it is what ``fedpipe plan`` shows.

    Raises:
        FedPipeError: The configuration cannot work.
    """
    from fedpipe.commands.plan.plan import build_plan
    from fedpipe.config.load import load_config

    with _own_environment():
        return build_plan(load_config(_source(config), overrides, preset=preset))


def pretrain(
    config: Config = None,
    *,
    run_dir: str | Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Pre-train a model on this machine, or go on with the run in a directory.

    Args:
        config: Sections, the path of a YAML file, or None for the packaged quick start, or for
            that of the run in the directory.
        run_dir: Directory of the run; None is runs/NAME.
        preset: Name of a published system that the configuration is laid over.
        overrides: ``section.key=value`` each, which win over the configuration.

    Returns:
        The run, which is done.

    Raises:
        FedPipeError: What the user can mend, or a process that failed.
        KeyboardInterrupt: The run was asked to stop, and is saved; the same call goes on with it.
    """
    from fedpipe.commands.pretrain.command import pretrain as command
    from fedpipe.config.load import read_config

    source = _source(config)
    with _own_environment():
        _check_done(command(source, overrides, _text(run_dir), preset=preset))
    return Run(run_dir or Path("runs") / read_config(source, overrides, preset=preset).name)


def finetune(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Fine-tune a model over clients, or go on with the run in a directory.

    Arguments, result and errors are those of ``pretrain``; the presets are published studies. A
    configuration must be given, and may be ``{}``, unless there is a run in the directory.
    """
    from fedpipe.commands.finetune.command import finetune as command
    from fedpipe.config.finetune import load_finetune

    source = _source(config)
    with _own_environment():
        _check_done(command(source, overrides, _text(run_dir), preset=preset))
    return Run(run_dir or Path("runs") / load_finetune(source, overrides, preset=preset).name)


def evaluate(
    models: Run | str | Path | Sequence[Run | str | Path],
    *,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    config: Config = None,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    parallel: int = 1,
) -> Run:
    """Fine-tune models on labelled tasks and score them.

    Args:
        models: Runs, or Hugging Face folders; several are compared.
        tasks: Names of tasks; None takes those of the configuration.
        data: Folder with the tasks' files; None takes that of the configuration.
        seeds: Each model is fine-tuned once with each; None takes those of the configuration.
        config: With a section ``evaluation``: sections, the path of a YAML file, or None.
        run_dir: Directory of the evaluation; None is runs/NAME-evaluation.
        overrides: ``section.key=value`` each, which win over the configuration.
        parallel: Trainings at a time.

    Returns:
        The evaluation; ``metrics()`` has a row for each training.

    Raises:
        FedPipeError: What the user can mend, or a training that failed.
        KeyboardInterrupt: The evaluation was asked to stop; the same call goes on with it.
    """
    from fedpipe.commands.evaluate.command import evaluate as command
    from fedpipe.commands.evaluate.setup import read_evaluation

    several = [models] if isinstance(models, Run | str | Path) else models
    given = {
        "models": tuple(str(m.directory if isinstance(m, Run) else m) for m in several),
        "tasks": tasks and tuple(tasks),
        "data": data and str(data),
        "seeds": seeds and tuple(seeds),
    }
    chosen = {name: value for name, value in given.items() if value}
    source = _source(config)
    with _own_environment():
        _check_done(command(source, overrides, _text(run_dir), chosen=chosen, parallel=parallel))
    return Run(run_dir or read_evaluation(source, overrides, None, chosen=chosen)[1])


def export(run: Run | str | Path) -> list[Path]:
    """Write the newest checkpoint of a run as folders that other libraries read.

    Args:
        run: A run, or its directory.

    Returns:
        The folders.

    Raises:
        FedPipeError: There is no intact checkpoint.
    """
    from fedpipe.commands.export import export as command
    from fedpipe.run.run_dir import RunDir

    directory = run.directory if isinstance(run, Run) else run
    with _own_environment():
        return command(RunDir.open(directory, "pretrain", "finetune"))


def _source(config: Config) -> str | Node | None:
    """Return what the commands take for a configuration: a path, a tree of values, or None."""
    from fedpipe.config.tree import wrap

    return wrap(config, "the configuration") if isinstance(config, Mapping) else _text(config)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


@contextmanager
def _own_environment() -> Iterator[None]:
    """Leave the environment of this process as it was, which a command may set for its own."""
    with kept_environment(), system_errors_named():
        yield


def _check_done(code: int) -> None:
    if code:
        raise KeyboardInterrupt
