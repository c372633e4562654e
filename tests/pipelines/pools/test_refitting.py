"""``sapt pool refit``: a version gets back, from data and once, what later tasks need of its tasks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cluster.store import open_store
from cluster.tracking.registry import PoolRegistry
from pipelines import pool
from sapt_core.data.task import Task
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import Finished, Outcome, publish, write_task
from tests.pipelines.extensions import Call, Learnt, go_on, manifest

pytest_plugins = ["tests.mlflow_servers"]


@pytest.fixture
def data(tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for task in tasks.values():
        write_task(tmp_path / "data", task)
    return tmp_path / "data"


def refit(call: Call, later: Learnt, digest: str, *given: str) -> Outcome:
    return call(pool.main, ["refit", digest, *given, "--inline", f"store.uri={later.store}"])


def whole(data: Path, *names: str) -> list[str]:
    return [part for name in names for part in ("--task", name, "--data", str(data / name))]


def made(ended: Outcome, store: Path) -> Manifest:
    assert ended.code == 0, ended.out + ended.err
    return manifest(store, ended.out.split("snapshot ")[1].split()[0])


def test_a_version_of_an_earlier_release_can_be_extended(later: Learnt, data: Path, call: Call) -> None:
    complete = manifest(later.store, later.version)
    assert complete.trained is not None
    refused = go_on(call, later.store, complete.trained, "--task", "ticket", "--data", str(later.ticket))
    assert "sapt pool refit VERSION --task animal --data PATH --task basket --data PATH" in refused.err
    one = refit(call, later, complete.trained, *whole(data, "animal"))
    assert one.code == 2
    assert "the version carries nothing of basket either" in one.err
    given = [*whole(data, "animal", "basket"), "reflection.source=statistics"]
    version = made(refit(call, later, complete.trained, *given), later.store)
    assert (version.blocks, version.router, version.targets) == (complete.blocks, complete.router, complete.targets)
    assert version.trained == complete.trained
    assert version.carried is not None
    assert complete.carried is not None
    for found, was in zip(version.carried, complete.carried, strict=True):
        # The same folders are split as they were, so the very same is carried, but for the curve.
        assert found == was.model_copy(update={"curve": None})
    ended = go_on(call, later.store, version.digest, "--task", "ticket", "--data", str(later.ticket))
    assert ended.code == 0, ended.out + ended.err
    told = json.loads((later.store / "summary.json").read_text())
    assert told["tasks"] == ["animal", "basket", "ticket"]
    assert "finished" not in refit(call, later, complete.trained, *given).out


def without(later: Learnt, *fields: str) -> Manifest:
    """The version as one that carries nothing of animal under some fields."""
    version = manifest(later.store, later.version)
    assert version.carried is not None
    first = version.carried[0]
    tokens = {name: digest for name, digest in first.tokens.items() if name == "meta.json"}
    changes = {"tokens": tokens, "reflection": {}}
    poor = first.model_copy(update={field: changes[field] for field in fields})
    version = version.model_copy(update={"carried": (poor, *version.carried[1:])})
    open_store(StoreConfig(uri=str(later.store))).put(version.to_bytes())
    return version


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("tokens", "the version carries no sealed rows of animal"),
        ("reflection", "the version carries nothing to reflect on of animal"),
    ],
)
def test_one_task_gets_back_what_it_lacks(later: Learnt, data: Path, field: str, said: str, call: Call) -> None:
    complete, poor = manifest(later.store, later.version), without(later, field)
    refused = go_on(call, later.store, poor.digest, "--task", "ticket", "--data", str(later.ticket))
    assert refused.code == 2
    assert said in refused.err
    assert "sapt pool refit VERSION --task animal --data PATH" in refused.err
    version = made(refit(call, later, poor.digest, *whole(data, "animal")), later.store)
    assert version.carried == complete.carried
    assert (version.trained, version.lineage != complete.lineage) == (complete.trained, True)
    extended = go_on(call, later.store, version.digest, "--task", "ticket", "--data", str(later.ticket), "--dry-run")
    assert extended.code == 0, extended.err


def test_what_may_not_stay_does_not(later: Learnt, call: Call, tmp_path: Path) -> None:
    poor = without(later, "tokens", "reflection")
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        csv.writer(file).writerows([("input", "output"), *((f"the zebra number {i} eats", "zebra") for i in range(9))])
    given = ["--task", "animal", "--data", str(rows), "retention.train_rows=statistics", "retention.sealed_rows=false"]
    version = made(refit(call, later, poor.digest, *given), later.store)
    assert version.carried is not None
    assert version.carried[0].tokens.keys() == {"meta.json"}
    assert version.carried[0].reflection.keys() == {"statistics"}
    assert not [path for path in later.store.rglob("*") if path.is_file() and b"zebra" in path.read_bytes()]
    # The same once more is answered from the records, and leaves as little.
    assert made(refit(call, later, poor.digest, *given), later.store) == version
    assert not [path for path in later.store.rglob("*") if path.is_file() and b"zebra" in path.read_bytes()]
    kept = made(refit(call, later, poor.digest, *given[:4]), later.store)
    assert kept.carried is not None
    assert {"dev.arrow", "test.arrow"} <= kept.carried[0].tokens.keys()
    assert [path for path in later.store.rglob("*") if path.is_file() and b"zebra" in path.read_bytes()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["colour"], "--task colour: the version has not learnt it; it knows: animal, basket"),
        (["animal"], "--task animal: the version carries all that reflection.source=statistics"),
        (["animal", "animal"], "--task animal: given twice"),
        (["animal", "method.name=sequential"], "method.name sequential (was sapt)"),
        (["animal", "benchmark.tasks=x"], "benchmark.tasks: is said by --task and --data"),
    ],
)
def test_what_is_refused_changes_nothing(later: Learnt, data: Path, given: list[str], said: str, call: Call) -> None:
    before = sorted(path for path in later.store.rglob("*") if path.is_file())
    names = [each for each in given if "=" not in each]
    asked = [*whole(data, *names), *(each for each in given if "=" in each)]
    ended = refit(call, later, later.version, *asked)
    assert ended.code == 2, ended.out + ended.err
    assert said in ended.err
    assert sorted(path for path in later.store.rglob("*") if path.is_file()) == before


def test_a_registered_version_gets_the_next_number(
    copied: Finished, tasks: dict[str, Task], call: Call, sqlite_tracking: TrackingConfig, tmp_path: Path
) -> None:
    complete = manifest(copied.store, copied.snapshot)
    assert complete.trained is not None
    publish(copied, sqlite_tracking, complete.trained, tags={"task": "basket"})
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        examples = [(row.input, row.references[0]) for row in tasks["animal"].train]
        csv.writer(file).writerows([("input", "output"), *examples])
    given = ["--task", "animal", "--data", str(rows), "--task", "basket", "--data", str(rows), "--inline"]
    place = f"tracking.uri={sqlite_tracking.uri}"
    ended = call(pool.main, ["refit", "latest", *given, place, "reflection.source=none"])
    assert ended.code == 0, ended.out + ended.err
    assert "sapt version 2: models:/sapt/2" in ended.out
    first, second = PoolRegistry(sqlite_tracking).versions()
    assert (second.line, second.index, second.tags["sapt.parent"]) == (first.line, first.index, complete.trained)
    # The same again is the same version.
    again = call(pool.main, ["refit", "1", *given, place, "reflection.source=none"])
    assert "sapt version 2: models:/sapt/2" in again.out
