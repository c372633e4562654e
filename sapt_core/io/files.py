"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears as ``path``, over whatever was there, when the block ends without an error.

    It is made as any other file, so that the umask says who may read it: ``tempfile`` makes files for their
    owner alone, and colleagues on a shared disk would be shut out.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def poured(chunks: Iterable[bytes], file: IO[bytes]) -> str:
    """Write the pieces to a file; returns the sha256 (hex) of them all."""
    seen = hashlib.sha256()
    for chunk in chunks:
        seen.update(chunk)
        file.write(chunk)
    return seen.hexdigest()
