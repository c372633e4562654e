"""List the versions of a registered model, line by line."""

from __future__ import annotations

from pipelines.console import cli
from pipelines.console.commands import pasted


def main() -> None:
    """Parse the command line and print."""
    parser = cli.parser(
        __doc__ or "", pasted("pool", "list", "tracking.model=quickstart"), needs_config=False, action="list"
    )
    arguments = cli.parse(parser)

    from pipelines.console.tables import text_table, wide_console
    from pipelines.pools.opened import places_of, registry_of

    registry = registry_of(places_of(arguments))
    versions = registry.versions()
    console = wide_console()
    if not versions:
        console.print(f"{registry.config.model} has no versions yet. Is tracking.model right?")
        return
    lines = dict.fromkeys(version.line for version in versions)
    rows = []
    for version in sorted(versions, key=lambda each: [*lines].index(each.line)):
        scores = registry.scores(version)
        figures = [f"{scores[name]:.2f}" if name in scores else "" for name in ("ap", "f_ra")]
        rows.append([version.line, str(version.version), ", ".join(version.aliases), *figures, version.tasks])
    title = f"{registry.config.model}: versions {len(versions)}, lines {len(lines)}"
    console.print(text_table(title, ["line", "version", "aliases", "AP", "F.Ra", "tasks"], rows))
