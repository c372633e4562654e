"""A store in a folder of a local or shared file system."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.store.base import CHUNK_BYTES, ArtifactStore
from sapt_core.errors import StoreError

_STALE_SECONDS = 24 * 3600


class LocalStore(ArtifactStore):
    """A store in ``folder``, safe for many processes and, on a shared file system, many nodes.

    Objects are written to ``tmp/`` beside them, synced, and appear under their names in one step.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()

    @property
    def uri(self) -> str:
        return str(self.folder)

    def check(self) -> None:
        super().check()
        with self._faults("clear"):
            for part in (self.folder / "tmp").iterdir():  # left by processes that were killed while they wrote
                if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                    part.unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        with self._faults("write"), self._part() as (part, file):
            file.write(data)
            self._publish(part, file, name)

    def _write_file(self, name: str, path: Path) -> None:
        with self._faults("write"), path.open("rb") as source, self._part() as (part, file):
            shutil.copyfileobj(source, file, CHUNK_BYTES)
            self._publish(part, file, name)

    def _create(self, name: str, data: bytes) -> bool:
        target = self.folder / name
        with self._faults("write"), self._part() as (part, file):
            file.write(data)
            _sync(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(part, target)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
            return True

    def _read(self, name: str) -> bytes | None:
        with self._faults("read"):
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None

    def _chunks(self, name: str) -> Iterator[bytes] | None:
        with self._faults("read"):
            try:
                file = (self.folder / name).open("rb")
            except FileNotFoundError:
                return None
        return self._pieces(file)

    def _pieces(self, file: IO[bytes]) -> Iterator[bytes]:
        with self._faults("read"), file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _size(self, name: str) -> int | None:
        with self._faults("read"):
            try:
                return (self.folder / name).stat().st_size
            except FileNotFoundError:
                return None

    def _list(self, folder: str) -> list[str]:
        with self._faults("read"):
            return [
                path.relative_to(self.folder).as_posix() for path in (self.folder / folder).rglob("*") if path.is_file()
            ]

    def _delete(self, name: str) -> None:
        with self._faults("delete"):
            (self.folder / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        with self._faults("delete"):
            try:
                shutil.rmtree(self.folder / folder)
            except FileNotFoundError:
                return

    @contextmanager
    def _part(self) -> Iterator[tuple[Path, IO[bytes]]]:
        folder = self.folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield part, file
        finally:
            part.unlink(missing_ok=True)

    def _publish(self, part: Path, file: IO[bytes], name: str) -> None:
        _sync(file)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        _sync_folder(target.parent)

    @contextmanager
    def _faults(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = error.strerror or str(error)
            raise StoreError(
                f"Cannot {action} in the store {self.uri}: {what} ({error.filename}). "
                "store.uri must be a folder this user can write to, with free space, on a file system with hard links."
            ) from error


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
