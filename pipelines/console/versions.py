"""Versions that people name on a command line: a registered one, or a snapshot in a store."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace

from cluster.store import ArtifactStore, open_store
from sapt_core.errors import SnapshotError
from sapt_core.settings import PlacesConfig
from sapt_core.versions.manifest import Manifest


def add_arguments(parser: ArgumentParser) -> None:
    """Add ``--version`` and ``--snapshot``, of which one must be given."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--version", metavar="REF", help="of tracking.model in tracking.uri: a number, latest or an alias"
    )
    which.add_argument("--snapshot", metavar="DIGEST", help="of a version in store.uri, without MLflow")


def open_version(arguments: Namespace, places: PlacesConfig) -> tuple[Manifest, ArtifactStore]:
    """The manifest of the named version and the store that holds its blobs.

    Raises:
        SnapshotError: it is no pool, is damaged, or was written by a newer release.
        TrackingError: MLflow cannot be reached or has no such version.
        StoreError: the store cannot be read or has no such snapshot.
    """
    if arguments.snapshot is not None:
        if not re.fullmatch(r"[0-9a-f]{64}", arguments.snapshot):
            raise SnapshotError(
                f"--snapshot {arguments.snapshot}: give the 64 hex digits that pipelines/continual.py ended with"
            )
        store = open_store(places.store)
        return Manifest.from_bytes(store.get(arguments.snapshot)), store
    from cluster.tracking.registry import PoolRegistry  # noqa: PLC0415  MLflow only where it is asked for
    from cluster.tracking.runs import check_readable  # noqa: PLC0415

    data, kept, _ = PoolRegistry(check_readable(places.tracking)).load_manifest(arguments.version)
    return Manifest.from_bytes(data), open_store(kept)
