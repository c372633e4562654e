"""What a version is made of, counted: parameters that a task trained, bytes that are kept."""

from __future__ import annotations

from sapt_core.io.blobs import BlobStore
from sapt_core.versions.loading import load_blob, load_router
from sapt_core.versions.manifest import Manifest


def trained_parameters(manifest: Manifest, store: BlobStore) -> int:
    """How many numbers were trained for the version's task: its block and, with shared attention, router and key."""
    block = sum(value.numel() for value in load_blob(manifest.taught_block, store).values())
    if manifest.attention is None:
        return block
    attention, keys = load_router(manifest, store)
    return block + keys.shape[1] + sum(value.numel() for value in attention.parameters())


def stored_bytes(manifest: Manifest, store: BlobStore) -> int:
    """Size of all that the version is made of and that its method needs to go on, without the backbone."""
    digests = {*manifest.blocks, *manifest.state.values(), *([manifest.router] if manifest.router else [])}
    return sum(store.size(digest) for digest in digests) + len(manifest.to_bytes())
