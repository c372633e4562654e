"""What a stage resumes from, as a store keeps it: the newest two complete checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sapt_core.io.files import poured

if TYPE_CHECKING:
    from cluster.store.base import ArtifactStore

KEPT = 2
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MANIFEST = "manifest.json"

T = TypeVar("T")


class StoreCheckpoints:
    """Checkpoints of one stage in a store. See ``sapt_core.io.blobs.Checkpoints``.

    Each lies in a folder that no other writer's has the name of, and counts once its manifest is there. So two
    runs at the same stage, or one that drops what the other saves, cost a checkpoint and never a stage.
    """

    def __init__(self, store: ArtifactStore, folder: str) -> None:
        self._store = store
        self._folder = folder

    def load(self, read: Callable[[Path], T]) -> T | None:
        """What ``read`` makes of the files of the newest complete checkpoint; None before the first."""
        _, complete = self._there()
        for folder in reversed(complete):
            with self._store._drafts() as files:
                if self._fetch(folder, files):
                    return read(files)
        return None

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep the files that ``write`` puts into an empty folder, and drop all but the newest two checkpoints.

        Raises:
            ValueError: a file name that is not letters, digits, ``.``, ``_`` and ``-``.
        """
        there, complete = self._there()
        number = max(map(_number, there), default=-1) + 1
        folder = f"{self._folder}/{number:08d}-{uuid.uuid4().hex[:8]}"
        with self._store._drafts() as files:
            write(files)
            digests = {}
            for path in sorted(files.iterdir()):
                check_file_names([path.name])
                with path.open("rb") as file:
                    digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                self._store._take_file(f"{folder}/{path.name}", path)
            self._store._write(f"{folder}/{_MANIFEST}", json.dumps(digests).encode())
        for old in there - {*complete[-(KEPT - 1) :]}:
            self._store.discard(old)

    def _there(self) -> tuple[set[str], list[str]]:
        """The folders of all checkpoints, and of those that have their manifest, oldest first."""
        names = {entry.name for entry in self._store._list(self._folder)}
        folders = {name.rpartition("/")[0] for name in names}
        complete = {folder for folder in folders if f"{folder}/{_MANIFEST}" in names}
        return folders, sorted(complete, key=lambda folder: (_number(folder), folder))

    def _fetch(self, folder: str, target: Path) -> bool:
        """Write a checkpoint's files to a folder; False if any is missing or damaged: an older one then counts."""
        try:
            digests = dict(json.loads(self._store._read(f"{folder}/{_MANIFEST}") or b""))
            check_file_names(digests)
        except (ValueError, TypeError):
            return False
        for name, digest in digests.items():
            chunks = self._store._chunks(f"{folder}/{name}")
            if chunks is None:
                return False
            with (target / name).open("wb") as file:
                if poured(chunks, file) != digest:
                    return False
        return True


def check_file_names(names: Iterable[str]) -> None:
    """Refuse names of checkpoint files that could leave their folder or hide the manifest.

    Raises:
        ValueError: naming the file.
    """
    for name in names:
        if not _FILE_NAME.fullmatch(name) or name == _MANIFEST:
            raise ValueError(f"checkpoint file {name!r}: use letters, digits, '.', '_' and '-', and not {_MANIFEST!r}")


def _number(folder: str) -> int:
    return int(folder.rpartition("/")[2].partition("-")[0])
