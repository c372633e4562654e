"""A store in a folder of a local or shared file system."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cluster.store.base import CHUNK_BYTES, ArtifactStore, Entry
from sapt_core.errors import StoreError

_STALE_SECONDS = 24 * 3600
_PLACE_ATTEMPTS = 20


class LocalStore(ArtifactStore):
    """A store in ``folder``, safe for many processes and, on a shared file system, many nodes.

    Objects are written to ``tmp/`` beside them, synced, and appear under their names in one step. Folders that are
    dropped go there in one step, too, and any that is empty may go at any time. All of it has the umask's mode,
    so that who may use the folder may use what is in it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()

    @property
    def uri(self) -> str:
        return str(self.folder)

    def check(self) -> None:
        super().check()
        with self._faults("clear"):
            for left in (self.folder / "tmp").iterdir():  # by processes that were killed while they wrote
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                        _remove(left)

    def _write(self, name: str, data: bytes) -> None:
        with self._faults("write"), self._part() as (part, file):
            file.write(data)
            self._place(part, file, name, Path.replace)

    def _write_file(self, name: str, path: Path) -> None:
        with self._faults("write"), path.open("rb") as source, self._part() as (part, file):
            shutil.copyfileobj(source, file, CHUNK_BYTES)
            self._place(part, file, name, Path.replace)

    def _take_file(self, name: str, path: Path) -> None:
        with self._faults("write"), self._part() as (part, _), path.open("rb") as file:
            path.chmod(part.stat().st_mode)  # libraries write files for their owner alone
            self._place(path, file, name, Path.replace)

    def _create(self, name: str, data: bytes) -> bool:
        with self._faults("write"), self._part() as (part, file):
            file.write(data)
            try:
                self._place(part, file, name, os.link)
            except FileExistsError:
                return False
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

    def _look(self, name: str) -> Entry | None:
        with self._faults("read"):
            try:
                found = (self.folder / name).stat()
            except FileNotFoundError:
                return None
            return Entry(name, found.st_size, time.time() - found.st_mtime)

    def _touch(self, name: str) -> bool:
        with self._faults("write"):
            try:
                os.utime(self.folder / name)
            except (FileNotFoundError, PermissionError):  # a colleague's, which only its folder lets one replace
                return False
            return True

    def _list(self, folder: str) -> list[Entry]:
        names = [
            Path(root, name).relative_to(self.folder).as_posix()
            for root, _, files in self._walk(self.folder / folder)
            for name in files
        ]
        return [entry for entry in map(self._look, names) if entry is not None]

    def _walk(self, folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # another process removes what it needs no more
                raise error

        with self._faults("read"):
            yield from os.walk(folder, onerror=refuse)

    def _delete(self, name: str) -> None:
        target = self.folder / name
        with self._faults("delete"):
            target.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or removed already
                for parent in list(target.relative_to(self.folder).parents)[:-1]:
                    (self.folder / parent).rmdir()

    def delete_folder(self, folder: str) -> None:
        with self._faults("delete"):
            gone = self._draft()
            try:
                (self.folder / folder).rename(gone)  # whole, whoever writes into it
            except FileNotFoundError:
                return
            _remove(gone)

    @contextmanager
    def _drafts(self) -> Iterator[Path]:
        with self._faults("write"):
            folder = self._draft()
            folder.mkdir()
        try:
            yield folder
        finally:
            _remove(folder)

    @contextmanager
    def _part(self) -> Iterator[tuple[Path, IO[bytes]]]:
        part = self._draft()
        try:
            with part.open("xb") as file:
                yield part, file
        finally:
            part.unlink(missing_ok=True)

    def _draft(self) -> Path:
        """A name of its own for something on its way in or out."""
        folder = self.folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid.uuid4().hex

    def _place(self, part: Path, file: IO[bytes], name: str, how: Callable[[Path, Path], object]) -> None:
        """Let a complete file appear under its name, while others may remove the folder it belongs in.

        Raises:
            FileExistsError: it is there, and ``how`` replaces nothing.
        """
        _sync(file)
        target = self.folder / name
        for _ in range(_PLACE_ATTEMPTS):
            if _made(target.parent):
                with suppress(FileNotFoundError):
                    how(part, target)
                    _sync_folder(target.parent)
                    return
        raise NotADirectoryError(errno.ENOTDIR, "its folder cannot be made", str(target))

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


def _remove(path: Path) -> None:
    """Remove a file or folder that nobody else uses; what a network file system still holds is left for later."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _made(folder: Path) -> bool:
    """Make a folder; False if it is no folder, or others removed it, or what it is to lie in, at this moment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError):
        return False
    return True


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # dropped since, and with it what was placed there
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
