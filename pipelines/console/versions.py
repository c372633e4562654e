"""Versions that people name: a registered one, or a snapshot in a store."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import OmegaConf

from cluster.store import ArtifactStore, open_store
from sapt_core.config.experiment import merged
from sapt_core.config.overrides import parsed
from sapt_core.errors import SnapshotError
from sapt_core.settings import PlacesConfig, StoreConfig
from sapt_core.versions.manifest import Manifest

if TYPE_CHECKING:
    from cluster.tracking.lines import PoolVersion


_DIGEST = re.compile(r"[0-9a-f]{64}")


def open_version(arguments: Namespace, places: PlacesConfig) -> tuple[Manifest, ArtifactStore]:
    """The version that ``--version`` or ``--snapshot`` names; errors as of ``registered`` and ``snapshot``."""
    if arguments.snapshot is not None:
        return snapshot(arguments.snapshot, places)
    return registered(arguments.version, places, arguments.overrides)


def snapshot(digest: str, places: PlacesConfig) -> tuple[Manifest, ArtifactStore]:
    """The manifest of a version by its digest, and the store, which holds its blobs.

    Raises:
        SnapshotError: the digest is none, or what it names is no pool, or was written by a newer release.
        StoreError: the store cannot be read or has no such snapshot.
    """
    if not _DIGEST.fullmatch(digest):
        raise SnapshotError(f"snapshot {digest}: give the 64 hex digits that learning ended with")
    store = open_store(places.store)
    return Manifest.from_bytes(store.get(digest)), store


def registered(reference: str, places: PlacesConfig, overrides: Sequence[str] = ()) -> tuple[Manifest, ArtifactStore]:
    """The manifest of a version that is registered in MLflow, and the store that holds its blobs.

    That is the store it was published with, unless ``overrides``, the command line's, name another.

    Raises:
        SnapshotError: it is no pool, is damaged, or was written by a newer release.
        TrackingError: MLflow cannot be reached or has no such version.
    """
    found = find_registered(reference, places, overrides)
    return found.manifest, open_store(found.store)


class Registered(NamedTuple):
    """A version that is registered in MLflow.

    Attributes:
        manifest: what it is.
        store: where its blobs are.
        version: as the registry has it.
    """

    manifest: Manifest
    store: StoreConfig
    version: PoolVersion


def find_registered(reference: str, places: PlacesConfig, overrides: Sequence[str] = ()) -> Registered:
    """A registered version with what the registry says of it; as ``registered``."""
    from cluster.tracking.registry import PoolRegistry  # noqa: PLC0415  MLflow only where it is asked for
    from cluster.tracking.service import check_readable  # noqa: PLC0415

    registry = PoolRegistry(check_readable(places.tracking))
    data, kept, version = registry.load_manifest(reference, places.store.endpoint_url)
    return Registered(Manifest.from_bytes(data), _moved(kept, places.store, overrides), version)


def find_version(
    reference: str, places: PlacesConfig, overrides: Sequence[str] = ()
) -> tuple[Manifest, StoreConfig, PoolVersion | None]:
    """The version of a digest, or a registered one, its store, and what the registry says of the latter.

    Raises:
        SnapshotError, StoreError, TrackingError: as of ``snapshot`` and ``registered``.
    """
    if _DIGEST.fullmatch(reference):
        return snapshot(reference, places)[0], places.store, None
    return find_registered(reference, places, overrides)


def _moved(kept: StoreConfig, asked: StoreConfig, overrides: Sequence[str]) -> StoreConfig:
    """The store that a version was published with, but for what the command line says of it: stores move.

    What a config file says does not count: it may be of another machine than the version.
    """
    said = OmegaConf.select(merged(parsed(overrides, PlacesConfig)), "store") or {}
    return kept.model_copy(update={field: getattr(asked, field) for field in said})
