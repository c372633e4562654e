"""A task that is known is learnt again: the next version of the line, scored on the rows of before."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster.stages import InlineExecutor, run_graph
from cluster.store import open_store
from cluster.store.lookups import Lookups
from cluster.tracking.lines import Lineage
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.runs import Tracker
from pipelines import extend, pool
from pipelines.pools.scoring import scoring_config
from pipelines.reports.page import FOLDER
from pipelines.sequence.gate import build_gate
from sapt_core.data.prepare import read_split
from sapt_core.settings import PlacesConfig, StoreConfig, TrackingConfig
from tests.pipelines.extensions import Call, Learnt, go_on, manifest

pytest_plugins = ["tests.mlflow_servers"]

pytestmark = pytest.mark.usefixtures("apart")


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("input", "output"), *rows])
    return path


@pytest.fixture
def more(later: Learnt, tmp_path: Path) -> Path:
    """New rows of animal, with all of its sealed ones among them."""
    version = manifest(later.store, later.version)
    store = open_store(StoreConfig(uri=str(later.store)))
    assert version.carried is not None
    sealed = [
        (row["input"], row["references"][0])
        for name in ("dev.arrow", "test.arrow")
        for row in read_split(store.get(version.carried[0].tokens[name]))
    ]
    return write_rows(tmp_path / "more.csv", [*sealed, *((f"the cat number {i} sleeps", "cat") for i in range(12))])


def summary(later: Learnt) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((later.store / "summary.json").read_text())
    return found


def test_it_is_the_next_version_with_the_same_tasks(
    later: Learnt,
    more: Path,
    call: Call,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = go_on(call, later.store, later.version, "--task", "animal", "--again", "--data", str(more))
    assert ended.code == 0, ended.out + ended.err
    assert "14 of its 26 rows are test or dev rows that the version is scored on" in caplog.text
    told = summary(later)
    before, after = manifest(later.store, later.version), manifest(later.store, told["snapshot"])
    assert (told["tasks"], told["lessons"]) == (["animal", "basket"], ["animal", "basket", "animal again"])
    assert [len(row) for row in told["scores"]] == [1, 2, 2]
    assert told["f_ra"] == pytest.approx(
        sum(max(row[j] for row in told["scores"][:2] if j < len(row)) - told["scores"][2][j] for j in (0, 1)) / 2
    )
    assert after.tasks == before.tasks
    assert (after.blocks[0] != before.blocks[0], after.blocks[1]) == (True, before.blocks[1])
    assert after.parent == before.trained
    assert (after.again, before.again) == ("animal", None)
    assert before.carried is not None
    assert after.carried is not None
    first, second = after.carried
    assert second == before.carried[1]
    # Scored on the rows of before, and reflected on by those of both times.
    assert first.tokens == before.carried[0].tokens
    assert (first.data, first.rows, first.curve) == tuple(
        getattr(before.carried[0], name) for name in ("data", "rows", "curve")
    )
    assert first.reflection.keys() == {"statistics"}
    assert first.reflection != before.carried[0].reflection
    (again,) = first.again
    assert (again.rows, again.anew) == ({"train": 11, "dev": 1, "test": 0}, False)
    assert "evaluate[v00" not in ended.out
    page = next(FOLDER.rglob("*.html")).read_text()
    assert "after animal again" in page
    # Submitted again nothing is left to do.
    assert (
        "started" not in go_on(call, later.store, later.version, "--task", "animal", "--again", "--data", str(more)).out
    )


def test_the_new_rows_stay_no_longer_than_they_may(
    later: Learnt, more: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["--task", "animal", "--again", "--data", str(more), "retention.train_rows=statistics"]
    ended = go_on(call, later.store, later.version, *given)
    assert ended.code == 0, ended.out + ended.err
    assert "later tasks are held on the new rows alone" in caplog.text  # other retention than that of the rows before
    version = manifest(later.store, summary(later)["snapshot"])
    assert version.carried is not None
    first = version.carried[0]
    assert first.retention is not None
    assert (first.retention.train_rows, first.reflection.keys()) == ("statistics", {"statistics"})
    assert not open_store(StoreConfig(uri=str(later.store))).has(first.again[0].data)


def test_learnt_on_from_there_and_once_more(later: Learnt, more: Path, call: Call) -> None:
    animal = ["--task", "animal", "--again", "--data", str(more)]
    once = go_on(call, later.store, later.version, *animal)
    assert once.code == 0, once.out + once.err
    twice = go_on(call, later.store, summary(later)["snapshot"], *animal, "--anew")
    assert twice.code == 0, twice.out + twice.err
    version = manifest(later.store, summary(later)["snapshot"])
    assert version.carried is not None
    assert [each.anew for each in version.carried[0].again] == [False, True]
    ended = go_on(call, later.store, summary(later)["snapshot"], "--task", "ticket", "--data", str(later.ticket))
    assert ended.code == 0, ended.out + ended.err
    told = summary(later)
    assert told["lessons"] == ["animal", "basket", "animal again", "animal again", "ticket"]
    assert [len(row) for row in told["scores"]] == [1, 2, 2, 2, 3]
    last = manifest(later.store, told["snapshot"])
    assert last.blocks[:2] == version.blocks
    assert last.carried is not None
    assert last.carried[:2] == version.carried


def test_the_gate_sees_a_drop_of_the_task_itself(later: Learnt, tmp_path: Path, call: Call) -> None:
    """Rows that teach nonsense: the same sealed rows tell."""
    wrong = write_rows(tmp_path / "wrong.csv", [(f"the dog number {i} barks", "zzz zzz") for i in range(16)])
    given = ["--task", "animal", "--again", "--data", str(wrong), "train.epochs=30"]
    ended = go_on(call, later.store, later.version, *given)
    assert ended.code == 0, ended.out + ended.err
    told = summary(later)
    fallen = told["scores"][1][0] - told["scores"][2][0]
    assert fallen > 1
    places = PlacesConfig(store=StoreConfig(uri=str(later.store)))
    before, after = manifest(later.store, later.version), manifest(later.store, told["snapshot"])
    gate = build_gate(scoring_config(after, places.store, places, None, ()), after, before)
    store = open_store(places.store)
    scored = [stage for stages in (gate.candidate, gate.champion) for stage in stages.values()]
    started = []
    records = run_graph(scored, Lookups(store), InlineExecutor(store), started.append)
    assert {event.stage.kind for event in started if event.kind == "started"} == {"carried"}  # all scores are there
    row = replace(gate, bare={}).rows(records)[0]
    assert row.change == pytest.approx(-fallen)
    assert "animal: falls by" in row.faults(1.0)[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--task", "colour", "--again"], "--task colour: the version has not learnt colour; it knows: animal, basket"),
        (["--task", "Animal", "--again"], "has not learnt Animal; it knows: animal, basket"),
        (["--task", "animal"], "give the new task a name of its own, or give --again to learn it from more rows"),
        (["--task", "animal", "--anew"], "give --again too"),
        (["--task", "animal", "--again", "--metric", "exact_match"], "--metric: animal keeps the one"),
        (["--task", "animal", "--again", "--definition", "Other."], "--definition: animal keeps the one"),
        (
            ["--task", "animal", "--again", "benchmark.max_source_tokens=64"],
            "max_source_tokens=64: animal was learnt with",
        ),
        (["--task", "animal", "--again", "evaluation.single_task=true"], "evaluation.single_task=true: FWT"),
    ],
)
def test_what_is_refused(later: Learnt, more: Path, given: list[str], said: str, call: Call) -> None:
    before = sorted(path for path in later.store.rglob("*") if path.is_file())
    ended = go_on(call, later.store, later.version, *given, "--data", str(more))
    assert ended.code == 2, ended.out + ended.err
    assert said in ended.err
    assert sorted(path for path in later.store.rglob("*") if path.is_file()) == before


def test_one_task_at_a_time_and_rows_that_are_new(later: Learnt, more: Path, tmp_path: Path, call: Call) -> None:
    two = ["--task", "animal", "--data", str(more), "--task", "basket", "--data", str(more), "--again"]
    assert "--task basket: --again learns one task at a time" in go_on(call, later.store, later.version, *two).err
    with more.open() as file:
        rows = [tuple(row) for row in csv.reader(file)][1:15]
    sealed = write_rows(tmp_path / "sealed.csv", rows)
    ended = go_on(call, later.store, later.version, "--task", "animal", "--again", "--data", str(sealed))
    assert ended.code == 2
    assert "no usable row" in ended.err or "give at least 2" in ended.err


def test_it_is_published_in_the_line_that_it_goes_on(
    later: Learnt,
    more: Path,
    call: Call,
    sqlite_tracking: TrackingConfig,
) -> None:
    version = manifest(later.store, later.version)
    assert version.lineage is not None
    run = Tracker(sqlite_tracking).start_sequence("before", key="0" * 64, params={}, tags={})
    registry = PoolRegistry(sqlite_tracking)
    first = registry.publish(
        version.to_bytes(),
        StoreConfig(uri=str(later.store)),
        lineage=Lineage("before", ("", version.lineage)),
        digest=version.digest,
        index=2,
        run_id=run,
        description="",
        tags={"task": "basket"},
        metrics={"score/animal": 50.0},
    )
    again = ["--task", "animal", "--again", "--data", str(more)]
    assert go_on(call, later.store, later.version, *again).code == 0
    where = [f"tracking.uri={sqlite_tracking.uri}", f"tracking.experiment={sqlite_tracking.experiment}"]
    ended = call(extend.main, ["--from", f"models:/{sqlite_tracking.model}/{first}", *again, *where])
    assert ended.code == 0, ended.out + ended.err
    newest = registry.versions()[-1]
    assert (newest.version, newest.line, newest.index) == (first + 1, registry.versions()[0].line, 3)
    assert (newest.tags["task"], newest.tags["tasks"]) == ("animal", "animal, basket")
    assert newest.tags["sapt.parent"] == version.digest
    text = MlflowClient(sqlite_tracking.uri).get_model_version(sqlite_tracking.model, str(newest.version)).description
    assert "after 2 tasks, animal learnt again" in text
    shown = call(pool.main, ["show", "latest", *where, f"tracking.model={sqlite_tracking.model}"])
    assert shown.code == 0, shown.err
    assert "learnt again from 11 rows" in " ".join(shown.out.replace("│", " ").split())
