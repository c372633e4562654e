"""A published version that a sequence goes on from, and what its stages gave, without its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapt_core.data.task import KnownTask
from sapt_core.errors import SnapshotError
from sapt_core.io.blobs import BlobStore
from sapt_core.versions.contents import line_of
from sapt_core.versions.manifest import CarriedTask, Manifest, Recipe


@dataclass(frozen=True)
class Base:
    """A version with what it carries.

    Attributes:
        manifest: the version, complete.
        trained: every version up to it as training wrote it, oldest first.
        recipe: how its newest task was learnt.
        carried: of every task, oldest first.
        lineage: its name as the registry compares it.
    """

    manifest: Manifest
    trained: tuple[Manifest, ...]
    recipe: Recipe
    carried: tuple[CarriedTask, ...]
    lineage: str

    @property
    def lessons(self) -> tuple[int, ...]:
        """For each version the place of the task that it learnt, for the first time or again."""
        return tuple(version.taught for version in self.trained)

    @property
    def tasks(self) -> tuple[KnownTask, ...]:
        """What it has learnt, oldest first."""
        return tuple(
            KnownTask(task.name, task.definition, task.template, task.metric, carried.data, carried.rows)
            for task, carried in zip(self.manifest.tasks, self.carried, strict=True)
        )

    def training(self, lesson: int) -> tuple[Mapping[str, str], Mapping[str, Any]]:
        """Outputs and metrics of a version's training, the ``lesson``-th."""
        carried = self.carried[self.lessons[lesson]]
        times = self.lessons[:lesson].count(self.lessons[lesson])
        curve = carried.again[times - 1].curve if times else carried.curve
        return training_outputs(self.trained[lesson]), {} if curve is None else {"curve": curve}


def refit_command(tasks: Sequence[str]) -> str:
    """What gives a version back what it lacks of some tasks."""
    return f"sapt pool refit VERSION {' '.join(f'--task {name} --data PATH' for name in tasks)}"


def training_outputs(manifest: Manifest) -> dict[str, str]:
    """What the stage that learnt a version gives, by name."""
    outputs = {"manifest": manifest.digest, "block": manifest.taught_block}
    if manifest.router is not None:
        outputs["router"] = manifest.router
    return outputs | {f"state {name}": digest for name, digest in manifest.state.items()}


def read_base(manifest: Manifest, store: BlobStore) -> Base:
    """What a version carries, from the store alone.

    Raises:
        SnapshotError: it carries nothing: it was published by an earlier release.
        StoreError: a manifest of its line is missing or damaged.
    """
    if manifest.recipe is None or manifest.carried is None or manifest.lineage is None or manifest.trained is None:
        raise SnapshotError(
            f"The version (schema {manifest.schema_version}) does not carry what a later task needs of its tasks: an "
            "earlier release published it, or its newest block was imported without data. Go on from one before, or "
            f"give it back once, from their data: {refit_command(manifest.names)}"
        )
    line = tuple(line_of(manifest, store))[::-1]
    return Base(manifest, line, manifest.recipe, manifest.carried, manifest.lineage)
