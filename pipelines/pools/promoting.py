"""Make a version the champion, if it keeps what the champion knows and has learnt what it says.

Both are scored on the sealed test rows that the version carries, and so is the bare backbone; what the store has been
told of before is not scored again. Refused where a task falls by more than registry.max_drop or scores no better than
the bare backbone.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.console import cli
from pipelines.console.commands import pasted
from pipelines.pools.scoring import set_apart
from pipelines.pools.showing import VERSION
from sapt_core.errors import FaultsError, LineageError, SnapshotError, StoreError

if TYPE_CHECKING:
    from cluster.tracking.lines import PoolVersion
    from pipelines.sequence.gate import Row
    from sapt_core.settings import PlacesConfig, StoreConfig
    from sapt_core.versions.manifest import Manifest


def main() -> None:
    """Parse the command line, score, and move the alias or refuse to."""
    example = pasted("pool", "promote", "latest", "tracking.model=quickstart")
    parser = cli.parser(__doc__ or "", example, needs_config=False, action="promote", named=VERSION)
    cli.add_inline(parser, told="score on this machine alone, without Ray")
    parser.add_argument("--reason", metavar="TEXT", default="it passed the gate", help="why, for the record")
    parser.add_argument("--force", metavar="REASON", help="promote it whatever the scores, for this reason")
    parser.add_argument("--line", metavar="NAME", help="its line, if that is not the champion's")
    arguments = cli.parse(parser)

    from cluster.store import open_store
    from cluster.tracking.lines import forgotten_in
    from pipelines.console.tables import wide_console
    from pipelines.console.versions import find_registered
    from pipelines.pools.opened import places_of, registry_of
    from pipelines.pools.promotion import Promotion
    from pipelines.pools.scoring import score_table, scored, scoring_config
    from pipelines.sequence.gate import build_gate

    said = set_apart(arguments)
    console, places = wide_console(), places_of(arguments)
    candidate, kept, version = find_registered(arguments.version, places, arguments.overrides)
    registry = registry_of(places, version.model)
    versions = registry.versions()
    champion = next((each for each in versions if "champion" in each.aliases), None)
    if champion is not None and champion.version == version.version:
        console.print(f"{version.model} version {version.version} is the champion already")
        return
    _check_line(version, champion or versions[0], arguments.line)
    rows: list[Row] = []
    try:
        rival = None if champion is None else _rival(champion, kept, arguments, places)
        config = scoring_config(candidate, kept, places, arguments.config, said)
        gate = build_gate(config, candidate, rival, forgotten_in(versions, version))
        rows = scored(gate, open_store(kept), config, arguments)
        other = "no champion" if champion is None else f"champion {champion.version}"
        console.print(score_table(rows, version.model, f"version {version.version}", other))
        faults = [fault for row in rows for fault in row.faults(places.registry.max_drop)]
    except (SnapshotError, StoreError) as error:  # so that a champion can be replaced that is damaged
        if arguments.force is None:
            raise
        faults = [f"not scored: {error}"]
        console.print(faults[0], soft_wrap=True)
    if faults and arguments.force is None:
        title = f"{version.model} version {version.version} is not promoted (--force REASON does it all the same):"
        raise FaultsError(title, faults)
    promotion = Promotion.of(version, champion, arguments.force or arguments.reason, rows, faults)
    promotion.carry_out(registry)
    console.print(f"champion: {version.model} version {version.version}")
    if champion is not None:
        console.print(f"before:   version {champion.version}; {pasted('pool', 'rollback')} takes it back")


def _check_line(version: PoolVersion, other: PoolVersion, said: str | None) -> None:
    """Refuse a version of another line than the champion's, or, without one, the model's first, unless that is said."""
    if said is not None and said != version.line:
        raise LineageError(f"--line {said}: {version.model} version {version.version} is of line {version.line}")
    if version.line != other.line and said is None:
        raise LineageError(
            f"{version.model} version {version.version} is of line {version.line}, and what answers now of "
            f"{other.line}: it does not go on from that. If it is to take its place all the same, give "
            f"--line {version.line}"
        )


def _rival(champion: PoolVersion, kept: StoreConfig, arguments: argparse.Namespace, places: PlacesConfig) -> Manifest:
    """The champion's manifest, if its blobs lie where those of the version do.

    Raises:
        SnapshotError: they lie elsewhere; or it is damaged or was written by a newer release.
    """
    from pipelines.console.versions import find_registered

    rival, beside, _ = find_registered(champion.uri, places, arguments.overrides)
    if beside.uri != kept.uri:
        raise SnapshotError(
            f"The version lies in {kept.uri} and the champion, version {champion.version}, in {beside.uri}: copy one "
            "store into the other and say by store.uri where both are"
        )
    return rival
