"""A version held against the champion and the bare backbone, on the sealed test rows that it carries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.stages import Stage, StageRecord
from pipelines.sequence.base import refit_command
from pipelines.sequence.making import StageMaker
from sapt_core.backbones.reference import weight_bytes
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.errors import SnapshotError
from sapt_core.versions.manifest import Manifest

SEALED = "test.arrow"


@dataclass(frozen=True)
class Row:
    """Scores (0 to 100) on one task; None where there is nobody to score, or nothing to score on.

    Attributes:
        task: its name.
        candidate: of the version that is to be promoted; None: it has not learnt the task, or keeps no test rows of it.
        champion: of the one that answers now.
        bare: of the backbone alone.
        learnt: whether the candidate has learnt it.
        forgotten: whether it, or a version that it goes on from, was made to forget it.
    """

    task: str
    candidate: float | None
    champion: float | None
    bare: float | None
    learnt: bool = True
    forgotten: bool = False

    @property
    def change(self) -> float | None:
        """Points that the candidate is above the champion."""
        return None if self.candidate is None or self.champion is None else self.candidate - self.champion

    def faults(self, max_drop: float) -> list[str]:
        """What is against the candidate, for people.

        Args:
            max_drop: points that it may be below the champion.
        """
        if self.forgotten:
            return []
        if not self.learnt:
            return [f"{self.task}: the champion has learnt it and this version has not"]
        if self.candidate is None:
            return []
        found = []
        if self.change is not None and -self.change > max_drop:
            found.append(
                f"{self.task}: falls by {-self.change:.2f} points, from {self.champion:.2f} to {self.candidate:.2f}; "
                f"registry.max_drop is {max_drop:g}"
            )
        if self.bare is not None and self.candidate <= self.bare:
            found.append(f"{self.task}: {self.candidate:.2f} is no better than the bare backbone, {self.bare:.2f}")
        return found


@dataclass(frozen=True)
class Gate:
    """The stages that score, by task.

    Attributes:
        tasks: of the candidate, oldest first.
        lost: tasks that the champion alone has learnt, and whether they were forgotten on purpose.
        candidate, champion, bare: none of a task without test rows; ``champion`` none of a task that it cannot answer.
    """

    tasks: tuple[str, ...]
    lost: Mapping[str, bool]
    candidate: Mapping[str, Stage]
    champion: Mapping[str, Stage]
    bare: Mapping[str, Stage]

    @property
    def stages(self) -> list[Stage]:
        """All of them; those of one version follow each other, so that it is loaded once."""
        return [stage for stages in (self.candidate, self.champion, self.bare) for stage in stages.values()]

    def rows(self, records: Mapping[Stage, StageRecord]) -> list[Row]:
        """What came of it."""

        def score(stages: Mapping[str, Stage], task: str) -> float | None:
            return None if task not in stages else float(records[stages[task]].metrics["score"])

        found = [
            Row(task, score(self.candidate, task), score(self.champion, task), score(self.bare, task))
            for task in self.tasks
        ]
        return [
            *found,
            *(
                Row(task, None, None, None, learnt=False, forgotten=on_purpose)
                for task, on_purpose in self.lost.items()
            ),
        ]


def build_gate(
    config: ExperimentConfig, candidate: Manifest, champion: Manifest | None, forgotten: Collection[str] = ()
) -> Gate:
    """The stages, with the keys that they have in the sequences that learnt the versions; nothing is run.

    Args:
        config: as the candidate was learnt.
        candidate: the version.
        champion: the one that answers now; None if none does.
        forgotten: tasks that the candidate was made to forget.

    Raises:
        SnapshotError: the candidate carries no test rows, or the champion is of another backbone, which reads its rows
            otherwise.
    """
    carried = candidate.carried or ()
    sealed = {
        task.name: tokens.tokens
        for task, tokens in zip(candidate.tasks, carried, strict=bool(carried))
        if SEALED in tokens.tokens
    }
    if not sealed:
        raise SnapshotError(
            "The version carries no sealed test rows of any task, on which it could be held against the champion "
            "(it carries none where retention.sealed_rows is false). To give them back once, from data: "
            f"{refit_command(candidate.names)} retention.sealed_rows=true"
        )
    if champion is not None and not candidate.backbone.is_of(champion.backbone):
        raise SnapshotError(
            f"The version is of backbone {candidate.backbone.path} ({candidate.backbone.digest[:12]}), the champion of "
            f"{champion.backbone.path} ({champion.backbone.digest[:12]}): neither can be scored on the other's rows. "
            "Give pools of two backbones a tracking.model each"
        )
    make = StageMaker(config, candidate.backbone, {}, weight_bytes(config.backbone))
    metrics = {task.name: task.metric for task in candidate.tasks}
    rows = {task: make.carried(f"prepare[{task}]", tokens) for task, tokens in sealed.items()}

    def scored(name: str, manifest: Manifest, tasks: Sequence[str]) -> dict[str, Stage]:
        version = make.carried(name, {"manifest": manifest.trained or manifest.digest})
        return {
            task: make.evaluation(f"evaluate[{name} on {task}]", version, rows[task], [metrics[task]]) for task in tasks
        }

    known = [] if champion is None else [task.name for task in champion.tasks]
    answered = [task for task in rows if champion is not None and (task in known or not champion.method.needs_task)]
    tasks = tuple(task.name for task in candidate.tasks)
    return Gate(
        tasks=tasks,
        lost={task: task in forgotten for task in known if task not in tasks},
        candidate=scored("candidate", candidate, list(rows)),
        champion={} if champion is None else scored("champion", champion, answered),
        bare={task: make.zero_shot(f"zero_shot[{task}]", prepared, [metrics[task]]) for task, prepared in rows.items()},
    )
