"""Every command of the README does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from pipelines import compare, continual, evaluate, extend, predict, report, sapt, sweep
from sapt_core.config.experiment import load_config
from sapt_core.data.synthetic import synthetic_sequence
from sapt_core.settings import BenchmarkConfig, TrackingConfig
from tests.pipelines.commands import ROOT, TINY, Finished, Outcome, command, publish

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]

BLOCKS = re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
RUNS = {"make", "mlflow", "python", "ray", "sapt"}


def commands(program: str, script: str = "") -> list[list[str]]:
    return [words for words in COMMANDS if words[0] == program and script in words[1]]


def test_the_tests_below_see_every_command() -> None:
    said = [words for words in COMMANDS if words[0] in RUNS]
    scripts = [words[1] for words in said if words[0] == "python"]
    named = ("compare", "continual", "evaluate", "extend", "predict", "report", "sweep")
    assert sorted(scripts) == [f"pipelines/{name}.py" for name in named]
    assert [len(commands(program)) for program in ("make", "mlflow", "ray", "sapt")] == [2, 1, 1, 1]


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_targets_are_there(words: list[str]) -> None:
    # That they work is what runs this test, and the quickstart's own tests.
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_command_plans(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands("sapt")
    monkeypatch.chdir(tmp_path)
    planned = call(sapt.main, words[1:])
    assert planned.code == 0, planned.err
    assert "stages, experiment" in planned.out


def test_own_tasks(call: Call, tmp_path: Path) -> None:
    (words,) = commands("python", "continual")
    config = BenchmarkConfig(suite="synthetic", tasks=("animal", "stock", "place"), train_rows=12, test_rows=4)
    for name, task in zip(("first", "second", "third"), synthetic_sequence(config), strict=True):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            rows = [{"input": row.input, "output": list(row.references)} for row in getattr(task, split)]
            content = {"Definition": [task.definition], "Instances": rows}
            (tmp_path / name / f"{split}.json").write_text(json.dumps(content))
    given = [
        word.replace("DIR_OR_HUB_ID", str(ROOT / "pipelines/backbones/tiny"))
        .replace("=DIR", f"={tmp_path}")
        .replace("pipelines/configs", str(ROOT / "pipelines/configs"))
        for word in words[2:]
    ]
    small = ["train.epochs=1", "generator.epochs=1", "generator.max_tokens=24", "benchmark.max_source_tokens=96"]
    ended = call(continual.main, [*given, *small, "--inline", f"store.uri={tmp_path}/store"])
    assert ended.code == 0, ended.err
    assert "after third: AP" in ended.out


def test_the_job_asks_for_what_there_is() -> None:
    (words,) = commands("ray")
    inner = words[words.index("--") + 1 :]
    assert inner[:2] == ["python", "pipelines/continual.py"]
    path, *overrides = inner[inner.index("--config") + 1 :]
    config = load_config(ROOT / path, overrides)
    assert config.store.uri == "s3://BUCKET/PREFIX"


def test_a_comparison_ends_in_its_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands("python", "compare")
    monkeypatch.chdir(tmp_path)  # where it leaves its records
    given = [word.replace("pipelines/configs", str(ROOT / "pipelines/configs")) for word in words[2:]]
    small = [*TINY, "evaluation.single_task=false", "--rows", "sequential", "--seeds", "0"]
    ended = call(compare.main, [*given, *small, "--inline"])
    assert ended.code == 0, ended.err
    left = sorted(path.name for path in Path("runs/comparisons/quickstart").iterdir())
    assert left == ["ap_after_each_task.png", "sequential_seed0.json"]


def test_a_fresh_clone_computes_its_own_comparison(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands("python", "compare")
    monkeypatch.chdir(tmp_path)
    for folder in ("pipelines/configs", "pipelines/backbones", "docs/results"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    planned = call(compare.main, [*words[2:], "--dry-run"])
    assert planned.code == 0, planned.err
    assert "2 cells to learn" in planned.out


@pytest.fixture
def published(finished: Finished, sqlite_tracking: TrackingConfig) -> TrackingConfig:
    """The tiny sequence as version 1 of the model that the quickstart registers."""
    tracking = sqlite_tracking.model_copy(update={"experiment": "quickstart", "model": "quickstart"})
    publish(finished, tracking)
    return tracking


@pytest.mark.parametrize("script", ["evaluate", "predict"])
def test_versions_are_scored_and_asked(
    script: str, published: TrackingConfig, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = commands("python", script)
    monkeypatch.chdir(ROOT)
    small = [TINY[2], TINY[3]] if script == "evaluate" else []
    main = {"evaluate": evaluate.main, "predict": predict.main}[script]
    ended = call(main, [*words[2:], *small, f"tracking.uri={published.uri}"])
    assert ended.code == 0, ended.err
    assert "animal" in ended.out


def test_a_task_that_comes_later_is_planned(
    finished: Finished,
    sqlite_tracking: TrackingConfig,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (words,) = commands("python", "extend")
    monkeypatch.chdir(tmp_path)
    given = [word for word in command(finished.store)[2:] if word != "--inline"]
    tracking = f"tracking.uri={sqlite_tracking.uri}"
    learnt = call(continual.main, [*given, tracking, "tracking.model=quickstart"])
    assert learnt.code == 0, learnt.err
    (tmp_path / "colour.csv").write_text("input,output\n" + "the sky,blue\nthe grass,green\n" * 6)
    asked = [word.replace("DIR/", f"{tmp_path}/") for word in words[2:]]
    planned = call(extend.main, [*asked, "--dry-run", tracking])
    assert planned.code == 0, planned.err
    assert "complete" in planned.out


def test_the_report_is_written(
    published: TrackingConfig, finished: Finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = commands("python", "report")
    monkeypatch.chdir(tmp_path)
    given = [word.replace("pipelines/configs", str(ROOT / "pipelines/configs")) for word in words[2:]]
    ended = call(report.main, [*given, *TINY, f"store.uri={finished.store}", f"tracking.uri={published.uri}"])
    assert ended.code == 0, ended.err
    assert len(list(tmp_path.glob("runs/report/*/index.html"))) == 1


@pytest.mark.integration
def test_the_ui_starts(migrated_database: Path, unused_port: int) -> None:
    (words,) = commands("mlflow")
    given = [word.replace("sqlite:///runs/mlflow.db", f"sqlite:///{migrated_database}") for word in words[1:]]
    command = [sys.executable, "-m", "mlflow", *given, "--port", str(unused_port)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            answered = False
            for _ in range(960):
                try:
                    answered = requests.get(f"http://127.0.0.1:{unused_port}/health", timeout=5).ok
                    break
                except requests.RequestException:  # not up yet, or a busy machine
                    time.sleep(0.25)
            assert answered
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the server's own workers too


def test_a_sweep_ends_in_its_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands("python", "sweep")
    monkeypatch.chdir(tmp_path)
    given = [word.replace("pipelines/configs", str(ROOT / "pipelines/configs")) for word in words[2:]]
    ended = call(sweep.main, [*given, *TINY, "train.epochs=1", "evaluation.single_task=false", "--inline"])
    assert ended.code == 0, ended.out + ended.err
    assert "Best: train.learning_rate=" in ended.out
    there = [json.loads(path.read_text()) for path in Path("runs/sweeps/quickstart").glob("trial_*.json")]
    assert len(there) == 4
    (shared,) = re.findall(r"(\d+) stages, of which several trials have need", ended.out)
    alone = sum(each["run_stages"] + each["shared_stages"] for each in there)
    assert (int(shared) + sum(each["run_stages"] for each in there)) / alone < 0.7  # a fraction, as promised
