"""The command line: parse, call one workflow, turn errors into one line and an exit code.

0 done, 2 the user's error (one line), 1 a failure, 75 interrupted and resumable (``EX_TEMPFAIL``).
Workflows are imported inside the commands: ``--help``, ``plan`` and configuration errors answer
without torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedpipe import __version__
from fedpipe.commands import options
from fedpipe.config.finetune import finetune_presets
from fedpipe.config.load import load_config, preset_names, read_config
from fedpipe.errors import CheckpointError, ConfigError, FedPipeError, LaunchError
from fedpipe.files import system_errors_named
from fedpipe.printable import printable
from fedpipe.terminal import prepare_output

if TYPE_CHECKING:
    from fedpipe.config.schema import RunConfig

EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 75

_DESCRIPTION = (
    "Federated pre-training of BERT-like models over a pipeline of locally trained stages."
)
_EPILOG = """\
exit codes:
  0   done
  1   a process of the run failed
  2   an error of yours, in one line
  75  interrupted; the same command with --run-dir DIR resumes

Default < preset < --config < override; without preset and file the packaged quick start is used:
  fedpipe pretrain --preset fedbiobert-4-8 --config FILE --run-dir runs/mine optimizer.lr=5e-4
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps every command and its summary on one line."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # Python 3.11 forgets that commands are indented below their title.
            self._action_max_length += self._indent_increment


class _Parser(argparse.ArgumentParser):
    """Reports its errors as ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}. See {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    prepare_output()
    try:
        args = _parse(argv)
        command: Callable[[argparse.Namespace], int] = args.run
        with system_errors_named():
            code = command(args)
        sys.stdout.flush()
        return code
    except FedPipeError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return EXIT_FAILURE if isinstance(error, LaunchError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse stops collecting overrides at the first option that follows them.
    for argument in rest:
        if argument.startswith("-") or "=" not in argument:
            parser.error(f"unknown argument {argument!r}")
    args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedpipe",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedpipe {__version__}")
    presets = f"a published system: {', '.join(preset_names())}"
    tuning = f"a published study: {', '.join(finetune_presets())}"
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (run, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=_sentence(summary),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        if name == "submit":
            command.add_argument(
                "task", metavar="TASK", choices=_JOBS, help=f"what to run: {', '.join(_JOBS)}"
            )
        if name == "reproduce":
            options.add_reproduction(command)
        elif name == "evaluate":
            options.add_path(
                command, "--config", metavar="FILE", help="YAML with a section evaluation"
            )
        else:
            studies = tuning if name == "finetune" else presets
            command.add_argument("--preset", metavar="NAME", help=studies)
            options.add_path(
                command,
                "--config",
                metavar="FILE",
                help="YAML, laid over the preset; default: the quick start",
            )
        default = _DEFAULT_DIRS.get(name, "runs/NAME")
        options.add_path(
            command, "--run-dir", metavar="DIR", help=f"directory of the run; default: {default}"
        )
        command.add_argument(
            "overrides", metavar="section.key=value", nargs="*", help="wins over the file"
        )
        if name == "plan":
            command.add_argument(
                "--measure",
                action="store_true",
                help="measure layers and heads on this machine, and show the cut that balances"
                " them",
            )
        if name in ("throughput", "submit"):
            options.add_measurement(command)
        if name == "submit":
            options.add_job(command)
            options.add_scale(command)
        if name == "finetune":
            text = "count what every method trains on every family's base model; start nothing"
            command.add_argument("--count", action="store_true", help=text)
        if name in _GRIDS:
            options.add_grid(command, text=_GRIDS[name])
        if name in ("evaluate", "submit"):
            options.add_evaluation(command)
        if name == "evaluate":
            options.add_comparison(command)
        if name in ("sweep", "submit", "evaluate"):
            options.add_parallel(command)
        command.set_defaults(run=run)
    return parser


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _plan(args: argparse.Namespace) -> int:
    if args.run_dir and not (args.config or args.preset):
        _existing_run(args)
    config = _checked_config(args)
    from fedpipe.commands.plan.plan import build_plan, render
    from fedpipe.commands.plan.text_facts import render_text, render_uncounted, text_facts
    from fedpipe.data.corpus import find_prepared

    _show(render(build_plan(config)))
    data = find_prepared(config)
    _show(render_text(text_facts(data), config) if data else render_uncounted())
    if args.measure:
        from fedpipe.commands.plan.cut import choose_cut, measure_here

        choose_cut(config, measure=measure_here, notify=_show)
    return EXIT_DONE


def _pretrain(args: argparse.Namespace) -> int:
    _checked_config(args)
    from fedpipe.commands.pretrain.command import pretrain

    return pretrain(args.config, args.overrides, args.run_dir, preset=args.preset)


def _finetune(args: argparse.Namespace) -> int:
    from fedpipe.commands.finetune.command import count_here, finetune

    if args.count:
        return count_here()
    return finetune(args.config, args.overrides, args.run_dir, preset=args.preset, axes=args.grid)


def _throughput(args: argparse.Namespace) -> int:
    if not args.grid:
        _checked_config(args)
    from fedpipe.commands.throughput.command import throughput
    from fedpipe.commands.throughput.report import ThroughputSettings

    return throughput(
        args.config,
        args.overrides,
        args.run_dir,
        preset=args.preset,
        axes=args.grid,
        settings=ThroughputSettings(
            repetitions=args.repetitions, num_steps=args.steps, emulate_ms=args.emulate_ms
        ),
    )


def _submit(args: argparse.Namespace) -> int:
    from fedpipe.cluster.external import RunRequest
    from fedpipe.commands.submit.command import submit_request
    from fedpipe.commands.throughput.report import ThroughputSettings

    return submit_request(
        RunRequest(
            task=args.task,
            config_path=args.config,
            overrides=args.overrides,
            run_dir=args.run_dir,
            preset=args.preset,
            settings=ThroughputSettings(
                repetitions=args.repetitions, num_steps=args.steps, emulate_ms=args.emulate_ms
            ),
        ),
        axes=args.grid,
        chosen=_chosen(args) | ({"scale": args.scale} if args.scale else {}),
        profile_path=args.profile,
        cluster=args.cluster,
        parallel=args.parallel,
        follows=args.follow,
        show=_show,
    )


def _show(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def _sweep(args: argparse.Namespace) -> int:
    from fedpipe.commands.study.command import sweep

    return sweep(
        args.config,
        args.overrides,
        args.grid,
        args.run_dir,
        preset=args.preset,
        parallel=args.parallel,
    )


def _evaluate(args: argparse.Namespace) -> int:
    if args.compare:
        return _compare(args)
    if args.run_dir and os.path.isfile(Path(args.run_dir) / "cell.json"):
        from fedpipe.commands.evaluate.command import run_one

        return run_one(args.run_dir)
    from fedpipe.commands.evaluate.command import evaluate

    return evaluate(
        args.config,
        args.overrides,
        args.run_dir,
        chosen=_chosen(args),
        parallel=args.parallel,
    )


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``EvaluationConfig`` that options set."""
    chosen: dict[str, Any] = {}
    if args.model:
        chosen["models"] = tuple(args.model)
    if args.tasks is not None:
        chosen["tasks"] = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    if args.data is not None:
        chosen["data"] = args.data
    if args.seeds is not None:
        chosen["seeds"] = _seeds(args.seeds)
    return chosen


def _reproduce(args: argparse.Namespace) -> int:
    from fedpipe.commands.reproduce.command import reproduce

    return reproduce(
        args.experiment,
        args.overrides,
        args.run_dir,
        scale=args.scale,
        data=args.data,
        seeds=None if args.seeds is None else _seeds(args.seeds),
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--seeds: expected whole numbers, got {text!r}. Write for example --seeds 0,1,2."
        ) from None


def _compare(args: argparse.Namespace) -> int:
    from fedpipe.commands.evaluate.compare import compare, terminal_text, write_comparison

    content = compare(*args.compare)
    _show(terminal_text(content))
    if args.run_dir:
        write_comparison(content, Path(args.run_dir))
        _show(f"report  {Path(args.run_dir) / 'comparison.html'}")
    return EXIT_DONE


def _checked_config(args: argparse.Namespace) -> RunConfig:
    """Refuse a wrong configuration before a launcher starts to import torch in the background."""
    config_path = args.config
    if args.run_dir and not (config_path or args.preset):
        saved = Path(args.run_dir) / "config.yaml"
        config_path = str(saved) if os.path.isfile(saved) else None
    return load_config(config_path, args.overrides, preset=args.preset)


def _export(args: argparse.Namespace) -> int:
    run_dir = _existing_run(args)
    from fedpipe.commands.outputs import export

    for folder in export(run_dir):
        _show(str(folder))
    return EXIT_DONE


def _report(args: argparse.Namespace) -> int:
    run_dir = _existing_run(args)
    from fedpipe.commands.outputs import report

    report(run_dir)
    _show(str(run_dir / "report.html"))
    return EXIT_DONE


def _existing_run(args: argparse.Namespace) -> Path:
    """Return the directory of a run that has been started."""
    if args.run_dir:
        run_dir = Path(args.run_dir)
    else:
        config = read_config(args.config, args.overrides, preset=args.preset)
        run_dir = Path("runs") / config.name
    if not os.path.isfile(run_dir / "config.yaml"):  # Path.is_file raises on a long name
        raise CheckpointError(
            f"--run-dir: expected the directory of a run, got {str(run_dir)!r} without a"
            " config.yaml. Name one that fedpipe pretrain wrote."
        )
    return run_dir


_DEFAULT_DIRS = {"evaluate": "runs/NAME-evaluation", "reproduce": "runs/EXPERIMENT-SCALE"}
_JOBS = ("pretrain", "throughput", "sweep", "evaluate", "finetune", "reproduce")

_GRIDS = {
    "throughput": "measure every combination of the values, one after the other, and compare them:"
    " pipeline.cut=[1],[2] pipeline.micro_batch_size=8,16",
    "sweep": "every combination of the values is a run: pipeline.cut=[2],[4] seed=0,1,2; default:"
    " that of the sweep in DIR",
    "submit": "sweep and finetune: every combination of the values is a job of an array",
    "finetune": "run every combination of the values, one after the other, and compare them:"
    " method.name=lora,full seed=0,1",
}
"""Commands that take a grid, and what they do with it."""

_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "plan": (_plan, "show grid, stages, bytes, memory and ideal bubble; start nothing"),
    "pretrain": (_pretrain, "pre-train a model on this machine, or resume the run in DIR"),
    "finetune": (_finetune, "fine-tune a model over clients, whole or with an adapter"),
    "export": (_export, "write the newest checkpoint of a run as a Hugging Face folder"),
    "report": (_report, "write report.html, report.md and the plots of a run"),
    "throughput": (_throughput, "measure every schedule in one interleaved run"),
    "sweep": (_sweep, "pre-train once per cell of a grid of values, and compare the runs"),
    "evaluate": (_evaluate, "fine-tune models on labelled tasks, and score and compare them"),
    "reproduce": (
        _reproduce,
        "run a published experiment with its baselines, and draw its figures",
    ),
    "submit": (_submit, "run one of these commands as jobs on SLURM, through submitit"),
}
