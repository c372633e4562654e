"""From code to versions of a pool, wherever they are kept."""

from __future__ import annotations

from cluster import store as stores
from cluster.store import ArtifactStore
from pipelines.console.versions import registered, snapshot
from sapt_core.api import Pool
from sapt_core.config.experiment import load_places
from sapt_core.settings import PlacesConfig

_DEFAULTS = PlacesConfig()


def load(
    version: str,
    *,
    store: str = _DEFAULTS.store.uri,
    tracking: str = _DEFAULTS.tracking.uri,
    endpoint_url: str | None = None,
) -> Pool:
    """A version by its name in MLflow's registry, or by its digest in a store.

    Args:
        version: ``models:/NAME@ALIAS``, ``models:/NAME/NUMBER``, or the 64 hex digits that learning ended with.
        store: folder or s3://bucket/prefix, for a digest; a registered version knows its own.
        tracking: MLflow's URI, for a name.
        endpoint_url: of an S3 store; default: the AWS environment's.

    Raises:
        ConfigError: an address has no form that is known.
        SnapshotError: it is no version of a pool, is damaged, or was written by a newer release.
        TrackingError: MLflow cannot be reached or has no such version.
        StoreError: the store cannot be read or has no such blob.
    """
    places = _places(store, endpoint_url, f"tracking.uri={tracking}")
    return Pool(*(registered(version, places) if version.startswith("models:/") else snapshot(version, places)))


def open_store(uri: str = _DEFAULTS.store.uri, *, endpoint_url: str | None = None) -> ArtifactStore:
    """The store of a folder or of s3://bucket/prefix. Nothing is contacted or made yet.

    Raises:
        ConfigError: the address has no form that is known.
    """
    return stores.open_store(_places(uri, endpoint_url).store)


def _places(store: str, endpoint_url: str | None, *others: str) -> PlacesConfig:
    return load_places([f"store.uri={store}", f"store.endpoint_url={endpoint_url or 'null'}", *others])
