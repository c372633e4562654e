"""Folders of records, one JSON file each."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sapt_core.errors import DataError

Kept = TypeVar("Kept", bound=BaseModel)


def read_folder(folder: Path, pattern: str, kind: type[Kept]) -> list[Kept]:
    """All files of a pattern as records of a kind, by name; none if there is no such folder yet.

    Raises:
        DataError: with every file that is no such record.
    """
    found, faults = [], []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(kind.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            faults.append(f"{path.name}: {said}; delete it, and it is put together again from its stages")
    if faults:
        raise DataError(f"{folder} holds files that are no records:", faults)
    return found
