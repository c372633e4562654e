"""Taking what stages gave out of a store on purpose, while their records go on to say that they are done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cluster.store.base import AT_ONCE
from cluster.store.cleaning import reached_by
from cluster.store.lookups import Lookups, Record


class Erased(NamedTuple):
    """What was taken out.

    Attributes:
        marked: records that say so since.
        blobs, bytes: how many blobs are gone, and how long they were.
        kept: digests of those that stay, because another record or a version names them too.
    """

    marked: int
    blobs: int
    bytes: int
    kept: frozenset[str]


def erase(wanted: Mapping[str, Collection[str]], records: dict[str, Record], known: Lookups) -> Erased:
    """Mark outputs of records as erased, then remove those of their blobs that nothing else in the store names.

    In this order, so that whatever breaks in between leaves records that are valid, and the same call finishes it. A
    run that begins meanwhile and puts one of the blobs may lose it again: it fails, and submitted again it goes on.

    Args:
        wanted: names of outputs by the key of the record.
        records: all that the store has, by key; brought up to date.
        known: what is known of the store, which is told.

    Raises:
        StoreError: the store cannot be read or written.
    """
    store, marked = known.store, 0
    for key, names in wanted.items():
        record = records[key]
        before = record.get("erased", [])
        erased = sorted({*before, *names})
        if erased != before:
            records[key] = {**record, "erased": erased}
            store.replace_record(key, records[key])
            known.add(key, records[key])
            marked += 1
    digests = {records[key]["outputs"][name] for key, names in wanted.items() for name in names}
    there = {digest for digest in digests if store.has(digest)}
    kept = there & reached_by(store, records) if there else set()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sizes = list(pool.map(store.remove, there - kept))
    return Erased(marked, len(sizes), sum(sizes), frozenset(kept))
