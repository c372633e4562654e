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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import cli
from pipelines.console.commands import pasted
from sapt_core.errors import DataError

if TYPE_CHECKING:
    from cluster.tracking.lines import Lineage
    from sapt_core.config.experiment import ExperimentConfig
    from sapt_core.data.task import LearntTask, Task
    from sapt_core.settings import PlacesConfig, StoreConfig, TrackingConfig
    from sapt_core.versions.importing import PoolKind
    from sapt_core.versions.manifest import Manifest

IMPORT = "import"  # kind of the record that keeps an imported version's bytes in the store


@dataclass(frozen=True)
class _Ground:
    """What an import goes on from.

    Attributes:
        onto: the version, or the kind of a pool that begins.
        store: that has its blobs.
        tracking: with the model that gets the next version; None: the store alone has it.
        line: the registered version's place in its lineage.
        usual: a task's template, metric and lengths, unless the command line has others.
    """

    onto: Manifest | PoolKind
    store: StoreConfig
    tracking: TrackingConfig | None
    line: str | None
    usual: Mapping[str, Any]


def main() -> None:
    """Parse the command line, make the version and register it."""
    parser = _parser()
    arguments = cli.parse(parser)
    if arguments.onto is None and arguments.config is None:
        parser.error("give --onto, a version to go on from, or --config, to begin a pool")

    from cluster.store import open_store
    from cluster.tracking.registry import PoolRegistry
    from cluster.tracking.service import is_there, resolved
    from pipelines.pools.made import keep
    from sapt_core.config.experiment import load_config
    from sapt_core.data.task import LearntTask
    from sapt_core.versions.importing import import_adapter

    folder = Path(arguments.folder)
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    ground = _ground(arguments, config)
    usual = {
        **ground.usual,
        **{name: value for name in ground.usual if (value := getattr(arguments, name)) is not None},
    }
    data = None if arguments.data is None else _read_data(arguments, ground, config, usual)
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
    manifest = _completed(manifest, ground, config, data, _Given(arguments, usual, rows, lineage.names[-1]))
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


def _ground(arguments: argparse.Namespace, config: ExperimentConfig | None) -> _Ground:
    """What the command line names; errors as of ``registered``, ``snapshot`` and ``identify``."""
    from cluster.tracking.lines import LINEAGE
    from pipelines.console.versions import find_registered, snapshot
    from sapt_core.backbones.reference import identify
    from sapt_core.config.experiment import load_places
    from sapt_core.data.cl_benchmark import METRICS
    from sapt_core.template_settings import TEMPLATE_NAMES
    from sapt_core.versions.importing import PoolKind

    if arguments.onto is None:
        assert config is not None  # noqa: S101 - main sees to it
        read = config.benchmark
        suite = read.suite if read.suite in TEMPLATE_NAMES else "superni"
        usual = {
            "template": read.template or suite,
            "metric": next(iter(read.metrics), METRICS.get(read.suite, "exact_match")),
            "max_source_tokens": read.max_source_tokens,
            "max_target_tokens": read.max_target_tokens,
        }
        attention = config.attention if config.method.shared_attention else None
        kind = PoolKind(config.method, identify(config.backbone), config.pet, attention)
        return _Ground(kind, config.store, config.tracking, None, usual)
    said = [each for each in arguments.overrides if arguments.data is None or each.startswith(("store.", "tracking."))]
    places: PlacesConfig = load_places(said) if config is None else config
    fields = {"template", "metric", "max_source_tokens", "max_target_tokens"}
    if not arguments.onto.startswith("models:/"):
        manifest, _ = snapshot(arguments.onto, places)
        return _Ground(manifest, places.store, None, None, manifest.tasks[-1].model_dump(include=fields))
    found = find_registered(arguments.onto, places, arguments.overrides)
    tracking = places.tracking.model_copy(update={"model": found.version.model})
    usual = found.manifest.tasks[-1].model_dump(include=fields)
    return _Ground(found.manifest, found.store, tracking, found.version.tags.get(LINEAGE), usual)


@dataclass(frozen=True)
class _Given:
    """What the command line says of an import.

    Attributes:
        arguments: all of it.
        usual: the task's template, metric and lengths.
        rows: inputs of it.
        lineage: name of the version that is known before it is made.
    """

    arguments: argparse.Namespace
    usual: Mapping[str, Any]
    rows: Sequence[str]
    lineage: str


def _settings(
    arguments: argparse.Namespace, ground: _Ground, config: ExperimentConfig | None, usual: Mapping[str, Any]
) -> ExperimentConfig:
    """How the pool's tasks are learnt and what may stay of them, with the imported task's lengths.

    Raises:
        ConfigError: fields that the version decides.
    """
    from pipelines.sequence.extension import Places, own_settings, settled
    from sapt_core.config.experiment import ExperimentConfig, load_places
    from sapt_core.config.overrides import parsed
    from sapt_core.versions.manifest import Manifest

    lengths = {name: usual[name] for name in ("max_source_tokens", "max_target_tokens")}
    if not isinstance(ground.onto, Manifest):
        assert config is not None  # noqa: S101 - a pool begins with one
        return config.model_copy(update={"benchmark": config.benchmark.model_copy(update=lengths)})
    tracking = ground.tracking or load_places([]).tracking
    places = Places(ground.store.model_dump(mode="json"), tracking.model_dump(mode="json"))
    own = own_settings(ground.onto, ground.onto.recipe, [arguments.task], ".", places)
    own["benchmark"] |= {**lengths, "template": usual["template"], "metric": usual["metric"]}
    said = [each for each in arguments.overrides if not each.startswith(("store.", "tracking."))]
    return settled(ground.onto, own, parsed(said, ExperimentConfig), "An import")


def _read_data(
    arguments: argparse.Namespace, ground: _Ground, config: ExperimentConfig | None, usual: Mapping[str, Any]
) -> Task:
    """The adapter's task with its rows.

    Raises:
        SnapshotError: the version lacks so much of its own tasks that none can come to them.
        SaptError: with all faults of the files and the settings.
    """
    from omegaconf import OmegaConf

    from cluster.store import open_store
    from pipelines.sequence.base import read_base
    from pipelines.sequence.completing import fitted
    from sapt_core.config.experiment import validated
    from sapt_core.config.preflight import check_backbone
    from sapt_core.data.tasks import load_additions
    from sapt_core.task_settings import TaskConfig
    from sapt_core.versions.manifest import Manifest

    store, settings = open_store(ground.store), _settings(arguments, ground, config, usual)
    if isinstance(ground.onto, Manifest):
        read_base(ground.onto, store)
    told = {"definition": arguments.definition, "template": usual["template"], "metric": usual["metric"]}
    given = OmegaConf.create({"name": arguments.task, "path": str(arguments.data), **told})
    addition = validated(TaskConfig, [given], "What the command line says of the task")
    tasks = load_additions([addition], settings.benchmark)
    if isinstance(ground.onto, Manifest):
        fitted(settings, ground.onto.backbone, store, tasks)
    else:
        check_backbone(settings, tasks)
    return tasks[0]


def _completed(
    manifest: Manifest, ground: _Ground, config: ExperimentConfig | None, data: Task | None, given: _Given
) -> Manifest:
    """The version with what later tasks need of all its tasks, of the imported one as far as there is data.

    As it is where the version before carries nothing, or a pool begins without data.
    """
    from cluster.stages import InlineExecutor
    from cluster.store import open_store
    from cluster.store.lookups import Lookups
    from pipelines.pools.scoring import executor_of
    from pipelines.sequence.completing import build_completion, fitted, given_samples, nothing_of
    from sapt_core.io.hashing import canonical_hash
    from sapt_core.versions.manifest import Manifest

    before = ground.onto.carried if isinstance(ground.onto, Manifest) else () if data is not None else None
    if before is None:
        return manifest
    store = open_store(ground.store)
    tasks = {} if data is None else {len(before): data}
    own = nothing_of(canonical_hash(list(given.rows)), {"train": len(given.rows)}) if data is None else None
    settings, memory = fitted(
        _settings(given.arguments, ground, config, given.usual), manifest.backbone, store, [*tasks.values()]
    )
    completion = build_completion(
        settings,
        manifest,
        [*before, own],
        tasks,
        store,
        lineage=given.lineage,
        samples=given_samples(settings, [task.name for task in tasks.values()], store),
        memory=memory,
    )
    known = Lookups(store)
    with ExitStack() as stack:
        if data is None:
            return completion.run(known, InlineExecutor(store))
        return completion.run(known, executor_of([completion.stage], known, settings, given.arguments, stack))


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


def _lineage(ground: _Ground, folder: Path, task: LearntTask, rows: Sequence[str]) -> Lineage:
    """The version before, and a name of the next that is known before it is made."""
    from cluster.tracking.lines import Lineage
    from sapt_core.io.hashing import canonical_hash
    from sapt_core.versions.adapters import SETTINGS, TENSORS
    from sapt_core.versions.manifest import Manifest

    files = [folder / name for name in (SETTINGS, TENSORS)]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    earlier = ground.onto.tasks if isinstance(ground.onto, Manifest) else ()
    name = canonical_hash([IMPORT, ground.line, digests, task.model_dump(), list(rows)])
    tasks = tuple(each.name for each in (*earlier, task))
    asked = f"method {ground.onto.method.name}, tasks {', '.join(tasks)}"
    return Lineage(asked, (*(ground.line or "" for _ in earlier), name), tasks=tasks)


def _publish(manifest: Manifest, ground: _Ground, lineage: Lineage, rows: Sequence[str]) -> int:
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
