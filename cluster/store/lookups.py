"""What a command knows of a store's records and blobs: each is looked up once, with as few requests as will do.

Where one request of a listing tells of many objects, as in S3, two listings say what is there, and a pack, one object
that holds the records of a sequence as they were when it ended, spares reading them one by one. A packed record counts
only while the listing shows the very object that it is a copy of, so a pack that is missing, damaged or outdated
costs time alone. What is not there when it is listed may come at any time: whoever is about to do a stage's work
looks again under its lease.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from cluster.store.base import AT_ONCE, ArtifactStore, checked
from sapt_core.errors import StoreError

Record = dict[str, Any]

_FORM = "sapt pack 1 "

log = logging.getLogger(__name__)


class Lookups:
    """Looks things up for one command, which makes it before it plans and hands it to all that look.

    Args:
        store: where.
        packs: names (sha256) of packs that may hold the records which will be asked for.
    """

    def __init__(self, store: ArtifactStore, packs: Sequence[str] = ()) -> None:
        self.store = store
        self._names = packs
        self._records: dict[str, Record | None] = {}
        self._tags: dict[str, str] = {}  # of the objects that _records were read from, as listed before that
        self._began = False
        self._asked: set[str] = set()  # blobs that are there though no listing says so

    def records(self, keys: Iterable[str]) -> dict[str, Record]:
        """The records of those stage keys that have one.

        Raises:
            StoreError: the store cannot be read, or a record is not a JSON object.
        """
        keys = list(dict.fromkeys(keys))
        new = [key for key in keys if self._records.get(key) is None and (self._began or key not in self._records)]
        if self._listed is not None:
            if not self._began:
                new = [key for key in new if key in self._listed]
            packed = [key for key in new if key in self._packed and key not in self._records]
            self._records |= {key: self._packed[key] for key in packed}
            self._tags |= {key: self._listed[key] for key in packed}
        self._read(key for key in new if self._records.get(key) is None)
        return {key: record for key in keys if (record := self._records.get(key)) is not None}

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Those of the blobs that are not there.

        Raises:
            StoreError: the store cannot be read.
        """
        unlisted = {*digests} - self._asked - (self._blobs or set())

        def ask(digest: str) -> None:
            if self.store.has(digest):
                self._asked.add(digest)

        _at_once(ask, unlisted)
        return unlisted - self._asked

    def add(self, key: str, record: Record) -> None:
        """Take note of a record that was committed since. By then others may have been, which were not there."""
        self._records[key] = record
        self._tags.pop(key, None)
        self._began = True

    def delete(self, key: str) -> None:
        """Delete a record from the store."""
        self.store.delete_record(key)
        self._records[key] = None
        self._tags.pop(key, None)

    def pack(self, name: str, keys: Collection[str]) -> None:
        """Keep what these keys have now in the pack ``name``, for the commands that follow.

        Fails nothing: the work is done, and a pack saves time alone.
        """
        try:
            there = self._packs.get(name, {})
            if all(key in there and key in self._tags for key in keys):
                return  # it is as good as it was
            # Listed before it is read: what another run puts in a record's place in between has another tag.
            listed = None if self._listed is None else _by_key(self.store._tags("records"))
            if listed is None:
                return
            changed = [key for key in keys if key in listed and self._tags.get(key) != listed[key]]
            self._tags |= {key: listed[key] for key in changed}
            self._read(changed)
            packed = {key: (listed[key], record) for key in keys if key in listed and (record := self._records[key])}
            body = json.dumps(packed, allow_nan=False).encode()
            self.store._write(_object(name), f"{_head(body)}\n".encode() + body)
        except StoreError as error:
            log.warning("The next run will look up its stages one by one: %s", error)

    def _read(self, keys: Iterable[str]) -> None:
        def read(key: str) -> None:
            self._records[key] = self.store.read_record(key)
            if self._listed is not None and key in self._listed:
                self._tags.setdefault(key, self._listed[key])

        _at_once(read, keys)

    @cached_property
    def _listed(self) -> dict[str, str] | None:
        """Tags of all records by key; None where they are asked for one by one."""
        return _by_key(self.store._tags("records"))

    @cached_property
    def _blobs(self) -> set[str] | None:
        """Digests of all blobs; None where they are asked for one by one."""
        tags = self.store._tags("blobs")
        return None if tags is None else {_last(name) for name in tags}

    @cached_property
    def _packs(self) -> dict[str, dict[str, Record]]:
        """By pack the records in it that are as they were when it was written."""
        found: dict[str, dict[str, Record]] = {}
        listed = self._listed or {}

        def read(name: str) -> None:
            packed = read_pack(self.store, name)
            found[name] = {key: record for key, (tag, record) in packed.items() if listed.get(key) == tag}

        _at_once(read, self._names if listed else ())
        return found

    @cached_property
    def _packed(self) -> dict[str, Record]:
        return {key: record for records in self._packs.values() for key, record in records.items()}


def read_pack(store: ArtifactStore, name: str) -> dict[str, tuple[str, Record]]:
    """What a pack holds: each record, and the tag that its object had, by key; nothing if it is damaged or not there.

    Raises:
        StoreError: the store cannot be read.
    """
    head, _, body = (store._read(_object(name)) or b"").partition(b"\n")
    if head.decode(errors="replace") != _head(body):
        return {}
    packed: dict[str, tuple[str, Record]] = json.loads(body)
    return packed


def _object(name: str) -> str:
    return f"packs/{checked(name)}"


def _head(body: bytes) -> str:
    return f"{_FORM}{hashlib.sha256(body).hexdigest()}"


def _at_once(call: Callable[[str], None], names: Iterable[str]) -> None:
    """Make a call for each name, several at a time; the first error ends it."""
    names = list(names)
    if len(names) < 2:
        for name in names:
            call(name)
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(names))) as pool:
        for _ in pool.map(call, names):
            pass


def _by_key(tags: dict[str, str] | None) -> dict[str, str] | None:
    return None if tags is None else {_last(name).removesuffix(".json"): tag for name, tag in tags.items()}


def _last(name: str) -> str:
    return name.rpartition("/")[2]
