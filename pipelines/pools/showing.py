"""Show one version: its tasks in order, scores, what it carries for later tasks, and its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.console import cli
from pipelines.console.commands import pasted

if TYPE_CHECKING:
    from sapt_core.versions.manifest import CarriedTask

VERSION = {"version": "a number, latest, an alias, or in full models:/NAME/3 or models:/NAME@ALIAS"}


def main() -> None:
    """Parse the command line and print."""
    example = pasted("pool", "show", "champion", "tracking.model=quickstart")
    parser = cli.parser(__doc__ or "", example, needs_config=False, action="show", named=VERSION)
    arguments = cli.parse(parser)

    from cluster.store import open_store
    from cluster.tracking.runs import metric_name
    from pipelines.console.tables import text_table, wide_console
    from pipelines.console.versions import find_registered
    from pipelines.pools.opened import places_of, registry_of
    from sapt_core.versions.contents import blobs_of

    places = places_of(arguments)
    manifest, kept, version = find_registered(arguments.version, places, arguments.overrides)
    scores = registry_of(places, version.model).scores(version)
    store = open_store(kept)
    rows = []
    for index, task in enumerate(manifest.tasks):
        score = scores.get(metric_name(f"score/{task.name}"))
        carried = "" if manifest.carried is None else _told(manifest.carried[index])
        rows.append([task.name, "" if score is None else f"{score:.1f}", task.metric, carried or "nothing"])
    console = wide_console()
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    title = f"{version.model} version {version.version}{aliases}, line {version.line}"
    console.print(text_table(title, ["task", "score", "metric", "carries for later tasks"], rows))
    figures = [f"{said} {scores[name]:.2f}" for said, name in (("AP", "ap"), ("F.Ra", "f_ra")) if name in scores]
    console.print("  ".join([*figures, f"method {manifest.method.name}", f"backbone {manifest.backbone.path}"]))
    size = sum(store.size(digest) for digest in blobs_of(manifest, backbone=False))
    console.print(f"{size:,} bytes in {store.uri} beside the backbone; snapshot {manifest.digest}", soft_wrap=True)


def _told(task: CarriedTask) -> str:
    """What is carried of a task: rows of each split, what there is to reflect on, and what it was learnt again from."""
    splits = [name.removesuffix(".arrow") for name in sorted(task.tokens) if name.endswith(".arrow")]
    again = [
        f"learnt again {'anew ' if each.anew else ''}from {each.rows['train']} rows ({each.data[:12]})"
        for each in task.again
    ]
    return ", ".join([*(f"{task.rows[split]} {split} rows" for split in splits), *task.reflection, *again])
