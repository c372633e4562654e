"""The ways in: `sapt COMMAND` and the files in pipelines, from any folder, with help that is there at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines import compare, continual, sapt, sweep
from pipelines.console.commands import SCRIPTS, pasted
from sapt_core import __version__
from sapt_core.config.experiment import load_config
from tests.pipelines.commands import ROOT, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
HEAVY = (
    "torch",
    "transformers",
    "ray",
    "mlflow",
    "pydantic",
    "omegaconf",
    "numpy",
    "pandas",
    "boto3",
    "rich",
    "optuna",
)
WAYS = [
    ["-m", "pipelines.sapt"],
    *(["-m", "pipelines.sapt", name] for name in SCRIPTS),
    *([f"pipelines/{script}.py"] for script in SCRIPTS.values()),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: Path(way[-1]).name)
def test_help_imports_nothing_that_takes_seconds(way: list[str]) -> None:
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", *way, "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in asked.stderr.splitlines()}
    assert not imported & set(HEAVY)


def test_sapt_lists_its_commands_and_its_version(call: Call) -> None:
    for given in ([], ["--help"]):
        listed = call(sapt.main, given)
        assert listed.code == 0
        assert all(f"  {name} " in listed.out for name in SCRIPTS)
        assert "Learn a sequence of tasks" in listed.out
    assert call(sapt.main, ["--version"]).out == f"sapt-on-ray {__version__}\n"


def test_no_such_command(call: Call) -> None:
    refused = call(sapt.main, ["lern"])
    assert refused.code == 2
    assert "'learn'" in refused.err


def test_a_command_is_its_file(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(continual, "main", lambda: called.append(sys.argv))
    assert call(sapt.main, ["learn", "--config", "x", "--", "seed=1"]).code == 0
    assert called == [["sapt learn", "--config", "x", "--", "seed=1"]]


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ("pipelines/continual.py", "python pipelines/predict.py --task 'a & b'"),
        ("/there/my pipelines/compare.py", "python '/there/my pipelines/predict.py' --task 'a & b'"),
        ("sapt learn", "sapt predict --task 'a & b'"),
    ],
)
def test_commands_to_paste_are_written_as_this_one_was(
    started: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "--config", "x"])
    assert pasted("predict", "--task", "a & b") == command


# From another folder


@pytest.mark.parametrize(
    ("main", "config"),
    [
        (continual.main, "quickstart"),
        (compare.main, "quickstart"),
        (sweep.main, "pipelines/configs/sweeps/quickstart.yaml"),
    ],
    ids=["learn", "compare", "sweep"],
)
def test_a_shipped_config_runs_from_any_folder(
    main: Callable[[], None], config: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = call(main, ["--config", config, "--dry-run"])
    assert planned.code == 0, planned.err
    assert "to run" in planned.out
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_printed_with_all_defaults(call: Call, tmp_path: Path) -> None:
    overrides = ["store.uri=/data/team #2", "pet.type=prompt", "method.name=replay"]
    printed = call(continual.main, ["--config", "quickstart", "--print-config", *overrides])
    assert printed.code == 0, printed.err
    assert yaml.safe_load(printed.out)["diagnostics"]["forgetting"] == 5.0
    path = tmp_path / "whole.yaml"
    path.write_text(printed.out)
    assert load_config(path) == load_config("quickstart", overrides)


def test_the_configs_of_a_comparison_are_printed_row_by_row(call: Call, tmp_path: Path) -> None:
    printed = call(compare.main, ["--config", "quickstart", "--print-config", "train.epochs=3", "--seeds", "4"])
    assert printed.code == 0, printed.err
    rows = yaml.safe_load((ROOT / "pipelines/configs/comparisons/quickstart.yaml").read_text())["rows"]
    documents = printed.out.split("---\n")
    assert [text.splitlines()[0] for text in documents] == [f"# {row['name']} seed 4" for row in rows]
    for text in documents:
        (tmp_path / "row.yaml").write_text(text)
        config = load_config(tmp_path / "row.yaml")
        assert (config.train.epochs, config.seed) == (3, 4)
    only = call(compare.main, ["--config", "quickstart", "--print-config", "--rows", rows[1]["name"]])
    assert only.out.startswith(f"# {rows[1]['name']} seed 0\n")
    assert "---" not in only.out
    assert call(compare.main, ["--config", "quickstart", "--print-config", "--rows", "nosuch"]).code == 2


def test_what_the_trials_of_a_sweep_start_from_is_printed(call: Call, tmp_path: Path) -> None:
    printed = call(sweep.main, ["--config", "quickstart", "--print-config", "train.epochs=3"])
    assert printed.code == 0, printed.err
    (tmp_path / "base.yaml").write_text(printed.out)
    config = load_config(tmp_path / "base.yaml")
    assert (config.train.epochs, config.evaluation.split) == (3, "dev")
