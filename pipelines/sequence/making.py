"""The stages of a sequence, each reading exactly what can change its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from cluster.stages import Stage, StageContext, StageResult
from pipelines.sequence import bodies
from sapt_core.backbones.reference import BackboneRef
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.task import KnownTask, LearntTask, Task
from sapt_core.judging.scoring.named import own_sources
from sapt_core.methods.base import Method
from sapt_core.settings import PETConfig, RetentionConfig, TrainConfig
from sapt_core.training.trainer import step_seed
from sapt_core.versions.manifest import Recipe

# What each kind of stage computes; raised where its body, or what that calls, gives something else than before, so
# that what is stored is made anew. A train stage counts its method's version too (``Method.version``).
VERSIONS = {
    "probe": 1,
    "prepare": 1,
    "pseudo_samples": 4,
    "given": 1,
    "memory": 1,
    "statistics": 1,
    "joined": 1,
    "train": 1,
    "complete": 1,
    "carried": 1,
    "evaluate": 2,
    "attend": 1,
    "quality": 2,
    "zero_shot": 2,
    "cost": 1,
}

# Outputs of ``prepare`` that can change what a later stage gives. Prompts hold definition and template,
# so a split's tokens stand for them.
KEPT_FROM = frozenset({"train.arrow"})
LEARNT_FROM = frozenset({"train.arrow", "dev.arrow"})
SAMPLED = frozenset({"samples"})
REFLECTED_ON = frozenset({"samples", "statistics"})
ATTENDED_ON = frozenset({"dev.arrow"})
NAMED_BY = frozenset({"manifest"})  # it names all blobs of a version
NOTHING: frozenset[str] = frozenset()

PROBED = frozenset({"probe"})  # the input of what runs the backbone

Body: TypeAlias = Callable[[StageContext], StageResult]


@dataclass(frozen=True)
class Chain:
    """Learning, task by task, oldest first.

    Attributes:
        tasks: what is learnt, and before it what was learnt before.
        prepare: a stage a task: what versions are scored on, and a new task is learnt from.
        kept: what there is to reflect on, by the task's place.
        origins: of every task a hash of how that is made.
        retention: of every task what may stay of its data; None where all may.
        again: of every task each more time that it was learnt, as ``bodies.complete`` reads it.
        train: a stage a lesson: each task once, and once more whenever it was learnt again.
        lessons: the place of each lesson's task.
        lineage: names of the versions that are known before they are learnt; empty before the one that is gone on from.
    """

    tasks: list[Task | KnownTask] = field(default_factory=list)
    prepare: list[Stage] = field(default_factory=list)
    kept: dict[int, Stage] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)
    retention: list[RetentionConfig | None] = field(default_factory=list)
    again: list[list[dict[str, Any]]] = field(default_factory=list)
    train: list[Stage] = field(default_factory=list)
    lessons: list[int] = field(default_factory=list)
    lineage: list[str] = field(default_factory=list)

    def known(self, lesson: int) -> int:
        """How many tasks are known after a lesson."""
        return max(self.lessons[: lesson + 1]) + 1


@dataclass(frozen=True)
class StageMaker:
    """Makes stages that read exactly what can change their result."""

    config: ExperimentConfig
    ref: BackboneRef
    samples: Mapping[str, str]
    memory: int

    @property
    def loading(self) -> dict[str, Any]:
        """What a stage takes that loads the backbone."""
        cluster = self.config.cluster
        return {"cpus": cluster.cpus_per_worker, "gpus": cluster.gpus_per_worker, "memory": self.memory}

    @property
    def backbone(self) -> dict[str, Any]:
        """The backbone as keys have it: a folder by its content, whatever it is called."""
        return self.ref.model_dump(mode="json", exclude=None if self.ref.files is None else {"path"})

    @property
    def named(self) -> dict[str, Any]:
        return {"backbone": self.ref.path}

    @property
    def workers(self) -> dict[str, Any]:
        return {"workers": self.config.cluster.train_workers, **self.loading}

    @cached_property
    def probe(self) -> Stage:
        """What the backbone does with the kinds of blocks that are learnt on it; all that run it wait for it."""
        config = self.config
        blocks = {"pet": config.pet, **({"generator.pet": config.generator.pet} if config.generates else {})}
        kinds = {field: _kind_of(pet) for field, pet in blocks.items()}
        fields = [field for field, kind in kinds.items() if field == "pet" or kind != kinds["pet"]]
        return Stage(
            name="probe",
            kind="probe",
            version=VERSIONS["probe"],
            body=bodies.probe,
            told={**self.named, "fields": fields},
            reads={
                "backbone": self.backbone,
                "blocks": [kinds[field] for field in fields],
                "gradient_checkpointing": config.train.gradient_checkpointing,
                **({"num_beams": config.evaluation.num_beams} if config.evaluation.num_beams > 1 else {}),
            },
            **self.loading,
        )

    @property
    def recipe(self) -> Recipe:
        """How a task is learnt, as a version says it: nothing of places and machines."""
        config = self.config
        benchmark = config.benchmark
        return Recipe(
            seed=config.seed,
            max_source_tokens=benchmark.max_source_tokens,
            max_target_tokens=benchmark.max_target_tokens,
            dev_fraction=benchmark.dev_fraction,
            split_seed=benchmark.split_seed,
            reflection=config.reflection.model_dump(mode="json", exclude={"data_dir"}),
            generator=config.generator,
            train=config.train.model_copy(update={"checkpoint_every_steps": TrainConfig().checkpoint_every_steps}),
        )

    def completion(self, chain: Chain, lesson: int) -> Stage:
        """The version after a lesson, with all that later tasks need."""
        known = chain.known(lesson)
        tokens = {f"task {place:02d}": stage for place, stage in enumerate(chain.prepare[:known])}
        kept = {f"kept {place:02d}": stage for place, stage in chain.kept.items() if place < known}
        learnt = {f"learnt {place:02d}": chain.train[chain.lessons.index(place)] for place in range(known)}
        tasks = [
            {
                "data": task.digest,
                "rows": dict(task.rows),
                "origin": origin,
                **({} if retention is None else {"retention": retention.model_dump(mode="json")}),
                **({"again": again} if again else {}),
            }
            for task, origin, retention, again in zip(
                chain.tasks, chain.origins, chain.retention, chain.again, strict=True
            )
        ][:known]
        return Stage(
            name=f"complete[{lesson:02d} {chain.tasks[chain.lessons[lesson]].name}]",
            kind="complete",
            version=VERSIONS["complete"],
            body=bodies.complete,
            reads={
                "lineage": chain.lineage[lesson],
                "recipe": self.recipe.model_dump(mode="json"),
                "tasks": tasks,
            },
            inputs={"version": chain.train[lesson], **tokens, **kept, **learnt},
            uses={
                "version": NAMED_BY,
                **dict.fromkeys(tokens, bodies.CARRIED),
                **dict.fromkeys(learnt, NOTHING),  # the version names them all; of these the curves
            },
            cpus=self.config.cluster.cpus_per_worker,
        )

    def carried(self, name: str, outputs: Mapping[str, str], metrics: Mapping[str, Any] | None = None) -> Stage:
        """What a version carries in the place of a stage that ran when it was learnt."""
        return Stage(
            name=name,
            kind="carried",
            version=VERSIONS["carried"],
            body=bodies.carried,
            reads={"outputs": dict(outputs), "metrics": dict(metrics or {})},
            cpus=self.config.cluster.cpus_per_worker,
        )

    def keeps(self, task: Task) -> bool:
        """Whether there is something of a task that later ones reflect on."""
        return self.config.reflects and (self.config.reflection.source != "given" or task.name in self.samples)

    def preparation(self, name: str, task: Task) -> Stage:
        config = self.config
        return Stage(
            name=name,
            kind="prepare",
            version=VERSIONS["prepare"],
            body=bodies.prepare,
            told=self.named if task.cut is None else {**self.named, "cut": asdict(task.cut)},
            reads={
                "task": task.digest,
                "backbone": self.backbone,
                "max_source_tokens": config.benchmark.max_source_tokens,
                "max_target_tokens": config.benchmark.max_target_tokens,
            },
            cpus=config.cluster.cpus_per_worker,
        )

    def stage(
        self,
        name: str,
        task: Task,
        method: Method,
        inputs: dict[str, Stage],
        *,
        again: int = 0,
        anew: bool = False,
    ) -> Stage:
        """Learning a task that was learnt ``again`` times before, further or ``anew``."""
        config = self.config
        shared = method.shared_attention
        # What a stage does not read stands at its default, so that changing it changes no key.
        unread = type(config).model_fields
        attention = config.attention if shared else unread["attention"].default
        reflection = config.reflection if shared else unread["reflection"].default
        if shared and "parent" not in inputs:
            # Nothing to reflect on yet, but the split that the target comes from counts.
            reflection = unread["reflection"].default.model_copy(update={"target_split": reflection.target_split})
        scores = bool(config.train.eval_every_epochs)
        evaluation = config.evaluation if scores else unread["evaluation"].default
        return Stage(
            name=name,
            kind="train",
            # Both only ever rise, so no sum comes twice.
            version=method.version + VERSIONS["train"] - 1,
            body=bodies.train,
            told={**self.named, "checkpoint_every_steps": config.train.checkpoint_every_steps},
            reads={
                "method": method.model_dump(mode="json"),
                # One block has no finished ones to let gradient through.
                "pet": config.pet.model_dump(
                    mode="json", exclude=None if method.pool == "block per task" else {"detach_frozen"}
                ),
                "attention": attention.model_dump(mode="json"),
                "reflection": reflection.model_dump(mode="json", exclude={"source", "data_dir", "share", "rank"}),
                "train": config.train.model_dump(mode="json", exclude={"checkpoint_every_steps"}),
                "evaluation": evaluation.model_dump(mode="json", exclude={"single_task", "split"}),
                "seed": step_seed(config.seed, task.name, *([again] if again else [])),
                "backbone": self.backbone,
                "learnt": LearntTask(
                    name=task.name,
                    definition=task.definition,
                    template=task.template,
                    metric=task.metric,
                    max_source_tokens=config.benchmark.max_source_tokens,
                    max_target_tokens=config.benchmark.max_target_tokens,
                    labels=task.labels,
                ).model_dump(mode="json"),
                # Dev is answered as test is; without that, how does not count.
                **({"answers": VERSIONS["evaluate"], **_own_metrics([task.metric])} if scores else {}),
                **({"again": "anew" if anew else "further"} if again else {}),
            },
            inputs={**inputs, "probe": self.probe},
            uses={"task": LEARNT_FROM, "probe": NOTHING},  # other test rows retrain nothing
            quiet=PROBED,
            **self.workers,
        )

    def keeping(self, label: str, task: Task, prepared: Stage) -> Stage:
        """The stage that keeps what reflection needs of a task, as ``reflection.source`` says."""
        config, reflection = self.config, self.config.reflection
        given: dict[str, Any] = {"inputs": {"task": prepared}, "uses": {"task": KEPT_FROM}}
        plain = {**given, "cpus": config.cluster.cpus_per_worker}
        if reflection.source == "generated":
            return Stage(
                name=f"pseudo_samples[{label}]",
                kind="pseudo_samples",
                version=VERSIONS["pseudo_samples"],
                body=bodies.pseudo_samples,
                told=self.named,
                reads={
                    "generator": config.generator.model_dump(mode="json"),
                    "precision": config.train.precision,
                    "seed": step_seed(config.seed, "generator", task.name),
                    "backbone": self.backbone,
                },
                inputs={"task": prepared, "probe": self.probe},
                uses={"task": KEPT_FROM, "probe": NOTHING},
                quiet=PROBED,
                **self.workers,
            )
        if reflection.source == "memory":
            seed = step_seed(config.seed, "memory", task.name)
            reads: dict[str, Any] = {"share": reflection.share, "seed": seed}
            return Stage(
                name=f"memory[{label}]",
                kind="memory",
                version=VERSIONS["memory"],
                body=bodies.memory,
                reads=reads,
                **plain,
            )
        if reflection.source == "statistics":
            query = config.attention.model_dump(mode="json", include={"query", "pool_padding"})
            reads = {"rank": reflection.rank, "attention": query, "backbone": self.backbone}
            return Stage(
                name=f"statistics[{label}]",
                kind="statistics",
                version=VERSIONS["statistics"],
                body=bodies.statistics,
                reads=reads,
                told=self.named,
                **plain,
            )
        reads = {"inputs": self.samples[task.name]}
        return Stage(
            name=f"given[{label}]", kind="given", version=VERSIONS["given"], body=bodies.given_samples, reads=reads
        )

    def joining(self, name: str, before: Stage, kept: Stage, rows: tuple[int, int]) -> Stage:
        """The stage that keeps what reflection needs of the rows of before and of new ones, so many."""
        return Stage(
            name=name,
            kind="joined",
            version=VERSIONS["joined"],
            body=bodies.joined,
            reads={"rows": list(rows), "rank": self.config.reflection.rank},
            inputs={"before": before, "kept": kept},
            uses=dict.fromkeys(("before", "kept"), REFLECTED_ON),
            cpus=self.config.cluster.cpus_per_worker,
        )

    def evaluation(self, name: str, version: Stage, task: Stage, metrics: Sequence[str]) -> Stage:
        """A version's scores on a task, whose metrics are those that it names itself."""
        reads = _own_metrics(metrics)
        return self._scoring(name, "evaluate", bodies.evaluate, reads, {"version": version, "task": task})

    def zero_shot(self, name: str, task: Stage, metrics: Sequence[str]) -> Stage:
        """The bare backbone's scores, likewise."""
        reads = {"backbone": self.backbone, **_own_metrics(metrics)}
        return self._scoring(name, "zero_shot", bodies.zero_shot, reads, {"task": task, "probe": self.probe})

    def cost(self, version: Stage, task: Stage) -> Stage:
        return Stage(
            name="cost",
            kind="cost",
            version=VERSIONS["cost"],
            body=bodies.cost,
            inputs={"version": version, "task": task},
            uses={"version": NAMED_BY, "task": KEPT_FROM},
            **self.loading,
        )

    def _scoring(self, name: str, kind: str, body: Body, reads: dict[str, Any], inputs: dict[str, Stage]) -> Stage:
        config = self.config
        return Stage(
            name=name,
            kind=kind,
            version=VERSIONS[kind],
            body=body,
            reads={
                "evaluation": config.evaluation.model_dump(mode="json", exclude={"single_task"}),
                "precision": config.train.precision,
                "max_target_tokens": config.benchmark.max_target_tokens,
                **reads,
            },
            told=self.named,
            inputs=inputs,
            uses={
                "task": frozenset({f"{config.evaluation.split}.arrow", "meta.json"}),
                "version": NAMED_BY,
                "probe": NOTHING,
            },
            quiet=PROBED,
            **self.loading,
        )


def _kind_of(pet: PETConfig) -> dict[str, Any]:
    """What of a block's settings decides how a backbone takes it."""
    return pet.model_dump(mode="json", include={"type", "target_modules"})


def _own_metrics(names: Sequence[str]) -> dict[str, Any]:
    """What the user's own metrics are, so that a changed one scores anew; nothing of those that ship."""
    sources = own_sources(names)
    return {"metrics": sources} if sources else {}
