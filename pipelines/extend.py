"""Learn one or more tasks on top of a published version, with nothing but MLflow and the store.

    python pipelines/extend.py --from models:/quickstart@champion --task colour --data colour.csv [key=value ...]

How they are learnt is the version's; what may differ a task can be given as overrides or in a config. The data of the
tasks that the version knows is not needed. Submitted again after any interruption, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.console import cli
from pipelines.console.commands import pasted


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
    parser.add_argument("--task", action="append", required=True, metavar="NAME", help="a new task; once a task")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        type=Path,
        metavar="PATH",
        help="its rows, once a --task: a folder with train and test, or one file (.csv, .tsv, .jsonl, .json, .parquet) "
        "with input and output, of which test rows are split off",
    )
    parser.add_argument("--definition", action="append", metavar="TEXT", help="its instruction, if the rows have none")
    parser.add_argument("--template", help="of the prompts (default: that of the version's newest task)")
    parser.add_argument(
        "--metric",
        help="of the scores, or several with commas between them, the leading one first (default: that of the "
        "version's newest task)",
    )
    cli.add_run(parser)
    arguments = cli.parse(parser)
    _check_pairs(parser, arguments)

    from cluster.store import open_store
    from pipelines.console.versions import find_registered, snapshot
    from pipelines.running.sequence import carry_out
    from pipelines.sequence.extension import Places, extend
    from sapt_core.config.experiment import load_places
    from sapt_core.data.addition import Addition

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
    definitions = arguments.definition or [None] * len(arguments.task)
    additions = [
        Addition(name, path, definition, arguments.template, arguments.metric)
        for name, path, definition in zip(arguments.task, arguments.data, definitions, strict=True)
    ]
    experiment = extend(
        manifest,
        store,
        additions,
        places=Places(kept.model_dump(mode="json"), tracking),
        path=arguments.config,
        overrides=arguments.overrides,
    )
    carry_out(experiment, arguments)


def _check_pairs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    tasks = len(arguments.task)
    for option, given in (("--data", arguments.data), ("--definition", arguments.definition)):
        if given is not None and len(given) != tasks:
            parser.error(f"{option} is given {len(given)} times and --task {tasks}: give it once a task")


if __name__ == "__main__":
    cli.run(main)
