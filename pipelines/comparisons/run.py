"""Running a comparison: the graphs of its cells as one, here or on Ray."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.stages import Executor, InlineExecutor, Stage, StageEvent, plan, run_graph
from cluster.store import ArtifactStore
from cluster.store.lookups import Lookups
from pipelines.comparisons.cells import Cell, Comparison
from pipelines.comparisons.records import read_records, record_of, write_record
from pipelines.comparisons.table import results
from pipelines.running.monitor import Monitor, tell_alone
from pipelines.running.sequence import inline_executor, keep_to_retention, ray_executor
from pipelines.sequence.graph import SequenceGraph
from sapt_core.errors import TrackingError
from sapt_core.io.hashing import canonical_hash

if TYPE_CHECKING:
    from pipelines.running.publishing import MLflowPublisher


PLOT = "ap_after_each_task.png"


class ComparisonRun:
    """The cells of a comparison that are still to be learnt, as one graph of stages.

    Args:
        comparison: where they come from.
        cells: those without a record.
        store: holds what the stages give.
        console: for news.
    """

    def __init__(self, comparison: Comparison, cells: Sequence[Cell], store: ArtifactStore, console: Console) -> None:
        self.comparison = comparison
        self.cells = list(cells)
        self.store = store
        self.failed: dict[Cell, Exception] = {}
        self._console = console
        self._known = Lookups(store, [cell.experiment.key for cell in self.cells])
        self._graphs = {cell: _named(cell.experiment.graph, f"{cell.place.name}: ") for cell in cells}
        self._origin = {copy: (cell, stage) for cell, copies in self._graphs.items() for stage, copy in copies.items()}
        self._monitors: dict[Cell, Monitor] = {}
        self._complete: set[Cell] = set()
        self._publisher: Callable[[Cell], MLflowPublisher] | None = None
        self._publishers: dict[Cell, MLflowPublisher] = {}

    @property
    def stages(self) -> list[Stage]:
        """Those of the cells that are neither complete nor failed, cell by cell, most urgent first."""
        return [
            self._graphs[cell][stage]
            for cell in self.cells
            if cell not in self._complete and cell not in self.failed
            for stage in cell.experiment.graph.stages
        ]

    @cached_property
    def plan(self) -> Mapping[Stage, str]:
        """What a run would do with each stage, before it is run."""
        return plan(self.stages, self._known)

    def show_plan(self, *, recorded: int) -> None:
        """Print what a run would do, a line a cell."""
        states = Counter((self._origin[stage][0], state) for stage, state in self.plan.items())
        self._console.print(
            f"Comparison {self.comparison.name}: {len(self.cells)} cells to learn, {recorded} have their record"
        )
        if not self.cells:
            return
        table = Table(title="Plan: stages that several cells have in common run once", title_justify="left")
        for column in ("cell", "done", "to run", "depends on others"):
            table.add_column(column, justify="left" if column == "cell" else "right")
        for cell in self.cells:
            table.add_row(cell.place.name, *(str(states[cell, state]) for state in ("done", "to run", "unknown")))
        self._console.print(table)
        left = [self._origin[stage] for stage, state in self.plan.items() if state != "done"]
        tell_alone(self._console, sum(stage in cell.experiment.graph.alone for cell, stage in left), len(left))

    def run(
        self, executor: Executor[Any], publisher: Callable[[Cell], MLflowPublisher] | None = None
    ) -> Mapping[Cell, Exception]:
        """Learn all cells; one that fails leaves the others to go on.

        Args:
            executor: where stages run.
            publisher: opens the MLflow run of a cell, when its first stage has news.

        Returns:
            The cells that failed, each with its error.

        Raises:
            Exception: what stopped the whole comparison.
        """
        self._publisher = publisher
        all_done = set(self.plan.values()) == {"done"}
        for cell in self.cells:
            cell.experiment.upload(self._known, all_done=all_done)
        try:
            while stages := self.stages:
                failures = len(self.failed)
                try:
                    run_graph(stages, self._known, executor, self.on_event)
                except Exception:
                    if len(self.failed) == failures:  # no stage's failure but the surroundings'
                        raise
        except BaseException as error:
            for cell, opened in self._publishers.items():
                if cell not in self._complete and cell not in self.failed:
                    with suppress(TrackingError):  # the first error is the one to tell
                        opened.abandon(killed=not isinstance(error, Exception))
            raise
        self._pack()
        return self.failed

    def keep_to_retention(self) -> None:
        """Remove from the store what may not stay of the complete cells; to be called once they are published.

        Raises:
            StoreError: the store cannot be read or written.
        """
        finished = [(cell.experiment, self._monitors[cell].records) for cell in self.cells if cell in self._complete]
        if keep_to_retention(finished, self._known, self._console):
            self._pack()

    def _pack(self) -> None:
        for cell in self.cells:
            if cell in self._complete:
                keys = [record.key for record in self._monitors[cell].records.values()]
                self._known.pack(cell.experiment.key, keys)

    def on_event(self, event: StageEvent) -> None:
        """Take news of one stage to its cell's monitor, under the name it has there."""
        if event.kind == "planned":
            return
        cell, stage = self._origin[event.stage]
        if cell not in self._monitors:
            if self._publisher is not None:
                self._publishers[cell] = self._publisher(cell)
            published, label = self._publishers.get(cell), f"{cell.place.name}: "
            self._monitors[cell] = Monitor(cell.experiment, self.store, published, label)
        monitor = self._monitors[cell]
        record = event.record and event.record.model_copy(update={"name": stage.name})
        monitor.on_event(replace(event, stage=stage, record=record))
        if isinstance(event.error, Exception) and cell not in self.failed:
            self.failed[cell] = event.error
            if cell in self._publishers:
                self._publishers[cell].abandon(killed=False)
        elif len(monitor.records) == len(self._graphs[cell]) and cell not in self._complete:
            self._finish(cell, monitor)

    def _finish(self, cell: Cell, monitor: Monitor) -> None:
        record = record_of(cell, monitor)
        write_record(record, self.comparison.config.results)
        if cell in self._publishers:
            from pipelines.reports import page  # noqa: PLC0415  matplotlib, only where something is drawn

            self._publishers[cell].finish(monitor, lambda: page.build(monitor.findings, monitor.verdict))
        self._complete.add(cell)
        figures = record.figures
        self._console.print(
            f"{cell.place.name} is complete: AP {figures.ap:.2f}, F.Ra {figures.f_ra:.2f}, BWT {figures.bwt:.2f}",
        )


def run_cells(running: ComparisonRun, arguments: argparse.Namespace) -> Mapping[Cell, Exception]:
    failed = _run_inline(running, arguments) if arguments.inline else _run_published(running)
    running.keep_to_retention()
    return failed


def _run_inline(running: ComparisonRun, arguments: argparse.Namespace) -> Mapping[Cell, Exception]:
    with ExitStack() as stack:
        config = running.cells[0].experiment.config
        return running.run(inline_executor(arguments, config.store, running.store, stack))


def _run_published(running: ComparisonRun) -> Mapping[Cell, Exception]:
    """Run on Ray, unless the store has all of it, each sequence a child of the comparison's MLflow run."""
    from cluster.tracking import runs, service  # noqa: PLC0415  not with --inline
    from cluster.tracking.outbox import Outbox  # noqa: PLC0415
    from pipelines.running.publishing import MLflowPublisher  # noqa: PLC0415

    comparison, config = running.comparison, running.cells[0].experiment.config
    checked = service.check(config.tracking)
    tracker = runs.Tracker(checked)
    with ExitStack() as stack:
        all_done = set(running.plan.values()) == {"done"}
        executor = InlineExecutor(running.store) if all_done else ray_executor(config, stack)
        key = canonical_hash(["comparison", comparison.name])
        tags = {"comparison": comparison.name, "git_commit": running.cells[0].experiment.commit}
        outbox = stack.enter_context(Outbox())
        parent = tracker.start_sequence(f"compare {comparison.name}", key=key, params={}, tags=tags)

        def publisher(cell: Cell) -> MLflowPublisher:
            return MLflowPublisher(cell.experiment, checked, outbox, parent=parent, name=cell.place.name)

        try:
            failed = running.run(executor, publisher)
            made = results(comparison, read_records(comparison.config.results))
            plot = made.plot()
            told: dict[str, str | bytes] = {f"{comparison.name}.md": made.markdown()}
            told |= {} if plot is None else {PLOT: plot}
            outbox.put(lambda: tracker.log_artifacts(parent, told))
            outbox.put(lambda: tracker.finish(parent, "FAILED" if failed else "FINISHED"))
            outbox.flush()
        except BaseException as error:
            if isinstance(error, Exception):
                outbox.put(lambda: tracker.finish(parent, "FAILED"))
            else:
                outbox.stop()
                with suppress(TrackingError):  # the first error is the one to tell
                    tracker.finish(parent, "KILLED")
            raise
    return failed


def _named(graph: SequenceGraph, prefix: str) -> dict[Stage, Stage]:
    """A copy of every stage of a graph under a name that no other cell's has."""
    copies: dict[Stage, Stage] = {}

    def copy(stage: Stage) -> Stage:
        if stage not in copies:
            inputs = {name: copy(source) for name, source in stage.inputs.items()}
            copies[stage] = replace(stage, name=f"{prefix}{stage.name}", inputs=inputs)
        return copies[stage]

    for stage in graph.stages:
        copy(stage)
    return copies
