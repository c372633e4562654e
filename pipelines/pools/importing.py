"""Make a PEFT LoRA adapter the newest block of a pool, without training.

    python pipelines/pool.py import adapters/colour --onto models:/quickstart@latest --task colour --rows colour.txt
    python pipelines/pool.py import adapters/colour --config quickstart --task colour --rows colour.jsonl
    python pipelines/pool.py import adapters/colour --onto DIGEST --task colour --data colour.csv store.uri=runs/store

Rows are inputs of the adapter's task: they say when its block is meant. With --data in their place, rows with answers,
the task is scored and held in place by later ones like any other. The next version goes on from the one that is
named, and is registered where that is; with --config a pool begins, and with a digest the store alone has it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import cli
from pipelines.console.commands import pasted
from sapt_core.errors import DataError

if TYPE_CHECKING:
    from cluster.tracking.lines import Lineage
    from pipelines.pools.import_ground import Ground
    from sapt_core.data.task import LearntTask
    from sapt_core.versions.manifest import Manifest

IMPORT = "import"  # kind of the record that keeps an imported version's bytes in the store


def main() -> None:
    """Parse the command line, make the version and register it."""
    parser = _parser()
    arguments = cli.parse(parser)
    if arguments.onto is None and arguments.config is None:
        parser.error("give --onto, a version to go on from, or --config, to begin a pool")

    from cluster.store import open_store
    from cluster.tracking.registry import PoolRegistry
    from cluster.tracking.service import is_there, resolved
    from pipelines.pools.import_ground import Given, completed, find_ground, read_data
    from pipelines.pools.made import keep
    from sapt_core.config.experiment import load_config
    from sapt_core.data.task import LearntTask
    from sapt_core.versions.importing import import_adapter

    folder = Path(arguments.folder)
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    ground = find_ground(arguments, config)
    usual = {
        **ground.usual,
        **{name: value for name in ground.usual if (value := getattr(arguments, name)) is not None},
    }
    data = None if arguments.data is None else read_data(arguments, ground, config, usual)
    rows, definition = (
        read_rows(arguments.rows) if data is None else ([row.input for row in data.train], data.definition)
    )
    definition = definition if arguments.definition is None else arguments.definition
    labels = () if data is None else data.labels
    task = LearntTask(name=arguments.task, definition=definition, labels=labels, **usual)
    lineage = _lineage(ground, folder, task, [*rows, *([] if data is None else [data.digest])])
    if ground.tracking is not None and is_there(ground.tracking):
        PoolRegistry(resolved(ground.tracking)).check_continuation(lineage)
    store = open_store(ground.store)
    manifest = import_adapter(folder, task, rows, store, onto=ground.onto)
    if arguments.onto is None and config is not None:
        from sapt_core.backbones.loading import store_backbone

        store_backbone(config.backbone, ground.onto.backbone, store)
    manifest = completed(manifest, ground, config, data, Given(arguments, usual, rows, lineage.names[-1]))
    keep(store, manifest, IMPORT, task.name, {})
    if manifest.attention is not None:
        print(f"rows of {task.name} give its block {manifest.targets[-1][-1]:.2f} of their weight")
    print(f"snapshot {manifest.digest}")
    if ground.tracking is not None:
        number = _publish(manifest, ground, lineage, rows)
        print(f"{ground.tracking.model} version {number}: models:/{ground.tracking.model}/{number}")


def _parser() -> argparse.ArgumentParser:
    example = ("adapters/colour", "--onto", "models:/sapt@latest", "--task", "colour", "--rows", "colour.txt")
    parser = cli.parser(
        __doc__ or "",
        pasted("pool", "import", *example),
        needs_config=False,
        action="import",
        named={"folder": "of the adapter, as PEFT's save_pretrained wrote it"},
    )
    parser.add_argument("--onto", metavar="REF", help="models:/NAME@ALIAS, models:/NAME/NUMBER, or a snapshot's digest")
    parser.add_argument("--task", required=True, metavar="NAME", help="what the adapter was trained on")
    parser.add_argument("--definition", metavar="TEXT", help="put before every input; default: the rows' own, or none")
    known = parser.add_mutually_exclusive_group(required=True)
    known.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="inputs of the task: text, one a line, or .json, .jsonl, .csv, .tsv or .parquet (docs/config.md)",
    )
    known.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="rows of the task with their answers, a folder or a file, as for extend: it can be scored and extended",
    )
    usual = "default: as of the version's newest task, or as benchmark in --config has it"
    parser.add_argument("--template", metavar="NAME", help=f"text around definition and input; {usual}")
    parser.add_argument("--metric", metavar="NAME", help="the task's score; default: likewise")
    parser.add_argument("--max-source-tokens", type=int, metavar="N", help="longest prompt; default: likewise")
    parser.add_argument("--max-target-tokens", type=int, metavar="N", help="longest answer; default: likewise")
    cli.add_inline(parser, told="make what --data gives to later tasks on this machine alone, without Ray")
    return parser


def read_rows(path: Path) -> tuple[list[str], str]:
    """Inputs of a task and its definition, empty where the file has none.

    Raises:
        DataError: with every row that is no input, or the reason why the file cannot be read.
    """
    from sapt_core.data.files import kind, read_file, suffix_of
    from sapt_core.data.rows import definition_of
    from sapt_core.task_settings import ColumnsConfig

    said: Any = None
    try:
        if suffix_of(path) is not None:
            found = read_file(path)
            instances, said = list(found.instances), found.said
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            instances = [line for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError("The rows cannot be read:", [f"{path}: {error}"]) from error
    if not instances:
        raise DataError("The rows cannot be read:", [f"{path}: holds no rows; give inputs, one a row"])
    texts = [row.get("input", row.get("prompt")) if isinstance(row, dict) else row for row in instances]
    places = [place for place, text in enumerate(texts) if not isinstance(text, str)]
    if places:
        faults = [f"{path}: row {place}: input is {kind(texts[place])}" for place in places]
        raise DataError("The rows cannot be read; rows count from 0:", faults)
    stated = [given for row in instances if (given := definition_of(row, ColumnsConfig()))]
    wordings = (stated[:1] if said is None else said.get("Definition")) or ""
    return list(map(str, texts)), str(wordings[0] if isinstance(wordings, list) else wordings)


def _lineage(ground: Ground, folder: Path, task: LearntTask, rows: Sequence[str]) -> Lineage:
    """The version before, and a name of the next that is known before it is made."""
    from cluster.tracking.lines import Lineage
    from sapt_core.io.hashing import canonical_hash
    from sapt_core.versions.adapters import SETTINGS, TENSORS
    from sapt_core.versions.manifest import Manifest

    files = [folder / name for name in (SETTINGS, TENSORS)]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    earlier = ground.onto.tasks if isinstance(ground.onto, Manifest) else ()
    name = canonical_hash([IMPORT, ground.lineage, digests, task.model_dump(), list(rows)])
    tasks = tuple(each.name for each in (*earlier, task))
    asked = f"method {ground.onto.method.name}, tasks {', '.join(tasks)}"
    return Lineage(asked, (*(ground.lineage or "" for _ in range(ground.index)), name), tasks=tasks)


def _publish(manifest: Manifest, ground: Ground, lineage: Lineage, rows: Sequence[str]) -> int:
    """Register the version; returns its number."""
    from pipelines.pools.made import register
    from sapt_core.io.hashing import canonical_hash
    from sapt_core.versions.manifest import Manifest

    assert ground.tracking is not None  # noqa: S101 - main asks for it alone then
    task = manifest.tasks[-1].name
    tasks = ", ".join(each.name for each in manifest.tasks)
    return register(
        manifest,
        ground.store,
        ground.tracking,
        lineage,
        run=f"import {task}",
        description=f"{manifest.method.name} with {task} brought in as a PEFT adapter, not trained here and not "
        f"scored yet; its tasks: {tasks}.",
        parent=ground.onto.digest if isinstance(ground.onto, Manifest) else None,
        params={"rows": len(rows), "data_digest": canonical_hash(list(rows))},
    )
