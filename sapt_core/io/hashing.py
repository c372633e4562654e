"""Digests: one hash for JSON values, and what a sha256 that somebody else wrote must look like.

Imports nothing heavy: every process that manages stages needs it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, TypeAlias

from pydantic import StringConstraints

# Digests become paths in a store, and may come from a manifest that somebody else wrote.
Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def canonical_hash(value: Any) -> str:
    """sha256 (hex) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
