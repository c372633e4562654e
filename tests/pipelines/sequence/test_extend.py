"""A task that comes later: learnt on top of a version, with the store alone, to the very bytes of one run."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines import continual
from sapt_core.data.task import Task
from tests.pipelines.commands import QUICKSTART, TINY, write_task
from tests.pipelines.extensions import FOLDERS, NAMES, Call, Learnt, go_on, manifest


@pytest.fixture
def data(tasks: dict[str, Task], tmp_path: Path) -> Path:
    for task in tasks.values():
        write_task(tmp_path / "data", task)
    return tmp_path / "data"


def learn(call: Call, store: Path, data: Path, names: Sequence[str], *overrides: str) -> dict[str, Any]:
    given = [*TINY, *FOLDERS, f"benchmark.data_dir={data}", f"benchmark.tasks={','.join(names)}", f"store.uri={store}"]
    options = ["--config", QUICKSTART, "--inline", "--summary", str(store / "summary.json")]
    ended = call(continual.main, [*options, *given, "evaluation.single_task=false", *overrides])
    assert ended.code == 0, ended.out + ended.err
    summary: dict[str, Any] = json.loads((store / "summary.json").read_text())
    return summary


def test_a_task_that_comes_later_ends_in_the_version_of_one_run(
    call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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
    page = next(line for line in ended.out.splitlines() if line.startswith("report: ")).removeprefix("report: ")
    assert "All 3" in Path(page).read_text()
    assert "train[00" not in ended.out


def test_a_file_of_rows(
    later: Learnt, tasks: dict[str, Task], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its rows become test rows, and what differs can be given."""
    monkeypatch.chdir(tmp_path)
    task = tasks["ticket"]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "output"])
        writer.writerows([row.input, row.references[0]] for row in (*task.train, *task.dev))
    given = ["--task", "ticket", "--data", str(tmp_path / "rows.csv"), "--definition", task.definition]
    ended = go_on(call, later.store, later.version, *given, "train.epochs=1", "benchmark.max_source_tokens=64")
    assert ended.code == 0, ended.out + ended.err
    summary = json.loads((later.store / "summary.json").read_text())
    version = manifest(later.store, summary["snapshot"])
    assert [each.name for each in version.tasks] == list(NAMES)
    assert version.tasks[-1].definition == task.definition
    assert version.tasks[-1].max_source_tokens == 64
    assert version.recipe is not None
    assert version.recipe.train.epochs == 1
    assert version.carried is not None
    assert version.carried[-1].rows == {"train": 17, "dev": 2, "test": 5}
    assert version.blocks[:2] == manifest(later.store, later.version).blocks
    # What is always the commonest answer of a task whose train rows are gone, its dev rows tell.
    page = next(line for line in ended.out.splitlines() if line.startswith("report: ")).removeprefix("report: ")
    for name in NAMES:
        row = rf'<th scope="row" class="words">{name}</th><td class="words">\w+</td><td>[\d.]+</td><td>[\d.]+</td>'
        assert re.search(row, Path(page).read_text()), name


def test_rows_of_a_task_that_it_knows_are_told_of(
    later: Learnt, tasks: dict[str, Task], call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of one's test rows under another name; and inputs of the other with other answers, which are another task."""
    animal, basket = tasks["animal"], tasks["basket"]
    with (tmp_path / "creature.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "output"])
        writer.writerows([row.input, row.references[0]] for row in (*animal.train, *animal.test))
        writer.writerows([row.input, "something else"] for row in basket.test)
    given = ["--task", "creature", "--data", str(tmp_path / "creature.csv"), "--dry-run"]
    assert go_on(call, later.store, later.version, *given).code == 0
    (told,) = [record.getMessage() for record in caplog.records if "among its own" in record.getMessage()]
    kept = len({*animal.test, *animal.dev})
    share = f"{len({*animal.test})} of the {kept} rows of animal that the version is scored on are among its own"
    assert told.startswith(f"creature: {share} (")
    assert told.endswith("by --task animal --again")


def test_a_plan_writes_nothing(later: Learnt, call: Call) -> None:
    before = sorted(path for path in later.store.rglob("*") if path.is_file())
    ended = go_on(call, later.store, later.version, "--task", "ticket", "--data", str(later.ticket), "--dry-run")
    assert ended.code == 0, ended.err
    assert "Plan: " in ended.out
    assert sorted(path for path in later.store.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--task", "animal"], "--task animal: the version has learnt it"),
        (["--task", "Animal"], "--task Animal: the version has learnt animal, which differs in case alone"),
        (["--task", "ticket", "method.name=sequential"], "method.name sequential (was sapt)"),
        (["--task", "ticket", "pet.r=4"], "pet.r 4 (was 8)"),
        (["--task", "ticket", "attention.temperature=3"], "attention.temperature 3.0"),
        (["--task", "ticket", "backbone.path=elsewhere"], "backbone.path: the backbone is the version's"),
        (["--task", "ticket", "benchmark.tasks=a"], "benchmark.tasks: is said by --task and --data"),
        (["--task", "ticket", "train.epoch=3"], "train.epoch: no such field; did you mean epochs?"),
        (["--task", "ticket", "reflection.source=generated", "train.epochs=0"], "train.epochs"),
    ],
)
def test_what_is_refused(later: Learnt, given: list[str], said: str, call: Call) -> None:
    before = sorted(path for path in later.store.rglob("*") if path.is_file())
    ended = go_on(call, later.store, later.version, *given, "--data", str(later.ticket))
    assert ended.code == 2, ended.out + ended.err
    assert said in ended.err
    assert sorted(path for path in later.store.rglob("*") if path.is_file()) == before


def test_no_such_data(later: Learnt, call: Call, tmp_path: Path) -> None:
    ended = go_on(call, later.store, later.version, "--task", "ticket", "--data", str(tmp_path / "none.csv"))
    assert ended.code == 2
    assert "none.csv" in ended.err


def test_a_version_that_carries_nothing(later: Learnt, call: Call) -> None:
    trained = manifest(later.store, later.version).trained
    assert trained is not None
    ended = go_on(call, later.store, trained, "--task", "ticket", "--data", str(later.ticket))
    assert ended.code == 2
    assert "does not carry what a later task needs" in ended.err


def test_what_is_gone_is_named(later: Learnt, call: Call) -> None:
    version = manifest(later.store, later.version)
    assert version.carried is not None
    digest = version.carried[1].reflection["statistics"]
    (later.store / "blobs" / digest[:2] / digest).unlink()
    ended = go_on(call, later.store, later.version, "--task", "ticket", "--data", str(later.ticket))
    assert ended.code == 2
    assert f"no longer has statistics of basket ({digest[:12]})" in ended.err
    assert "go on from a version of before" in ended.err
