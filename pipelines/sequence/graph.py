"""The stage graph of a task sequence (docs/architecture.md).

Only ``train`` is a chain. Preparing, pseudo-samples and single-task runs are independent of the
sequence and of each other, and a version is scored while the next one is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cluster.stages import Stage, StageContext, StageResult
from pipelines.sequence import bodies
from sapt_core.backbones.reference import BackboneRef, weight_bytes
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.task import LearntTask, Task
from sapt_core.methods.base import Method
from sapt_core.methods.sequential import Sequential
from sapt_core.training.trainer import step_seed

# What each kind of stage computes; raised where its body, or what that calls, gives something else than before, so
# that what is stored is made anew. A train stage counts its method's version too (``Method.version``).
VERSIONS = {
    "prepare": 1,
    "pseudo_samples": 4,
    "given": 1,
    "memory": 1,
    "statistics": 1,
    "train": 1,
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
ATTENDED_ON = frozenset({"dev.arrow"})
NAMED_BY = frozenset({"manifest"})  # it names all blobs of a version

Body: TypeAlias = Callable[[StageContext], StageResult]


@dataclass(frozen=True)
class SequenceGraph:
    """The stages of one sequence of T tasks, oldest first.

    Attributes:
        tasks: their names.
        train: T stages, one version each.
        evaluate: row i holds the scores of version i on tasks 0..i.
        single: each task learnt alone and scored; empty if not asked for.
        kept: what there is to reflect on of tasks 0..T-2; empty for a method without reflection.
        quality: how the pseudo-samples in ``kept`` compare with the real rows; empty where there are none.
        attend: version i's mean attention on the dev rows of tasks 0..i; empty for a method without attention.
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
    cost: Stage

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
        """All of them, most urgent first: the chain, then task by task what the chain and the versions wait for."""
        found = list(self.train)
        for index, row in enumerate(self.evaluate):
            found += [self.prepare[index], *self.kept[index : index + 1], *row, *self.transfer[index]]
            found += self.attend[index : index + 1]
        return [*found, *self.single, *self.quality, *self.zero_shot, self.cost]


def build_graph(
    config: ExperimentConfig,
    tasks: Sequence[Task],
    unseen: Sequence[Task],
    ref: BackboneRef,
    samples: Mapping[str, str] | None = None,
) -> SequenceGraph:
    """The graph of a configured experiment; nothing is run.

    Args:
        config: the experiment.
        tasks: those of the sequence, as loaded for ``config.benchmark``.
        unseen: those that are scored only.
        ref: the configured backbone, by content.
        samples: for reflection source ``given``, the blob of every earlier task's inputs by its name.
    """
    labels = [f"{index:02d} {task.name}" for index, task in enumerate(tasks)]
    learner = _Learner(config, ref, samples or {}, weight_bytes(config.backbone))
    prepare = tuple(learner.preparation(f"prepare[{label}]", task) for label, task in zip(labels, tasks, strict=True))
    reflects = config.method.shared_attention and config.reflection.source != "none" and config.reflection.weight > 0
    kept = tuple(
        learner.keeping(label, task, prepared)
        for label, task, prepared in zip(labels[:-1], tasks[:-1], prepare[:-1], strict=True)
        if reflects
    )
    train: list[Stage] = []
    for index, (label, task) in enumerate(zip(labels, tasks, strict=True)):
        earlier = {f"kept {number:02d}": stage for number, stage in enumerate(kept[:index])}
        parent = {"parent": train[-1]} if train else {}
        train.append(
            learner.stage(f"train[{label}]", task, config.method, {"task": prepare[index], **parent, **earlier})
        )
    evaluate = tuple(
        tuple(learner.evaluation(f"evaluate[v{i:02d} on {labels[j]}]", version, prepare[j]) for j in range(i + 1))
        for i, version in enumerate(train)
    )
    single: tuple[Stage, ...] = ()
    if config.evaluation.single_task:
        alone = [
            learner.stage(f"single[{label}]", task, Sequential(), {"task": prepared})
            for label, task, prepared in zip(labels, tasks, prepare, strict=True)
        ]
        single = tuple(
            learner.evaluation(f"evaluate[single {label}]", version, prepared)
            for label, version, prepared in zip(labels, alone, prepare, strict=True)
        )
    quality = tuple(
        Stage(
            name=f"quality[{label}]",
            kind="quality",
            version=VERSIONS["quality"],
            body=bodies.quality,
            told=learner.named,
            reads={
                "backbone": learner.backbone,
                "max_source_tokens": config.benchmark.max_source_tokens,
                "template": task.template,
                "definition": task.definition,
            },
            inputs={"task": prepared, "kept": samples},
            uses={"task": KEPT_FROM, "kept": SAMPLED},
            cpus=config.cluster.cpus_per_worker,
        )
        for label, task, prepared, samples in zip(labels, tasks, prepare, kept, strict=False)
        if config.reflection.source in {"generated", "given"}
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
    prepared_unseen = [learner.preparation(f"prepare[unseen {task.name}]", task) for task in unseen]
    transfer = tuple(
        tuple(
            learner.evaluation(f"evaluate[v{i:02d} on unseen {task.name}]", version, prepared)
            for task, prepared in zip(unseen, prepared_unseen, strict=True)
        )
        for i, version in enumerate(train)
    )
    zero_shot = tuple(
        learner.zero_shot(f"zero_shot[{task.name}]", prepared)
        for task, prepared in zip(unseen, prepared_unseen, strict=True)
    )
    return SequenceGraph(
        tasks=tuple(task.name for task in tasks),
        prepare=prepare,
        kept=kept,
        train=tuple(train),
        evaluate=evaluate,
        single=single,
        quality=quality,
        attend=attend,
        cost=learner.cost(train[-1], prepare[-1]),
        unseen=tuple(task.name for task in unseen),
        transfer=transfer,
        zero_shot=zero_shot,
    )


@dataclass(frozen=True)
class _Learner:
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

    def preparation(self, name: str, task: Task) -> Stage:
        config = self.config
        return Stage(
            name=name,
            kind="prepare",
            version=VERSIONS["prepare"],
            body=bodies.prepare,
            told=self.named,
            reads={
                "task": task.digest,
                "backbone": self.backbone,
                "max_source_tokens": config.benchmark.max_source_tokens,
                "max_target_tokens": config.benchmark.max_target_tokens,
            },
            cpus=config.cluster.cpus_per_worker,
        )

    def stage(self, name: str, task: Task, method: Method, inputs: dict[str, Stage]) -> Stage:
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
                "seed": step_seed(config.seed, task.name),
                "backbone": self.backbone,
                "learnt": LearntTask(
                    name=task.name,
                    definition=task.definition,
                    template=task.template,
                    metric=task.metric,
                    max_source_tokens=config.benchmark.max_source_tokens,
                    max_target_tokens=config.benchmark.max_target_tokens,
                ).model_dump(mode="json"),
                # Dev is answered as test is; without that, how does not count.
                **({"answers": VERSIONS["evaluate"]} if scores else {}),
            },
            inputs=inputs,
            uses={"task": LEARNT_FROM},  # other test rows retrain nothing
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
                **given,
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

    def evaluation(self, name: str, version: Stage, task: Stage) -> Stage:
        return self._scoring(name, "evaluate", bodies.evaluate, {}, {"version": version, "task": task})

    def zero_shot(self, name: str, task: Stage) -> Stage:
        return self._scoring(name, "zero_shot", bodies.zero_shot, {"backbone": self.backbone}, {"task": task})

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
            uses={"task": frozenset({f"{config.evaluation.split}.arrow", "meta.json"}), "version": NAMED_BY},
            **self.loading,
        )
