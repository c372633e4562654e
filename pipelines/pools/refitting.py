"""Give a version what later tasks need of a task and it does not carry: sealed rows, what is reflected on.

    python pipelines/pool.py refit latest --task animal --data animal.csv tracking.model=quickstart
    python pipelines/pool.py refit DIGEST --task animal --data animal.csv store.uri=runs/store

Nothing is trained, and blocks stay what they are: the next version of the model answers as the one that it is made
of, and can be extended and promoted by its scores. The data is needed this once. A version of an earlier release
carries nothing: give --task and --data of all its tasks, and with --config how it was learnt.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.console import cli
from pipelines.console.commands import pasted

if TYPE_CHECKING:
    from cluster.tracking.lines import PoolVersion
    from sapt_core.settings import StoreConfig, TrackingConfig
    from sapt_core.versions.manifest import Manifest


def main() -> None:
    """Parse the command line, make the version and register it."""
    parser = _parser()
    arguments = cli.parse(parser)
    cli.check_pairs(parser, arguments)

    from cluster.store import open_store
    from cluster.store.lookups import Lookups
    from pipelines.console.versions import find_version
    from pipelines.pools.made import keep
    from pipelines.pools.scoring import executor_of
    from pipelines.sequence.extension import Places
    from pipelines.sequence.refit import REFIT, refit
    from sapt_core.config.experiment import load_places
    from sapt_core.task_settings import TaskConfig

    places = load_places([each for each in arguments.overrides if each.startswith(("store.", "tracking."))])
    before, kept, version = find_version(arguments.version, places, arguments.overrides)
    store = open_store(kept)
    completion = refit(
        before,
        store,
        [TaskConfig(name=name, path=str(path)) for name, path in zip(arguments.task, arguments.data, strict=True)],
        places=Places(kept.model_dump(mode="json"), places.tracking.model_dump(mode="json")),
        path=arguments.config,
        overrides=arguments.overrides,
    )
    known = Lookups(store)
    with ExitStack() as stack:
        after = completion.run(known, executor_of([completion.stage], known, completion.config, arguments, stack))
    keep(store, after, REFIT, ", ".join(arguments.task), {})
    for index, task in enumerate(after.tasks):
        if task.name in arguments.task and after.carried is not None:
            print(f"{task.name}: carries {', '.join([*after.carried[index].tokens, *after.carried[index].reflection])}")
    print(f"snapshot {after.digest}")
    if version is not None:
        tracking = places.tracking.model_copy(update={"model": version.model})
        number = _registered(before, after, version, (kept, tracking), ", ".join(arguments.task))
        print(f"{version.model} version {number}: models:/{version.model}/{number}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        __doc__ or "",
        pasted("pool", "refit", "latest", "--task", "animal", "--data", "animal.csv", "tracking.model=quickstart"),
        needs_config=False,
        action="refit",
        named={"version": "a number, latest, an alias, in full models:/NAME/3, or a snapshot's digest in store.uri"},
    )
    parser.add_argument("--task", action="append", required=True, metavar="NAME", help="one that it knows; once a task")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        type=Path,
        metavar="PATH",
        help="what it was learnt from, once a --task: a folder or a file, as for extend. It is split as it was then",
    )
    cli.add_inline(parser, told="on this machine alone, without Ray")
    return parser


def _registered(
    before: Manifest, after: Manifest, version: PoolVersion, where: tuple[StoreConfig, TrackingConfig], tasks: str
) -> int:
    from cluster.tracking.lines import Lineage
    from pipelines.pools.made import register

    assert after.lineage is not None  # noqa: S101 - it is complete
    return register(
        after,
        *where,
        Lineage(
            f"method {after.method.name}, tasks {', '.join(after.names)}",
            (*("" for _ in range(version.index - 1)), after.lineage),  # nothing is learnt: its place stays
            tasks=after.names,
        ),
        run=f"refit {tasks}",
        description=f"Version {version.version} with what later tasks need of {tasks}, not trained; its tasks: "
        f"{', '.join(after.names)}.",
        parent=before.digest,
    )
