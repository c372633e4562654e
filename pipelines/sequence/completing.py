"""What a version lacks that later tasks need of its tasks, made from their data: a version made of another one.

Nothing is trained. The version as training, or an import, wrote it stays what it was; it is completed once more, with
more of what it may carry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cluster.stages import Executor, Stage, StageRecord, run_graph
from cluster.store.cleaning import all_records
from cluster.store.erasing import erase
from cluster.store.lookups import Lookups
from pipelines.sequence import bodies
from pipelines.sequence.base import Base
from pipelines.sequence.graph import carried_chain
from pipelines.sequence.making import StageMaker
from pipelines.sequence.retention import with_rows
from sapt_core.backbones.loading import folder_of
from sapt_core.backbones.reference import BackboneRef, weight_bytes
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.config.preflight import check_backbone, settle_precision, with_precision
from sapt_core.data import load_inputs
from sapt_core.data.task import LearntTask, Task
from sapt_core.io.blobs import BlobStore
from sapt_core.io.hashing import canonical_hash
from sapt_core.versions.contents import line_of
from sapt_core.versions.manifest import CarriedTask, Manifest

TEXTS = "texts"  # kind of the record that keeps the tasks' text while, and for as long as it may, lie in the store


@dataclass(frozen=True)
class Completion:
    """A version that is to be completed with data.

    Attributes:
        config: how its newest task was learnt, and what may stay.
        version: as training or an import wrote it.
        tasks: what there is data of, by the tasks' places.
        stage: gives the complete version.
    """

    config: ExperimentConfig
    version: Manifest
    tasks: Mapping[int, Task]
    stage: Stage

    def run(self, known: Lookups, executor: Executor[Any]) -> Manifest:
        """Make it, and leave nothing in the store that may not stay.

        Args:
            known: what is known of the store.
            executor: runs what is not done yet.
        """
        store, retention = known.store, self.config.retention
        for task in self.tasks.values():
            store.put(task.to_json())
        key = self._hold(known) if self.tasks else ""
        records = run_graph([self.stage], known, executor)
        if self.tasks and not retention.keeps_all:
            wanted = {
                record.key: names for stage, record in records.items() if (names := with_rows(stage, record, retention))
            }
            wanted[key] = frozenset(f"{place:03d}" for place in self.tasks)
            erase(wanted, all_records(store), known)
        return Manifest.from_bytes(store.get(records[self.stage].outputs["manifest"]))

    def _hold(self, known: Lookups) -> str:
        """Have a record name the tasks' text, so that it is not cleaned away; returns its key."""
        outputs = {f"{place:03d}": task.digest for place, task in self.tasks.items()}
        key = canonical_hash([TEXTS, self.version.digest, outputs])
        record = StageRecord(
            kind=TEXTS,
            name=TEXTS,
            key=key,
            inputs={},
            outputs=outputs,
            values={},
            metrics={},
            seconds=0.0,
            finished_at=datetime.now(UTC),
            world_size=1,
        )
        stored = record.model_dump(mode="json")
        if known.store.commit_record(key, stored).get("erased"):
            known.store.replace_record(key, stored)
        return key


def lacking(carried: CarriedTask | None, config: ExperimentConfig) -> tuple[bool, bool]:
    """Whether later tasks lack sealed rows of a task, and what they reflect on, so far as ``config`` has any."""
    tokens = frozenset() if carried is None else frozenset(carried.tokens)
    material = carried is not None and bool(carried.reflection)
    return config.retention.sealed_rows and not tokens >= bodies.CARRIED, config.reflects and not material


def build_completion(
    config: ExperimentConfig,
    version: Manifest,
    carried: Sequence[CarriedTask | None],
    tasks: Mapping[int, Task],
    store: BlobStore,
    *,
    lineage: str,
    samples: Mapping[str, str] | None = None,
    memory: int = 0,
) -> Completion:
    """The stages that complete a version; nothing is run.

    What is carried stays; what a task lacks is made of its data.

    Args:
        config: as of ``Completion``.
        version: as training or an import wrote it.
        carried: of every task what there is; None only of those that there is data of.
        tasks: what there is data of, by the tasks' places.
        store: has the version.
        lineage: name of the complete version.
        samples: for reflection source ``given``, the blob of every task's inputs by its name.
        memory: bytes that the backbone's weights take, as far as known.

    Raises:
        StoreError: a manifest of the version's line is missing or damaged.
    """
    make = StageMaker(config, version.backbone, samples or {}, memory)
    there = tuple(
        nothing_of(tasks[place].digest, tasks[place].rows) if each is None else each
        for place, each in enumerate(carried)
    )
    line = tuple(line_of(version, store))[::-1]
    chain = carried_chain(make, Base(version, line, make.recipe, there, lineage))
    for place, task in tasks.items():
        rows, material = lacking(carried[place], config)
        of_task = replace(make, config=with_lengths(config, version.tasks[place]))
        label = f"{place:02d} {task.name}"
        prepared = of_task.preparation(f"prepare[{label} given]", task)
        if rows:
            chain.prepare[place], chain.tasks[place] = prepared, task
        if material and make.keeps(task):
            source = of_task.keeping(label, task, prepared)
            chain.kept[place] = source
            chain.origins[place] = canonical_hash([source.kind, source.version, dict(source.reads)])
        chain.retention[place] = None if config.retention.keeps_all else config.retention
    return Completion(config, version, tasks, make.completion(chain, len(chain.lessons) - 1))


def with_lengths(config: ExperimentConfig, task: LearntTask) -> ExperimentConfig:
    """The config with the lengths that a task was learnt with."""
    lengths = task.model_dump(include={"max_source_tokens", "max_target_tokens"})
    return config.model_copy(update={"benchmark": config.benchmark.model_copy(update=lengths)})


def fitted(
    config: ExperimentConfig, ref: BackboneRef, store: BlobStore, tasks: Sequence[Task]
) -> tuple[ExperimentConfig, int]:
    """The config with the number format that it is computed in, and the bytes that the backbone's weights take.

    Args:
        config: of the version.
        ref: its backbone, which the store has.
        store: has it.
        tasks: that must fit it.

    Raises:
        SaptError: with all that is against them.
    """
    here = {"path": str(folder_of(ref, store)), "revision": None, "gguf_file": None}
    local = config.model_copy(update={"backbone": config.backbone.model_copy(update=here)})
    check_backbone(local, tasks)
    return with_precision(config, settle_precision(local, ref).train.precision), weight_bytes(local.backbone)


def given_samples(config: ExperimentConfig, names: Sequence[str], store: BlobStore) -> dict[str, str]:
    """For reflection source ``given`` the blob of every task's inputs, put into the store.

    Raises:
        DataError: with all that is wrong with them.
    """
    folder = config.reflection.data_dir
    if not config.reflects or config.reflection.source != "given" or folder is None:
        return {}
    return {name: store.put(json.dumps(texts).encode()) for name, texts in load_inputs(folder, names).items()}


def nothing_of(data: str, rows: Mapping[str, int]) -> CarriedTask:
    """What is carried of a task of which there is nothing.

    Args:
        data: sha256 of what it was made of.
        rows: how many each split had, as far as that is known.
    """
    return CarriedTask(data=data, rows=dict(rows), tokens={}, reflection={}, origin=canonical_hash(None), curve=None)
