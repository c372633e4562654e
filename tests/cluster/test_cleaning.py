"""What no record reaches: listed in full, removed only when asked, never what is young or in use."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.store import LocalStore
from cluster.store.cleaning import BROKEN_OFF, FINISHED, KILLED, NO_RECORD, remove, unreachable
from sapt_core.errors import StoreError
from tests.states import load, save

DAY = 24 * 3600


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def age(store: LocalStore, days: float, *names: str) -> None:
    """Let these objects, all by default, have been written so many days ago."""
    when = time.time() - days * DAY
    for path in store.folder.rglob("*"):
        if path.is_file() and (not names or path.relative_to(store.folder).as_posix() in names):
            os.utime(path, (when, when))


def blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def found(store: LocalStore, **options: object) -> dict[str, str]:
    return {each.entry.name: each.why for each in unreachable(store, **options)}  # type: ignore[arg-type]


def manifest(store: LocalStore, parent: str | None, **blobs: object) -> str:
    return store.put(json.dumps({"parent": parent, **blobs}).encode())


def commit(store: LocalStore, name: str, outputs: Mapping[str, str], metrics: Mapping[str, object] = {}) -> None:
    store.commit_record(key(name), {"outputs": outputs, "values": {}, "metrics": metrics, "inputs": {}})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def versions(store: LocalStore) -> dict[str, str]:
    """Blobs of two versions by name, the second made of the first, and of a stage beside them; all are old."""
    kept = {name: store.put(name.encode()) for name in ("block 1", "block 2", "router 1", "router 2", "state", "curve")}
    kept |= {name: store.put(name.encode()) for name in ("weights", "tokenizer", "predictions")}
    backbone = {"files": {"model.safetensors": kept["weights"], "tokenizer.json": kept["tokenizer"]}}
    kept["manifest 1"] = manifest(store, None, blocks=[kept["block 1"]], router=kept["router 1"], backbone=backbone)
    kept["manifest 2"] = manifest(
        store,
        kept["manifest 1"],
        blocks=[kept["block 1"], kept["block 2"]],
        router=kept["router 2"],
        state={"memory": kept["state"]},
        backbone=backbone,
    )
    commit(store, "train 1", {"manifest": kept["manifest 1"], "block": kept["block 1"], "router": kept["router 1"]})
    commit(store, "train 2", {"manifest": kept["manifest 2"]}, {"curve": kept["curve"], "last": {"loss": 0.5}})
    commit(store, "evaluate", {"predictions": kept["predictions"]})
    age(store, 90)
    return kept


def test_what_records_reach_is_kept(store: LocalStore, versions: dict[str, str]) -> None:
    assert found(store) == {}
    assert found(store, grace=timedelta(0)) == {}


def test_what_none_reaches_is_listed_and_stays_until_it_is_removed(store: LocalStore, versions: dict[str, str]) -> None:
    lost = store.put(b"of a record that was deleted")
    age(store, 90)
    listed = unreachable(store)
    assert [(each.entry.name, each.entry.size, each.why) for each in listed] == [(blob(lost), 28, NO_RECORD)]
    assert listed[0].entry.age == pytest.approx(90 * DAY, abs=600)
    assert store.get(lost)
    assert remove(store, listed) == 28
    assert not store.has(lost)
    assert all(store.has(digest) for digest in versions.values())
    assert unreachable(store) == []
    assert remove(store, listed) == 0  # again


def test_what_is_young_stays(store: LocalStore, versions: dict[str, str]) -> None:
    """Another driver may be between its blobs and its record."""
    new, old = store.put(b"new"), store.put(b"old")
    age(store, 90, blob(old))
    age(store, 13, blob(new))
    assert found(store) == {blob(old): NO_RECORD}
    assert set(found(store, grace=timedelta(days=12))) == {blob(old), blob(new)}


def test_what_is_put_again_before_it_is_removed_stays(store: LocalStore, versions: dict[str, str]) -> None:
    again = store.put(b"again")
    age(store, 90)
    listed = unreachable(store)
    store.put(b"again")  # a stage gives it once more; its record is on its way
    assert remove(store, listed) == 0
    assert store.get(again) == b"again"
    assert unreachable(store) == []


def test_a_version_outlives_the_record_of_its_parent(store: LocalStore, versions: dict[str, str]) -> None:
    store.delete_record(key("train 1"))
    assert found(store) == {}


def test_a_version_without_a_record_is_kept_if_it_is_asked_for(store: LocalStore, versions: dict[str, str]) -> None:
    store.delete_record(key("train 2"))
    lost = {blob(versions[name]) for name in ("manifest 2", "block 2", "router 2", "state", "curve")}
    assert set(found(store)) == lost
    # A version in a registry: all that reading it takes stays; its training curve is no part of it.
    assert set(found(store, keep=[versions["manifest 2"]])) == {blob(versions["curve"])}
    store.delete_record(key("train 1"))
    assert set(found(store, keep=[versions["manifest 2"]])) == {blob(versions["curve"])}  # its parent, too


def test_a_version_that_is_to_be_kept_must_be_there(store: LocalStore, versions: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="is to be kept is not in"):
        unreachable(store, keep=["0" * 64])


def test_nothing_is_guessed_of_what_is_damaged(store: LocalStore, versions: dict[str, str]) -> None:
    path = store.folder / blob(versions["manifest 2"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match="damaged"):
        unreachable(store)
    path.unlink()  # its record is void, and the stage would run again
    assert set(found(store)) == {blob(versions[name]) for name in ("block 2", "router 2", "state")}
    record = store.folder / "records" / f"{key('train 1')}.json"
    record.write_text("{")
    with pytest.raises(StoreError, match="not a JSON object"):
        unreachable(store)


def test_a_manifest_that_is_none_stops_it(store: LocalStore) -> None:
    commit(store, "odd", {"manifest": store.put(b"[1]")})
    with pytest.raises(StoreError, match="is none"):
        unreachable(store)


def test_checkpoints(store: LocalStore, versions: dict[str, str]) -> None:
    for name in ("train 1", "broken off", "at work"):
        save(store.checkpoints(key(name)), {"state.bin": b"1"})
    age(store, 90)
    save(store.checkpoints(key("at work")), {"state.bin": b"3"})  # its first one is as old as the others
    listed = unreachable(store)
    assert {"/".join(each.entry.name.split("/")[:2]): each.why for each in listed} == {
        f"checkpoints/{key('train 1')}": FINISHED,
        f"checkpoints/{key('broken off')}": BROKEN_OFF,
    }
    remove(store, [each for each in listed if each.why == FINISHED])
    assert {path.name for path in (store.folder / "checkpoints").iterdir()} == {key("broken off"), key("at work")}
    assert load(store.checkpoints(key("broken off"))) == {"state.bin": b"1"}
    remove(store, listed)
    assert {path.name for path in (store.folder / "checkpoints").iterdir()} == {key("at work")}
    assert load(store.checkpoints(key("at work"))) == {"state.bin": b"3"}


def test_what_killed_processes_left(store: LocalStore, versions: dict[str, str]) -> None:
    left = {f"leases/{key('x')}.json", "probes/0123", "tmp/4567", "tmp/89ab/state.bin"}
    for name in left:
        store._write(name, b"x")
    assert found(store) == {}
    age(store, 90)
    listed = unreachable(store)
    assert {each.entry.name: each.why for each in listed} == dict.fromkeys(left, KILLED)
    remove(store, listed)
    assert unreachable(store, grace=timedelta(0)) == []


def test_an_empty_store(store: LocalStore) -> None:
    assert unreachable(store) == []
    assert not store.folder.exists()  # nothing is made
