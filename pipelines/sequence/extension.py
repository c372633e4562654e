"""A published version and the tasks that come to it: an experiment that goes on where the version's ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cluster.store import ArtifactStore
from cluster.store.lookups import Lookups
from pipelines.sequence.base import Base, read_base
from pipelines.sequence.experiment import Experiment, assemble
from pipelines.sequence.making import ATTENDED_ON
from sapt_core.backbones.loading import folder_of
from sapt_core.config.experiment import ExperimentConfig, read_mapping, validated
from sapt_core.config.overrides import parsed
from sapt_core.data.addition import Addition, load_additions
from sapt_core.errors import ConfigError, SnapshotError
from sapt_core.versions.learning import require_same_kind
from sapt_core.versions.manifest import Manifest, Recipe

# What a version says of itself, and a config may therefore not: what is learnt on it is learnt the same way.
OF_THE_VERSION = ("method", "backbone", "pet", "attention")
OF_THE_TASKS = ("suite", "data_dir", "order", "tasks", "unseen", "template", "metric")


class Places(NamedTuple):
    """Where the version lies and what comes of it goes: the sections of a config that name them."""

    store: dict[str, Any]
    tracking: dict[str, Any]


def extend(
    manifest: Manifest,
    store: ArtifactStore,
    additions: Sequence[Addition],
    *,
    places: Places,
    path: Path | None = None,
    overrides: Sequence[str] = (),
) -> Experiment:
    """The experiment that learns tasks on top of a published version, checked and not started.

    Method, PET, attention and backbone are the version's, and so is all else that neither ``path`` nor ``overrides``
    say otherwise.

    Args:
        manifest: the version.
        store: holds its blobs.
        additions: the tasks, in the order to learn.
        places: where it lies.
        path: a config of what is to differ; None for nothing.
        overrides: dotted ``key=value``, over ``path``.

    Raises:
        SnapshotError: the version does not carry what later tasks need, or something of it is gone.
        StoreError: the store cannot be read.
        ConfigError: a field that the version decides, or a task that it knows.
        SaptError: with all faults of the task files and of the backbone.
    """
    base = read_base(manifest, store)
    _check_whole(base, store)
    config = _config(base, additions, places, path, overrides)
    faults = [*_names(base, additions), *_reflection(base, config), *_sealed(base, config)]
    if faults:
        raise ConfigError("The version cannot be extended so:", faults)
    return assemble(
        config,
        "The extension",
        load=lambda benchmark: load_additions(additions, benchmark),
        identified=lambda _: manifest.backbone,
        folder=folder_of(manifest.backbone, store),
        base=base,
    )


def _check_whole(base: Base, store: ArtifactStore) -> None:
    """Refuse a version of which something is gone that later tasks need, naming all of it."""
    needed: dict[str, str] = {}
    for index, (task, carried) in enumerate(zip(base.tasks, base.carried, strict=True)):
        outputs, metrics = base.training(index)
        kept = {**carried.tokens, **carried.reflection, **outputs, "curve": metrics["curve"]}
        needed |= {f"{name} of {task.name}": digest for name, digest in kept.items()}
    gone = Lookups(store).missing(needed.values())
    if gone:
        lost = [f"{what} ({digest[:12]})" for what, digest in needed.items() if digest in gone]
        raise SnapshotError(
            f"The version cannot be gone on from: {store.uri} no longer has {', '.join(lost)}. If the store has moved, "
            "say where to by store.uri; else restore what is gone, or go on from a version of before. What the version "
            "answers needs its blocks and its router alone"
        )


def _config(
    base: Base, additions: Sequence[Addition], places: Places, path: Path | None, overrides: Sequence[str]
) -> ExperimentConfig:
    """The version's own settings, and over them what is said to differ."""
    folder = str(additions[0].path.absolute().parent)
    own = own_settings(base.manifest, base.recipe, [addition.name for addition in additions], folder, places)
    given = [*([] if path is None else [read_mapping(path)]), *parsed(overrides, ExperimentConfig)]
    config = validated(ExperimentConfig, [OmegaConf.create(own), *given], "The extension's config")
    faults = [
        f"benchmark.{field}: is said by --task and --data; leave it out"
        for field in OF_THE_TASKS
        if any(OmegaConf.select(layer, f"benchmark.{field}") is not None for layer in given)
    ]
    faults += _differing(base, config, given)
    if faults:
        raise ConfigError("An extension goes on as the version was learnt:", faults)
    return config


def own_settings(
    manifest: Manifest, recipe: Recipe, tasks: Sequence[str], folder: str, places: Places
) -> dict[str, Any]:
    """The sections of a config that learns and scores tasks as a version did.

    Args:
        manifest: the version.
        recipe: how its newest task was learnt.
        tasks: their names.
        folder: holds them.
        places: where the version lies.
    """
    newest = manifest.tasks[-1]
    own: dict[str, Any] = {
        "seed": recipe.seed,
        "benchmark": {
            "suite": "folder",
            "data_dir": folder,
            "tasks": list(tasks),
            "template": newest.template,
            "metric": newest.metric,
            "answers": "labels" if newest.labels else "free",
            "max_source_tokens": recipe.max_source_tokens,
            "max_target_tokens": recipe.max_target_tokens,
            "dev_fraction": recipe.dev_fraction,
            "split_seed": recipe.split_seed,
        },
        "backbone": manifest.backbone.model_dump(mode="json", include={"path", "revision", "dtype"}),
        "pet": manifest.pet.model_dump(mode="json"),
        "method": manifest.method.model_dump(mode="json"),
        "reflection": recipe.reflection,
        "generator": recipe.generator.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
        # FWT compares with every task learnt alone, the old ones too, whose rows need not be there any more.
        "evaluation": {"single_task": False},
        "store": places.store,
        "tracking": places.tracking,
    }
    if manifest.carried is not None and (retention := manifest.carried[-1].retention) is not None:
        own["retention"] = retention.model_dump(mode="json")
    if manifest.attention is not None:
        own["attention"] = manifest.attention.model_dump(mode="json")
    return own


def _differing(base: Base, config: ExperimentConfig, given: Sequence[DictConfig]) -> list[str]:
    """Fields of what the version decides that are given otherwise than it has them."""
    backbone = [f"backbone.{field}" for layer in given for field in (OmegaConf.select(layer, "backbone") or {})]
    faults = [f"{field}: the backbone is the version's; leave it out" for field in dict.fromkeys(backbone)]
    try:
        shared = config.attention if config.method.shared_attention else None
        require_same_kind(base.trained[-1], config.method, config.pet, shared)
    except SnapshotError as error:
        faults.append(str(error))
    return faults


def _names(base: Base, additions: Sequence[Addition]) -> list[str]:
    """What is wrong with the tasks' names."""
    known = [task.name for task in base.tasks]
    folded = {name.casefold(): name for name in known}
    faults, seen = [], set[str]()
    for addition in additions:
        name = addition.name
        if name in known:
            faults.append(f"--task {name}: the version has learnt it; give the new task a name of its own")
        elif (near := folded.get(name.casefold())) is not None:
            faults.append(f"--task {name}: the version has learnt {near}, which differs in case alone: rename it")
        elif name.casefold() in seen:
            faults.append(f"--task {name}: given twice")
        seen.add(name.casefold())
    return faults


def _reflection(base: Base, config: ExperimentConfig) -> list[str]:
    """What is against reflecting on the tasks that the version knows."""
    if not config.reflects:
        return []
    none = [task.name for task, carried in zip(base.tasks, base.carried, strict=True) if not carried.reflection]
    if not none:
        return []
    return [
        f"reflection.source={config.reflection.source}: the version carries nothing to reflect on of "
        f"{', '.join(none)}; give reflection.source=none, with which they are not held in place"
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
        "retention.sealed_rows was false. Learn these tasks and the new ones in one sequence, from their data, or with "
        "retention.sealed_rows=true"
    ]
