"""Versions of a pool on disk: one JSON manifest and safetensors blobs by sha256.

Version t+1 adds one block and one router to what version t has; blocks that are finished are carried
by digest and never written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, PrivateAttr, ValidationError, model_validator

from sapt_core.backbones.reference import BackboneRef
from sapt_core.data.collate import Together
from sapt_core.data.task import LearntTask
from sapt_core.errors import SnapshotError
from sapt_core.io.hashing import Digest
from sapt_core.methods.base import AnyMethod
from sapt_core.settings import (
    AttentionConfig,
    GeneratorConfig,
    PETConfig,
    RetentionConfig,
    TrainConfig,
)

SCHEMA_VERSION = 4
TRAINED = 3  # what training writes; schema 4 adds what later tasks need, and tasks that were learnt again


class Recipe(BaseModel):
    """How the newest task of a version was learnt, beside what the version itself says; the next one is learnt alike.

    Attributes:
        seed: of the sequence.
        max_source_tokens, max_target_tokens: longest prompt and answer.
        dev_fraction, split_seed: how dev rows are split off the train rows.
        reflection, generator, train: sections of the config. ``train.precision`` is settled, what is a habit of the
            machine stands at its default, and where given samples lay is left out. How it was scored is none of it:
            that makes no other version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    max_source_tokens: int
    max_target_tokens: int
    dev_fraction: float
    split_seed: int
    reflection: dict[str, JsonValue]
    generator: GeneratorConfig
    train: TrainConfig


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: Sequence[object]) -> bool:
    return not value


class LearntAgain(BaseModel):
    """One more time that a task was learnt, from rows of their own.

    Attributes:
        data: sha256 of the text of these rows, which need not be kept.
        rows: how many each split had; those of test are not scored, as scores stay those on the rows of before.
        anew: whether a new block took the place of the task's; else that one was learnt further.
        curve: sha256 of the training curve.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Digest
    rows: dict[str, int]
    anew: bool
    curve: Digest


class CarriedTask(BaseModel):
    """What a version carries of a task for those that come after it: its data folder is not needed again.

    Attributes:
        data: sha256 of the task's text, which need not be kept.
        rows: how many rows each split had.
        tokens: sha256 of the tokenised splits that are kept, and of what goes with them, by the file's name.
        reflection: sha256 of what attention is held on, by name; empty where there is nothing.
        origin: hash of how ``reflection`` was made.
        curve: sha256 of the training curve; None where none was kept, or nothing trained here.
        retention: what may stay of its data; None where all may.
        again: how often, and from what, it was learnt again, oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Digest
    rows: dict[str, int]
    tokens: dict[str, Digest]
    reflection: dict[str, Digest]
    origin: Digest
    curve: Digest | None
    retention: RetentionConfig | None = Field(None, exclude_if=_is_none)
    again: tuple[LearntAgain, ...] = Field((), exclude_if=_is_empty)

    @property
    def train_rows(self) -> int:
        """How many train rows it was learnt from, all times."""
        return sum(rows["train"] for rows in (self.rows, *(each.rows for each in self.again)))


class Manifest(BaseModel):
    """A version of a pool.

    Attributes:
        schema_version: of this format: 3 as training writes it, 4 with all that later tasks need, or where a task of
            its line was learnt again.
        method: the method that learnt it, with its options.
        backbone: the backbone it belongs to.
        pet: settings of its blocks.
        attention: settings of its shared attention; None for a method without it.
        tasks: tasks learnt so far, oldest first.
        blocks: sha256 of every block, oldest first; each is a PEFT ``adapter_model.safetensors``.
        router: sha256 of keys (T, D) and query projection; None without attention.
        targets: mean weights of the blocks there were, on every task after it was learnt, the last time.
        state: sha256 of what the method keeps beside the blocks, by name.
        parent: sha256 of the manifest of the version before, as training wrote it.
        answering: which prompts may share a batch, where that is less than the backbone's class says of itself.
        again: the task that this version learnt again; None where it learnt the newest of its tasks.
        trained: sha256 of this version's manifest as training wrote it, which the next version's ``parent`` is; from
            here on None in schema 3.
        lineage: name of the version that is known before it is learnt, as the registry compares it.
        recipe: how the newest task was learnt.
        carried: of every task what later ones need, oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = TRAINED
    method: AnyMethod
    backbone: BackboneRef
    pet: PETConfig
    attention: AttentionConfig | None
    tasks: tuple[LearntTask, ...]
    blocks: tuple[Digest, ...]
    router: Digest | None
    targets: tuple[tuple[FiniteFloat, ...], ...]
    state: dict[str, Digest] = {}
    parent: Digest | None
    answering: Together = Field("any", exclude_if=lambda answering: answering == "any")
    again: str | None = Field(None, exclude_if=_is_none)
    trained: Digest | None = Field(None, exclude_if=_is_none)
    lineage: Digest | None = Field(None, exclude_if=_is_none)
    recipe: Recipe | None = Field(None, exclude_if=_is_none)
    carried: tuple[CarriedTask, ...] | None = Field(None, exclude_if=_is_none)

    # Of an earlier schema, as it was read: what these add must not rename what was written then.
    _written: bytes | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        grows = self.method.pool == "block per task"
        blocks = list(range(1, len(self.tasks) + 1)) if grows else [1] * len(self.tasks)
        weights = [len(row) for row in self.targets]
        if self.schema_version > TRAINED and len(weights) == len(blocks):
            # A task that was learnt again has a target over all the blocks there were by then.
            weights = [
                least if least <= given <= blocks[-1] else given for given, least in zip(weights, blocks, strict=True)
            ]
        if not self.tasks or len(self.blocks) != blocks[-1] or weights != blocks:
            raise ValueError(
                f"{len(self.tasks)} tasks, {len(self.blocks)} blocks and targets over "
                f"{[len(row) for row in self.targets]} blocks do not belong together"
            )
        if (self.attention is None) != (self.router is None):
            raise ValueError("attention and router are there together or not at all")
        if self.method.shared_attention != (self.attention is not None):
            has = "has no" if self.attention is None else "has an"
            raise ValueError(f"method {self.method.name} does not go with a version that {has} attention")
        whole = [each is not None for each in (self.trained, self.lineage, self.recipe, self.carried)]
        if any(whole) != all(whole) or (any(whole) and self.schema_version <= TRAINED):
            raise ValueError("trained, lineage, recipe and carried belong to schema 4, all of them")
        if self.again is not None and (self.schema_version <= TRAINED or self.again not in self.names):
            raise ValueError("again is of schema 4, and names one of the tasks")
        if self.carried is not None and len(self.carried) != len(self.tasks):
            raise ValueError(f"{len(self.tasks)} tasks, and of {len(self.carried)} something is carried")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Manifest:
        """A changed copy is another manifest than the one that was read."""
        copy = super().model_copy(update=update, deep=deep)
        copy._written = None
        return copy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON; of a manifest that an earlier release wrote, the very bytes."""
        return (
            self._written
            or json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False).encode()
        )

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the name of this version's content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def as_parent(self) -> str:
        """What the next version names as its parent: the manifest as training wrote it, be this one it or complete."""
        return self.trained or self.digest

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, oldest first."""
        return tuple(task.name for task in self.tasks)

    @property
    def taught(self) -> int:
        """The place of the task that this version learnt, for the first time or again."""
        return len(self.tasks) - 1 if self.again is None else self.names.index(self.again)

    @property
    def taught_block(self) -> Digest:
        """The block that this version learnt."""
        return self.blocks[self.taught if len(self.blocks) == len(self.tasks) else -1]

    @property
    def block_names(self) -> tuple[str, ...]:
        """The task that made each block, oldest first; a block that all tasks share is named so."""
        grows = self.method.pool == "block per task"
        return tuple(task.name for task in self.tasks) if grows else ("all tasks",)

    def chosen(self, task: str | None) -> Sequence[int]:
        """Indices of the blocks that answer; a ``task`` is looked at where the method needs one.

        Raises:
            SnapshotError: the method needs a task that the version has learnt, and this is none.
        """
        return self.method.active(self.index_of(task)) if self.method.needs_task else range(len(self.blocks))

    def blocks_for(self, task: str | None) -> tuple[str, ...]:
        """The names of the blocks that answer, as ``chosen``."""
        return tuple(self.block_names[index] for index in self.chosen(task))

    def index_of(self, task: str | None) -> int:
        """The place of a task that the version has learnt.

        Raises:
            SnapshotError: it has not, or none is named.
        """
        names = [learnt.name for learnt in self.tasks]
        if task in names:
            return names.index(task)
        given = "none is named" if task is None else f"it has not learnt {task}"
        raise SnapshotError(
            f"Method {self.method.name} answers only where the task is told, and {given}; it knows: {', '.join(names)}"
        )

    def complete(self, *, lineage: Digest, recipe: Recipe, carried: Sequence[CarriedTask]) -> Manifest:
        """The version as it is published: with all that later tasks need.

        Args:
            lineage: the version's name before it was learnt.
            recipe: how its newest task was learnt.
            carried: of every task, oldest first.
        """
        added = {"trained": self.digest, "lineage": lineage, "recipe": recipe, "carried": tuple(carried)}
        return Manifest(**{**dict(self), **added, "schema_version": SCHEMA_VERSION})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            SnapshotError: not a manifest, or written by a newer release.
        """
        try:
            value: Any = json.loads(data, parse_constant=_refuse)
        except ValueError as error:
            raise SnapshotError(f"The snapshot's manifest is not JSON: {error}") from error
        version = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SnapshotError(
                f"The snapshot has schema version {version}; this release reads up to {SCHEMA_VERSION}. "
                "Update SAPT on Ray to load it"
            )
        if isinstance(version, int) and version < 3 and isinstance(value.get("method"), str):
            value["method"] = {"name": value["method"]}  # methods had no options yet
        if version == 1 and isinstance(value.get("attention"), dict):
            # Schema 1 kept the router's rate, a setting of training alone, under another name.
            value["attention"].pop("learning_rate", None)
        try:
            manifest = cls.model_validate(value)
        except ValidationError as error:
            where = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise SnapshotError(f"The snapshot's manifest is not valid: {where}") from error
        if version not in {TRAINED, SCHEMA_VERSION}:
            manifest._written = data
        return manifest


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, so its training diverged; learn it anew with a lower train.learning_rate")


def require_backbone(manifest: Manifest, ref: BackboneRef) -> None:
    """Refuse a snapshot that belongs to another backbone.

    Raises:
        SnapshotError: it is another one.
    """
    if not ref.is_of(manifest.backbone):
        raise SnapshotError(
            f"The snapshot was learnt on backbone {manifest.backbone.path} ({manifest.backbone.digest[:12]}), "
            f"not on {ref.path} ({ref.digest[:12]}); give the backbone it was learnt on"
        )
