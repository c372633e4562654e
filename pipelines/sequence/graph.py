"""The stage graph of a task sequence (docs/architecture.md).

Only ``train`` is a chain. Preparing, pseudo-samples and single-task runs are independent of the
sequence and of each other, and a version is scored while the next one is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.stages import Stage
from pipelines.sequence import bodies
from pipelines.sequence.base import Base
from pipelines.sequence.making import ATTENDED_ON, KEPT_FROM, NAMED_BY, SAMPLED, VERSIONS, Chain, StageMaker
from sapt_core.backbones.reference import BackboneRef
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.task import KnownTask, Task
from sapt_core.io.hashing import canonical_hash
from sapt_core.methods.sequential import Sequential
from sapt_core.settings import RetentionConfig


@dataclass(frozen=True)
class SequenceGraph:
    """The stages of one sequence of T tasks, oldest first.

    Attributes:
        tasks: their names.
        train: T stages, one version each.
        evaluate: row i holds the scores of version i on tasks 0..i.
        single: each task learnt alone and scored; empty if not asked for.
        kept: what there is to reflect on of every task, of the newest as far as it is there; empty for a method without
            reflection. Later tasks need it, so that of the newest none of the other stages does.
        quality: how the pseudo-samples of tasks ``known``..T-2 compare with the real rows; empty where there are none.
        attend: version i's mean attention on the dev rows of tasks 0..i; empty for a method without attention.
        complete: the versions as they are published, with all that later tasks need, from version ``known`` on.
        lineage: names of these versions that are known before they are learnt: a hash of all that each is learnt from.
            Two sequences that begin with the same tasks, learnt alike, have the same first names.
        cost: what the last version costs.
        prepare: one stage a task.
        unseen: names of tasks that are scored and never learnt.
        transfer: row i holds the scores of version i on the unseen tasks.
        zero_shot: scores of the bare backbone on the unseen tasks.
    """

    tasks: tuple[str, ...]
    prepare: tuple[Stage, ...]
    kept: tuple[Stage, ...]
    train: tuple[Stage, ...]
    evaluate: tuple[tuple[Stage, ...], ...]
    single: tuple[Stage, ...]
    unseen: tuple[str, ...]
    transfer: tuple[tuple[Stage, ...], ...]
    zero_shot: tuple[Stage, ...]
    quality: tuple[Stage, ...]
    attend: tuple[Stage, ...]
    complete: tuple[Stage, ...]
    lineage: tuple[str, ...]
    cost: Stage

    @property
    def known(self) -> int:
        """How many of the tasks, the oldest, were learnt before: by the version that the sequence goes on from."""
        return len(self.train) - len(self.complete)

    def completed(self, index: int) -> tuple[Stage, ...]:
        """The stage that completes version ``index`` (from 0); none for one that was published before."""
        place = index - self.known
        return () if place < 0 else self.complete[place : place + 1]

    @property
    def alone(self) -> list[Stage]:
        """What FWT alone needs: each task learnt by itself, and scored."""
        return [stage for scored in self.single for stage in (scored.inputs["version"], scored)]

    @property
    def by_version(self) -> list[Stage]:
        """What the scores of the versions need, each version's before the next is learnt."""
        return [stage for version, row in zip(self.train, self.evaluate, strict=True) for stage in (version, *row)]

    @property
    def stages(self) -> list[Stage]:
        """What the figures need, most urgent first: the chain, then task by task what it and the versions wait for."""
        return self._stages(self.kept[: len(self.train) - 1], ())

    @property
    def published(self) -> list[Stage]:
        """All of them, in the same order: the figures, and versions that can be gone on from."""
        return self._stages(self.kept, self.complete)

    def _stages(self, kept: Sequence[Stage], complete: Sequence[Stage]) -> list[Stage]:
        found = list(self.train)
        for index, row in enumerate(self.evaluate):
            found += [self.prepare[index], *kept[index : index + 1], *row, *self.transfer[index]]
            found += self.attend[index : index + 1]
        return [*found, *complete, *self.single, *self.quality, *self.zero_shot, self.cost]


def build_graph(
    config: ExperimentConfig,
    tasks: Sequence[Task],
    unseen: Sequence[Task],
    ref: BackboneRef,
    *,
    samples: Mapping[str, str] | None = None,
    base: Base | None = None,
    memory: int = 0,
) -> SequenceGraph:
    """The graph of a configured experiment; nothing is run.

    Stages of tasks that ``base`` has learnt give what it carries of them, so that what comes after has the keys, and
    the results, that it has where all tasks are learnt in one run.

    Args:
        config: the experiment.
        tasks: those that are learnt, as loaded for ``config.benchmark``.
        unseen: those that are scored only.
        ref: the configured backbone, by content.
        samples: for reflection source ``given``, the blob of every task's inputs by its name; the newest may lack.
        base: the version that is gone on from.
        memory: bytes that the backbone's weights take, as far as known.
    """
    make = StageMaker(config, ref, samples or {}, memory)
    before = () if base is None else base.tasks
    every: tuple[Task | KnownTask, ...] = (*before, *tasks)
    labels = [f"{index:02d} {task.name}" for index, task in enumerate(every)]
    chain = _chain(make, every, base)
    prepare, kept, train = chain.prepare, chain.kept, chain.train
    evaluate = tuple(
        tuple(
            make.evaluation(f"evaluate[v{i:02d} on {labels[j]}]", version, prepare[j], every[j].metrics)
            for j in range(i + 1)
        )
        for i, version in enumerate(train)
    )
    single: tuple[Stage, ...] = ()
    if config.evaluation.single_task:
        alone = [
            make.stage(f"single[{label}]", task, Sequential(), {"task": prepared})
            for label, task, prepared in zip(labels, tasks, prepare, strict=True)
        ]
        single = tuple(
            make.evaluation(f"evaluate[single {label}]", version, prepared, task.metrics)
            for label, version, prepared, task in zip(labels, alone, prepare, tasks, strict=True)
        )
    quality = tuple(
        Stage(
            name=f"quality[{label}]",
            kind="quality",
            version=VERSIONS["quality"],
            body=bodies.quality,
            told=make.named,
            reads={
                "backbone": make.backbone,
                "max_source_tokens": config.benchmark.max_source_tokens,
                "template": task.template,
                "definition": task.definition,
            },
            inputs={"task": prepare[index], "kept": kept[index]},
            uses={"task": KEPT_FROM, "kept": SAMPLED},
            cpus=config.cluster.cpus_per_worker,
        )
        for index, (label, task) in list(enumerate(zip(labels, every, strict=True)))[len(before) : -1]
        if kept and config.reflection.source in {"generated", "given"}
    )
    attend = tuple(
        Stage(
            name=f"attend[v{i:02d}]",
            kind="attend",
            version=VERSIONS["attend"],
            body=bodies.attend,
            inputs={"version": version, **{f"task {j:02d}": prepare[j] for j in range(i + 1)}},
            uses={"version": NAMED_BY, **{f"task {j:02d}": ATTENDED_ON for j in range(i + 1)}},
            cpus=config.cluster.cpus_per_worker,
        )
        for i, version in enumerate(train)
        if config.method.shared_attention
    )
    prepared_unseen = [make.preparation(f"prepare[unseen {task.name}]", task) for task in unseen]
    transfer = tuple(
        tuple(
            make.evaluation(f"evaluate[v{i:02d} on unseen {task.name}]", version, prepared, task.metrics)
            for task, prepared in zip(unseen, prepared_unseen, strict=True)
        )
        for i, version in enumerate(train)
    )
    zero_shot = tuple(
        make.zero_shot(f"zero_shot[{task.name}]", prepared, task.metrics)
        for task, prepared in zip(unseen, prepared_unseen, strict=True)
    )
    lineage = _lineage(chain, base)
    return SequenceGraph(
        tasks=tuple(task.name for task in every),
        prepare=tuple(prepare),
        kept=tuple(kept),
        train=tuple(train),
        evaluate=evaluate,
        single=single,
        quality=quality,
        attend=attend,
        complete=tuple(make.completion(chain, index, lineage[index]) for index in range(len(before), len(every))),
        lineage=lineage,
        cost=make.cost(train[-1], prepare[-1]),
        unseen=tuple(task.name for task in unseen),
        transfer=transfer,
        zero_shot=zero_shot,
    )


def _chain(make: StageMaker, tasks: Sequence[Task | KnownTask], base: Base | None) -> Chain:
    """Learning task by task; what ``base`` has learnt is taken from what it carries."""
    prepare: list[Stage] = []
    kept: list[Stage] = []
    train: list[Stage] = []
    origins: list[str] = []
    retention: list[RetentionConfig | None] = []
    own = make.config.retention
    for index, task in enumerate(tasks):
        label = f"{index:02d} {task.name}"
        if isinstance(task, KnownTask):
            assert base is not None  # noqa: S101 - whose tasks they are
            carried = base.carried[index]
            prepare.append(make.carried(f"prepare[{label}]", carried.tokens))
            train.append(make.carried(f"train[{label}]", *base.training(index)))
            if carried.reflection:
                kept.append(make.carried(f"kept[{label}]", carried.reflection))
            origins.append(carried.origin)
            retention.append(carried.retention)
            continue
        prepare.append(make.preparation(f"prepare[{label}]", task))
        earlier = {f"kept {number:02d}": stage for number, stage in enumerate(kept)}
        parent = {"parent": train[-1]} if train else {}
        train.append(
            make.stage(f"train[{label}]", task, make.config.method, {"task": prepare[index], **parent, **earlier})
        )
        source = make.keeping(label, task, prepare[index]) if make.keeps(task) else None
        kept += [] if source is None else [source]
        origins.append(canonical_hash(source and [source.kind, source.version, dict(source.reads)]))
        retention.append(None if own.keeps_all else own)
    return Chain(tuple(tasks), tuple(prepare), tuple(kept), tuple(train), tuple(origins), tuple(retention))


def _lineage(chain: Chain, base: Base | None) -> tuple[str, ...]:
    """Names of the versions; of those before the one that is gone on from none is known."""
    names = [] if base is None else [*("" for _ in base.tasks[1:]), base.lineage]
    for index in range(len(names), len(chain.tasks)):
        task, stage = chain.tasks[index], chain.train[index]
        assert isinstance(task, Task)  # noqa: S101 - known ones come first
        reflected_on = chain.origins[: sum(name.startswith("kept ") for name in stage.inputs)]
        learnt = [stage.kind, stage.version, dict(stage.reads)]
        # Other test rows make no other version.
        names.append(canonical_hash([names[-1:], learnt, list(reflected_on), task.learnt_digest]))
    return tuple(names)
