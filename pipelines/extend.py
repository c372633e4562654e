"""Learn one or more tasks on top of a published version, with nothing but MLflow and the store.

    python pipelines/extend.py --from models:/quickstart@champion --task colour --data colour.csv [key=value ...]
    python pipelines/extend.py --from models:/quickstart@champion --tasks tasks.yaml [key=value ...]

How they are learnt is the version's; what may differ a task can be given as overrides or in a config. The data of the
tasks that the version knows is not needed. Submitted again after any interruption, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import cli
from pipelines.console.commands import pasted

if TYPE_CHECKING:
    from sapt_core.task_settings import TaskConfig


def main() -> None:
    """Parse the command line and learn."""
    parser = cli.parser(
        __doc__ or "",
        pasted("extend", "--from", "models:/quickstart@champion", "--task", "colour", "--data", "colour.csv"),
        needs_config=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from",
        dest="version",
        metavar="REF",
        help="the version: models:/NAME/3, models:/NAME@ALIAS, or of tracking.model a number, latest or an alias",
    )
    source.add_argument("--snapshot", metavar="DIGEST", help="the version by its digest in store.uri, without MLflow")
    parser.add_argument("--task", action="append", metavar="NAME", help="a new task; once a task")
    parser.add_argument(
        "--again",
        action="store_true",
        help="the task is one that the version knows: learn it further from these rows, its other tasks held as ever",
    )
    parser.add_argument(
        "--anew", action="store_true", help="with --again: with a new block and key in the place of those it has"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="its rows, once a --task: a folder with train and test, one file (.csv, .tsv, .jsonl, .json, .parquet) of "
        "which test rows are split off, or a hub id (docs/data.md)",
    )
    parser.add_argument("--tasks", type=Path, metavar="FILE", help="the new tasks as a YAML file (docs/data.md)")
    parser.add_argument("--definition", action="append", metavar="TEXT", help="its instruction, if the rows have none")
    parser.add_argument("--template", help="of the prompts (default: that of the version's newest task)")
    parser.add_argument(
        "--metric",
        help="of the scores, or several with commas between them, the leading one first (default: that of the "
        "version's newest task)",
    )
    cli.add_run(parser)
    arguments = cli.parse(parser)
    _check_tasks(parser, arguments)

    from cluster.store import open_store
    from pipelines.console.versions import find_registered, snapshot
    from pipelines.running.sequence import carry_out
    from pipelines.sequence.extension import Places, extend
    from sapt_core.config.experiment import load_places

    cli.check_output(arguments.summary)
    places = load_places([each for each in arguments.overrides if each.startswith(("store.", "tracking."))])
    tracking = places.tracking.model_dump(mode="json")
    if arguments.snapshot is not None:
        manifest, store = snapshot(arguments.snapshot, places)
        kept = places.store
    else:
        found = find_registered(arguments.version, places, arguments.overrides)
        manifest, kept, store = found.manifest, found.store, open_store(found.store)
        tracking["model"] = found.version.model
    experiment = extend(
        manifest,
        store,
        _additions(arguments),
        places=Places(kept.model_dump(mode="json"), tracking),
        path=arguments.config,
        overrides=arguments.overrides,
        again=None if not arguments.again else "anew" if arguments.anew else "further",
    )
    carry_out(experiment, arguments)


def _additions(arguments: argparse.Namespace) -> list[TaskConfig]:
    """The tasks that the command line names, each with what it says of all of them."""
    from omegaconf import OmegaConf

    from sapt_core.config.experiment import validated
    from sapt_core.task_settings import TasksFile

    if arguments.tasks is not None:
        given: dict[str, Any] = {"tasks_file": str(arguments.tasks)}
        what = f"{arguments.tasks} with the command line"
    else:
        definitions = arguments.definition or [None] * len(arguments.task)
        named = zip(arguments.task, arguments.data, definitions, strict=True)
        tasks = [{"name": name, "path": path, "definition": definition} for name, path, definition in named]
        given, what = {"tasks": tasks}, "What the command line says of the tasks"
    shared = {name: getattr(arguments, name) for name in ("template", "metric") if getattr(arguments, name) is not None}
    return list(validated(TasksFile, [OmegaConf.create({**given, "defaults": shared})], what).tasks)


def _check_tasks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if (arguments.tasks is None) == (arguments.task is None):
        parser.error("give the tasks by --task and --data, or by --tasks")
    if arguments.tasks is None:
        cli.check_pairs(parser, arguments)
    elif arguments.data is not None or arguments.definition is not None:
        parser.error("--data and --definition go with --task; what --tasks names says so itself")
    if arguments.anew and not arguments.again:
        parser.error("--anew says how a task is learnt again: give --again too")


if __name__ == "__main__":
    cli.run(main)
