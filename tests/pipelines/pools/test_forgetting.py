"""A task that is taken out of a registered pool."""

from __future__ import annotations

from collections.abc import Callable

from cluster.store import open_store
from cluster.tracking.registry import PoolRegistry
from pipelines import pool, predict
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import Finished, Outcome, publish

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
SCORED = ("--inline", "evaluation.batch_size=50")


def test_the_next_version_does_not_know_the_task(
    copied: Finished, call: Call, sqlite_tracking: TrackingConfig
) -> None:
    place = f"tracking.uri={sqlite_tracking.uri}"
    publish(copied, sqlite_tracking, tags={"tasks": "animal, basket"})
    made = call(pool.main, ["forget", "animal", "--version", "latest", place, *SCORED])
    assert made.code == 0, made.err
    assert "sapt version 2: models:/sapt/2, without animal" in made.out
    before, after = PoolRegistry(sqlite_tracking).versions()
    assert (after.tasks, after.line, after.tags["forgotten"]) == ("basket", before.line, "animal")
    assert after.tags["sapt.parent"] == copied.snapshot
    store = open_store(StoreConfig(uri=str(copied.store)))
    manifest = Manifest.from_bytes(store.get(after.tags["sapt.snapshot"]))
    assert manifest.carried is not None
    assert [task.name for task in manifest.tasks] == ["basket"]
    assert set(PoolRegistry(sqlite_tracking).scores(after)) == {"score/basket", "ap"}
    # The same again is the same version.
    assert call(pool.main, ["forget", "animal", "--version", "1", place, *SCORED]).out == made.out
    asked = call(predict.main, ["--version", "2", "--task", "basket", "--input", "two pears", place])
    assert asked.code == 0, asked.err
    assert "animal" not in asked.out
    # What was forgotten on purpose is no loss, which the gate would refuse.
    assert call(pool.main, ["promote", "1", place, *SCORED, "--force", "first"]).code == 0
    promoted = call(pool.main, ["promote", "2", place, *SCORED, "registry.max_drop=100"])
    assert "animal: the champion has learnt it" not in promoted.err
    assert any("animal" in line and "forgotten" in line for line in promoted.out.splitlines())


def test_what_is_refused_changes_nothing(copied: Finished, call: Call, sqlite_tracking: TrackingConfig) -> None:
    place = f"tracking.uri={sqlite_tracking.uri}"
    publish(copied, sqlite_tracking)
    objects = sorted(copied.store.rglob("*"))
    refused = call(pool.main, ["forget", "colour", "--version", "latest", place])
    assert refused.code == 2
    assert "the version has not learnt colour; it knows: animal, basket" in refused.err
    assert sorted(copied.store.rglob("*")) == objects
    alone = call(pool.main, ["forget", "animal", "--snapshot", copied.snapshot, f"store.uri={copied.store}"])
    assert alone.code == 0, alone.err
    digest = alone.out.removeprefix("snapshot ").strip()
    again = call(pool.main, ["forget", "basket", "--snapshot", digest, f"store.uri={copied.store}"])
    assert again.code == 2
    assert "basket is the version's only task" in again.err
    assert len(PoolRegistry(sqlite_tracking).versions()) == 1
