"""A tiny sequence that was run once, and entry points called in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.console import cli
from sapt_core.config.experiment import load_config
from sapt_core.data import load_sequence
from sapt_core.data.task import Task
from sapt_core.settings import TrackingConfig
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Finished, Outcome, command, publish, write_task
from tests.pipelines.extensions import FOLDERS, NAMES, Learnt

# As if they were not installed: accelerate asks for boto3 and uses it where it is there.
BLOCKER = """
import sys
from importlib.machinery import PathFinder

class Blocker(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "mlflow", "boto3", "botocore"}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Blocker if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="session", autouse=True)
def _small_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # One thread: tiny matrices. Its own cache: nothing of the machine's decides a test.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "blocker").mkdir()
    (folder / "blocker/sitecustomize.py").write_text(BLOCKER)
    # The packages of this checkout, whatever is installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "blocker"), str(ROOT)])}
    summary = folder / "new/summary.json"
    ended = subprocess.run(
        command(folder / "store", "--summary", str(summary)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    outcome = Outcome(ended.returncode, ended.stdout, ended.stderr)
    return Finished(folder / "store", json.loads(summary.read_text()), outcome)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """The finished sequence with a store of the test's own, to change."""
    shutil.copytree(finished.store, tmp_path / "store")
    return Finished(tmp_path / "store", finished.summary, finished.outcome)


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], None], list[str]], Outcome]:
    """Call an entry point's main in this process, as its script does."""

    def called(main: Callable[[], None], arguments: list[str]) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.run(main)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return called


@pytest.fixture
def at_work(copied: Finished, sqlite_tracking: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where the tiny sequence has run as the quickstart."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    copied.store.rename("runs/store")
    tracking = sqlite_tracking.model_copy(update={"experiment": "quickstart", "model": "quickstart"})
    publish(replace(copied, store=tmp_path / "runs/store"), tracking)
    shutil.copy(tracking.uri.removeprefix("sqlite:///"), "runs/mlflow.db")


@pytest.fixture(scope="session")
def tasks() -> dict[str, Task]:
    rows = [override for override in TINY if not override.startswith("benchmark.tasks")]
    config = load_config(QUICKSTART, [*rows, f"benchmark.tasks={','.join(NAMES)}"])
    return {task.name: task for task in load_sequence(config.benchmark)}


@pytest.fixture(scope="session")
def learnt(tasks: dict[str, Task], tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """Two tasks learnt, and their data gone."""
    folder = tmp_path_factory.mktemp("learnt")
    for task in tasks.values():
        write_task(folder / "data", task)
    overrides = ["reflection.source=statistics", "evaluation.single_task=false"]
    given = [*TINY, *FOLDERS, f"benchmark.data_dir={folder / 'data'}", "benchmark.tasks=animal,basket", *overrides]
    summary = folder / "store/summary.json"
    command = [sys.executable, "-m", "pipelines.continual", "--config", QUICKSTART, "--inline", *given]
    subprocess.run([*command, f"store.uri={folder / 'store'}", "--summary", str(summary)], cwd=ROOT, check=True)
    for name in ("animal", "basket"):
        shutil.rmtree(folder / "data" / name)
    return Learnt(folder / "store", json.loads(summary.read_text())["snapshot"], folder / "data" / "ticket")


@pytest.fixture
def later(learnt: Learnt, tmp_path: Path) -> Learnt:
    """With a store of the test's own."""
    shutil.copytree(learnt.store, tmp_path / "store")
    return learnt._replace(store=tmp_path / "store")
