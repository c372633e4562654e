"""Compare two versions task by task, by the scores that they were published with."""

from __future__ import annotations

from pipelines.console import cli
from pipelines.console.commands import pasted


def main() -> None:
    """Parse the command line and print."""
    named = {"first": "a version, as of show", "second": "the version that is held against it"}
    example = pasted("pool", "compare", "champion", "latest", "tracking.model=quickstart")
    parser = cli.parser(__doc__ or "", example, needs_config=False, action="compare", named=named)
    arguments = cli.parse(parser)

    from cluster.tracking.runs import metric_name
    from pipelines.console.tables import text_table, wide_console
    from pipelines.console.versions import find_registered
    from pipelines.pools.opened import places_of, registry_of

    places = places_of(arguments)
    references = (arguments.first, arguments.second)
    one, two = (find_registered(reference, places, arguments.overrides) for reference in references)
    figures = [registry_of(places, version.model).scores(version) for _, _, version in (one, two)]
    tasks = list(dict.fromkeys(task.name for manifest, _, _ in (one, two) for task in manifest.tasks))
    names = {task: metric_name(f"score/{task}") for task in tasks} | {"AP": "ap", "F.Ra": "f_ra"}
    rows = []
    for said, name in names.items():
        before, after = (scores.get(name) for scores in figures)
        change = "" if before is None or after is None else f"{after - before:+.2f}"
        rows.append([said, *("" if score is None else f"{score:.2f}" for score in (before, after)), change])
    title = " and ".join(f"{version.model} {version.version} (line {version.line})" for _, _, version in (one, two))
    header = ["task", *(f"version {version.version}" for _, _, version in (one, two)), "change"]
    wide_console().print(text_table(title, header, rows))
