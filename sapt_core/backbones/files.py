"""Files of backbones on this machine: hashed once each, however many processes ask, and found again by content."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from sapt_core.io.hashing import canonical_hash

# A file that was written just now may be written again within one tick of its clock.
_SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    """Where this machine keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapt"


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file, read anew only if its size, time of change or inode are not those of the last time."""
    known = _remembered(path)
    if known is not None:
        return known
    before = _stamp(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(path) == before and time.time_ns() - path.stat().st_mtime_ns > _SETTLED_NS:
        remember(path, digest)
    return digest


def remember(path: Path, digest: str) -> None:
    """Keep in mind what a file holds that was read or written whole a moment ago; a cache that is full forgets it."""
    place = path.resolve()
    with suppress(OSError):
        _write(_by_place(place), json.dumps({"stamp": _stamp(place), "sha256": digest}))
        _write(_by_content(digest), str(place))


def copy_of(digest: str) -> Path | None:
    """A file on this machine that is known to hold this content and has not changed since, if there is one."""
    try:
        path = Path(_by_content(digest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return path if _remembered(path) == digest else None


def _remembered(path: Path) -> str | None:
    try:
        kept = json.loads(_by_place(path.resolve()).read_bytes())
        return str(kept["sha256"]) if kept["stamp"] == _stamp(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _by_place(path: Path) -> Path:
    # A home folder may be shared by machines that have other files at the same place.
    return cache_folder() / "files" / "by_place" / f"{canonical_hash([platform.node(), str(path)])}.json"


def _by_content(digest: str) -> Path:
    return cache_folder() / "files" / "by_content" / canonical_hash([platform.node(), digest])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as part:
        part.write(text)
    Path(part.name).replace(path)
