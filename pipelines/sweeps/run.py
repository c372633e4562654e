"""Running a sweep: its trials one by one in this process, or on Ray Tune."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import optuna
from rich.console import Console

from cluster.stages import Executor, InlineExecutor, Stage, StageEvent, StageRecord, done, plan, run_graph
from cluster.store import ArtifactStore, open_store, resolved
from cluster.store.lookups import Lookups
from pipelines.console import cli
from pipelines.console.machine import machine_of
from pipelines.console.tables import text_table
from pipelines.running.sequence import keep_to_retention, publish_sequence, ray_executor
from pipelines.sequence.experiment import Experiment, assemble
from pipelines.sweeps import trials
from pipelines.sweeps.space import Scalar, Sweep, describe, shown
from pipelines.sweeps.trials import Setup, TrialRecord
from sapt_core.errors import DivergenceError, SaptError, TrackingError
from sapt_core.io.hashing import canonical_hash

if TYPE_CHECKING:
    from cluster.tracking.outbox import Outbox
    from cluster.tracking.runs import Tracker

FEWEST_DRAWN = 3


@dataclass
class Points:
    """Proposes the points that have no record yet; a ``cluster.on_ray.tuning.Search``.

    Attributes:
        sweep: the space.
        left: points that are known beforehand, in their order; None where Optuna proposes.
        study: what Optuna knows.
        tasks: of a whole trial.
        asked: its trials that run, by the trial's name.
        taken: points that have been tried or are being tried.
    """

    sweep: Sweep
    left: list[dict[str, Scalar]] | None
    study: optuna.Study
    tasks: int
    asked: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @classmethod
    def after(cls, sweep: Sweep, ended: Sequence[TrialRecord], tasks: int) -> Points:
        """What is left to try."""
        planned = sweep.planned()
        known = [each.point for each in ended]
        study = trials.study_of(sweep, ended, sweep.config.objectives)
        left = None if planned is None else [point for point in planned if point not in known]
        return cls(sweep, left, study, tasks, taken={describe(point) for point in known})

    def count(self, ended: Sequence[TrialRecord]) -> int:
        """How many points are left."""
        if self.left is not None:
            return len(self.left)
        wanted, size = self.sweep.config.trials or 0, self.sweep.size
        return max(0, (wanted if size is None else min(wanted, size)) - len(ended))

    def ask(self, trial: str) -> Mapping[str, Scalar] | None:
        if self.left is not None:
            return self.left.pop(0) if self.left else None
        # A seed for each point, so that a sweep that was broken off goes on with the points it would have tried.
        self.study.sampler = optuna.samplers.TPESampler(seed=self.sweep.config.seed + len(self.study.trials))
        proposed = self.study.ask(self.sweep.distributions)
        if describe(proposed.params) in self.taken:  # of few values TPE proposes its best point again and again
            self.study.tell(proposed, state=optuna.trial.TrialState.FAIL)
            proposed = self._another()
        self.taken.add(describe(proposed.params))
        self.asked[trial] = proposed
        point: dict[str, Scalar] = proposed.params
        return point

    def _another(self) -> optuna.Trial:
        """A point that was not tried yet, drawn at random; there is one, as no more than ``count`` are asked for."""
        self.study.sampler = optuna.samplers.RandomSampler(seed=self.sweep.config.seed + len(self.study.trials))
        while describe((proposed := self.study.ask(self.sweep.distributions)).params) in self.taken:
            self.study.tell(proposed, state=optuna.trial.TrialState.FAIL)
        return proposed

    def tell(self, trial: str, result: Mapping[str, Any] | None) -> None:
        proposed = self.asked.pop(trial, None)
        if proposed is None:
            return
        if result is None or "ap" not in result:
            self.study.tell(proposed, state=optuna.trial.TrialState.FAIL)
        elif result["tasks"] < self.tasks:  # AP over fewer tasks is no AP of the sequence
            self.study.tell(proposed, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(proposed, [result[name] for name in self.sweep.config.objectives])


class SweepRun:
    """A sweep's trials that are still to be run.

    Args:
        sweep: what is tried.
        experiment: a trial's, for what all have in common.
        store: holds what the stages give.
        console: for news.
    """

    def __init__(self, sweep: Sweep, experiment: Experiment, store: ArtifactStore, console: Console) -> None:
        self.sweep = sweep
        self.store = store
        self._console = console
        self._known = Lookups(store)
        self._experiment = experiment
        samples = {name: hashlib.sha256(data).hexdigest() for name, data in experiment.samples.items()}
        self.setup = Setup(
            sweep,
            experiment.tasks,
            experiment.backbone,
            experiment.config.train.precision,
            samples,
            resolved(experiment.config.store),
        )
        self.folder = sweep.config.results
        self.key = trials.sweep_key(sweep, experiment)
        # One that failed is tried again.
        self.before = [each for each in trials.read_trials(self.sweep, self.key) if each.state != "failed"]
        self.points = Points.after(sweep, self.before, len(experiment.tasks))
        # All that are planned, also those with a record: their stages are done.
        self.shared = self.setup.shared(sweep.planned() or sweep.lattice())
        self.shared_seconds = 0.0
        self._tracker: Tracker | None = None
        self._outbox: Outbox | None = None
        self._parent = ""
        self._open: dict[str, str] = {}
        self._crowned: list[tuple[Experiment, Mapping[Stage, StageRecord]]] = []

    def show_plan(self) -> None:
        """Print what a run would do."""
        left = self.points.count(self.before)
        states = Counter(plan(self.shared, self._known).values())
        whole = len(self.setup.graph({}).by_version)
        self._console.print(
            f"Sweep {self.sweep.name}: {left} trials to run, {len(self.before)} have their record; each has {whole} "
            f"stages of training and scoring. {len(self.shared)} stages, of which several trials have need, run first: "
            f"{states['done']} are done.",
        )

    def inline(self) -> None:
        """Run in this process, trial by trial, without Ray and MLflow.

        Raises:
            SaptError: the sweep stops trials early, which needs others beside them.
        """
        if self.sweep.config.stop != "none":
            raise SaptError("--inline runs trials one after another: set stop: none, or run on Ray")
        self._experiment.upload(self._known, all_done=not self.points.count(self.before))
        self._run_shared(InlineExecutor(self.store))
        for number in range(self.points.count(self.before)):
            point = self.points.ask(str(number))
            assert point is not None  # noqa: S101 - so many are left
            results: list[dict[str, Any]] = []
            error = None
            try:
                trials.try_point(self.setup, point, results.append, self._known, InlineExecutor(self.store))
            except SaptError as failed:
                error = str(failed)
            self.ended(str(number), point, results, error)
            self.points.tell(str(number), results[-1] if results and error is None else None)
        self._keep_to_retention()
        self._keep_to_retention()

    def published(self) -> None:
        """Run on Ray Tune; the sweep is a parent run in MLflow, each trial a child."""
        from cluster.tracking import runs, service  # noqa: PLC0415  not with --inline
        from cluster.tracking.lines import Lineage  # noqa: PLC0415
        from cluster.tracking.outbox import Outbox  # noqa: PLC0415
        from cluster.tracking.registry import PoolRegistry  # noqa: PLC0415

        config = self.sweep.config
        checked = service.check(self._experiment.config.tracking)
        if config.champion:  # refused before the trials, not after them
            asked = Lineage(f"the best trial of sweep {self.sweep.name}", (), self.sweep.name)
            PoolRegistry(checked).check_continuation(asked)
        tracker = self._tracker = runs.Tracker(checked)
        left = self.points.count(self.before)
        tags = {"sweep": self.sweep.name, "git_commit": self._experiment.commit}
        with ExitStack() as stack:
            executor = ray_executor(self._experiment.config, stack)
            from cluster.on_ray.tuning import check_room, run_trials  # noqa: PLC0415  Tune, once Ray is there

            check_room(self._experiment.config.cluster, config.concurrent)
            outbox = self._outbox = stack.enter_context(Outbox())
            self._parent = self._tracker.start_sequence(f"sweep {self.sweep.name}", key=self.key, params={}, tags=tags)
            try:
                self._experiment.upload(self._known, all_done=not left)
                self._run_shared(executor)
                if left:
                    run_trials(
                        _Body(self.setup),
                        self.points,
                        self,
                        trials=left,
                        concurrent=config.concurrent,
                        stop=config.stop,
                        grace=config.grace,
                        tasks=len(self._experiment.tasks),
                        retries=self._experiment.config.cluster.max_failures,
                    )
                told: dict[str, str | bytes] = {f"{self.sweep.name}.md": self.markdown(), **self.plots}
                outbox.put(lambda: tracker.log_artifacts(self._parent, told))
                outbox.flush()
                chosen = trials.best(self.after)
                if chosen is not None:
                    outbox.put(lambda: self._tell_best(tracker, chosen))
                if config.champion and chosen is not None:
                    self._crown(chosen, checked)
                outbox.put(lambda: self._close("FINISHED"))
                outbox.flush()
            except BaseException as error:
                if isinstance(error, Exception):
                    outbox.put(lambda: self._close("FAILED"))
                else:
                    outbox.stop()
                    with suppress(TrackingError):  # the first error is the one to tell
                        self._close("KILLED")
                raise
        self._keep_to_retention()

    def _keep_to_retention(self) -> None:
        """Remove from the store what may not stay, once no trial needs it."""
        known = Lookups(self.store)  # the trials' processes have committed records since
        graphs = [self.setup.graph(each.point) for each in self.after]
        learnt = {stage: record for graph in graphs for stage, record in done(graph.by_version, known).items()}
        keep_to_retention([(self._experiment, learnt), *self._crowned], known, self._console)

    def _tell_best(self, tracker: Tracker, chosen: TrialRecord) -> None:
        """Say in the sweep's run which trial was best: its point in tags, as a sweep that grows may find a better."""
        tracker.log_tags(self._parent, {f"best/{name}": shown(value) for name, value in chosen.point.items()})
        figures = {name: getattr(chosen, name)[-1] for name in ("ap", "f_ra")}
        tracker.log_scores(self._parent, len(self.after), {f"best/{name}": value for name, value in figures.items()})

    def _close(self, state: Literal["FAILED", "KILLED", "FINISHED"]) -> None:
        """Close the runs of the sweep and of the trials that are still open."""
        assert self._tracker is not None  # noqa: S101 - asked of a published sweep alone
        for opened in (*self._open.values(), self._parent):
            self._tracker.finish(opened, state)

    def _run_shared(self, executor: Executor[Any]) -> None:
        """Run what trials share, so that no two of them begin the same work."""

        def tell(event: StageEvent) -> None:
            if event.record is None:
                return
            self.shared_seconds += event.record.seconds
            if event.kind == "finished":
                said = f"shared by trials: {event.stage.name} in {event.record.seconds:.0f} s"
                self._console.print(said)

        with suppress(DivergenceError):  # every trial that needs the stage meets it, and is recorded as failed
            run_graph(self.shared, self._known, executor, tell)

    def _crown(self, chosen: TrialRecord, checked: Any) -> None:
        """Register the best trial's versions, scored on test rows as always, and give the last one the alias."""
        from cluster.tracking.registry import PoolRegistry  # noqa: PLC0415  MLflow

        config = self.sweep.experiment(chosen.point)
        scored = config.model_copy(
            update={"evaluation": config.evaluation.model_copy(update={"split": "test"}), "tracking": checked}
        )
        experiment = replace(assemble(scored, "The best trial"), commit=self._experiment.commit)
        known = Lookups(self.store, [experiment.key])  # the trials' processes have committed records since
        monitor = publish_sequence(experiment, known, all_done=False, sweep=self.sweep.name)
        self._crowned.append((experiment, monitor.records))
        version = monitor.version
        assert version is not None  # noqa: S101 - it was published
        registry = PoolRegistry(checked)
        published = registry.resolve(str(version))
        if published.is_branch:  # somebody else's version became the newest of the line meanwhile
            self._console.print(f"no new champion: {checked.model} version {version} is the line {published.line}")
            return
        registry.crown(published)
        self._console.print(f"champion: {checked.model} version {version}")

    # cluster.on_ray.tuning.News

    def result(self, trial: str, point: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A trial has learnt another task."""
        self._console.print(
            f"{describe(point)}: after task {result['tasks']} AP {result['ap']:.2f}, F.Ra {result['f_ra']:.2f}",
        )
        if self._outbox is not None and self._tracker is not None:
            tracker, scores = self._tracker, {name: result[name] for name in ("ap", "f_ra")}
            self._outbox.put(lambda: tracker.log_scores(self._run_of(point), result["tasks"], scores))

    def ended(
        self, trial: str, point: Mapping[str, Any], results: Sequence[Mapping[str, Any]], error: str | None
    ) -> None:
        """A trial has ended: keep its record."""
        whole = len(results) == len(self._experiment.tasks)
        last: Mapping[str, Any] = results[-1] if results else {}
        state = "failed" if error is not None else "finished" if whole else "stopped"
        record = TrialRecord(
            sweep=self.key,
            point=dict(point),
            state=state,
            ap=tuple(round(each["ap"], 4) for each in results),
            f_ra=tuple(round(each["f_ra"], 4) for each in results),
            run_seconds=round(last.get("run_seconds", 0.0), 1),
            run_stages=last.get("run_stages", 0),
            shared_seconds=round(last.get("shared_seconds", 0.0), 1),
            shared_stages=last.get("shared_stages", 0),
            error=error,
            commit=self._experiment.commit,
            written_at=datetime.now(UTC),
            machine=machine_of(self._experiment.config.train),
        )
        trials.write_trial(record, self.folder)
        said = f"{describe(point)}: {state}" + (f", {error}" if error else "")
        self._console.print(said)
        if self._outbox is not None:
            self._outbox.put(lambda: self._close_trial(point, "FAILED" if error is not None else "FINISHED"))

    def _close_trial(self, point: Mapping[str, Any], state: Literal["FAILED", "FINISHED"]) -> None:
        assert self._tracker is not None  # noqa: S101 - asked of a published sweep alone
        self._tracker.finish(self._run_of(point), state)
        del self._open[describe(point)]

    def _run_of(self, point: Mapping[str, Any]) -> str:
        assert self._tracker is not None  # noqa: S101 - asked of a published sweep alone
        name = describe(point)
        if name not in self._open:
            self._open[name] = self._tracker.start_sequence(
                name,
                key=canonical_hash([self.key, dict(point)]),
                params=dict(point),
                tags={"sweep": self.sweep.name},
                parent=self._parent,
            )
        return self._open[name]

    @cached_property
    def after(self) -> list[TrialRecord]:
        """Records of all trials; to be asked for once they have ended, as what is made of them."""
        return trials.read_trials(self.sweep, self.key)

    @cached_property
    def plots(self) -> dict[str, bytes]:
        """PNGs by name; none of fewer than three trials that learnt all tasks."""
        if sum(each.state == "finished" for each in self.after) < FEWEST_DRAWN:
            return {}
        from pipelines.sweeps.surfaces import draw  # noqa: PLC0415  matplotlib, only where something is drawn

        return draw(self.sweep, self.after)

    def markdown(self) -> str:
        """The table for a file."""
        return trials.markdown(self.sweep, self.after, self.shared_seconds)

    def show_end(self) -> None:
        """Print the table, and put the plots beside the records."""
        self._console.print(text_table(f"Sweep {self.sweep.name}", *trials.table(self.sweep, self.after)))
        for remark in trials.remarks(self.after, self.shared_seconds):
            self._console.print(remark)
        if len(self.sweep.config.objectives) > 1:
            points = "; ".join(map(describe, trials.front(self.sweep, self.after)))
            self._console.print(f"Pareto front: {points}")
        for name, png in self.plots.items():
            cli.write_output(self.folder / name, png)


@dataclass(frozen=True)
class _Body:
    """What runs in a trial's process."""

    setup: Setup

    def __call__(self, point: Mapping[str, Any], report: Any) -> None:
        from cluster.on_ray.executor import RayExecutor  # noqa: PLC0415  on Ray alone

        cluster = self.setup.sweep.experiment(point).cluster
        with closing(RayExecutor(self.setup.store, cluster)) as executor:
            trials.try_point(self.setup, point, report, Lookups(open_store(self.setup.store)), executor)
