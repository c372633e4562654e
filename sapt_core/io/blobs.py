"""What sapt_core asks of a store: bytes in, bytes out, by content. ``cluster.store`` keeps them for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")


class BlobStore(Protocol):
    """Content-addressed bytes."""

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its sha256 (hex). Putting the same bytes again is free."""
        ...

    def get(self, digest: str) -> bytes:
        """Return the bytes whose sha256 is ``digest``, verified.

        Raises:
            StoreError: the blob is missing, its content differs, or the store cannot be reached.
        """
        ...

    def has(self, digest: str) -> bool:
        """Whether a blob of this name is there (not whether it is intact)."""
        ...

    def size(self, digest: str) -> int:
        """Length of a blob in bytes, without reading it.

        Raises:
            StoreError: the blob is missing, or the store cannot be reached.
        """
        ...

    def put_file(self, path: Path, digest: str | None = None) -> str:
        """Like ``put``, streamed from a file.

        Args:
            path: the file.
            digest: its sha256 (hex) where that is known, which spares reading a file that the store has.
        """
        ...

    def fetch_to(self, digest: str, path: Path) -> None:
        """Like ``get``, streamed to a new file that is there complete and verified or not at all."""
        ...


class Checkpoints(Protocol):
    """Where one training run keeps the state it can resume from: a folder of files, the newest wins.

    Files, and not bytes, because a state may be larger than the memory that is left.
    """

    def load(self, read: Callable[[Path], T]) -> T | None:
        """What ``read`` makes of the folder of the newest complete checkpoint; None before the first.

        The folder is gone when ``read`` returns.
        """
        ...

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep the files that ``write`` puts into an empty folder, all or none.

        Every worker calls it; ``write`` is called by rank 0 alone.
        """
        ...


class NoCheckpoints:
    """Of a training that starts anew after an interruption."""

    def load(self, read: Callable[[Path], T]) -> T | None:
        """Nothing is there."""

    def save(self, write: Callable[[Path], None]) -> None:
        """Nothing is kept."""
