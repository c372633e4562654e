"""The trials of a sweep: how one runs, what is kept of it, and what they say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import optuna
from pydantic import BaseModel, ConfigDict

from cluster.stages import Executor, Stage, StageEvent, StageRecord, closure, run_graph
from cluster.store.lookups import Lookups
from pipelines.console import cli
from pipelines.console.machine import Machine
from pipelines.console.records import read_folder
from pipelines.console.tables import markdown_table
from pipelines.sequence.experiment import Experiment
from pipelines.sequence.graph import SequenceGraph, build_graph
from pipelines.sweeps.space import DIRECTIONS, Scalar, Sweep, describe, shown
from sapt_core.backbones.device import Precision
from sapt_core.backbones.reference import BackboneRef, weight_bytes
from sapt_core.config.preflight import with_precision
from sapt_core.data.task import Task
from sapt_core.io.hashing import canonical_hash
from sapt_core.judging.metrics import ScoreMatrix
from sapt_core.settings import StoreConfig

LABELS = {"ap": "AP (dev)", "f_ra": "F.Ra (dev)"}


class TrialRecord(BaseModel):
    """A trial that has ended.

    Attributes:
        sweep: key of the sweep; trials of another one are not compared with it.
        state: whether it learnt all tasks, was stopped early, or failed for good.
        ap, f_ra: on the dev rows of the tasks so far, after each task.
        run_seconds, run_stages: of the stages that it ran.
        shared_seconds, shared_stages: of those whose results were there.
        error: why it failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    sweep: str
    point: dict[str, Scalar]
    state: Literal["finished", "stopped", "failed"]
    ap: tuple[float, ...]
    f_ra: tuple[float, ...]
    run_seconds: float
    run_stages: int
    shared_seconds: float
    shared_stages: int
    error: str | None
    commit: str
    written_at: datetime
    machine: Machine

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"trial_{canonical_hash([self.sweep, self.point])[:12]}.json"


def sweep_key(sweep: Sweep, experiment: Experiment) -> str:
    """sha256 of what makes trials comparable: settings, data and backbone of the base, and the fields that vary.

    Neither how many trials there are nor between which values: a sweep may grow.
    """
    return canonical_hash([experiment.key, sorted(sweep.config.space)])


@dataclass(frozen=True)
class Setup:
    """What a trial's process needs to know; it may be on a node without the data's files.

    Attributes:
        sweep: the space and the settings.
        tasks: of the sequence.
        backbone: by content.
        precision: that of trials which do not set it.
        samples: digests of given samples by task.
        store: with a folder that means the same everywhere.
    """

    sweep: Sweep
    tasks: tuple[Task, ...]
    backbone: BackboneRef
    precision: Precision
    samples: Mapping[str, str]
    store: StoreConfig

    def graph(self, point: Mapping[str, Scalar]) -> SequenceGraph:
        """The stages of a trial."""
        config = self.sweep.experiment(point)
        if config.train.precision == "auto":
            config = with_precision(config, self.precision)
        memory = weight_bytes(config.backbone)
        return build_graph(config, self.tasks, (), self.backbone, samples=self.samples, memory=memory)

    def shared(self, points: Sequence[Mapping[str, Scalar]]) -> list[Stage]:
        """Stages that several of the trials have in common, each once and under a name of its own."""
        signatures: dict[Stage, str] = {}
        seen: dict[str, list[Stage]] = {}
        for point in points:
            for stage in closure(self.graph(point).by_version):
                seen.setdefault(_signature(stage, signatures), []).append(stage)
        copies: dict[str, Stage] = {}
        names: Counter[str] = Counter()

        def copy(stage: Stage) -> Stage:
            signature = signatures[stage]
            if signature not in copies:
                inputs = {name: copy(source) for name, source in stage.inputs.items()}
                names[stage.name] += 1
                number = "" if names[stage.name] == 1 else f" {names[stage.name]}"
                copies[signature] = replace(stage, name=f"{stage.name}{number}", inputs=inputs)
            return copies[signature]

        return [copy(stages[0]) for stages in seen.values() if len(stages) > 1]


@dataclass
class Follower:
    """Follows one trial's stages and reports after every task."""

    graph: SequenceGraph
    report: Callable[[dict[str, Any]], None]
    records: dict[Stage, StageRecord] = field(default_factory=dict)
    run: list[float] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)
    told: int = 0

    def on_event(self, event: StageEvent) -> None:
        """Take news of one stage."""
        if event.record is None:
            return
        self.records[event.stage] = event.record
        (self.run if event.kind == "finished" else self.shared).append(event.record.seconds)
        while self.told < len(self.graph.tasks) and all(
            stage in self.records for stage in (self.graph.train[self.told], *self.graph.evaluate[self.told])
        ):
            self.told += 1
            rows = tuple(
                tuple(self.records[stage].metrics["score"] for stage in row) for row in self.graph.evaluate[: self.told]
            )
            matrix = ScoreMatrix(self.graph.tasks[: self.told], rows, None)
            self.report(
                {
                    "tasks": self.told,
                    "ap": matrix.ap(),
                    "f_ra": matrix.f_ra(),
                    "run_seconds": sum(self.run),
                    "run_stages": len(self.run),
                    "shared_seconds": sum(self.shared),
                    "shared_stages": len(self.shared),
                }
            )


def try_point(
    setup: Setup,
    point: Mapping[str, Scalar],
    report: Callable[[dict[str, Any]], None],
    known: Lookups,
    executor: Executor[Any],
) -> None:
    """Learn the sequence with the settings of a point, and report after every task."""
    graph = setup.graph(point)
    run_graph(graph.by_version, known, executor, Follower(graph, report).on_event)


def read_trials(sweep: Sweep, key: str) -> list[TrialRecord]:
    """The records of a sweep's trials, oldest first.

    Those of other sweeps are left out, of values that this one no longer asks for, and all but the newest of a point.

    Raises:
        DataError: with every file that is no record.
    """
    found = read_folder(sweep.config.results, "trial_*.json", TrialRecord)
    own = [each for each in found if each.sweep == key and sweep.holds(each.point)]
    newest = {describe(each.point): each for each in sorted(own, key=lambda each: (each.written_at, each.file))}
    return sorted(newest.values(), key=lambda each: (each.written_at, each.file))


def write_trial(record: TrialRecord, folder: Path) -> None:
    """Put a record into the folder, whole or not at all."""
    cli.write_output(folder / record.file, record.model_dump_json(indent=1) + "\n")


def best(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Of those that learnt all tasks, the one with the highest AP on dev rows; of equal ones the lower F.Ra."""
    whole = [each for each in trials if each.state == "finished"]
    return max(whole, key=lambda each: (each.ap[-1], -each.f_ra[-1], describe(each.point)), default=None)


def level(trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Figures in which all trials that learnt all tasks agree, to what the table shows: a plot would draw rounding."""
    whole = [each for each in trials if each.state == "finished"]
    ends = {name: {round(getattr(each, name)[-1], 2) for each in whole} for name in ("ap", "f_ra")}
    return {name: values.pop() for name, values in ends.items() if len(values) == 1}


def front(sweep: Sweep, trials: Sequence[TrialRecord]) -> list[dict[str, Scalar]]:
    """Points that learnt all tasks and that no other beats in AP without losing in F.Ra, by falling AP."""
    found = study_of(sweep, trials, ("ap", "f_ra")).best_trials
    return [each.params for each in sorted(found, key=lambda each: -each.values[0])]


@dataclass(frozen=True)
class Cost:
    """Seconds of stages.

    Attributes:
        shared: of those that several trials share, run once.
        run: of all that was run, the shared ones too.
        alone: of the same trials, each run by itself to its end; a trial that was stopped or failed counts as the
            mean of those that were not.

    What an interrupted sweep had run of a trial counts, when it goes on, as shared.
    """

    shared: float
    run: float
    alone: float | None

    @property
    def ratio(self) -> float | None:
        """``run`` as a share of ``alone``."""
        return self.run / self.alone if self.alone else None


def cost(trials: Sequence[TrialRecord], shared_seconds: float) -> Cost:
    """What the trials cost, and what they would have cost one by one."""
    run = shared_seconds + sum(each.run_seconds for each in trials)
    whole = [each.run_seconds + each.shared_seconds for each in trials if each.state == "finished"]
    return Cost(shared_seconds, run, fmean(whole) * len(trials) if whole else None)


def table(sweep: Sweep, trials: Sequence[TrialRecord]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows, best first; trials that did not end by themselves last."""
    header = ("trial", *sweep.config.space, "AP", "F.Ra", "tasks", "s run", "s shared", "state")
    order = {"finished": 0, "stopped": 1, "failed": 2}
    ranked = sorted(trials, key=lambda each: (order[each.state], -(each.ap[-1] if each.ap else 0.0)))
    rows = [
        (
            each.file.removeprefix("trial_").removesuffix(".json")[:6],
            *(shown(each.point[name]) for name in sweep.config.space),
            f"{each.ap[-1]:.2f}" if each.ap else "–",
            f"{each.f_ra[-1]:.2f}" if each.f_ra else "–",
            str(len(each.ap)),
            f"{each.run_seconds:.0f}",
            f"{each.shared_seconds:.0f}",
            each.state if each.error is None else f"{each.state}: {each.error}",
        )
        for each in ranked
    ]
    return header, rows


def markdown(sweep: Sweep, trials: Sequence[TrialRecord], shared_seconds: float) -> str:
    """The table for a file, with what it cost."""
    header, rows = table(sweep, trials)
    return "\n\n".join([markdown_table(header, rows), *remarks(trials, shared_seconds)]) + "\n"


def remarks(trials: Sequence[TrialRecord], shared_seconds: float) -> list[str]:
    """What stands below the table."""
    said = ["AP and F.Ra on dev rows; test rows choose nothing."]
    chosen = best(trials)
    if chosen is not None:
        said.append(
            f"Best: {describe(chosen.point)}, with AP {chosen.ap[-1]:.2f} and F.Ra {chosen.f_ra[-1]:.2f} "
            "(the highest AP; of equal ones the lower F.Ra)."
        )
    for name, value in level(trials).items() if len(trials) > 1 else ():
        said.append(
            f"{LABELS[name]} is {value:.2f} in every trial that learnt all tasks, so there is no plot of it: try "
            "values that lie further apart, or harder tasks."
        )
    spent = cost(trials, shared_seconds)
    if spent.ratio is not None:
        early = sum(each.state != "finished" for each in trials)
        guess = f"; the {early} that ended early counted as the mean of the others" if early else ""
        said.append(
            f"{spent.run:.0f} stage-seconds, {spent.shared:.0f} of them of stages that several trials share, against "
            f"{spent.alone:.0f} for the same trials one by one{guess}: {spent.ratio:.0%}."
        )
    return said


def study_of(sweep: Sweep, trials: Sequence[TrialRecord], objectives: Sequence[str]) -> optuna.Study:
    """Trials as a study of Optuna, whose values are the objectives; one that was stopped early counts as pruned."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=[DIRECTIONS[name] for name in objectives])
    for each in trials:
        given: dict[str, Any] = {"params": dict(each.point), "distributions": sweep.distributions}
        if each.state == "finished":
            values = [{"ap": each.ap, "f_ra": each.f_ra}[name][-1] for name in objectives]
            study.add_trial(optuna.trial.create_trial(**given, values=values))
        elif each.state == "stopped":
            study.add_trial(optuna.trial.create_trial(**given, state=optuna.trial.TrialState.PRUNED))
    return study


def _signature(stage: Stage, known: dict[Stage, str]) -> str:
    """sha256 of all that decides a stage's key and is known before anything has run."""
    if stage not in known:
        inputs = {
            name: [_signature(source, known), sorted(stage.uses[name]) if name in stage.uses else None]
            for name, source in stage.inputs.items()
        }
        known[stage] = canonical_hash([stage.kind, stage.version, dict(stage.reads), inputs])
    return known[stage]
