"""Look after a store: how large it is, whether it is whole, and what of it nothing needs any more.

    python pipelines/store.py du store.uri=runs/store
    python pipelines/store.py verify store.uri=runs/store
    python pipelines/store.py gc store.uri=runs/store
    python pipelines/store.py gc --remove store.uri=runs/store

gc lists, and with --remove removes, what no record of a stage reaches and nothing has written or put in the last 14
days: it may be on its way into a record. What a pool was made to forget goes at once, with the records that came of it,
unless a version that is registered in MLflow (tracking.uri) knows it still.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from pipelines.console import cli
from pipelines.console.commands import pasted
from sapt_core.errors import FaultsError, TrackingError

if TYPE_CHECKING:
    from cluster.store import ArtifactStore
    from sapt_core.settings import PlacesConfig


def main() -> None:
    """Parse the command line and do what is asked."""
    parser = cli.parser(
        __doc__ or "",
        pasted("store", "gc", "store.uri=runs/store"),
        needs_config=False,
        actions=["du", "verify", "gc"],
    )
    parser.add_argument("--remove", action="store_true", help="with gc: remove what is listed; default: list it")
    parser.add_argument(
        "--keep",
        type=_digest,
        action="append",
        default=[],
        metavar="DIGEST",
        help="with gc: of a version that counts although its record was deleted; may be given several times",
    )
    arguments = cli.parse(parser)

    from cluster.store import open_store
    from sapt_core.config.experiment import load_config, load_places

    config, overrides = arguments.config, arguments.overrides
    places = load_places(overrides) if config is None else load_config(config, overrides)
    store = open_store(places.store)
    if arguments.action == "du":
        _used(store)
    elif arguments.action == "verify":
        _verify(store)
    else:
        _collect(store, places, arguments)


def _used(store: ArtifactStore) -> None:
    from cluster.store.contents import usage
    from pipelines.console.tables import text_table, wide_console

    rows = [[use.what, f"{use.objects:,}", f"{use.size:,}"] for use in usage(store)]
    wide_console().print(text_table(store.uri, ["what", "objects", "bytes"], rows))


def _verify(store: ArtifactStore) -> None:
    from cluster.store.contents import faults_of

    faults = faults_of(store)
    if faults:
        raise FaultsError(f"{store.uri} is not whole; what is gone is made anew by the run that needs it:", faults)
    print(f"{store.uri} is whole: all blobs were read, and all that records name is there")


def _collect(store: ArtifactStore, places: PlacesConfig, arguments: argparse.Namespace) -> None:
    from cluster.store.cleaning import remove, unreachable

    found = unreachable(store, keep=[*arguments.keep, *_registered(store, places)])
    for leftover in found:
        print(f"{leftover.entry.size:>14,}  {leftover.entry.name}: {leftover.why}")
    print(f"{sum(leftover.entry.size for leftover in found):>14,}  bytes in {len(found)} objects of {store.uri}")
    if arguments.remove:
        print(f"{remove(store, found):>14,}  bytes removed")
    elif found:
        print("Nothing was removed: --remove does.")


def _registered(store: ArtifactStore, places: PlacesConfig) -> list[str]:
    """Manifests in the store of versions that are registered; none is asked for where nothing was forgotten.

    Raises:
        TrackingError: MLflow cannot be reached, or has nothing of a model that was made to forget a task.
    """
    from cluster.store.cleaning import forgetting

    forgotten = forgetting(store)
    if not forgotten:
        return []

    from cluster.tracking.lines import SNAPSHOT
    from cluster.tracking.registry import PoolRegistry
    from cluster.tracking.service import check_readable, is_there

    models = {record["metrics"]["model"] for record in forgotten} - {None}
    if not models and not is_there(places.tracking):
        return []  # forgotten by its snapshot, where nobody uses MLflow
    registry = PoolRegistry(check_readable(places.tracking))
    versions = {name: registry.versions(name) for name in registry.models()}
    unknown = [name for name in sorted(models) if not versions.get(name)]
    if unknown:
        raise TrackingError(
            f"A task was forgotten by {', '.join(unknown)}, of which {registry.config.uri} has no version: nobody can "
            "say here which versions know it still. Give the tracking.uri where they are registered"
        )
    digests = {version.tags.get(SNAPSHOT) for each in versions.values() for version in each} - {None}
    return [digest for digest in digests if digest is not None and store.has(digest)]


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the 64 hex digits that learning ended with")
    return text


if __name__ == "__main__":
    cli.run(main)
