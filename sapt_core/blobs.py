"""What sapt_core asks of a store: bytes in, bytes out, by content. ``cluster.store`` keeps them for real."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


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

    def put_file(self, path: Path) -> str:
        """Like ``put``, streamed from a file."""
        ...

    def fetch_to(self, digest: str, path: Path) -> None:
        """Like ``get``, streamed to a new file that is there complete and verified or not at all."""
        ...


class Checkpoints(Protocol):
    """Where one training run keeps the state it can resume from: named files, the newest set wins."""

    def load(self) -> dict[str, bytes] | None:
        """Files of the newest complete checkpoint, or None before the first."""
        ...

    def save(self, files: dict[str, bytes]) -> None:
        """Keep a checkpoint, all files or none. Every worker calls it; rank 0's files are kept."""
        ...
