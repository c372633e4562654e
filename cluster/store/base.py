"""What every store does, built on the few operations that a place to keep bytes must offer.

Layout, relative to the store's root:

    blobs/<aa>/<sha256>                 content-addressed bytes
    records/<key>.json                  one per finished stage; the first writer wins
    checkpoints/<key>/<n>-<id>/<file>   resumable state of a running stage, manifest.json written last
    leases/<key>.json                   who is at work on a stage
    probes/                             what ``check`` writes and deletes
    packs/<key>                         copies of a finished sequence's records in one object, to be read at once
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cluster.store.checkpoints import StoreCheckpoints
from sapt_core.errors import StoreError
from sapt_core.io.files import poured, whole_file

CHUNK_BYTES = 1 << 20
REFRESH_SECONDS = 24 * 3600
AT_ONCE = 16  # requests that one process makes at a time, where it has many to make
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CREATE_ATTEMPTS = 5

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An object of a store: its name, its length in bytes, and the seconds since it was written or touched."""

    name: str
    size: int
    age: float


class ArtifactStore(ABC):
    """Content-addressed blobs, atomic records and checkpoints. Satisfies ``sapt_core.io.blobs.BlobStore``.

    Every method raises ``StoreError`` when the place cannot be reached, read or written.
    """

    @property
    @abstractmethod
    def uri(self) -> str:
        """Address for people, without secrets."""

    @abstractmethod
    def _write(self, name: str, data: bytes) -> None:
        """Put an object there, all of it or nothing, over whatever was there."""

    @abstractmethod
    def _write_file(self, name: str, path: Path) -> None:
        """The same from a file, without reading it into memory."""

    @abstractmethod
    def _create(self, name: str, data: bytes) -> bool:
        """Put an object there unless one is there already; of several writers exactly one gets True."""

    @abstractmethod
    def _read(self, name: str) -> bytes | None:
        """The object's bytes, None if there is none."""

    @abstractmethod
    def _chunks(self, name: str) -> Iterator[bytes] | None:
        """The object's bytes piece by piece, None if there is none."""

    @abstractmethod
    def _look(self, name: str) -> Entry | None:
        """What is known of an object without reading it, None if there is none."""

    @abstractmethod
    def _touch(self, name: str) -> bool:
        """Make an object's age zero; False if it is not there or not ours to touch."""

    @abstractmethod
    def _list(self, folder: str) -> list[Entry]:
        """All objects under a folder, at any depth."""

    def _tags(self, folder: str) -> dict[str, str] | None:
        """Names of all objects under a folder, each with a tag that is another once its content is.

        None where it takes no fewer requests to ask for what is wanted one by one.
        """
        return None

    @abstractmethod
    def _delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove everything under a folder of the store; nothing happens if there is nothing."""

    @contextmanager
    def _drafts(self) -> Iterator[Path]:
        """An empty folder for files on their way, which is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="sapt-") as folder:
            yield Path(folder)

    def _take_file(self, name: str, path: Path) -> None:
        """``_write_file`` for a file in ``_drafts``, which need not stay there."""
        self._write_file(name, path)

    def discard(self, folder: str) -> None:
        """Remove a folder of what nothing will read any more; that it cannot be removed is no reason to fail."""
        try:
            self.delete_folder(folder)
        except StoreError as error:
            log.warning("%s stays in %s, though nothing needs it any more: %s", folder, self.uri, error)

    # Blobs

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its sha256 (hex). Putting the same bytes again is free."""
        digest = hashlib.sha256(data).hexdigest()
        if not self._renewed(digest, len(data)):
            self._write(_blob(digest), data)
        return digest

    def put_file(self, path: Path | str, digest: str | None = None) -> str:
        """Keep a file's content, streamed, and return its sha256 (hex).

        Args:
            path: the file.
            digest: its sha256 where that is known, which spares reading a file that the store has.
        """
        path = Path(path)
        size = path.stat().st_size
        if digest is not None and self._renewed(digest, size):
            return digest
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not self._renewed(digest, size):
            self._write_file(_blob(digest), path)
        return digest

    def _renewed(self, digest: str, size: int) -> bool:
        """Whether a blob is there and whole; its age then counts anew, because whoever put it is about to use it."""
        there = self._look(_blob(digest))
        if there is None or there.size != size:  # a truncated blob is mended by putting it again
            return False
        return there.age < REFRESH_SECONDS or self._touch(_blob(digest))

    def get(self, digest: str) -> bytes:
        """Return the bytes whose sha256 is ``digest``, verified.

        Raises:
            StoreError: the blob is missing or its content differs.
        """
        data = self._read(_blob(digest))
        if data is None:
            raise self._missing(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            raise self._damaged(digest)
        return data

    def has(self, digest: str) -> bool:
        """Whether a blob is there; its content is verified when it is read."""
        return self._look(_blob(digest)) is not None

    def size(self, digest: str) -> int:
        """Length of a blob in bytes, without reading it.

        Raises:
            StoreError: the blob is missing.
        """
        there = self._look(_blob(digest))
        if there is None:
            raise self._missing(digest)
        return there.size

    def fetch_to(self, digest: str, path: Path | str) -> None:
        """Write a blob to a local file, streamed and verified; the file appears whole or not at all.

        Raises:
            StoreError: the blob is missing or its content differs.
        """
        path = Path(path)
        chunks = self._chunks(_blob(digest))
        if chunks is None:
            raise self._missing(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            if poured(chunks, file) != digest:
                raise self._damaged(digest)

    def remove(self, digest: str) -> int:
        """Take out a blob that nothing needs any more, and return its length; 0 if it is not there."""
        there = self._look(_blob(digest))
        self._delete(_blob(digest))
        return 0 if there is None else there.size

    # Records

    def read_record(self, key: str) -> dict[str, Any] | None:
        """The record of a stage key, None if the stage is not done.

        Raises:
            StoreError: the record is not a JSON object.
        """
        data = self._read(_record(key))
        if data is None:
            return None
        try:
            record = json.loads(data)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise StoreError(
                f"Record {_record(key)} in {self.uri} is not a JSON object. "
                "Delete it and run the pipeline again: its stage is repeated."
            )
        return record

    def commit_record(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write a record unless the key has one, and return the one that counts.

        Of several writers the first wins; all get the winner's record.
        """
        data = _json(record)
        for _ in range(_CREATE_ATTEMPTS):
            if self._create(_record(key), data):
                return json.loads(data)  # type: ignore[no-any-return]
            winner = self.read_record(key)
            if winner is not None:
                return winner  # None: the winner's was deleted in between
        raise StoreError(f"Record {_record(key)} in {self.uri} is deleted as fast as it is written. Run again.")

    def replace_record(self, key: str, record: dict[str, Any]) -> None:
        """Put another record in the place of the one that a key has."""
        self._write(_record(key), _json(record))

    def delete_record(self, key: str) -> None:
        """Forget a stage's result, so that it runs again."""
        self._delete(_record(key))

    # Checkpoints

    def checkpoints(self, key: str) -> StoreCheckpoints:
        """Where the stage of this key keeps the state it resumes from."""
        return StoreCheckpoints(self, f"checkpoints/{checked(key)}")

    def drop_checkpoints(self, key: str) -> None:
        """Remove a stage's checkpoints; its record is there, so nothing resumes from them any more.

        Fails no stage: another run may be at the same one, and what cannot be removed is in nobody's way.
        """
        self.discard(f"checkpoints/{checked(key)}")

    # Preflight

    def check(self) -> None:
        """Do all that a run does with a probe, so that what cannot work fails before work is done.

        Raises:
            StoreError: the place cannot be reached, read, listed or written, or lets a second writer of a
                record win, on which the safety of parallel and repeated runs rests.
        """
        name = f"probes/{uuid.uuid4().hex}"
        first, second = b"first", b"another"
        created = self._create(name, first)
        try:
            again = self._create(name, second)
            if not created or again or self._read(name) != first:
                raise StoreError(
                    f"The store {self.uri} overwrites an object that is already there although it was asked not to "
                    "(S3: PUT with If-None-Match: *). Two runs could then replace each other's records. Use a store "
                    "with conditional writes: AWS S3, a current MinIO or Ceph, or a local folder."
                )
            self._write(name, second)
            there = self._look(name)
            self._require("give back what was written last", self._read(name) == second)
            self._require("say how long an object is", there is not None and there.size == len(second))
            self._require("list what is there", name in {entry.name for entry in self._list("probes")})
            self._require("let an object be copied onto itself", self._touch(name))
        finally:
            self._delete(name)
        self._require("forget what was deleted", self._look(name) is None)

    def _require(self, what: str, does: bool) -> None:
        if not does:
            raise StoreError(f"The store {self.uri} cannot be used: it does not {what}. Use another.")

    def _missing(self, digest: str) -> StoreError:
        return StoreError(
            f"Blob {digest} is not in {self.uri}. If the store has moved, say where to by store.uri; else run the "
            "pipeline again: the stage that made it is repeated."
        )

    def _damaged(self, digest: str) -> StoreError:
        return StoreError(
            f"Blob {digest} in {self.uri} does not have the content its name says: it is damaged. "
            f"Delete {_blob(digest)} there and run the pipeline again: the stage that made it is repeated."
        )


def _blob(digest: str) -> str:
    return f"blobs/{checked(digest)[:2]}/{digest}"


def _record(key: str) -> str:
    return f"records/{checked(key)}.json"


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode()


def checked(digest: str) -> str:
    """Digests and keys become paths, and may come from a manifest that somebody else wrote.

    Raises:
        StoreError: it is no sha256.
    """
    if not _DIGEST.fullmatch(digest):
        raise StoreError(
            f"{digest!r} is not a sha256 of 64 hex digits: the manifest or record that names it is damaged."
        )
    return digest
