"""A sequence in MLflow: parent run, a child a training stage, and a model version a task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from cluster.stages import StageRecord
from cluster.store import resolved
from cluster.tracking.lines import SNAPSHOT, SWEEP, Lineage
from cluster.tracking.outbox import Outbox
from cluster.tracking.registry import CHAMPION, PoolRegistry
from cluster.tracking.runs import DESCRIPTION, LoggedDataset, Tracker, metric_name
from cluster.tracking.service import check_readable
from pipelines.reports.answers import COLUMNS, table
from pipelines.reports.page import Link
from pipelines.reports.verdict import Champion, Line, Registered
from pipelines.running.description import describe
from pipelines.running.monitor import Monitor
from pipelines.sequence.experiment import Experiment
from sapt_core.errors import TrackingError
from sapt_core.io.addresses import redacted, without_user
from sapt_core.io.shipped import located
from sapt_core.settings import TrackingConfig
from sapt_core.versions.manifest import Manifest


def lineage_of(experiment: Experiment, sweep: str | None = None) -> Lineage:
    """What the registry compares with the pool that it holds."""
    tasks = tuple(task.name for task in experiment.every_task)
    asked = f"method {experiment.config.method.name}, tasks {', '.join(tasks)}"
    return Lineage(
        asked if sweep is None else f"{asked} (the best trial of sweep {sweep})", experiment.graph.lineage, sweep, tasks
    )


def registered_as(snapshot: str, experiment: Experiment, tracker: Tracker) -> Registered | None:
    """What the registry says of a version.

    Args:
        snapshot: its digest.
        experiment: of its sequence.
        tracker: of the MLflow that is asked.

    Returns:
        None if it is not registered. The champion's scores are those on the rows that the experiment has, as far as
        the champion's run says which it had.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    registry = PoolRegistry(tracker.config)
    versions = registry.versions()
    own = next((each for each in versions if each.tags.get(SNAPSHOT) == snapshot), None)
    if own is None:
        return None
    champion = next((each for each in versions if CHAMPION in each.aliases), None)
    if champion is None:
        return Registered(own.version, None)
    data = {} if champion.run_id is None else tracker.datasets(champion.run_id)
    names = {metric_name(f"score/{task.name}"): task.name for task in experiment.every_task}
    scores = {
        names.get(name, name.removeprefix("score/")): score
        for name, score in registry.scores(champion).items()
        if name.startswith("score/")
    }
    for task in experiment.every_task:
        if not task.digest.startswith(data.get(task.name, "")):
            scores.pop(task.name, None)
    return Registered(own.version, Champion(champion.version, scores))


@dataclass(frozen=True)
class SequenceRun:
    """The parent run of a sequence that was published."""

    tracker: Tracker
    run_id: str

    @classmethod
    def find(cls, experiment: Experiment) -> SequenceRun:
        """The run of an experiment, left as it is.

        Raises:
            TrackingError: MLflow cannot be reached or has no run of it.
        """
        config = experiment.config.tracking
        tracker = Tracker(check_readable(config))
        run_id = tracker.find_sequence(experiment.key)
        if run_id is None:
            raise TrackingError(
                f"MLflow at {redacted(config.uri)} has no run of experiment {experiment.key[:12]} in "
                f"{config.experiment!r}: give the tracking.uri and tracking.experiment that pipelines/continual.py ran "
                "with, or --inline to write the folder alone."
            )
        return cls(tracker, run_id)

    def links(self, version: int | None = None) -> tuple[Link, ...]:
        """The run, and the ``version`` of the registered model that it ended with."""
        config = self.tracker.config
        web = without_user(config.uri).rstrip("/") if config.uri.startswith(("http://", "https://")) else None
        folder = self.tracker.folder_of(self.run_id)
        found = [(f"MLflow run {self.run_id}", f"#/experiments/{folder}/runs/{self.run_id}")]
        if version is not None:
            found.append((f"{config.model} version {version}", f"#/models/{quote(config.model)}/versions/{version}"))
        return tuple(Link(text, None if web is None else f"{redacted(web)}/{place}") for text, place in found)

    def log_report(self, files: Mapping[str, bytes], version: int | None = None) -> str:
        """Put a report's files into the run; returns the artifact folder."""
        folder = "report" if version is None else f"report/version-{version}"
        self.tracker.log_artifacts(self.run_id, {f"{folder}/{name}": data for name, data in files.items()})
        return folder


class MLflowPublisher:
    """Publishes one experiment; see ``pipelines.running.monitor.Publisher``. No call of it waits for MLflow.

    Args:
        experiment: the sequence.
        tracking: as ``cluster.tracking.service.check`` returned it.
        outbox: makes the calls.
        parent: run of the comparison that the sequence is part of. Its versions are scored and not registered:
            the registry is for what somebody may serve, and ``pipelines/continual.py`` puts it there.
        name: of the run; default: method, suite, tasks and seed.
        sweep: whose best trial it is.
    """

    def __init__(
        self,
        experiment: Experiment,
        tracking: TrackingConfig,
        outbox: Outbox,
        *,
        parent: str | None = None,
        name: str | None = None,
        sweep: str | None = None,
    ) -> None:
        config = experiment.config
        self._tracker = Tracker(tracking)
        self._registry = PoolRegistry(tracking) if parent is None else None
        self._lineage = lineage_of(experiment, sweep)
        self._store = resolved(config.store)
        self._tags = {
            "method": config.method.name,
            "backbone": experiment.backbone.path,
            **({} if sweep is None else {SWEEP: sweep}),
        }
        # Of the run alone: hashes are of no use to who chooses among versions.
        made_from = {
            "config_hash": config.digest(),
            "data_digest": experiment.data_digest,
            "git_commit": experiment.commit,
        }
        suite = f"{config.benchmark.suite} {len(experiment.every_task)} tasks"
        again = "".join(f", {task.name} again" for task in experiment.again)
        name = name or f"{config.method.name} {suite}{again} seed {config.seed}"
        params = _flat(
            config.model_dump(
                mode="json", exclude={"store", "tracking", "registry", "cluster", "diagnostics", "retention"}
            )
        )
        self.versions: list[int | None] = []
        self._tasks = [task.name for task in experiment.every_task]
        self._run: str | None = None
        self._stage_runs: dict[str, str] = {}
        self._trainings = [stage.name for stage in experiment.graph.train]
        self._parent = None if experiment.base is None else experiment.base.manifest.digest
        self._outbox = outbox

        def open_run() -> None:
            self._run = self._tracker.start_sequence(
                name, key=experiment.key, params=params, tags={**self._tags, **made_from}, parent=parent
            )
            self._tracker.log_datasets(self.run_id, _datasets(experiment))

        outbox.put(open_run)

    @property
    def run_id(self) -> str:
        """Id of the sequence's run, which is opened before anything else is told."""
        assert self._run is not None  # noqa: S101
        return self._run

    @property
    def run(self) -> SequenceRun:
        """The sequence's run."""
        return SequenceRun(self._tracker, self.run_id)

    def stage(self, record: StageRecord, curve: Callable[[], list[dict[str, float]]]) -> None:
        """Log a stage as a child run, once."""
        self._outbox.put(lambda: self._log_stage(record, curve()))

    def _log_stage(self, record: StageRecord, curve: list[dict[str, float]]) -> None:
        curves: dict[str, list[tuple[int, float]]] = {}
        for entry in curve:
            for name, value in entry.items():
                if name != "step":
                    curves.setdefault(name, []).append((int(entry["step"]), value))
        figures = {
            name: float(value)
            for name, value in record.metrics.items()
            if isinstance(value, int | float) and name not in curves
        }
        self._stage_runs[record.name] = self._tracker.log_stage(
            self.run_id,
            record.name,
            key=record.key,
            metrics=figures,
            curves=curves,
            seconds=record.seconds,
            tags={"kind": record.kind, "world_size": str(record.world_size)},
        )

    def version(self, manifest: Manifest, index: int, metrics: Mapping[str, float]) -> None:
        """Log the scores and publish the version, once."""
        self._outbox.put(lambda: self._publish(manifest, index, metrics))

    def _publish(self, manifest: Manifest, index: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log_scores(self.run_id, index + 1, metrics)
        if self._registry is None:
            self.versions.append(None)
            return
        tasks = ", ".join(task.name for task in manifest.tasks)
        number = self._registry.publish(
            manifest.to_bytes(),
            self._store,
            lineage=self._lineage,
            digest=manifest.digest,
            index=index + 1,
            run_id=self.run_id,
            description=describe(manifest, self._registry.config.model, metrics, self._scores_before()),
            tags={
                "task": manifest.tasks[manifest.taught].name,
                "tasks": tasks,
                **{name: f"{metrics[name]:.2f}" for name in ("ap", "f_ra")},
                **self._tags,
            },
            metrics=metrics,
            parent=self._parent,
            learnt_in=self._stage_runs.get(self._trainings[index]),
        )
        self._parent = manifest.digest
        self.versions.append(number)

    def _scores_before(self) -> dict[str, float]:
        """Figures of the version that the next one goes on from, by their names here."""
        assert self._registry is not None  # noqa: S101 - asked where versions are registered
        before = None if self._parent is None else self._registry.with_snapshot(self._parent)
        scores = {} if before is None else self._registry.scores(before)
        names = [f"score/{name}" for name in self._tasks]
        return {name: scores[metric_name(name)] for name in names if metric_name(name) in scores}

    def finish(self, monitor: Monitor, report: Callable[[], Mapping[str, bytes]]) -> None:
        """Close the parent run with the figures of the end, its verdict, warnings, answers and report.

        The report is made where MLflow is told of it: drawing many tasks takes long, and stages would wait.
        """
        made = cache(report)
        summary, verdict, findings = monitor.summary(), monitor.verdict, monitor.findings
        rows = table(findings.tasks, findings.answers)
        self._outbox.put(lambda: self._finish(summary, verdict, rows, made()))

    def _finish(
        self,
        summary: Mapping[str, Any],
        verdict: Sequence[Line],
        rows: Sequence[tuple[str | float, ...]],
        report: Mapping[str, bytes],
    ) -> None:
        figures = {name: summary[name] for name in ("ap", "f_ra", "fwt", "bwt") if summary[name] is not None}
        figures["warnings"] = len(summary["warnings"])
        # Step 0, where nothing is learnt, is the bare backbone's.
        zero_shot = {f"unseen/{name}": score for name, score in summary.get("zero_shot", {}).items()}
        self._tracker.log_scores(self.run_id, 0, zero_shot)
        self._tracker.log_scores(self.run_id, len(summary["tasks"]), figures)
        said = "\n".join(warning["text"] for warning in summary["warnings"])
        note = "\n".join(
            f"- **{line.label}**: {f'`{line.text}`' if line is verdict[-1] else line.text}" for line in verdict
        )
        self._tracker.log_tags(self.run_id, {"warnings": said or "none", DESCRIPTION: note})
        if rows:
            self._tracker.log_table(self.run_id, "predictions.json", COLUMNS, rows)
        self._tracker.log_artifacts(self.run_id, {"summary.json": json.dumps(summary, indent=1, allow_nan=False)})
        self.run.log_report(report)
        self._tracker.finish(self.run_id, "FINISHED")

    def abandon(self, *, killed: bool) -> None:
        """Close the parent run of a sequence that failed, behind all that waits, or now, if somebody ``killed`` it.

        Raises:
            TrackingError: it cannot be closed now.
        """
        if not killed:
            self._outbox.put(lambda: self._tracker.finish(self.run_id, "FAILED"))
            return
        self._outbox.stop()
        if self._run is not None:
            self._tracker.finish(self._run, "KILLED")


def _datasets(experiment: Experiment) -> list[LoggedDataset]:
    """The tasks that are learnt, and those that are scored alone."""
    benchmark = experiment.config.benchmark
    paths = {task.name: task.path for task in (*(benchmark.tasks or ()), *benchmark.unseen) if task.path is not None}

    def place(name: str) -> str | None:
        if (path := paths.get(name)) is not None:
            return str(located(path).absolute()) if located(path).exists() else f"hf://datasets/{path}"
        return None if benchmark.data_dir is None else str(benchmark.data_dir.absolute() / name)

    return [
        LoggedDataset(
            # The rows that a task is scored on are those of its first time, by whose name they are compared.
            name=f"{task.name} again" if task in experiment.again else task.name,
            digest=task.digest,
            folder=place(task.name),
            rows=dict(task.rows),
            context=context,
        )
        for context, tasks in (("training", experiment.tasks), ("evaluation", experiment.unseen))
        for task in tasks
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
