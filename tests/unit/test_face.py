"""The commands as functions: light to import, with the same plans and the same errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fedpipe
from fedpipe.commands.plan.plan import build_plan, render
from fedpipe.config.load import load_config
from fedpipe.run.run_dir import RunDir

HEAVY = ("torch", "deepspeed", "transformers", "datasets", "pandas", "numpy", "yaml", "pydantic")


def test_importing_fedpipe_imports_nothing_heavy() -> None:
    code = f"import sys, fedpipe; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_every_public_name_is_there_and_described() -> None:
    assert [name for name in fedpipe.__all__ if not getattr(fedpipe, name).__doc__] == []


def test_a_plan_is_the_same_from_a_dict_a_file_and_overrides(tmp_path: Path) -> None:
    expected = render(build_plan(load_config(None, [])))
    assert str(fedpipe.plan()) == expected

    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nfederation:\n  num_rounds: 3\n", "utf-8")
    plans = [
        str(fedpipe.plan({"name": "mine", "federation": {"num_rounds": 3}})),
        str(fedpipe.plan(file)),
        str(fedpipe.plan(str(file))),
        str(fedpipe.plan({"name": "mine"}, overrides=["federation.num_rounds=3"])),
    ]
    assert "mine" in plans[0]
    assert len(set(plans)) == 1


def test_a_thread_gets_the_same_error_and_leaves_the_handlers_of_signals(tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def pretrain() -> None:
        try:
            fedpipe.pretrain({"federation": {"num_round": 3}}, run_dir=tmp_path / "run")
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=pretrain)
    thread.start()
    thread.join()
    assert isinstance(found[0], fedpipe.FedPipeError)
    assert "Did you mean federation.num_rounds?" in str(found[0])
    assert signal.getsignal(signal.SIGTERM) is before


def test_sections_are_laid_over_a_preset() -> None:
    preset, name = fedpipe.plan(preset="fedbiobert-4-8").config, "mine"
    mine = fedpipe.plan({"name": name}, preset="fedbiobert-4-8").config
    assert (mine.name, mine.model, mine.pipeline) == (name, preset.model, preset.pipeline)


def test_paths_of_any_kind_are_taken(tmp_path: Path) -> None:
    config = fedpipe.plan({"data": {"train": [tmp_path / "text.jsonl"]}}).config
    assert config.data.train == (str(tmp_path / "text.jsonl"),)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"seed": "x"},
            "seed: expected a whole number, got 'x' in the configuration. Write digits only.",
        ),
        (
            {"federation": {"num_round": 3}},
            "federation.num_round: unknown key in the configuration. Did you mean"
            " federation.num_rounds?",
        ),
        ({"log": 3}, "log: expected a section with keys, got 3 in the configuration. "),
        (
            "nowhere.yaml",
            "--config: expected a readable YAML file, got 'nowhere.yaml' (No such file",
        ),
    ],
)
def test_errors_are_those_of_the_command_line(config: fedpipe.Config, message: str) -> None:
    for function in (fedpipe.plan, fedpipe.pretrain):
        with pytest.raises(fedpipe.FedPipeError) as caught:
            function(config)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_the_model_of_a_run_without_an_export_is_refused_by_name(tmp_path: Path) -> None:
    run = fedpipe.Run(tmp_path)
    with pytest.raises(fedpipe.FedPipeError, match="expected one exported model, got none"):
        _ = run.model
    for client in ("client_0", "client_1"):
        (tmp_path / "export" / client).mkdir(parents=True)
        (tmp_path / "export" / client / "config.json").write_text("{}", "utf-8")
    with pytest.raises(fedpipe.FedPipeError, match="a model for each client: client_0, client_1"):
        _ = run.tokenizer


def test_a_table_has_a_row_for_each_record(tmp_path: Path) -> None:
    lines = ['{"kind":"step","loss":2.0}', '{"kind":"step","loss":1.0}', '{"kind":"round"}']
    RunDir.at(tmp_path / "run", "pretrain").make()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    run = fedpipe.Run(tmp_path / "run")
    assert list(run.metrics("step")["loss"]) == [2.0, 1.0]
    assert len(run.metrics()) == 3
