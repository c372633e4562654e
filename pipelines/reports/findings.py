"""What the records of a sequence say, up to one of its versions; nothing is computed on a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile, zip_longest
from typing import Any

from cluster.stages import Stage, StageRecord, done
from cluster.store import ArtifactStore
from cluster.store.lookups import Lookups
from pipelines.reports.answers import Answer, drawn, read_predictions
from pipelines.sequence.bodies import LABELS
from pipelines.sequence.experiment import Experiment
from pipelines.sequence.making import StageMaker
from pipelines.sequence.scored import Scored, read_scored
from sapt_core.data.facts import TaskFacts
from sapt_core.data.prepare import read_split
from sapt_core.data.task import CutOff
from sapt_core.io.hashing import canonical_hash
from sapt_core.judging.analysis import (
    Circumstances,
    Diagnosis,
    SampleQuality,
    TrainingEnd,
    alignment,
    diagnose,
    gate_ends,
    spearman,
)
from sapt_core.judging.baselines import commonest_answer, constant_score
from sapt_core.judging.metrics import ScoreMatrix
from sapt_core.pool.probe.verdict import Verdict
from sapt_core.versions.manifest import Manifest

Rows = tuple[tuple[float, ...], ...]
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class AttentionFindings:
    """Mean weights of blocks, oldest first, of a method with shared attention.

    Attributes:
        learnt: row j is task j's attention when it was learnt, over the j+1 blocks there were.
        test: entry i is version i: row j the weights that task j's scored rows were answered with.
        dev: the same on dev rows; None for a version where it was not measured.
        kl: entry i is version i: KL of each task's attention when learnt from that on its dev rows now.
    """

    learnt: Rows
    test: tuple[Rows, ...]
    dev: tuple[Rows | None, ...]
    kl: tuple[tuple[float, ...] | None, ...]


@dataclass(frozen=True)
class SampleFindings:
    """A task's pseudo-samples.

    Attributes:
        counts: of the generator: wanted, generated, malformed, empty, duplicate, kept; of one that writes
            answers too: known_answers, those that a train row has.
        quality: against the real rows; None where it was not measured.
    """

    counts: dict[str, int]
    quality: SampleQuality | None


@dataclass(frozen=True)
class DataFindings:
    """What was counted when a task was prepared.

    Attributes:
        facts: figures; without labels where these may not stay.
        cut: what was cut off the train rows, if anything.
    """

    facts: TaskFacts
    cut: CutOff | None


@dataclass(frozen=True)
class Findings:
    """A sequence after one of its versions, with T tasks.

    Attributes:
        experiment: the sequence.
        manifest: the version.
        matrix: scores of these T tasks; single-task scores if all T are there.
        scored: the scores of ``matrix`` with their confidence intervals, and metrics beside the leading one.
        curves: training curve of every lesson: a task's, and another one whenever it was learnt again; None of a task
            that was not trained here.
        attention: None for a method without shared attention.
        reflected: for each task whether what was learnt after it reflected on anything of it.
        samples: of each task but the last; None where a task has none; empty where no text is made.
        answers: of each task some of its scored rows, drawn whatever was answered; none where rows may not stay.
        constant: for each task the score of giving always its commonest answer; None where no rows tell which that is.
        bare: for each task the score of the bare backbone; None where it was not measured.
        data: for each task what was counted of its rows; None of one that was learnt before, or by a release that
            did not count.
        probe: what the backbone was found to do with blocks on it; None of a sequence that was learnt without looking.
        records: keys of the records that all this was read from.
        finished_at: when the last of them was written (UTC).
    """

    experiment: Experiment
    manifest: Manifest
    matrix: ScoreMatrix
    scored: tuple[tuple[Scored, ...], ...]
    curves: tuple[Curve | None, ...]
    attention: AttentionFindings | None
    reflected: tuple[bool, ...]
    samples: tuple[SampleFindings | None, ...]
    answers: tuple[tuple[Answer, ...], ...]
    constant: tuple[float | None, ...]
    bare: tuple[float | None, ...]
    data: tuple[DataFindings | None, ...]
    probe: Verdict | None
    records: tuple[str, ...]
    finished_at: datetime

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the T tasks."""
        return self.matrix.tasks

    @property
    def gates(self) -> tuple[tuple[float, float] | None, ...]:
        """The new block's weight over the first and last steps of every lesson; None without attention."""
        return tuple(None if self.attention is None or curve is None else gate_ends(curve) for curve in self.curves)

    @property
    def digest(self) -> str:
        """sha256 of all that is found: records, the limits they are held against, and tasks without rows to show."""
        limits = self.experiment.config.diagnostics.model_dump(mode="json")
        hidden = [name for name, shown in zip(self.tasks, self.answers, strict=True) if not shown]
        found = [self.experiment.key, list(self.records), list(self.bare), limits]
        return canonical_hash([*found, *([hidden] if hidden else [])])

    @cached_property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Figures beyond the limits of the config's ``diagnostics``, with their cures."""
        config, tasks = self.experiment.config, len(self.tasks)
        last = [self.matrix.learnt(task) for task in range(tasks)]
        curves, gates = [self.curves[lesson] for lesson in last], [self.gates[lesson] for lesson in last]
        kl = None if self.attention is None else self.attention.kl[-1]
        return diagnose(
            self.matrix,
            config.diagnostics,
            Circumstances(
                shared=self.attention is not None,
                reflected=self.reflected,
                alignment=[None] * tasks if kl is None else kl,
                gates=[None if ends is None else ends[1] for ends in gates],
                trainings=[None if curve is None else TrainingEnd.of(curve) for curve in curves],
                constant=self.constant,
                bare=self.bare,
            ),
        )

    def quality_against_forgetting(self) -> dict[str, float | None]:
        """Spearman correlation over tasks of how well pseudo-samples are told with how much was forgotten."""
        qualities = [each.quality if each else None for each in self.samples]
        forgotten = self.matrix.forgotten()
        return {
            name: spearman([None if each is None else getattr(each, name) for each in qualities], forgotten)
            for name in ("embedding_accuracy", "word_accuracy")
        }


def scored_versions(experiment: Experiment, records: Mapping[Stage, StageRecord]) -> int:
    """How many versions, from the first on without a gap, are learnt and scored on all their tasks."""
    graph = experiment.graph
    rows = zip(graph.train, graph.evaluate, strict=True)
    return sum(1 for _ in takewhile(lambda row: all(stage in records for stage in (row[0], *row[1])), rows))


def bare_scores(experiment: Experiment, known: Lookups) -> dict[str, float]:
    """What the bare backbone scores on tasks that are learnt, by task, as far as that is in the store; nothing is run.

    No run scores it: with few tasks that would take as long as scoring the pool does. Where a version was held against
    it (``sapt pool promote``), the score is there.
    """
    graph = experiment.graph
    make = StageMaker(experiment.config, experiment.backbone, {}, 0)
    stages = {
        task.name: make.zero_shot(f"zero_shot[{task.name}]", prepared, task.metrics)
        for task, prepared in zip(experiment.every_task, graph.prepare, strict=True)
    }
    there = done(list(stages.values()), known)
    return {name: there[stage].metrics["score"] for name, stage in stages.items() if stage in there}


def collect(
    experiment: Experiment,
    records: Mapping[Stage, StageRecord],
    store: ArtifactStore,
    version: int,
    bare: Mapping[str, float],
) -> Findings:
    """Read what there is of a version.

    Args:
        experiment: the sequence.
        records: of its finished stages, at least those that ``scored_versions`` counts for ``version``.
        store: holds their blobs.
        version: from 1: lessons so far.
        bare: as ``bare_scores`` gives it.
    """
    graph, retention = experiment.graph, experiment.config.retention
    tasks, base = graph.known_tasks(version), experiment.base
    before = 0 if base is None else len(base.tasks)
    used: dict[Stage, StageRecord] = {}

    def take(stages: tuple[Stage, ...]) -> list[StageRecord | None]:
        used.update({stage: records[stage] for stage in stages if stage in records})
        return [records.get(stage) for stage in stages]

    learnt = [records[stage] for stage in graph.train[:version]]
    scored = [[records[stage] for stage in row] for row in graph.evaluate[:version]]
    for stages in (graph.train[:version], *graph.evaluate[:version]):
        take(stages)
    complete = [record for record in take(graph.completed(version - 1)) if record is not None]
    manifest = read_manifest([*learnt, *complete][-1], store)
    single = [record.metrics["score"] for record in take(graph.single[:version]) if record is not None]
    attention = None
    if manifest.attention is not None:
        dev = [_rows(record) for record in take(graph.attend[:version])] or [None] * version
        attention = AttentionFindings(
            learnt=manifest.targets,
            test=tuple(tuple(tuple(record.metrics["weights"]) for record in row) for row in scored),
            dev=tuple(dev),
            # What is to be held of a task is another thing once that was learnt again.
            kl=tuple(
                None if rows is None else moved(manifest if known is None else known, rows)
                for rows, known in zip_longest(dev, () if base is None else base.trained[:version])
            ),
        )
    matrix = ScoreMatrix(
        graph.tasks[:tasks],
        tuple(tuple(record.metrics["score"] for record in row) for row in scored),
        tuple(single) if len(single) == tasks else None,
        graph.lessons[:version],
    )
    newest = matrix.taught()
    kept = take(tuple(stage for place, stage in enumerate(graph.kept[:tasks]) if place != newest))
    held = [bool(record and record.metrics["bytes"]) for record in kept]
    held[newest:newest] = [False]
    compared = take(graph.quality[: max(tasks - 1 - before, 0)])
    qualities = dict(enumerate(compared, start=before))
    first = [read_predictions(scored[matrix.learnt(task)][task], store) for task in range(tasks)]
    now = [first[task] if task == newest else read_predictions(scored[-1][task], store) for task in range(tasks)]
    prepared = take(graph.prepare[:tasks])
    (probed,) = take((graph.probe,))
    commonest = _commonest(experiment, prepared, store)
    return Findings(
        experiment=experiment,
        manifest=manifest,
        matrix=matrix,
        scored=tuple(tuple(map(read_scored, row)) for row in scored),
        curves=tuple(None if "curve" not in record.metrics else read_curve(record, store) for record in learnt),
        attention=attention,
        reflected=(*held, *(False for _ in range(tasks - len(held)))),
        samples=tuple(_samples(record, qualities.get(index)) for index, record in enumerate(kept)) if compared else (),
        answers=tuple(
            drawn(first[index], now[index], task.metric, manifest.blocks_for(task.name))
            if first[index] and (index < before or retention.sealed_rows)
            else ()
            for index, task in enumerate(manifest.tasks)
        ),
        constant=tuple(
            None
            if answer is None or not rows
            else constant_score(
                task.metric, answer, [row["references"] for row in rows], [row["input"] for row in rows]
            )
            for task, answer, rows in zip(manifest.tasks, commonest, now, strict=True)
        ),
        bare=tuple(bare.get(name) for name in graph.tasks[:tasks]),
        data=tuple(_data(record, store, texts=retention.keeps_all) for record in prepared),
        probe=None if probed is None else Verdict(**probed.metrics),
        records=tuple(record.key for record in used.values()),
        finished_at=max(record.finished_at for record in used.values()),
    )


def moved(manifest: Manifest, dev: Rows) -> tuple[float, ...]:
    """KL of each task's attention when it was learnt from its mean weights ``dev`` at some version."""
    return tuple(alignment(target, row) for target, row in zip(manifest.targets, dev, strict=False))


def read_manifest(record: StageRecord, store: ArtifactStore) -> Manifest:
    """The version that a stage gave."""
    return Manifest.from_bytes(store.get(record.outputs["manifest"]))


def read_curve(record: StageRecord, store: ArtifactStore) -> Curve:
    """The training curve of a stage that has one."""
    curve: Curve = json.loads(store.get(record.metrics["curve"]))
    return curve


def _commonest(
    experiment: Experiment, prepared: Sequence[StageRecord | None], store: ArtifactStore
) -> list[str | None]:
    """Of each task the answer that most train rows have, or most dev rows where it was learnt before: those are left.

    Args:
        prepared: a record a task; only those of tasks that were learnt before are read.
    """
    before = 0 if experiment.base is None else len(experiment.base.tasks)
    rows: list[list[Sequence[str]]] = [
        [] if record is None else list(read_split(store.get(record.outputs["dev.arrow"]))["references"])
        for record in prepared[:before]
    ]
    rows += [[row.references for row in task.train] for task in experiment.tasks if task not in experiment.again]
    return [commonest_answer(each) for each in rows[: len(prepared)]]


def _data(prepared: StageRecord | None, store: ArtifactStore, *, texts: bool) -> DataFindings | None:
    """What was counted of a task, with its labels where ``texts`` of rows may stay."""
    if prepared is None or "facts" not in prepared.metrics:
        return None
    labels, cut = {}, prepared.metrics["cut"]
    if texts and LABELS in prepared.outputs and LABELS not in prepared.erased:
        labels = json.loads(store.get(prepared.outputs[LABELS]))
    return DataFindings(
        TaskFacts.joined(prepared.metrics["facts"], labels),
        None if cut is None else CutOff(**{**cut, "splits": tuple(cut["splits"])}),
    )


def _rows(record: StageRecord | None) -> Rows | None:
    return None if record is None else tuple(tuple(row) for row in record.metrics["weights"])


def _samples(counted: StageRecord | None, compared: StageRecord | None) -> SampleFindings | None:
    if counted is None:
        return None
    metrics: dict[str, Any] = counted.metrics
    kept = metrics["kept"]
    # Samples that were given are all that was wanted.
    counts = {"wanted": kept, "generated": kept, "malformed": 0, "empty": 0, "duplicate": 0, "kept": kept}
    counts = {name: metrics.get(name, value) for name, value in counts.items()}
    if "known_answers" in metrics:
        counts["known_answers"] = metrics["known_answers"]
    return SampleFindings(
        counts,
        None if compared is None else SampleQuality(**compared.metrics),
    )
