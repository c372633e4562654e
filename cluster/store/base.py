"""What every store does, built on seven operations that a place to keep bytes must offer.

Layout, relative to the store's root:

    blobs/<aa>/<sha256>                 content-addressed bytes
    records/<key>.json                  one per finished stage; the first writer wins
    checkpoints/<key>/<n>/<file>        resumable state of a running stage, manifest.json written last
    train/<run>/                        what Ray Train keeps while a training stage runs
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapt_core.errors import StoreError

CHUNK_BYTES = 1 << 20
CHECKPOINTS_KEPT = 2
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MANIFEST = "manifest.json"
_CREATE_ATTEMPTS = 5


class ArtifactStore(ABC):
    """Content-addressed blobs, atomic records and checkpoints. Satisfies ``sapt_core.blobs.BlobStore``.

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
    def _size(self, name: str) -> int | None:
        """The object's length in bytes, None if there is none."""

    @abstractmethod
    def _list(self, folder: str) -> list[str]:
        """Names of all objects under a folder, at any depth."""

    @abstractmethod
    def _delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove everything under a folder of the store; nothing happens if there is nothing."""

    # Blobs

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its sha256 (hex). Putting the same bytes again is free."""
        digest = hashlib.sha256(data).hexdigest()
        if self._size(_blob(digest)) != len(data):  # a truncated blob is mended by putting it again
            self._write(_blob(digest), data)
        return digest

    def put_file(self, path: Path | str) -> str:
        """Keep a file's content, streamed, and return its sha256 (hex)."""
        path = Path(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self._size(_blob(digest)) != path.stat().st_size:
            self._write_file(_blob(digest), path)
        return digest

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
        return self._size(_blob(digest)) is not None

    def size(self, digest: str) -> int:
        """Length of a blob in bytes, without reading it.

        Raises:
            StoreError: the blob is missing.
        """
        size = self._size(_blob(digest))
        if size is None:
            raise self._missing(digest)
        return size

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
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            seen = hashlib.sha256()
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    seen.update(chunk)
                    file.write(chunk)
            if seen.hexdigest() != digest:
                raise self._damaged(digest)
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)

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
        data = json.dumps(record, indent=1, sort_keys=True).encode()
        for _ in range(_CREATE_ATTEMPTS):
            if self._create(_record(key), data):
                return json.loads(data)  # type: ignore[no-any-return]
            winner = self.read_record(key)
            if winner is not None:
                return winner  # None: the winner's was deleted in between
        raise StoreError(f"Record {_record(key)} in {self.uri} is deleted as fast as it is written. Run again.")

    def delete_record(self, key: str) -> None:
        """Forget a stage's result, so that it runs again."""
        self._delete(_record(key))

    # Checkpoints

    def checkpoints(self, key: str) -> StoreCheckpoints:
        """Where the stage of this key keeps the state it resumes from."""
        return StoreCheckpoints(self, f"checkpoints/{_checked(key)}")

    def drop_checkpoints(self, key: str) -> None:
        """Remove a stage's checkpoints; its record is there, so nothing resumes from them any more."""
        self.delete_folder(f"checkpoints/{_checked(key)}")

    # Preflight

    def check(self) -> None:
        """Write, read and delete a probe, so that what cannot work fails before work is done.

        Raises:
            StoreError: the place cannot be reached, read or written, or lets a second writer of a
                record win, on which the safety of parallel and repeated runs rests.
        """
        name = f"probes/{uuid.uuid4().hex}"
        first, second = b"first", b"second"
        created = self._create(name, first)
        try:
            again = self._create(name, second)
            data = self._read(name)
        finally:
            self._delete(name)
        if not created or again or data != first:
            raise StoreError(
                f"The store {self.uri} overwrites an object that is already there although it was asked not to "
                "(S3: PUT with If-None-Match: *). Two runs could then replace each other's records. Use a store "
                "with conditional writes: AWS S3, a current MinIO or Ceph, or a local folder."
            )

    def _missing(self, digest: str) -> StoreError:
        return StoreError(
            f"Blob {digest} is not in {self.uri}. Run the pipeline again: the stage that made it is repeated."
        )

    def _damaged(self, digest: str) -> StoreError:
        return StoreError(
            f"Blob {digest} in {self.uri} does not have the content its name says: it is damaged. "
            f"Delete {_blob(digest)} there and run the pipeline again: the stage that made it is repeated."
        )


class StoreCheckpoints:
    """Checkpoints of one stage in a store: the newest two complete ones. See ``sapt_core.blobs.Checkpoints``."""

    def __init__(self, store: ArtifactStore, folder: str) -> None:
        self._store = store
        self._folder = folder

    def load(self) -> dict[str, bytes] | None:
        """Files of the newest complete checkpoint, or None before the first."""
        objects = self._store._list(self._folder)
        for number in reversed(_numbers(objects)):
            files = self._read(number) if f"{self._folder}/{number:08d}/{_MANIFEST}" in objects else None
            if files is not None:
                return files
        return None

    def save(self, files: dict[str, bytes]) -> None:
        """Keep a checkpoint, all files or none, and drop all but the newest two.

        Raises:
            ValueError: a file name that is not letters, digits, ``.``, ``_`` and ``-``.
        """
        check_file_names(files)
        numbers = _numbers(self._store._list(self._folder))
        number = numbers[-1] + 1 if numbers else 0
        for name, data in files.items():
            self._store._write(f"{self._folder}/{number:08d}/{name}", data)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self._store._write(f"{self._folder}/{number:08d}/{_MANIFEST}", json.dumps(digests).encode())
        for old in numbers[: -(CHECKPOINTS_KEPT - 1)]:
            self._store.delete_folder(f"{self._folder}/{old:08d}")

    def _read(self, number: int) -> dict[str, bytes] | None:
        """One checkpoint's files, None if any is missing or damaged: an older one is then the newest complete."""
        folder = f"{self._folder}/{number:08d}"
        try:
            digests = json.loads(self._store._read(f"{folder}/{_MANIFEST}") or b"")
        except ValueError:
            return None
        files = {}
        for name, digest in digests.items():
            data = self._store._read(f"{folder}/{name}")
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                return None
            files[name] = data
        return files


def check_file_names(files: dict[str, bytes]) -> None:
    """Refuse names of checkpoint files that could leave their folder or hide the manifest.

    Raises:
        ValueError: naming the file.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name) or name == _MANIFEST:
            raise ValueError(f"checkpoint file {name!r}: use letters, digits, '.', '_' and '-', and not {_MANIFEST!r}")


def _numbers(objects: list[str]) -> list[int]:
    return sorted({int(name.split("/")[-2]) for name in objects})


def _blob(digest: str) -> str:
    return f"blobs/{_checked(digest)[:2]}/{digest}"


def _record(key: str) -> str:
    return f"records/{_checked(key)}.json"


def _checked(digest: str) -> str:
    """Digests and keys become paths, and may come from a manifest that somebody else wrote."""
    if not _DIGEST.fullmatch(digest):
        raise StoreError(
            f"{digest!r} is not a sha256 of 64 hex digits: the manifest or record that names it is damaged."
        )
    return digest
