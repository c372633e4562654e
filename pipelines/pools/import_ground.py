"""What an imported adapter's version goes on from, and what the rows of its task give to later ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapt_core.config.experiment import ExperimentConfig
    from sapt_core.data.task import Task
    from sapt_core.settings import PlacesConfig, StoreConfig, TrackingConfig
    from sapt_core.versions.importing import PoolKind
    from sapt_core.versions.manifest import Manifest


@dataclass(frozen=True)
class Ground:
    """What an import goes on from.

    Attributes:
        onto: the version, or the kind of a pool that begins.
        store: that has its blobs.
        tracking: with the model that gets the next version; None: the store alone has it.
        lineage: the registered version's name in its lineage.
        index: how many versions were learnt one on the other up to it.
        usual: a task's template, metric and lengths, unless the command line has others.
    """

    onto: Manifest | PoolKind
    store: StoreConfig
    tracking: TrackingConfig | None
    lineage: str | None
    index: int
    usual: Mapping[str, Any]


@dataclass(frozen=True)
class Given:
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


def find_ground(arguments: argparse.Namespace, config: ExperimentConfig | None) -> Ground:
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
        return Ground(kind, config.store, config.tracking, None, 0, usual)
    said = [each for each in arguments.overrides if arguments.data is None or each.startswith(("store.", "tracking."))]
    places: PlacesConfig = load_places(said) if config is None else config
    fields = {"template", "metric", "max_source_tokens", "max_target_tokens"}
    if not arguments.onto.startswith("models:/"):
        manifest, _ = snapshot(arguments.onto, places)
        usual = manifest.tasks[-1].model_dump(include=fields)
        return Ground(manifest, places.store, None, None, len(manifest.tasks), usual)
    found = find_registered(arguments.onto, places, arguments.overrides)
    tracking = places.tracking.model_copy(update={"model": found.version.model})
    usual = found.manifest.tasks[-1].model_dump(include=fields)
    lineage, index = found.version.tags.get(LINEAGE), found.version.index
    return Ground(found.manifest, found.store, tracking, lineage, index, usual)


def _settings(
    arguments: argparse.Namespace, ground: Ground, config: ExperimentConfig | None, usual: Mapping[str, Any]
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


def read_data(
    arguments: argparse.Namespace, ground: Ground, config: ExperimentConfig | None, usual: Mapping[str, Any]
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


def completed(
    manifest: Manifest, ground: Ground, config: ExperimentConfig | None, data: Task | None, given: Given
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
