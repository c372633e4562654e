"""What a stage resumes from, as bytes, for tests that look at it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sapt_core.io.blobs import Checkpoints


def save(checkpoints: Checkpoints, files: Mapping[str, bytes]) -> None:
    """Keep these files, by name."""

    def write(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)

    checkpoints.save(write)


def load(checkpoints: Checkpoints) -> dict[str, bytes] | None:
    """The newest complete checkpoint's files, by name."""
    return checkpoints.load(lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()})
