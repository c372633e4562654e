"""What a version is made of, blob by blob."""

from __future__ import annotations

from collections.abc import Iterator

from sapt_core.io.blobs import BlobStore
from sapt_core.versions.manifest import Manifest


def blobs_of(manifest: Manifest, *, backbone: bool = True) -> dict[str, str]:
    """What each blob is that a version names, by its sha256.

    Args:
        manifest: the version.
        backbone: with the backbone's files.
    """
    found: dict[str, str] = {}
    if backbone:
        found |= {digest: f"{name} of the backbone" for name, digest in (manifest.backbone.files or {}).items()}
    found |= {digest: f"block of {name}" for name, digest in zip(manifest.block_names, manifest.blocks, strict=True)}
    if manifest.router is not None:
        found[manifest.router] = "keys and query projection"
    found |= {digest: f"{name} of the method" for name, digest in manifest.state.items()}
    for task, carried in zip(manifest.tasks, manifest.carried or (), strict=manifest.carried is not None):
        curves = {"curve": carried.curve, **{f"curve {number}": e.curve for number, e in enumerate(carried.again, 2)}}
        kept = {**carried.tokens, **carried.reflection, **{name: each for name, each in curves.items() if each}}
        found |= {digest: f"{name} of {task.name}" for name, digest in kept.items()}
    if manifest.trained is not None:
        found[manifest.trained] = "manifest as training wrote it"
    if manifest.parent is not None:
        found[manifest.parent] = "manifest of the version before"
    return found


def line_of(manifest: Manifest, store: BlobStore) -> Iterator[Manifest]:
    """The version as training wrote it, and those before it, newest first; later tasks need them.

    Raises:
        StoreError: one is missing or damaged.
    """
    found = manifest if manifest.trained is None else Manifest.from_bytes(store.get(manifest.trained))
    yield found
    while found.parent is not None:
        found = Manifest.from_bytes(store.get(found.parent))
        yield found
