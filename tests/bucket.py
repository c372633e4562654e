"""A store in memory that counts what a server of S3 would be asked."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from cluster.store.base import ArtifactStore, Entry

NAMES_A_PAGE = 1000
DAY = 24 * 3600


class Bucket(ArtifactStore):
    """Objects by name, and when they were written. A listing of more than ``pages`` is given up."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.asked: Counter[str] = Counter()
        self.read: Counter[str] = Counter()  # by name
        self.pages = 100
        self._lock = Lock()

    @property
    def uri(self) -> str:
        return "bucket"

    @property
    def requests(self) -> int:
        """How many there were since ``asked`` was cleared."""
        return self.asked.total()

    def old(self) -> None:
        """Let all that is there have been written weeks ago."""
        self.objects = {name: (data, time.time() - 30 * DAY) for name, (data, _) in self.objects.items()}

    def _ask(self, kind: str, count: int = 1) -> None:
        with self._lock:
            self.asked[kind] += count

    def _write(self, name: str, data: bytes) -> None:
        self._ask("write")
        self.objects[name] = data, time.time()

    def _write_file(self, name: str, path: Path) -> None:
        self._write(name, path.read_bytes())

    def _create(self, name: str, data: bytes) -> bool:
        self._ask("create")
        with self._lock:
            return self.objects.setdefault(name, given := (data, time.time())) is given

    def _read(self, name: str) -> bytes | None:
        self._ask("read")
        with self._lock:
            self.read[name] += 1
        return self.objects.get(name, (None, 0.0))[0]

    def _chunks(self, name: str) -> Iterator[bytes] | None:
        data = self._read(name)
        return None if data is None else iter([data])

    def _look(self, name: str) -> Entry | None:
        self._ask("look")
        return self._entry(name) if name in self.objects else None

    def _entry(self, name: str) -> Entry:
        data, when = self.objects[name]
        return Entry(name, len(data), time.time() - when)

    def _touch(self, name: str) -> bool:
        self._ask("touch", 2)  # S3 looks before it copies an object onto itself
        self.objects[name] = self.objects[name][0], time.time()
        return True

    def _list(self, folder: str) -> list[Entry]:
        found = [self._entry(name) for name in list(self.objects) if name.startswith(f"{folder}/")]
        self._ask("list", max(1, -(-len(found) // NAMES_A_PAGE)))
        return found

    def _tags(self, folder: str) -> dict[str, str] | None:
        found = self._list(folder)
        if len(found) > self.pages * NAMES_A_PAGE:
            return None
        return {entry.name: hashlib.sha256(self.objects[entry.name][0]).hexdigest() for entry in found}

    def _delete(self, name: str) -> None:
        self._ask("delete")
        self.objects.pop(name, None)

    def delete_folder(self, folder: str) -> None:
        for entry in self._list(folder):
            self._delete(entry.name)
