"""MLflow runs: a task sequence is a parent run, a training stage one of its children.

There is no active run, so stages may log from any process and in any order. Logging twice is harmless: a run is
found again by its key, and a finished child is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from cluster.store.lease import has_died, this_process
from cluster.tracking.service import client_of, experiment_of, reported
from sapt_core.errors import DivergenceError
from sapt_core.settings import TrackingConfig

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_KEY = "sapt.run_key"
STAGE_KEY = "sapt.stage_key"
WRITER = "sapt.writer"
PARENT = "mlflow.parentRunId"
DESCRIPTION = "mlflow.note.content"
TABLES = "mlflow.loggedArtifacts"  # where MLflow's pages and ``load_table`` look which artifacts are tables
_WRITING_SECONDS = 600

# Limits of MLflow 3 (mlflow.utils.validation).
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_MAX_KEY = 250
_MAX_PARAM = 6000
_MAX_TAG = 8000
_MAX_DIGEST = 36


def metric_name(name: str) -> str:
    """``name`` in MLflow's alphabet.

    A changed name ends in a digest of the given one, so that two names never become one.
    """
    clean = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    clean = "/".join(part.strip(".") or "_" for part in clean.split("/"))
    if clean == name and len(name) <= _MAX_KEY:
        return name
    return f"{clean[: _MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def score_time(config: TrackingConfig, run_id: str, step: int) -> int:
    """Timestamp (ms) of a run's scores at ``step``.

    MLflow keeps one of several points that agree in name, step, value and time, so the time is derived from
    the run, not read off the clock: a score that is written again adds nothing.
    """
    return int(client_of(config.uri).get_run(run_id).info.start_time) + 1000 * step


@dataclass(frozen=True)
class LoggedDataset:
    """What MLflow may know of a data set: never its text.

    Attributes:
        name: of the data set.
        digest: sha256 (hex) of its content.
        folder: where it was read from; None where it was generated.
        rows: their number by split.
        context: what for, as ``training``.
    """

    name: str
    digest: str
    folder: str | None
    rows: Mapping[str, int]
    context: str


@dataclass(frozen=True)
class Tracker:
    """Writes the runs of one experiment. Holds no connection, so it travels to Ray tasks.

    Every method raises ``TrackingError`` when MLflow cannot be used.

    Attributes:
        config: as ``check`` or ``resolved`` returned it.
    """

    config: TrackingConfig

    def start_sequence(
        self, name: str, *, key: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
    ) -> str:
        """Open the parent run of a sequence or of a comparison, or go on in the one that has ``key``.

        MLflow has no create-if-absent: of two drivers that start the same new sequence at once both make a run; each
        then looks again, and who has not the older one goes on in that.

        Args:
            name: shown in the UI.
            key: identity of the run (hex digest): the same command must give the same key.
            params: flat; those a resumed run already has stay as they are.
            tags: more tags, such as the config digest and the git commit.
            parent: run of the comparison that the sequence is part of; a sequence that ran by itself moves there.

        Returns:
            The run's id; its status is RUNNING.
        """
        try:
            with reported(self.config.uri):
                client, experiment = client_of(self.config.uri), experiment_of(self.config)
                found = self._first(experiment, {RUN_KEY: key})
                made = found or client.create_run(experiment, run_name=name, tags={RUN_KEY: key})
                self._open(made, params, tags, parent)
                run = made if found else self._first_of(made, experiment, {RUN_KEY: key})
                if run.info.run_id != made.info.run_id:
                    self._open(run, params, tags, parent)
                return str(run.info.run_id)
        except KeyboardInterrupt:  # nobody else has the id by which to close it
            with reported(self.config.uri):
                for run in self._search(experiment_of(self.config), {RUN_KEY: key}):
                    if run.info.status == "RUNNING":
                        client_of(self.config.uri).set_terminated(run.info.run_id, status="KILLED")
            raise

    def find_sequence(self, key: str) -> str | None:
        """Id of the run that ``start_sequence`` opened with ``key``, as it stands; None if there is none."""
        with reported(self.config.uri):
            experiment = client_of(self.config.uri).get_experiment_by_name(self.config.experiment)
            run = self._first(str(experiment.experiment_id), {RUN_KEY: key}) if experiment else None
            return None if run is None else str(run.info.run_id)

    def folder_of(self, run_id: str) -> str:
        """Id of the MLflow experiment that a run is in."""
        with reported(self.config.uri):
            return str(client_of(self.config.uri).get_run(run_id).info.experiment_id)

    def log_stage(
        self,
        parent: str,
        name: str,
        *,
        key: str,
        metrics: Mapping[str, float],
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
        seconds: float,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Write a finished stage as a child of ``parent``; once, however often it is called, and by how many drivers.

        Args:
            key: the stage's key (hex digest).
            metrics: final figures by name.
            curves: ``(step, value)`` points by name.
            seconds: how long the stage ran; it ends now.

        Returns:
            The child's run id.

        Raises:
            DivergenceError: a figure is no finite number; nothing is written.
        """
        points = [(label, step, value) for label, curve in (curves or {}).items() for step, value in curve]
        points += [(label, 0, value) for label, value in {**metrics, "seconds": seconds}.items()]
        _require_finite(name, points)
        now = _now()
        with reported(self.config.uri):
            client, experiment = client_of(self.config.uri), experiment_of(self.config)
            child = {PARENT: parent, STAGE_KEY: key}
            for run in self._search(experiment, child):
                if run.info.status == "FINISHED":
                    return str(run.info.run_id)
                if _is_left(run):
                    client.delete_run(run.info.run_id)
            run = client.create_run(
                experiment,
                run_name=name,
                start_time=now - int(seconds * 1000),
                tags={**child, WRITER: json.dumps({**this_process(), "since": now})},
            )
            self._log(run.info.run_id, points, tags=tags or {})
            client.set_terminated(run.info.run_id, status="FINISHED", end_time=now)
            return str(self._first_of(run, experiment, child).info.run_id)

    def log_scores(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric; in a sequence ``step`` is the number of tasks learnt.

        The same point again, from here or from ``PoolRegistry.publish``, stays one.

        Raises:
            DivergenceError: one is no finite number; nothing is written.
        """
        points = [(name, step, value) for name, value in metrics.items()]
        _require_finite(f"step {step}", points)
        with reported(self.config.uri):
            self._log(run_id, points, when=score_time(self.config, run_id, step))

    def log_datasets(self, run_id: str, datasets: Sequence[LoggedDataset]) -> None:
        """Say which data a run is of; one that is there already stays one."""
        from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

        inputs = []
        for each in datasets:
            source = {"tags": {"sha256": each.digest}} if each.folder is None else {"uri": each.folder}
            known = Dataset(
                name=each.name,
                digest=each.digest[:_MAX_DIGEST],
                source_type="code" if each.folder is None else "local",
                source=json.dumps(source),
                profile=json.dumps(dict(each.rows)),
            )
            inputs.append(DatasetInput(known, [InputTag("mlflow.data.context", each.context)]))
        with reported(self.config.uri):
            client_of(self.config.uri).log_inputs(run_id, inputs)

    def datasets(self, run_id: str) -> dict[str, str]:
        """Digests (hex, their first characters) of the data sets of a run, or of its parent, by name."""
        with reported(self.config.uri):
            client = client_of(self.config.uri)
            run = client.get_run(run_id)
            inputs = client.get_run(run.data.tags.get(PARENT, run_id)).inputs
        return {} if inputs is None else {each.dataset.name: each.dataset.digest for each in inputs.dataset_inputs}

    def log_table(self, run_id: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        """Put a table into the run, which MLflow's pages show and ``load_table`` reads; one that is there is replaced.

        MLflow's own ``log_table`` would append the rows a second time.

        Args:
            name: of the artifact, with the ending .json.
            columns, rows: no cell may be None, which MLflow reads as the text "None".
        """
        content = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, allow_nan=False)
        self.log_artifacts(run_id, {name: content})
        with reported(self.config.uri):
            run = client_of(self.config.uri).get_run(run_id)
            known = json.loads(run.data.tags.get(TABLES, "[]"))
            entry = {"path": name, "type": "table"}
            self._log(run_id, tags={TABLES: json.dumps([*(each for each in known if each != entry), entry])})

    def log_artifacts(self, run_id: str, files: Mapping[str, str | bytes]) -> None:
        """Put files into the run, by relative path; one that is there is replaced."""
        with reported(self.config.uri), tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                relative = PurePosixPath(name)
                if relative.is_absolute() or ".." in relative.parts:
                    raise ValueError(f"artifact path {name!r} leaves the run's folder")
                path = Path(folder, relative)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            client_of(self.config.uri).log_artifacts(run_id, folder)

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; one that is there is replaced."""
        with reported(self.config.uri):
            self._log(run_id, tags=tags)

    def finish(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Close a run; ``start_sequence`` opens it again. What an interrupt left half-written of a stage goes."""
        with reported(self.config.uri):
            client, experiment = client_of(self.config.uri), experiment_of(self.config)
            for child in self._search(experiment, {PARENT: run_id}):
                if STAGE_KEY in child.data.tags and child.info.status == "RUNNING" and _is_left(child):
                    client.delete_run(child.info.run_id)
            client.set_terminated(run_id, status=status)

    def _open(self, run: Run, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None) -> None:
        """Let a run go on; parameters that it has stay as they are."""
        if run.info.status != "RUNNING":
            client_of(self.config.uri).update_run(run.info.run_id, status="RUNNING")
        wanted = {metric_name(k): _cut(str(v), _MAX_PARAM) for k, v in params.items()}
        nested = {PARENT: parent} if parent is not None else {}
        new = {k: v for k, v in wanted.items() if k not in run.data.params}
        self._log(run.info.run_id, params=new, tags={**tags, **nested})

    def _search(self, experiment: str, tags: Mapping[str, str]) -> list[Run]:
        """Runs with these tags, oldest first, in an order that all drivers see."""
        condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = client_of(self.config.uri).search_runs([experiment], condition, order_by=["attributes.start_time ASC"])
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _first(self, experiment: str, tags: Mapping[str, str]) -> Run | None:
        return next(iter(self._search(experiment, tags)), None)

    def _first_of(self, made: Run, experiment: str, tags: Mapping[str, str]) -> Run:
        """The oldest run with these tags; ``made`` is one of them, and goes if it is not that one."""
        first = self._first(experiment, tags) or made
        if first.info.run_id != made.info.run_id:
            client_of(self.config.uri).delete_run(made.info.run_id)
        return first

    def _log(
        self,
        run_id: str,
        points: Sequence[tuple[str, int, float]] = (),
        *,
        when: int | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415

        client, when = client_of(self.config.uri), _now() if when is None else when
        for chunk in _chunks([Metric(metric_name(n), float(v), when, s) for n, s, v in points], _METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=chunk)
        for chunk in _chunks([Param(name, value) for name, value in (params or {}).items()], _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=chunk)
        if tags:
            client.log_batch(run_id, tags=[RunTag(name, _cut(value, _MAX_TAG)) for name, value in tags.items()])


def _is_left(run: Run) -> bool:
    """Whether nobody writes an unfinished stage any more: writing takes seconds, and a driver writes one at a time."""
    try:
        writer = json.loads(run.data.tags.get(WRITER, ""))
    except ValueError:  # of an earlier release
        return True
    own = writer.items() >= this_process().items()
    return own or has_died(writer) or _now() - writer["since"] > _WRITING_SECONDS * 1000


def _require_finite(what: str, points: Sequence[tuple[str, int, float]]) -> None:
    """Refuse figures that neither MLflow's charts nor its comparisons of versions have a place for."""
    faults = sorted({name for name, _, value in points if not math.isfinite(value)})
    if faults:
        raise DivergenceError(
            f"Figures of {what} are no finite numbers, so they are not published: {', '.join(faults)}. What they are "
            "of has diverged in training: lower the learning rate (train.learning_rate, generator.learning_rate) and "
            "run again."
        )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _now() -> int:
    return time.time_ns() // 1_000_000


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
