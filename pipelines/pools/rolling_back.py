"""Take the champion back: the one before it answers again, and is the one before in its turn."""

from __future__ import annotations

from pipelines.console import cli
from pipelines.console.commands import pasted
from sapt_core.errors import LineageError


def main() -> None:
    """Parse the command line and swap."""
    parser = cli.parser(
        __doc__ or "", pasted("pool", "rollback", "tracking.model=quickstart"), needs_config=False, action="rollback"
    )
    parser.add_argument("--reason", metavar="TEXT", help="why, for the record")
    arguments = cli.parse(parser)

    from pipelines.pools.opened import places_of, registry_of
    from pipelines.pools.promotion import Promotion

    registry = registry_of(places_of(arguments))
    versions = {alias: version for version in registry.versions() for alias in version.aliases}
    champion, previous = versions.get("champion"), versions.get("previous")
    model = registry.config.model
    if champion is None:
        raise LineageError(f"{model} has no champion: there is nothing to roll back")
    if previous is None or previous.version == champion.version:
        raise LineageError(
            f"{model} has no version that was champion before version {champion.version}: nothing to roll back to. "
            "Promote the one that is to answer"
        )
    why = arguments.reason or f"rolled back from version {champion.version}"
    Promotion.of(previous, champion, why).keep(registry)
    registry.swap(champion, previous)
    print(f"champion: {model} version {previous.version}, taken back from version {champion.version}")
