"""What lies in a store and is of no more use, and its removal.

Records are the roots, and no record is ever removed here. A record reaches the blobs whose digests stand in it:
outputs, and what its metrics name. A version's manifest is an output of the record of its train stage, and
reaches in turn all that reading the version takes: blocks, router, what the method keeps, the backbone's files
and, through its parent, the versions before. So as long as a version's train record is there, the version can be
read wherever its manifest has been published. What a record says was erased it does not reach, nor a manifest the
text that a task was made of.

What no record reaches may be on its way into one: a stage keeps its blobs before its record, and a run the
texts of its tasks before either. Both have just been put, which makes a blob's age zero even if it was there, so
what is younger than a grace period stays. It must be longer than any run takes.

A pack has copies of records and reaches nothing. It goes when none of its records is there any more.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

from cluster.store.base import AT_ONCE, ArtifactStore, Entry
from cluster.store.lookups import Record, read_pack
from sapt_core.errors import StoreError

GRACE = timedelta(days=14)
NO_RECORD = "no record reaches it"
FINISHED = "its stage is done"
BROKEN_OFF = "its stage was broken off, and the same run would go on from it"
KILLED = "left by a process that was killed"
UNPACKED = "none of the records is there that it holds copies of"

_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


class Leftover(NamedTuple):
    """An object that a store can do without, and why: one of the reasons above."""

    entry: Entry
    why: str


def unreachable(store: ArtifactStore, *, grace: timedelta = GRACE, keep: Iterable[str] = ()) -> list[Leftover]:
    """What no record reaches and nothing has written or put for a grace period. Nothing is removed.

    Args:
        store: to be looked through; every record and manifest is read.
        grace: what is younger is left out. Blobs tell their age to the day, so give more than one.
        keep: digests of manifests that count beside those of the records: of versions in a registry, whose
            records somebody may have deleted.

    Raises:
        StoreError: the store cannot be read; a record or manifest is damaged, so that nobody can say what it
            reaches; or one of ``keep`` is not there.
    """
    # Blobs before records: a record that comes in between reaches what is listed already.
    blobs = store._list("blobs")
    keys = {_last(entry.name).removesuffix(".json") for entry in store._list("records")}
    reached = reached_by(store, read_records(store, keys), keep)
    found = [Leftover(blob, NO_RECORD) for blob in blobs if _last(blob.name) not in reached]
    stages: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in store._list("checkpoints"):
        stages[entry.name.split("/")[1]].append(entry)
    for key, entries in stages.items():
        why = FINISHED if key in keys else BROKEN_OFF
        youngest = min(entry.age for entry in entries)  # the whole goes or stays
        found += [Leftover(entry._replace(age=youngest), why) for entry in entries]
    found += [Leftover(entry, KILLED) for folder in ("leases", "probes", "tmp") for entry in store._list(folder)]
    packs = store._list("packs")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        held = list(pool.map(lambda pack: read_pack(store, _last(pack.name)).keys(), packs))
    found += [Leftover(pack, UNPACKED) for pack, copied in zip(packs, held, strict=True) if copied.isdisjoint(keys)]
    return [each for each in found if each.entry.age > grace.total_seconds()]


def remove(store: ArtifactStore, leftovers: Sequence[Leftover]) -> int:
    """Remove what ``unreachable`` found, but for what has been put again since; returns the bytes that were freed.

    Raises:
        StoreError: the store cannot be reached, or forbids it; what was removed until then is gone.
    """

    def removed(leftover: Leftover) -> int:
        there = store._look(leftover.entry.name)
        if there is None or there.age < leftover.entry.age:
            return 0
        store._delete(there.name)
        return there.size

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(removed, leftovers))


def read_records(store: ArtifactStore, keys: Iterable[str] | None = None) -> dict[str, Record]:
    """The records of these keys, of all by default."""
    if keys is None:
        keys = {_last(entry.name).removesuffix(".json") for entry in store._list("records")}
    keys = list(keys)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = zip(keys, pool.map(store.read_record, keys), strict=True)
        return {key: record for key, record in found if record is not None}


def kept_outputs(record: Record) -> dict[str, str]:
    """What a stage gave, by name, less what was erased of it."""
    erased = record.get("erased", ())
    return {name: digest for name, digest in record.get("outputs", {}).items() if name not in erased}


def reached_by(store: ArtifactStore, records: Mapping[str, Record], keep: Iterable[str] = ()) -> set[str]:
    """Digests that the records and the manifests name, and those manifests' parents, and so on.

    Args:
        store: holds the manifests.
        records: by key.
        keep: digests of manifests that count too.

    Raises:
        StoreError: one of ``keep`` is not there, or something is named as a manifest that is none.
    """
    reached = _digests([{**record, "outputs": kept_outputs(record)} for record in records.values()])
    manifests = set(keep)
    for digest in manifests:
        if not store.has(digest):
            raise StoreError(f"The manifest {digest} that is to be kept is not in {store.uri}. Is store.uri right?")
    outputs = [record.get("outputs", {}) for record in records.values()]
    manifests |= {each["manifest"] for each in outputs if "manifest" in each}
    seen: set[str] = set()
    while manifests:
        digest = manifests.pop()
        seen.add(digest)
        if not store.has(digest):
            continue  # its record is void
        try:
            manifest = json.loads(store.get(digest))
            parent = manifest["parent"]
            for task in manifest.get("carried") or ():
                del task["data"]  # its text, which later tasks do not need
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f"{digest} in {store.uri} is named as a manifest and is none: nothing is removed."
            ) from None
        reached |= {digest} | _digests(manifest)
        if parent is not None and parent not in seen:
            manifests.add(parent)
    return reached


def _digests(value: Any) -> set[str]:
    return set(_DIGEST.findall(json.dumps(value)))


def _last(name: str) -> str:
    return name.rpartition("/")[2]
