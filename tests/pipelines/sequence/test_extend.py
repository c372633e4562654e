"""A task that comes later: learnt on top of a version, with the store alone, to the very bytes of one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines import continual, extend
from sapt_core.config.experiment import load_config
from sapt_core.data import load_sequence
from sapt_core.data.task import Example, Task
from tests.pipelines.commands import QUICKSTART, TINY, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
NAMES = ("animal", "basket", "ticket")
FOLDERS = (
    "benchmark.suite=folder",
    "benchmark.template=superni",
    "benchmark.train_rows=null",
    "benchmark.test_rows=null",
)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    rows = [override for override in TINY if not override.startswith("benchmark.tasks")]
    config = load_config(QUICKSTART, [*rows, f"benchmark.tasks={','.join(NAMES)}"])
    return {task.name: task for task in load_sequence(config.benchmark)}


def write(folder: Path, task: Task) -> None:
    """A task in the layout of CL_Benchmark."""
    (folder / task.name).mkdir(parents=True)
    for split, rows in (("train", [*task.train, *task.dev]), ("test", task.test)):
        content = {"Definition": task.definition, "Instances": [instance(row) for row in rows]}
        (folder / task.name / f"{split}.json").write_text(json.dumps(content))


def instance(row: Example) -> dict[str, Any]:
    return {"input": row.input, "output": list(row.references)}


@pytest.fixture
def data(tasks: dict[str, Task], tmp_path: Path) -> Path:
    for task in tasks.values():
        write(tmp_path / "data", task)
    return tmp_path / "data"


def learn(call: Call, store: Path, data: Path, names: Sequence[str], *overrides: str) -> dict[str, Any]:
    given = [*TINY, *FOLDERS, f"benchmark.data_dir={data}", f"benchmark.tasks={','.join(names)}", f"store.uri={store}"]
    options = ["--config", QUICKSTART, "--inline", "--summary", str(store / "summary.json")]
    ended = call(continual.main, [*options, *given, "evaluation.single_task=false", *overrides])
    assert ended.code == 0, ended.out + ended.err
    summary: dict[str, Any] = json.loads((store / "summary.json").read_text())
    return summary


def go_on(call: Call, store: Path, version: str, *given: str) -> Outcome:
    summary = ["--summary", str(store / "summary.json")]
    return call(extend.main, ["--snapshot", version, *given, "--inline", *summary, f"store.uri={store}"])


def test_a_task_that_comes_later_ends_in_the_version_of_one_run(call: Call, data: Path, tmp_path: Path) -> None:
    whole = learn(call, tmp_path / "whole", data, NAMES)
    before = learn(call, tmp_path / "store", data, NAMES[:2])
    for name in NAMES[:2]:
        shutil.rmtree(data / name)
    ended = go_on(call, tmp_path / "store", before["snapshot"], "--task", "ticket", "--data", str(data / "ticket"))
    assert ended.code == 0, ended.out + ended.err
    after = json.loads((tmp_path / "store/summary.json").read_text())
    assert after["snapshot"] == whole["snapshot"]
    assert after["scores"] == whole["scores"]
    assert "train[02 ticket] started" in ended.out
    assert "train[00" not in ended.out
