"""Read every blob of a version and say which are gone or damaged."""

from __future__ import annotations

from pipelines.console import cli
from pipelines.console.commands import pasted
from pipelines.pools.showing import VERSION
from sapt_core.errors import FaultsError, StoreError, StoreUnavailableError


def main() -> None:
    """Parse the command line, read and print."""
    example = pasted("pool", "verify", "champion", "tracking.model=quickstart")
    parser = cli.parser(__doc__ or "", example, needs_config=False, action="verify", named=VERSION)
    arguments = cli.parse(parser)

    from cluster.store import open_store
    from cluster.store.contents import damaged
    from pipelines.console.versions import find_registered
    from pipelines.pools.opened import places_of
    from sapt_core.versions.contents import blobs_of, line_of

    manifest, kept, version = find_registered(arguments.version, places_of(arguments), arguments.overrides)
    store = open_store(kept)
    blobs = blobs_of(manifest)
    try:
        for before in line_of(manifest, store):
            blobs = blobs_of(before) | {before.digest: f"manifest of {before.tasks[-1].name}"} | blobs
    except StoreUnavailableError:
        raise
    except StoreError:
        pass  # the manifest that is gone is among the blobs, and what it alone names nobody can say
    faults = damaged(blobs, store)
    if faults:
        raise FaultsError(f"{version.model} version {version.version} is not whole in {store.uri}:", faults)
    print(f"{version.model} version {version.version} is whole: {len(blobs)} blobs in {store.uri}")
