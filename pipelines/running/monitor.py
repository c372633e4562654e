"""News of a running sequence: to the console, to MLflow, and each finished version to the registry."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from statistics import fmean
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from cluster.stages import Stage, StageEvent, StageRecord
from cluster.store import ArtifactStore
from pipelines.console.tables import interval, wide_console
from pipelines.reports.findings import Findings, collect, moved, read_curve, read_manifest, scored_versions
from pipelines.reports.verdict import Line, Registered, judge
from pipelines.sequence.experiment import Experiment
from pipelines.sequence.scored import Scored, read_scored
from sapt_core.judging.analysis import gate_ends
from sapt_core.judging.metrics import ScoreMatrix
from sapt_core.judging.scoring.intervals import LEVEL, Estimate
from sapt_core.pool.probe.verdict import Verdict
from sapt_core.versions.manifest import Manifest

UNTOLD = {
    "carried",
    "complete",
    "evaluate",
    "zero_shot",
    "attend",
    "quality",
    "cost",
    "probe",
}  # many and short: the rows of scores tell that they are done, and a probe tells what it found


class Publisher(Protocol):
    """Where stages, scores and versions are published; ``pipelines.running.publishing`` does it in MLflow.

    Attributes:
        versions: numbers of those that are published by now, None for one that gets none.
    """

    versions: list[int | None]

    def stage(self, record: StageRecord, curve: Callable[[], list[dict[str, float]]]) -> None:
        """A finished stage, and what reads its training curve."""
        ...

    def version(self, manifest: Manifest, index: int, metrics: Mapping[str, float]) -> None:
        """A version with its scores."""
        ...


class Monitor:
    """Follows the stages of one sequence.

    Args:
        experiment: the sequence.
        store: holds what the stages gave.
        publisher: MLflow, or None without it.
        label: put before every line, where several sequences run at once.

    Attributes:
        bare: what the bare backbone scores on the tasks, as far as somebody measured it.
        registered: what the registry says of the last version, once that is published.
    """

    def __init__(
        self, experiment: Experiment, store: ArtifactStore, publisher: Publisher | None, label: str = ""
    ) -> None:
        self.experiment = experiment
        self.console = wide_console()
        self.records: dict[Stage, StageRecord] = {}
        self.store = store
        self.bare: dict[str, float] = {}
        self.registered: Registered | None = None
        self._planned: set[Stage] = set()
        self._told = experiment.graph.known
        self._publisher = publisher
        self._label = label

    def on_event(self, event: StageEvent) -> None:
        """Take news of one stage."""
        stage = event.stage
        if event.kind == "planned":
            self._planned.add(stage)
        elif event.kind == "started" and stage.kind not in UNTOLD:
            self._say(f"{stage.name} started")
        elif event.kind == "failed":
            self._say(f"{stage.name} failed")
        if event.record is None:
            return
        self.records[stage] = event.record
        if event.kind == "finished" and stage.kind not in UNTOLD:
            self._say(f"{stage.name} finished in {event.record.seconds:.0f} s")
        record = event.record
        if stage.kind == "probe" and (event.kind == "finished" or record.values):
            self._say(f"backbone: {Verdict(**record.metrics)}")
        if self._publisher is not None and "curve" in record.metrics:
            self._publisher.stage(record, lambda: read_curve(record, self.store))
        elif self._publisher is not None and stage.kind == "quality":
            self._publisher.stage(record, list)
        self._publish_rows()

    @property
    def version(self) -> int | None:
        """Number of the last version in the registry, as far as it is published."""
        versions = self._publisher.versions if self._publisher is not None else []
        return versions[-1] if versions else None

    def matrix(self) -> ScoreMatrix:
        """Scores so far: the rows that are complete, without gaps."""
        graph = self.experiment.graph
        complete_rows = graph.evaluate[: scored_versions(self.experiment, self.records)]
        rows = tuple(self._scores(row) for row in complete_rows)
        single = tuple(self.records[stage].metrics["score"] for stage in graph.single if stage in self.records)
        return ScoreMatrix(graph.tasks, rows, single if len(single) == len(graph.tasks) else None, graph.lessons)

    def manifest(self, index: int) -> Manifest:
        """Version ``index`` (from 0): as it is published, where that is planned, else as training left it."""
        graph = self.experiment.graph
        stage = next((each for each in graph.completed(index) if each in self._planned), graph.train[index])
        return read_manifest(self.records[stage], self.store)

    @cached_property
    def findings(self) -> Findings:
        """All there is to say of the sequence; to be asked for once it has ended."""
        return collect(self.experiment, self.records, self.store, len(self.experiment.graph.train), self.bare)

    @property
    def verdict(self) -> tuple[Line, ...]:
        """What came of it, in a few lines; to be asked for once it has ended."""
        return judge(self.findings, self.registered)

    def summary(self) -> dict[str, Any]:
        """The figures of the end, for scripts."""
        matrix = self.matrix()
        config = self.experiment.config
        return {
            "tasks": list(matrix.tasks),
            # Where a task was learnt again, what each row of scores comes after.
            **({} if matrix.lessons is None else {"lessons": list(matrix.labels)}),
            "scores": [list(row) for row in matrix.rows],
            "intervals": [[each.interval for each in row] for row in self._scored],
            "other_scores": self._other_scores(),
            "single": None if matrix.single is None else list(matrix.single),
            "ap": matrix.ap(),
            "f_ra": matrix.f_ra(),
            "fwt": matrix.fwt(),
            "bwt": matrix.bwt(),
            "bwt_over_t": matrix.bwt_over_t(),
            "model": config.tracking.model if self._publisher is not None else None,
            "version": self.version,
            "snapshot": self.manifest(len(matrix.rows) - 1).digest,
            "method": config.method.name,
            "seed": config.seed,
            "key": self.experiment.key,
            "verdict": [str(line) for line in self.verdict],
            "warnings": [{**asdict(each), "text": str(each)} for each in self.findings.diagnoses],
            "seconds": self.stage_seconds(),
            **self._transfer(),
        }

    @property
    def _scored(self) -> list[list[Scored]]:
        """All that is known of the scores of the matrix."""
        rows = self.experiment.graph.evaluate[: scored_versions(self.experiment, self.records)]
        return [[read_scored(self.records[stage]) for stage in row] for row in rows]

    def _other_scores(self) -> dict[str, dict[str, Estimate]]:
        """By metric beside the leading one, and by task, what the last version scores."""
        found: defaultdict[str, dict[str, Estimate]] = defaultdict(dict)
        for task, scored in zip(self.experiment.graph.tasks, self._scored[-1], strict=True):
            for name, each in scored.others.items():
                found[name][task] = each
        return dict(found)

    def _transfer(self) -> dict[str, Any]:
        """Scores on the unseen tasks, if there are any: after every version, and of the bare backbone."""
        graph = self.experiment.graph
        if not graph.unseen:
            return {}
        after = zip(*(self._scores(row) for row in graph.transfer), strict=True)
        return {
            "unseen": {name: list(scores) for name, scores in zip(graph.unseen, after, strict=True)},
            "zero_shot": dict(zip(graph.unseen, self._scores(graph.zero_shot), strict=True)),
        }

    def _scores(self, stages: Sequence[Stage]) -> tuple[float, ...]:
        return tuple(self.records[stage].metrics["score"] for stage in stages)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of every kind of stage, as their records state them, whichever run did the work."""
        total: defaultdict[str, float] = defaultdict(float)
        for stage, record in self.records.items():
            total[_group(stage)] += record.seconds
        return {group: round(seconds, 1) for group, seconds in sorted(total.items())}

    def show_plan(self, states: Mapping[Stage, str]) -> None:
        """Print what a run would do, a line a kind of stage."""
        table = Table(title=f"Plan: {len(states)} stages, experiment {self.experiment.key[:12]}", title_justify="left")
        for column in ("stage", "done", "to run", "depends on others"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        counts = Counter((_group(stage), state) for stage, state in states.items())
        for group in dict.fromkeys(_group(stage) for stage in states):
            table.add_row(group, *(str(counts[group, state]) for state in ("done", "to run", "unknown")))
        self.console.print(table)
        left = [stage for stage, state in states.items() if state != "done"]
        alone = set(self.experiment.graph.alone)
        tell_alone(self.console, sum(stage in alone for stage in left), len(left))

    def show_end(self) -> None:
        """Print what came of it and what to type next, then the score matrix and its summaries."""
        matrix, config = self.matrix(), self.experiment.config
        for line in self.verdict:
            # A line that is broken for the terminal's width cannot be pasted.
            self.console.print(str(line), style="yellow" if line.good is False else None, soft_wrap=True)
        rows = "" if config.evaluation.split == "test" else f", {config.evaluation.split} rows"
        table = Table(title=f"Scores of {config.method.name}, row i after task i{rows}", title_justify="left")
        table.add_column("after")
        for index, name in enumerate(matrix.tasks):
            table.add_column(f"{index} {short_name(name)}", justify="right")
        for index, row in enumerate(matrix.rows):
            table.add_row(f"{index} {short_name(matrix.labels[index])}", *(f"{score:.1f}" for score in row))
        table.add_row(f"{LEVEL} % interval", *(interval(each.interval) for each in self._scored[-1]))
        for name, others in self._other_scores().items():
            of_tasks = [others.get(task) for task in matrix.tasks]
            table.add_row(name, *("" if each is None else f"{each.score:.1f}" for each in of_tasks))
            table.add_row("", *("" if each is None else interval((each.low, each.high)) for each in of_tasks))
        if matrix.single is not None:
            table.add_row("alone", *(f"{score:.1f}" for score in matrix.single))
        self.console.print(table)
        fwt = matrix.fwt()
        self.console.print(
            f"AP {matrix.ap():.2f}  F.Ra {matrix.f_ra():.2f}  "
            f"FWT {'not measured' if fwt is None else f'{fwt:.2f}'}  "
            f"BWT {matrix.bwt():.2f} (over T: {matrix.bwt_over_t():.2f})"
        )
        if self.experiment.unseen:
            self._show_transfer()
        for diagnosis in self.findings.diagnoses:
            self.console.print(f"warning: {diagnosis}", style="yellow")
        if self._publisher is not None:
            self.console.print(f"registered: {config.tracking.model} version {self.version}")

    def _show_transfer(self) -> None:
        graph = self.experiment.graph
        table = Table(title="Scores on tasks that are never learnt", title_justify="left")
        table.add_column("after")
        for name in (*map(short_name, graph.unseen), "mean"):
            table.add_column(name, justify="right")
        labels = [f"{index} {short_name(name)}" for index, name in enumerate(self.matrix().labels)]
        for label, row in zip(["backbone", *labels], [graph.zero_shot, *graph.transfer], strict=True):
            scores = self._scores(row)
            table.add_row(label, *(f"{score:.1f}" for score in (*scores, fmean(scores))))
        self.console.print(table)

    def _publish_rows(self) -> None:
        """Publish every version whose scores are complete, in the order of the tasks."""
        graph = self.experiment.graph
        while self._told < len(graph.train):
            index = self._told
            attend = graph.attend[index : index + 1]
            complete = [stage for stage in graph.completed(index) if stage in self._planned]
            needed = (graph.train[index], *graph.evaluate[index], *graph.transfer[index], *attend, *complete)
            if not all(stage in self.records for stage in needed):
                return
            matrix = self.matrix()
            row = matrix.rows[index]
            if self._publisher is not None:
                scores: dict[str, float] = {}
                for name, stage in zip(graph.tasks, graph.evaluate[index], strict=False):
                    scores |= read_scored(self.records[stage]).figures("score", name)
                figures = {"ap": matrix.ap(index), "f_ra": matrix.f_ra(index), "bwt": matrix.bwt(index)}
                manifest = self.manifest(index)
                routing = self._routing(index, manifest) if attend else {}
                unseen: dict[str, float] = {}
                for name, stage in zip(graph.unseen, graph.transfer[index], strict=True):
                    unseen |= read_scored(self.records[stage]).figures("unseen", name, "unseen_")
                self._publisher.version(manifest, index, {**scores, **unseen, **figures, **routing})
            self._told += 1
            self._say(
                f"after {matrix.labels[index]}: AP {matrix.ap(index):.1f}, F.Ra {matrix.f_ra(index):.1f} | "
                + " ".join(f"{score:.1f}" for score in row)
            )

    def _routing(self, index: int, manifest: Manifest) -> dict[str, float]:
        """How version ``index`` attends: each task's weight of its own block and its KL, and the new block's start."""
        graph = self.experiment.graph
        weights = self.records[graph.attend[index]].metrics["weights"]
        start, end = gate_ends(read_curve(self.records[graph.train[index]], self.store))
        figures = {"gate/first_steps": start, "gate/end": end}
        found = zip(graph.tasks, weights, moved(manifest, weights), strict=False)
        for own, (name, row, kl) in enumerate(found):
            figures |= {f"own_weight/{name}": row[own], f"attention_kl/{name}": kl}
        return figures

    def _say(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {self._label}{text}")


def tell_alone(console: Console, alone: int, left: int) -> None:
    """Say what FWT costs of what is left to run, and how to do without."""
    if alone:
        console.print(
            f"{alone} of the {left} stages to run learn every task alone and score it, which FWT alone needs: "
            "evaluation.single_task=false leaves them out",
            markup=False,
        )


def _group(stage: Stage) -> str:
    return stage.name.partition("[")[0]


def short_name(name: str) -> str:
    """A task's name for a narrow column: of a numbered one its number."""
    return name.partition("_")[0] if name.startswith("task") else name
