"""Make the version that does not know a task: without its block, key, rows and what reflection held of it.

    python pipelines/pool.py forget animal --version latest tracking.model=quickstart
    python pipelines/pool.py forget animal --snapshot DIGEST store.uri=runs/store

Nothing is trained. The next version of the model answers all other tasks with what is left, and is held against the one
it goes on from. Its bytes and those of the task stay where versions that know the task are registered; once these are
deleted in MLflow, `sapt store gc` removes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from pipelines.console import cli
from pipelines.console.commands import pasted
from pipelines.pools.scoring import set_apart
from sapt_core.errors import FaultsError, SnapshotError

if TYPE_CHECKING:
    from cluster.store import ArtifactStore
    from cluster.tracking.lines import PoolVersion
    from sapt_core.settings import PlacesConfig, StoreConfig
    from sapt_core.versions.manifest import Manifest


class _Where(NamedTuple):
    """The version and where it lies, and what the command line says of how it is scored."""

    version: PoolVersion
    kept: StoreConfig
    store: ArtifactStore
    places: PlacesConfig
    said: Sequence[str]


def main() -> None:
    """Parse the command line, make the version, score and register it."""
    parser = cli.parser(
        __doc__ or "",
        pasted("pool", "forget", "animal", "--version", "latest", "tracking.model=quickstart"),
        needs_config=False,
        action="forget",
        named={"task": "that the version has learnt"},
    )
    cli.add_version(parser)
    cli.add_inline(parser, told="score on this machine alone, without Ray")
    arguments = cli.parse(parser)
    said = set_apart(arguments)

    from cluster.store import open_store
    from cluster.store.cleaning import FORGET
    from pipelines.console.versions import find_registered, snapshot
    from pipelines.pools.made import keep
    from pipelines.pools.opened import places_of
    from sapt_core.versions.forgetting import forget, forgetting_faults, forgotten

    task, places = arguments.task, places_of(arguments)
    version: PoolVersion | None = None
    if arguments.snapshot is None:
        before, kept, version = find_registered(arguments.version, places, arguments.overrides)
    else:
        (before, _), kept = snapshot(arguments.snapshot, places), places.store
    faults = forgetting_faults(before, task)
    if faults:
        raise FaultsError(f"The version cannot forget {task}:", faults)
    store = open_store(kept)
    after = forget(before, task, store, lineage=_lineage(before, task))
    gone = {"forgotten": sorted(forgotten(before, after, task, store))}
    keep(store, after, FORGET, task, {**gone, "model": None if version is None else version.model})
    print(f"snapshot {after.digest}")
    if version is None:
        return
    where = _Where(version, kept, store, places, said)
    metrics = _scored(before, after, where, arguments)
    number = _registered(before, after, where, task, metrics)
    print(f"{version.model} version {number}: models:/{version.model}/{number}, without {task}")


def _scored(before: Manifest, after: Manifest, where: _Where, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures of the new version, held against the one before on the test rows that it carries; prints the table."""
    from pipelines.console.tables import wide_console
    from pipelines.pools.scoring import score_table, scored, scoring_config
    from pipelines.sequence.gate import build_gate

    console = wide_console()
    try:
        config = scoring_config(after, where.kept, where.places, arguments.config, where.said)
        gate = replace(build_gate(config, after, before, {arguments.task}), bare={})
    except SnapshotError as error:
        console.print(f"not scored: {error}", soft_wrap=True)
        return {}
    rows = scored(gate, where.store, config, arguments)
    console.print(score_table(rows, where.version.model, "the version without it", f"version {where.version.version}"))
    scores = {row.task: row.candidate for row in rows if row.candidate is not None}
    figures = {f"score/{task}": score for task, score in scores.items()}
    return figures | ({"ap": fmean(scores.values())} if len(scores) == len(after.tasks) else {})


def _registered(before: Manifest, after: Manifest, where: _Where, task: str, metrics: Mapping[str, float]) -> int:
    from cluster.tracking.lines import FORGOTTEN, LINEAGE, Lineage
    from pipelines.pools.made import register

    version, names = where.version, [each.name for each in after.tasks]
    asked = f"method {after.method.name}, tasks {', '.join(names)}"
    lineage = ("", *("" for _ in names), version.tags.get(LINEAGE, ""), _lineage(before, task))[-len(names) :]
    return register(
        after,
        where.kept,
        where.places.tracking.model_copy(update={"model": version.model}),
        Lineage(asked, lineage, tasks=tuple(names)),
        run=f"forget {task}",
        description=f"{after.method.name} without {task}, which version {version.version} had learnt; its tasks: "
        f"{', '.join(names)}.",
        tags={FORGOTTEN: task},
        parent=before.digest,
        metrics=metrics,
    )


def _lineage(before: Manifest, task: str) -> str:
    """The new version's name, known before it is made."""
    from cluster.store.cleaning import FORGET
    from sapt_core.io.hashing import canonical_hash

    return canonical_hash([FORGET, before.digest, task])
