"""A published version and the tasks that come to it: an experiment that goes on where the version's ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cluster.store import ArtifactStore
from cluster.store.lookups import Lookups
from pipelines.sequence import bodies
from pipelines.sequence.base import Base, read_base, refit_command
from pipelines.sequence.experiment import Experiment, assemble
from pipelines.sequence.graph import joinable
from pipelines.sequence.making import ATTENDED_ON
from sapt_core.backbones.loading import folder_of
from sapt_core.config.experiment import ExperimentConfig, read_mapping, validated
from sapt_core.config.overrides import parsed
from sapt_core.data.prepare import read_examples
from sapt_core.data.task import Example, LearntTask, Task, name_faults
from sapt_core.data.tasks import load_additions
from sapt_core.errors import ConfigError, SnapshotError
from sapt_core.settings import BenchmarkConfig
from sapt_core.task_settings import TaskConfig
from sapt_core.versions.learning import again_faults, require_same_kind
from sapt_core.versions.manifest import Manifest, Recipe

log = logging.getLogger(__name__)

# What a version says of itself, and a config may therefore not: what is learnt on it is learnt the same way.
OF_THE_VERSION = ("method", "backbone", "pet", "attention")
OF_THE_TASKS = ("suite", "data_dir", "order", "tasks", "unseen", "tasks_file", "defaults", "template", "metric")


class Places(NamedTuple):
    """Where the version lies and what comes of it goes: the sections of a config that name them."""

    store: dict[str, Any]
    tracking: dict[str, Any]


def extend(
    manifest: Manifest,
    store: ArtifactStore,
    additions: Sequence[TaskConfig],
    *,
    places: Places,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    again: Literal["further", "anew"] | None = None,
) -> Experiment:
    """The experiment that learns tasks on top of a published version, checked and not started.

    Method, PET, attention and backbone are the version's, and so is all else that neither ``path`` nor ``overrides``
    say otherwise.

    Args:
        manifest: the version.
        store: holds its blobs.
        additions: the tasks, in the order to learn, each with its path; what they leave open is as of the version's
            newest task.
        places: where it lies.
        path: a config of what is to differ; None for nothing.
        overrides: dotted ``key=value``, over ``path``.
        again: whether the one task, which the version knows, is learnt further or anew, from more rows of it.

    Raises:
        SnapshotError: the version does not carry what later tasks need, or something of it is gone.
        StoreError: the store cannot be read.
        ConfigError: a field that the version decides, or a task that it knows, or, to be learnt again, does not know.
        SaptError: with all faults of the task files and of the backbone.
    """
    base = read_base(manifest, store)
    _check_whole(base, store)
    known: int | None = None
    if again is not None:
        _check_again(base, additions, anew=again == "anew")
        known = manifest.names.index(additions[0].name)
    config = _config(base, additions, places, path, overrides, known=known)
    faults = [*_reflection(base, config, known), *_sealed(base, config)]
    faults += _names(base, additions) if known is None else _differing_from(manifest.tasks[known], config)
    if config.evaluation.single_task:
        faults.append(
            "evaluation.single_task=true: FWT compares with every task learnt alone, and the rows of those that the "
            "version knows are not there; leave it out"
        )
    if faults:
        raise ConfigError("The version cannot be extended so:", faults)
    sealed, learnt = None, []
    if known is not None:
        learnt = [manifest.tasks[known]]
        sealed = frozenset(row.input for row in _sealed_rows(base, known, store))
        _tell_of_material(base, known, config, anew=again == "anew")

    def load(benchmark: BenchmarkConfig) -> tuple[Task, ...]:
        tasks = load_additions(additions, benchmark, sealed, learnt)
        if known is None:
            _tell_of_same_rows(base, tasks, store)
        return tasks

    return assemble(
        config,
        "The extension",
        load=load,
        identified=lambda _: manifest.backbone,
        folder=folder_of(manifest.backbone, store),
        base=base,
        anew=again == "anew",
    )


def _check_again(base: Base, additions: Sequence[TaskConfig], *, anew: bool) -> None:
    """Refuse what cannot be learnt again.

    Raises:
        ConfigError: with all that is against it.
    """
    faults = [f"--task {addition.name}: --again learns one task at a time" for addition in additions[1:]]
    addition = additions[0]
    faults += [f"--task {addition.name}: {fault}" for fault in again_faults(base.manifest, addition.name, anew=anew)]
    faults += [
        f"--{field}: {addition.name} keeps the one that it was learnt with; leave it out"
        for task in base.tasks
        if task.name == addition.name
        for field in ("definition", "template", "metric")
        if getattr(addition, field) not in {None, getattr(task, field)}
    ]
    if faults:
        raise ConfigError("The version cannot learn that again:", faults)


def _sealed_rows(base: Base, place: int, store: ArtifactStore) -> frozenset[Example]:
    """The rows that a task is scored on."""
    tokens = base.carried[place].tokens
    splits = [read_examples(store.get(tokens[name])) for name in sorted(bodies.SEALED) if name in tokens]
    return frozenset(row for split in splits for row in split)


def _tell_of_same_rows(base: Base, tasks: Sequence[Task], store: ArtifactStore) -> None:
    """Say which task that the version knows a new one shares rows with, as far as the version has them."""
    every = {task.name: {*task.train, *task.dev, *task.test} for task in tasks}
    for place, known in enumerate(base.tasks):
        sealed = _sealed_rows(base, place, store)
        for name, rows in every.items():
            if shared := len(sealed & rows):
                log.warning(
                    "%s: %d of the %d rows of %s that the version is scored on are among its own (%.0f%%), the same "
                    "answers too; what is the same task is learnt further by --task %s --again",
                    name,
                    shared,
                    len(sealed),
                    known.name,
                    100 * shared / len(sealed),
                    known.name,
                )


def _tell_of_material(base: Base, place: int, config: ExperimentConfig, *, anew: bool) -> None:
    """Say where later tasks hold a task's attention on its new rows alone."""
    if config.reflects and not anew and not joinable(base.carried[place], config):
        log.warning(
            "%s: what the version carries to reflect on of its earlier rows does not go together with what "
            "reflection.source and retention keep of the new ones: later tasks are held on the new rows alone",
            base.tasks[place].name,
        )


def _check_whole(base: Base, store: ArtifactStore) -> None:
    """Refuse a version of which something is gone that later tasks need, naming all of it."""
    needed: dict[str, str] = {}
    for task, carried in zip(base.tasks, base.carried, strict=True):
        needed |= {
            f"{name} of {task.name}": digest for name, digest in {**carried.tokens, **carried.reflection}.items()
        }
    for lesson, place in enumerate(base.lessons):
        outputs, metrics = base.training(lesson)
        times = base.lessons[:lesson].count(place)
        label = f"{base.tasks[place].name}{f' ({times + 1})' if times else ''}"
        needed |= {f"{name} of {label}": digest for name, digest in {**outputs, **metrics}.items()}
    gone = Lookups(store).missing(needed.values())
    if gone:
        lost = [f"{what} ({digest[:12]})" for what, digest in needed.items() if digest in gone]
        raise SnapshotError(
            f"The version cannot be gone on from: {store.uri} no longer has {', '.join(lost)}. If the store has moved, "
            "say where to by store.uri; else restore what is gone, or go on from a version of before. What the version "
            "answers needs its blocks and its router alone"
        )


def _config(
    base: Base,
    additions: Sequence[TaskConfig],
    places: Places,
    path: Path | None,
    overrides: Sequence[str],
    *,
    known: int | None,
) -> ExperimentConfig:
    """The version's own settings, and over them what is said to differ; ``known``: of which task, if it knows it."""
    folder = folder_of_rows(additions)
    own = own_settings(
        base.manifest, base.recipe, [addition.name for addition in additions], folder, places, known=known
    )
    given = [*([] if path is None else [read_mapping(path)]), *parsed(overrides, ExperimentConfig)]
    return settled(base.manifest, own, given, "An extension")


def folder_of_rows(additions: Sequence[TaskConfig]) -> str:
    """The folder that a config of tasks which each have a path of their own names, since one must be named."""
    return str(Path(additions[0].path or "").absolute().parent)


def settled(manifest: Manifest, own: dict[str, Any], given: Sequence[DictConfig], what: str) -> ExperimentConfig:
    """A version's own settings with others over them, if that leaves what it decides.

    Args:
        manifest: the version.
        own: as of ``own_settings``.
        given: what is to differ.
        what: goes on from the version, for messages.

    Raises:
        ConfigError: with all faults.
    """
    config = validated(ExperimentConfig, [OmegaConf.create(own), *given], f"{what}'s config")
    faults = [
        f"benchmark.{field}: is said by --task and --data, or by --tasks; leave it out"
        for field in OF_THE_TASKS
        if any(OmegaConf.select(layer, f"benchmark.{field}") is not None for layer in given)
    ]
    faults += _differing(manifest, config, given)
    if faults:
        raise ConfigError(f"{what} goes on as the version was learnt:", faults)
    return config


def own_settings(
    manifest: Manifest,
    recipe: Recipe | None,
    tasks: Sequence[str],
    folder: str,
    places: Places,
    *,
    known: int | None = None,
) -> dict[str, Any]:
    """The sections of a config that learns and scores tasks as a version did.

    Args:
        manifest: the version.
        recipe: how it was learnt; None where it does not say so.
        tasks: their names.
        folder: holds them.
        places: where the version lies.
        known: the place of the one task that is meant, if the version knows it; default: new ones, like its newest.
    """
    like = manifest.tasks[-1 if known is None else known]
    lengths = like if known is not None or recipe is None else recipe
    own: dict[str, Any] = {
        "benchmark": {
            "suite": "folder",
            "data_dir": folder,
            "tasks": list(tasks),
            "template": like.template,
            "metric": like.metric,
            "answers": _answers(like),
            "max_source_tokens": lengths.max_source_tokens,
            "max_target_tokens": lengths.max_target_tokens,
        },
        "backbone": manifest.backbone.model_dump(mode="json", include={"path", "revision", "dtype", "gguf_file"}),
        "pet": manifest.pet.model_dump(mode="json"),
        "method": manifest.method.model_dump(mode="json"),
        # FWT compares with every task learnt alone, the old ones too, whose rows need not be there any more.
        "evaluation": {"single_task": False},
        "store": places.store,
        "tracking": places.tracking,
    }
    if recipe is not None:
        own["seed"] = recipe.seed
        own["benchmark"] |= {"dev_fraction": recipe.dev_fraction, "split_seed": recipe.split_seed}
        own |= recipe.model_dump(mode="json", include={"reflection", "generator", "train"})
    if manifest.carried is not None:
        retention = manifest.carried[-1 if known is None else known].retention
        own |= {} if retention is None else {"retention": retention.model_dump(mode="json")}
    if manifest.attention is not None:
        own["attention"] = manifest.attention.model_dump(mode="json")
    return own


def _differing(manifest: Manifest, config: ExperimentConfig, given: Sequence[DictConfig]) -> list[str]:
    """Fields of what the version decides that are given otherwise than it has them."""
    backbone = [f"backbone.{field}" for layer in given for field in (OmegaConf.select(layer, "backbone") or {})]
    faults = [f"{field}: the backbone is the version's; leave it out" for field in dict.fromkeys(backbone)]
    try:
        shared = config.attention if config.method.shared_attention else None
        require_same_kind(manifest, config.method, config.pet, shared)
    except SnapshotError as error:
        faults.append(str(error))
    return faults


def _names(base: Base, additions: Sequence[TaskConfig]) -> list[str]:
    """What is wrong with the tasks' names."""
    faults, seen = [], set[str]()
    for addition in additions:
        name = addition.name
        found = name_faults(name, base.manifest.names)
        hint = ", or give --again to learn it from more rows" if name in base.manifest.names else ""
        faults += [f"--task {name}: {fault}{hint}" for fault in found]
        if not found and name.casefold() in seen:
            faults.append(f"--task {name}: given twice")
        seen.add(name.casefold())
    return faults


def _differing_from(task: LearntTask, config: ExperimentConfig) -> list[str]:
    """What a task that is learnt again has been given otherwise than it has it: lengths, and what may be answered."""
    has = {**task.model_dump(include={"max_source_tokens", "max_target_tokens"}), "answers": _answers(task)}
    return [
        f"benchmark.{field}={given}: {task.name} was learnt with {value}; leave it out"
        for field, value in has.items()
        if (given := getattr(config.benchmark, field)) != value
    ]


def _answers(task: LearntTask) -> str:
    """``benchmark.answers`` of a task."""
    return "labels" if task.labels else "free"


def _reflection(base: Base, config: ExperimentConfig, again: int | None = None) -> list[str]:
    """What is against reflecting on the tasks that the version knows, but for the one that is learnt again."""
    if not config.reflects:
        return []
    none = [
        task.name
        for place, (task, carried) in enumerate(zip(base.tasks, base.carried, strict=True))
        if not carried.reflection and place != again
    ]
    if not none:
        return []
    return [
        f"reflection.source={config.reflection.source}: the version carries nothing to reflect on of "
        f"{', '.join(none)}; give reflection.source=none, with which they are not held in place, or give it back once, "
        f"from their data: {refit_command(none)}"
    ]


def _sealed(base: Base, config: ExperimentConfig) -> list[str]:
    """What is against scoring the tasks that the version knows, as every version is scored on all of its tasks."""
    needed = {f"{config.evaluation.split}.arrow"}
    if config.method.shared_attention:
        needed |= ATTENDED_ON
    lost = [
        task.name for task, carried in zip(base.tasks, base.carried, strict=True) if not needed <= {*carried.tokens}
    ]
    if not lost:
        return []
    return [
        f"the version carries no sealed rows of {', '.join(lost)}, on which what is learnt next is scored: "
        "retention.sealed_rows was false. Give them back once, from their data: "
        f"{refit_command(lost)} retention.sealed_rows=true"
    ]
