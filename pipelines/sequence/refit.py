"""A version that lacks something that later tasks need of its tasks, and their data, once: the next version has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cluster.store import ArtifactStore
from pipelines.sequence.completing import Completion, build_completion, fitted, given_samples, lacking
from pipelines.sequence.extension import Places, folder_of_rows, own_settings, settled
from sapt_core.backbones.loading import load_encoding
from sapt_core.config.experiment import ExperimentConfig, read_mapping
from sapt_core.config.overrides import parsed
from sapt_core.data.tasks import load_additions
from sapt_core.errors import ConfigError, SnapshotError
from sapt_core.io.hashing import canonical_hash
from sapt_core.task_settings import TaskConfig
from sapt_core.versions.contents import line_of
from sapt_core.versions.manifest import Manifest

REFIT = "refit"  # kind of the record of the new version

# What a config may say: it is the one that the version was learnt with, as far as that is not known from the version.
SECTIONS = ("seed", "reflection", "generator", "train", "retention", "cluster")


def refit(
    manifest: Manifest,
    store: ArtifactStore,
    additions: Sequence[TaskConfig],
    *,
    places: Places,
    path: Path | None = None,
    overrides: Sequence[str] = (),
) -> Completion:
    """What gives a version back what it lacks of some tasks, checked and not started.

    Args:
        manifest: the version.
        store: holds its blobs, and receives given samples.
        additions: the tasks, each with its data.
        places: where the version lies.
        path: a config, of which ``SECTIONS`` count; None for none.
        overrides: dotted ``key=value``, over ``path``.

    Raises:
        SnapshotError: no task can be learnt on it whatever it carries.
        ConfigError: with all that is against it.
        SaptError: with all faults of the task files and of the backbone.
    """
    _check_names(manifest, additions)
    backbone, _ = load_encoding(manifest.backbone, store)
    if manifest.backbone.joined == backbone.is_encoder_decoder:
        raise SnapshotError(
            "An earlier release learnt the version, which tokenised prompts and answers of a decoder-only backbone "
            "apart: no task can be learnt on it, so it needs nothing. Start the sequence anew"
        )
    names = [addition.name for addition in additions]
    own = own_settings(manifest, manifest.recipe, names, folder_of_rows(additions), places)
    carried = manifest.carried or (None,) * len(manifest.tasks)
    spots = [manifest.names.index(name) for name in names]
    retention = None if (first := carried[spots[0]]) is None else first.retention
    own["retention"] = {} if retention is None else retention.model_dump(mode="json")
    layers = [] if path is None else [DictConfig(OmegaConf.masked_copy(read_mapping(path), list(SECTIONS)))]
    config = settled(manifest, own, [*layers, *parsed(overrides, ExperimentConfig)], "A refit")
    whole = [name for name, spot in zip(names, spots, strict=True) if not any(lacking(carried[spot], config))]
    if whole:
        raise ConfigError(
            "There is nothing to give back:",
            [
                f"--task {name}: the version carries all that reflection.source={config.reflection.source} and "
                f"retention.sealed_rows={str(config.retention.sealed_rows).lower()} ask for; give what it should carry "
                "beside that, or leave it out"
                for name in whole
            ],
        )
    tasks = load_additions(additions, config.benchmark, known=[manifest.tasks[spot] for spot in spots])
    config, memory = fitted(config, manifest.backbone, store, tasks)
    data = [task.digest for task in tasks]
    lineage = canonical_hash([REFIT, manifest.digest, data, config.retention.model_dump(mode="json")])
    return build_completion(
        config,
        next(line_of(manifest, store)),
        carried,
        dict(zip(spots, tasks, strict=True)),
        store,
        lineage=lineage,
        samples=given_samples(config, names, store),
        memory=memory,
    )


def _check_names(manifest: Manifest, additions: Sequence[TaskConfig]) -> None:
    faults, seen = [], set[str]()
    for addition in additions:
        if addition.name not in manifest.names:
            faults.append(
                f"--task {addition.name}: the version has not learnt it; it knows: {', '.join(manifest.names)}"
            )
        elif addition.name in seen:
            faults.append(f"--task {addition.name}: given twice")
        seen.add(addition.name)
    missing = [name for name in manifest.names if name not in seen]
    if manifest.carried is None and missing:
        faults.append(f"the version carries nothing of {', '.join(missing)} either: give --task and --data of each")
    if faults:
        raise ConfigError("The version cannot be refitted so:", faults)
