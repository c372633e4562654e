"""A task that is taken out of a registered pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.store import open_store
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.service import client_of
from pipelines import pool, predict
from pipelines import store as store_command
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import Finished, Outcome, publish, records

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
SCORED = ("--inline", "evaluation.batch_size=50")


def test_the_next_version_does_not_know_the_task(copied: Finished, call: Call, sqlite_tracking: TrackingConfig) -> None:
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


def test_what_the_store_alone_forgot_is_held_by_registered_versions(
    copied: Finished, call: Call, sqlite_tracking: TrackingConfig
) -> None:
    places = [f"tracking.uri={sqlite_tracking.uri}", f"store.uri={copied.store}"]
    publish(copied, sqlite_tracking)
    assert call(pool.main, ["forget", "animal", "--snapshot", copied.snapshot, *places]).code == 0
    held = call(store_command.main, ["gc", *places])
    assert held.code == 0, held.err
    assert " 0  bytes in 0 objects" in held.out
    nobody = call(
        store_command.main, ["gc", f"store.uri={copied.store}", f"tracking.uri=sqlite:///{copied.store}/no.db"]
    )
    assert nobody.code == 0, nobody.err
    assert "of a task that was forgotten" in nobody.out
    wrong = call(pool.main, ["forget", "animal", "--version", "latest", *places, "train.precision=bf16"])
    assert (wrong.code, "train.precision: versions are scored as they were learnt" in wrong.err) == (2, True)


def test_its_bytes_go_once_no_version_knows_it(copied: Finished, call: Call, sqlite_tracking: TrackingConfig) -> None:
    places = [f"tracking.uri={sqlite_tracking.uri}", f"store.uri={copied.store}"]
    publish(copied, sqlite_tracking)
    assert call(pool.main, ["forget", "animal", "--version", "latest", *places, *SCORED]).code == 0
    store, registry = open_store(StoreConfig(uri=str(copied.store))), PoolRegistry(sqlite_tracking)
    before = Manifest.from_bytes(store.get(copied.snapshot))
    after = Manifest.from_bytes(store.get(registry.versions()[1].tags["sapt.snapshot"]))
    kept = records(copied.store)
    assert any(
        before.tasks[0].definition.encode() in path.read_bytes() for path in (copied.store / "blobs").glob("*/*")
    )
    held = call(store_command.main, ["gc", "--remove", *places])
    assert held.code == 0, held.err
    assert " 0  bytes in 0 objects" in held.out  # the version before is registered
    away = call(store_command.main, ["gc", "--remove", f"store.uri={copied.store}", "tracking.uri=sqlite:///none.db"])
    assert (away.code, "tracking.uri" in away.err) == (3, True)
    client_of(sqlite_tracking.uri).delete_model_version("sapt", "1")
    lease = copied.store / "leases" / f"{'0' * 64}.json"
    lease.parent.mkdir(exist_ok=True)
    lease.write_text("{}")
    assert "1 stages are at work" in call(store_command.main, ["gc", "--remove", *places]).err
    lease.unlink()
    assert records(copied.store) == kept
    listed = call(store_command.main, ["gc", *places])
    removed = call(store_command.main, ["gc", "--remove", *places])
    assert removed.code == 0, removed.err
    assert removed.out.splitlines()[:-1] == listed.out.splitlines()[:-1]
    assert {line.split(": ")[1] for line in listed.out.splitlines()[:-2]} == {"of a task that was forgotten"}
    assert before.carried is not None
    of_animal = before.carried[0]
    for digest in (before.blocks[0], of_animal.data, *of_animal.tokens.values(), *of_animal.reflection.values()):
        assert not store.has(digest)
    wording = before.tasks[0].definition.encode()
    assert not [path for path in filter(Path.is_file, copied.store.rglob("*")) if wording in path.read_bytes()]
    left = {name for name, _ in records(copied.store).values()}
    assert not {name for name in left if name.startswith(("train[", "prepare[00 animal]", "pseudo_samples[00 animal]"))}
    assert {"prepare[01 basket]", "forget:animal"} <= left
    # What is left is whole, answers, and is learnt on.
    assert call(pool.main, ["verify", "2", *places]).code == 0
    assert call(store_command.main, ["verify", *places]).code == 0
    asked = call(predict.main, ["--version", "2", "--task", "basket", "--input", "two pears", *places])
    assert asked.code == 0, asked.err
    used = call(store_command.main, ["du", *places])
    assert used.code == 0, used.err
    size = sum(path.stat().st_size for path in copied.store.rglob("*") if path.is_file())
    assert used.out.splitlines()[-2].split("│")[-2].strip() == f"{size:,}"
    assert after.as_parent != before.as_parent
