"""The stage graph of a task sequence (docs/architecture.md).

Only ``train`` is a chain. Preparing, pseudo-samples and single-task runs are independent of the
sequence and of each other, and a version is scored while the next one is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from cluster.stages import Stage
from pipelines.sequence import bodies
from pipelines.sequence.base import Base
from pipelines.sequence.making import ATTENDED_ON, KEPT_FROM, NAMED_BY, SAMPLED, VERSIONS, Chain, StageMaker
from sapt_core.backbones.reference import BackboneRef
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.task import Task
from sapt_core.io.hashing import canonical_hash
from sapt_core.methods.sequential import Sequential
from sapt_core.settings import RetentionConfig
from sapt_core.versions.manifest import CarriedTask


@dataclass(frozen=True)
class SequenceGraph:
    """The stages of one sequence of T tasks, oldest first.

    Where a task was learnt again there are more versions than tasks.

    Attributes:
        tasks: their names.
        lessons: for each version the place of the task that it learnt.
        train: a stage a lesson, one version each.
        evaluate: row i holds the scores of version i on the tasks that it knows.
        single: each task learnt alone and scored; empty if not asked for.
        kept: what there is to reflect on of every task, of the newest as far as it is there; empty for a method without
            reflection. Later tasks need it, so that of the newest none of the other stages does.
        quality: how the pseudo-samples of new tasks but the last compare with the real rows; empty where there are
            none.
        attend: version i's mean attention on the dev rows of the tasks that it knows; empty for a method without
            attention.
        complete: the versions as they are published, with all that later tasks need, from version ``known`` on.
        lineage: names of these versions that are known before they are learnt: a hash of all that each is learnt from.
            Two sequences that begin with the same tasks, learnt alike, have the same first names.
        cost: what the last version costs.
        probe: what the backbone does with blocks on it, before anything is learnt.
        prepare: one stage a task.
        unseen: names of tasks that are scored and never learnt.
        transfer: row i holds the scores of version i on the unseen tasks.
        zero_shot: scores of the bare backbone on the unseen tasks.
    """

    tasks: tuple[str, ...]
    lessons: tuple[int, ...]
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
    probe: Stage

    @property
    def known(self) -> int:
        """How many of the versions, the oldest, were there before; the sequence goes on from the last of them."""
        return len(self.train) - len(self.complete)

    def known_tasks(self, versions: int) -> int:
        """How many tasks the first so many versions have learnt."""
        return max(self.lessons[:versions], default=-1) + 1

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
        last = self.lessons[-1]
        return self._stages([stage for place, stage in enumerate(self.kept) if place != last], ())

    @property
    def published(self) -> list[Stage]:
        """All of them, in the same order: the figures, and versions that can be gone on from."""
        return self._stages(self.kept, self.complete)

    def _stages(self, kept: Sequence[Stage], complete: Sequence[Stage]) -> list[Stage]:
        found = [self.probe, *self.train]
        for index, row in enumerate(self.evaluate):
            found += [self.prepare[self.lessons[index]], *kept[index : index + 1], *row, *self.transfer[index]]
            found += self.attend[index : index + 1]
        return list(dict.fromkeys([*found, *complete, *self.single, *self.quality, *self.zero_shot, self.cost]))


def build_graph(
    config: ExperimentConfig,
    tasks: Sequence[Task],
    unseen: Sequence[Task],
    ref: BackboneRef,
    *,
    samples: Mapping[str, str] | None = None,
    base: Base | None = None,
    memory: int = 0,
    anew: bool = False,
) -> SequenceGraph:
    """The graph of a configured experiment; nothing is run.

    Stages of tasks that ``base`` has learnt give what it carries of them, so that what comes after has the keys, and
    the results, that it has where all tasks are learnt in one run.

    Args:
        config: the experiment.
        tasks: those that are learnt, as loaded for ``config.benchmark``. One that ``base`` knows is learnt again.
        unseen: those that are scored only.
        ref: the configured backbone, by content.
        samples: for reflection source ``given``, the blob of every task's inputs by its name; the newest may lack.
        base: the version that is gone on from.
        memory: bytes that the backbone's weights take, as far as known.
        anew: whether what is learnt again begins with a new block.
    """
    make = StageMaker(config, ref, samples or {}, memory)
    before = () if base is None else base.tasks
    chain, complete, newest = _chain(make, tasks, base, anew=anew)
    prepare, train, every = chain.prepare, chain.train, chain.tasks
    kept = [chain.kept[place] for place in takewhile(chain.kept.__contains__, range(len(every)))]
    labels = [f"{index:02d} {task.name}" for index, task in enumerate(every)]
    evaluate = tuple(
        tuple(
            make.evaluation(f"evaluate[v{i:02d} on {labels[j]}]", version, prepare[j], every[j].metrics)
            for j in range(chain.known(i))
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
            inputs={"version": version, **{f"task {j:02d}": prepare[j] for j in range(chain.known(i))}},
            uses={"version": NAMED_BY, **{f"task {j:02d}": ATTENDED_ON for j in range(chain.known(i))}},
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
    return SequenceGraph(
        tasks=tuple(task.name for task in every),
        lessons=tuple(chain.lessons),
        prepare=tuple(prepare),
        kept=tuple(kept),
        train=tuple(train),
        evaluate=evaluate,
        single=single,
        quality=quality,
        attend=attend,
        complete=complete,
        lineage=tuple(chain.lineage),
        cost=make.cost(train[-1], newest),
        probe=make.probe,
        unseen=tuple(task.name for task in unseen),
        transfer=transfer,
        zero_shot=zero_shot,
    )


def _chain(
    make: StageMaker, tasks: Sequence[Task], base: Base | None, *, anew: bool
) -> tuple[Chain, tuple[Stage, ...], Stage]:
    """Learning task by task; what ``base`` has learnt is taken from what it carries.

    Returns:
        The chain, the stages that complete its new versions, and the one that prepared what the last is learnt from.
    """
    chain = Chain() if base is None else carried_chain(make, base)
    complete: list[Stage] = []
    own = None if make.config.retention.keeps_all else make.config.retention
    for task in tasks:
        lesson, names = len(chain.train), [each.name for each in chain.tasks]
        again = task.name in names
        place = names.index(task.name) if again else len(names)
        label = f"{lesson:02d} {task.name}{' again' if again else ''}"
        prepared = make.preparation(f"prepare[{label}]", task)
        reflected = {number: stage for number, stage in chain.kept.items() if number != place and make.config.reflects}
        inputs = {
            "task": prepared,
            **({"parent": chain.train[-1]} if chain.train else {}),
            **{f"kept {number:02d}": stage for number, stage in reflected.items()},
        }
        times = chain.lessons.count(place)
        stage = make.stage(f"train[{label}]", task, make.config.method, inputs, again=times, anew=anew)
        chain.train.append(stage)
        chain.lessons.append(place)
        learnt = [stage.kind, stage.version, dict(stage.reads)]
        origins = [chain.origins[number] for number in reflected]
        # Other test rows make no other version.
        chain.lineage.append(canonical_hash([chain.lineage[-1:], learnt, origins, task.learnt_digest]))
        source = make.keeping(label, task, prepared) if make.keeps(task) else None
        origin = canonical_hash(source and [source.kind, source.version, dict(source.reads)])
        if not again:
            chain.tasks.append(task)
            chain.prepare.append(prepared)
            chain.origins.append(origin)
            chain.retention.append(own)
            chain.again.append([])
            chain.kept.update({} if source is None else {place: source})
        else:
            assert base is not None  # noqa: S101 - which knows the task
            if source is not None:
                if not anew and joinable(base.carried[place], make.config):
                    counts = (base.carried[place].train_rows, len(task.train))
                    source = make.joining(f"joined[{label}]", chain.kept[place], source, counts)
                    origin = canonical_hash([source.kind, source.version, chain.origins[place], origin])
                chain.kept[place], chain.origins[place] = source, origin
            elif chain.retention[place] != own:  # which what is there of the rows of before may not go beyond
                chain.kept.pop(place, None)
            chain.retention[place] = own
            chain.again[place].append({"data": task.digest, "rows": dict(task.rows), "anew": anew})
        complete.append(make.completion(chain, lesson))
    return chain, tuple(complete), prepared


def carried_chain(make: StageMaker, base: Base) -> Chain:
    """The chain up to a version, of what that carries."""
    chain = Chain(lessons=[*base.lessons], lineage=[*("" for _ in base.lessons[1:]), base.lineage])
    for index, (task, carried) in enumerate(zip(base.tasks, base.carried, strict=True)):
        label = f"{index:02d} {task.name}"
        chain.tasks.append(task)
        chain.prepare.append(make.carried(f"prepare[{label}]", carried.tokens))
        if carried.reflection:
            chain.kept[index] = make.carried(f"kept[{label}]", carried.reflection)
        chain.origins.append(carried.origin)
        chain.retention.append(carried.retention)
        chain.again.append([each.model_dump(mode="json") for each in carried.again])
    for lesson, place in enumerate(base.lessons):
        label = f"{lesson:02d} {base.tasks[place].name}"
        chain.train.append(make.carried(f"train[{label}]", *base.training(lesson)))
    return chain


def joinable(carried: CarriedTask, config: ExperimentConfig) -> bool:
    """Whether what is there to reflect on of a task goes together with what is kept of more rows of it.

    It does if both are texts or both are statistics, and the same may stay of both.
    """
    kind = "statistics" if config.reflection.source == "statistics" else "samples"
    return kind in carried.reflection and (carried.retention or RetentionConfig()) == config.retention
