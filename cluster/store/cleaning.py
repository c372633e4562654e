"""What lies in a store and is of no more use, and its removal.

Records are the roots. A record reaches the blobs whose digests stand in it:
outputs, and what its metrics name. A version's manifest is an output of the record of its train stage, and
reaches in turn all that reading the version takes: blocks, router, what the method keeps, the backbone's files
and, through its parent, the versions before. So as long as a version's train record is there, the version can be
read wherever its manifest has been published. What a record says was erased it does not reach, nor a manifest the
text that a task was made of.

What no record reaches may be on its way into one: a stage keeps its blobs before its record, and a run the
texts of its tasks before either. Both have just been put, which makes a blob's age zero even if it was there, so
what is younger than a grace period stays. It must be longer than any run takes.

A pack has copies of records and reaches nothing. It goes when none of its records is there any more.

Records go in one case alone: where a version was made to forget a task. Its record (kind ``FORGET``) names what the
version before reaches and it does not. Of that, whatever no manifest in ``keep`` reaches is forgotten, and with it
each earlier record that gave some of it or was computed from such a record, with all that it names: what is learnt
again later stays. A record of kind ``CARRIED`` says what a version has and gave nothing, so it goes whenever it was
made. No grace period holds back what was forgotten; a stage that is at work does.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from cluster.store.base import AT_ONCE, ArtifactStore, Entry
from cluster.store.lease import EXPIRY_SECONDS
from cluster.store.lookups import Record, read_pack
from sapt_core.errors import StoreError

GRACE = timedelta(days=14)
NO_RECORD = "no record reaches it"
FINISHED = "its stage is done"
BROKEN_OFF = "its stage was broken off, and the same run would go on from it"
KILLED = "left by a process that was killed"
UNPACKED = "none of the records is there that it holds copies of"
FORGOTTEN = "of a task that was forgotten"
FORGET = "forget"  # kind of the record of a version that was made to forget a task
CARRIED = "carried"

_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


class Leftover(NamedTuple):
    """An object that a store can do without, and why: one of the reasons above."""

    entry: Entry
    why: str


def unreachable(store: ArtifactStore, *, grace: timedelta = GRACE, keep: Iterable[str] = ()) -> list[Leftover]:
    """What no record reaches and nothing has written or put for a grace period, and what was forgotten.

    Nothing is removed.

    Args:
        store: to be looked through; every record and manifest is read.
        grace: what is younger is left out. Blobs tell their age to the day, so give more than one.
        keep: digests of manifests that count beside those of the records: of versions in a registry, whose
            records somebody may have deleted or a task of which was forgotten later.

    Raises:
        StoreError: the store cannot be read; a record or manifest is damaged, so that nobody can say what it
            reaches; or one of ``keep`` is not there.
    """
    # Blobs before records: a record that comes in between reaches what is listed already.
    blobs = store._list("blobs")
    listed = {last_part(entry.name).removesuffix(".json"): entry for entry in store._list("records")}
    records = _read(store, listed)
    held = reached_from(store, _present(store, keep), texts=True)
    void, gone = _forgotten(records, held)
    left = {key: record for key, record in records.items() if key not in void}
    reached = held | reached_by(store, left, gone)
    found = [Leftover(entry, FORGOTTEN) for key, entry in listed.items() if key in void]
    for blob in blobs:
        if last_part(blob.name) not in reached:
            found.append(Leftover(blob, FORGOTTEN if last_part(blob.name) in gone else NO_RECORD))
    stages: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in store._list("checkpoints"):
        stages[entry.name.split("/")[1]].append(entry)
    for key, entries in stages.items():
        why = FORGOTTEN if key in void else FINISHED if key in listed else BROKEN_OFF
        youngest = min(entry.age for entry in entries)  # the whole goes or stays
        found += [Leftover(entry._replace(age=youngest), why) for entry in entries]
    found += [Leftover(entry, KILLED) for folder in ("leases", "probes", "tmp") for entry in store._list(folder)]
    packs = store._list("packs")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        copies = list(pool.map(lambda pack: read_pack(store, last_part(pack.name)).keys(), packs))
    found += [
        Leftover(pack, UNPACKED)
        for pack, copied in zip(packs, copies, strict=True)
        if copied.isdisjoint(left) and not copied & void
    ]
    found += [Leftover(pack, FORGOTTEN) for pack, copied in zip(packs, copies, strict=True) if copied & void]
    return [each for each in found if each.why == FORGOTTEN or each.entry.age > grace.total_seconds()]


def forgetting(store: ArtifactStore) -> list[Mapping[str, Any]]:
    """Records of the versions that were made to forget a task.

    Raises:
        StoreError: the store cannot be read.
    """
    return [record for record in all_records(store).values() if record.get("kind") == FORGET]


def remove(store: ArtifactStore, leftovers: Sequence[Leftover]) -> int:
    """Remove what ``unreachable`` found, but for what has been put again since; returns the bytes that were freed.

    Raises:
        StoreError: the store cannot be reached, or forbids it; what was removed until then is gone. Or something was
            forgotten, which a stage may need that is at work; nothing is removed then.
    """
    if any(leftover.why == FORGOTTEN for leftover in leftovers):
        at_work = [entry for entry in store._list("leases") if entry.age < EXPIRY_SECONDS]
        if at_work:
            raise StoreError(
                f"{len(at_work)} stages are at work in {store.uri}, which may need what was forgotten: nothing is "
                "removed. Try again when the run has ended"
            )

    def removed(leftover: Leftover) -> int:
        there = store._look(leftover.entry.name)
        if there is None or there.age < leftover.entry.age:
            return 0
        store._delete(there.name)
        return there.size

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(removed, leftovers))


def all_records(store: ArtifactStore) -> dict[str, Record]:
    """Records by their keys.

    Raises:
        StoreError: the store cannot be read, or a record is damaged.
    """
    return _read(store, [last_part(entry.name).removesuffix(".json") for entry in store._list("records")])


def _read(store: ArtifactStore, keys: Collection[str]) -> dict[str, Record]:
    """Records by their keys, but for those that went since they were listed."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {key: record for key, record in zip(keys, pool.map(store.read_record, keys), strict=True) if record}


def _forgotten(records: Mapping[str, Mapping[str, Any]], held: Collection[str]) -> tuple[set[str], set[str]]:
    """Keys of records that go because a task was forgotten, and all digests that these name and nothing holds."""
    void: set[str] = set()
    gone: set[str] = set()
    for forget in (record for record in records.values() if record.get("kind") == FORGET):
        free = set(forget["metrics"]["forgotten"]) - set(held)
        gone |= free
        earlier = {
            key: record
            for key, record in records.items()
            if record.get("kind") == CARRIED or _when(record) < _when(forget)
        }
        # Until a pass finds no more: what came of a record that goes, goes as well.
        while fresh := {
            key
            for key, record in earlier.items()
            if key not in void
            and (free.intersection(record["outputs"].values()) or void.intersection(record["inputs"].values()))
        }:
            void |= fresh
    return void, gone | {digest for key in void for digest in digests_in(records[key])} - set(held)


def _when(record: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(record["finished_at"])


def _present(store: ArtifactStore, manifests: Iterable[str]) -> set[str]:
    manifests = set(manifests)
    for digest in manifests:
        if not store.has(digest):
            raise StoreError(f"The manifest {digest} that is to be kept is not in {store.uri}. Is store.uri right?")
    return manifests


def manifests_of(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Digests of the manifests that records gave."""
    return {record["outputs"]["manifest"] for record in records if "manifest" in record.get("outputs", {})}


def kept_outputs(record: Mapping[str, Any]) -> dict[str, str]:
    """What a stage gave, by name, less what was erased of it."""
    erased = record.get("erased", ())
    return {name: digest for name, digest in record.get("outputs", {}).items() if name not in erased}


def reached_by(store: ArtifactStore, records: Mapping[str, Record], gone: Collection[str] = ()) -> set[str]:
    """Digests that records name, and what is reached from the manifests among them.

    Args:
        store: holds the manifests.
        records: by key.
        gone: manifests that do not count.

    Raises:
        StoreError: something is named as a manifest that is none, or the store cannot be read.
    """
    named = [{**each, "outputs": kept_outputs(each)} for each in records.values() if each.get("kind") != FORGET]
    return digests_in(named) | reached_from(store, manifests_of(records.values()) - set(gone))


def reached_from(store: ArtifactStore, manifests: set[str], *, texts: bool = False) -> set[str]:
    """Digests that the manifests name, and their parents, and so on.

    Args:
        store: holds the manifests.
        manifests: their digests.
        texts: whether those of the tasks' text count, which later tasks do not need.

    Raises:
        StoreError: one of them is none, or the store cannot be read.
    """
    reached: set[str] = set()
    seen: set[str] = set()
    while manifests:
        digest = manifests.pop()
        seen.add(digest)
        if not store.has(digest):
            continue  # its record is void
        try:
            manifest = json.loads(store.get(digest))
            before = [manifest["parent"], manifest.get("trained")]
            for task in () if texts else manifest.get("carried") or ():
                for lesson in (task, *task.get("again", ())):
                    del lesson["data"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StoreError(
                f"{digest} in {store.uri} is named as a manifest and is none: nothing is removed."
            ) from None
        reached |= {digest} | digests_in(manifest)
        manifests |= {each for each in before if each is not None} - seen
    return reached


def digests_in(value: Any) -> set[str]:
    return set(_DIGEST.findall(json.dumps(value)))


def last_part(name: str) -> str:
    """An object's name without its folders."""
    return name.rpartition("/")[2]
