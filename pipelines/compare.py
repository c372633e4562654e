"""Learn the same tasks with several settings, orders and seeds, and put the results side by side.

    python pipelines/compare.py --config pipelines/configs/compare_superni_mini.yaml [key=value ...]

All cells (row, order, seed) are one wide graph of stages: what two of them share runs once. Each complete cell
leaves a JSON record in the results folder, and table and figure are made of all records there. Submitted again
after any interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.stages import Executor, InlineExecutor, Stage, StageEvent, plan, run_graph
from cluster.store import ArtifactStore, open_store
from pipelines import cli
from pipelines.comparison import Cell, Comparison, load_comparison
from pipelines.continual import ray_executor
from pipelines.graph import SequenceGraph
from pipelines.records import read_records, record_of, recorded_elsewhere, write_record
from pipelines.reporter import Reporter, wide_console
from pipelines.results import results
from pipelines.tables import check_markers, write_between_markers
from sapt_core.errors import FaultsError, SaptError, TrackingError
from sapt_core.hashing import canonical_hash
from sapt_core.methods.base import known_methods

if TYPE_CHECKING:
    from pipelines.publishing import MLflowPublisher


PLOT = "ap_after_each_task.png"


class _ListMethods(argparse.Action):
    """Print a method a line and end, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        methods = known_methods()
        width = max(map(len, methods))
        for name, found in methods.items():
            print(f"{name:{width}}  {found.summary}")
        parser.exit()


def main() -> None:
    """Parse the command line, run what has no record yet and show the table."""
    arguments = _arguments()
    comparison = load_comparison(arguments.config, arguments.overrides)
    for name in arguments.rows or ():
        comparison.row(name)
    if arguments.markdown is not None:
        check_markers(arguments.markdown, f"compare:{comparison.name}")
    folder = comparison.config.results
    console = wide_console()
    failed = {} if arguments.table_only else _learn(comparison, arguments, console)
    if arguments.dry_run:
        return
    made = results(comparison, read_records(folder))
    for table in made.tables():
        console.print(table)
    for remark in made.remarks:
        console.print(remark, markup=False)
    plot = made.plot()
    if plot is not None:
        cli.write_output(folder / PLOT, plot)
    if arguments.markdown is not None:
        write_between_markers(arguments.markdown, f"compare:{comparison.name}", made.markdown())
    if failed:
        _raise(failed)


def _learn(comparison: Comparison, arguments: argparse.Namespace, console: Console) -> Mapping[Cell, Exception]:
    """Give the chosen cells their records; those that failed, each with its error."""
    folder = comparison.config.results
    keys = {record.place: record.key for record in read_records(folder)}
    cells = comparison.cells(comparison.places(arguments.rows, arguments.seeds))
    cli.check_output(folder / cells[0].place.file)
    unrecorded = [cell for cell in cells if keys.get(cell.place) != cell.experiment.key]
    elsewhere = recorded_elsewhere(unrecorded, folder)
    to_run = [cell for cell in unrecorded if cell not in elsewhere]
    store = open_store(cells[0].experiment.config.store)
    if not arguments.dry_run:
        store.check()
    running = Running(comparison, to_run, store, console)
    running.show_plan(recorded=len(cells) - len(to_run))
    for cell in unrecorded:
        if cell.place in keys:
            console.print(f"{cell.place.name}: its record is of other settings, data or backbone; it is replaced")
        if cell in elsewhere:
            console.print(f"{cell.place.name}: its record is taken over from another comparison")
    if arguments.dry_run:
        return {}
    for record in elsewhere.values():
        write_record(record, folder)
    return _run(running, arguments) if to_run else {}


class Running:
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
        self._graphs = {cell: _named(cell.experiment.graph, f"{cell.place.name}: ") for cell in cells}
        self._origin = {copy: (cell, stage) for cell, copies in self._graphs.items() for stage, copy in copies.items()}
        self._reporters: dict[Cell, Reporter] = {}
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
        return plan(self.stages, self.store)

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
        for cell in self.cells:
            cell.experiment.upload(self.store)
        try:
            while stages := self.stages:
                failures = len(self.failed)
                try:
                    run_graph(stages, self.store, executor, self.on_event)
                except Exception:
                    if len(self.failed) == failures:  # no stage's failure but the surroundings'
                        raise
        except BaseException as error:
            for cell, opened in self._publishers.items():
                if cell not in self._complete and cell not in self.failed:
                    with suppress(TrackingError):  # the first error is the one to tell
                        opened.abandon(killed=not isinstance(error, Exception))
            raise
        return self.failed

    def on_event(self, event: StageEvent) -> None:
        """Take news of one stage to its cell's reporter, under the name it has there."""
        if event.kind == "planned":
            return
        cell, stage = self._origin[event.stage]
        if cell not in self._reporters:
            if self._publisher is not None:
                self._publishers[cell] = self._publisher(cell)
            published, label = self._publishers.get(cell), f"{cell.place.name}: "
            self._reporters[cell] = Reporter(cell.experiment, self.store, published, label)
        reporter = self._reporters[cell]
        record = event.record and event.record.model_copy(update={"name": stage.name})
        reporter.on_event(replace(event, stage=stage, record=record))
        if isinstance(event.error, Exception) and cell not in self.failed:
            self.failed[cell] = event.error
            if cell in self._publishers:
                self._publishers[cell].abandon(killed=False)
        elif len(reporter.records) == len(self._graphs[cell]) and cell not in self._complete:
            self._finish(cell, reporter)

    def _finish(self, cell: Cell, reporter: Reporter) -> None:
        record = record_of(cell, reporter)
        write_record(record, self.comparison.config.results)
        if cell in self._publishers:
            from pipelines import report  # noqa: PLC0415  matplotlib, only where something is drawn

            self._publishers[cell].finish(reporter.summary(), report.build(reporter.findings))
        self._complete.add(cell)
        figures = record.figures
        self._console.print(
            f"{cell.place.name} is complete: AP {figures.ap:.2f}, F.Ra {figures.f_ra:.2f}, BWT {figures.bwt:.2f}",
            markup=False,
        )


def _run(running: Running, arguments: argparse.Namespace) -> Mapping[Cell, Exception]:
    if not arguments.inline:
        return _run_published(running)
    with ExitStack() as stack:
        config = running.cells[0].experiment.config
        return running.run(cli.inline_executor(arguments, config.store, running.store, stack))


def _run_published(running: Running) -> Mapping[Cell, Exception]:
    """Run on Ray, unless the store has all of it, each sequence a child of the comparison's MLflow run."""
    from cluster import tracking  # noqa: PLC0415  not with --inline
    from pipelines.publishing import MLflowPublisher  # noqa: PLC0415

    comparison, config = running.comparison, running.cells[0].experiment.config
    checked = tracking.check(config.tracking)
    tracker = tracking.Tracker(checked)
    with ExitStack() as stack:
        all_done = set(running.plan.values()) == {"done"}
        executor = InlineExecutor(running.store) if all_done else ray_executor(config, stack)
        key = canonical_hash(["comparison", comparison.name])
        tags = {"comparison": comparison.name, "git_commit": running.cells[0].experiment.commit}
        parent = tracker.start_sequence(f"compare {comparison.name}", key=key, params={}, tags=tags)

        def publisher(cell: Cell) -> MLflowPublisher:
            return MLflowPublisher(cell.experiment, checked, parent=parent, name=cell.place.name)

        try:
            failed = running.run(executor, publisher)
        except BaseException as error:
            with suppress(TrackingError):  # the first error is the one to tell
                tracker.finish(parent, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        made = results(comparison, read_records(comparison.config.results))
        plot = made.plot()
        plots = {} if plot is None else {PLOT: plot}
        tracker.log_artifacts(parent, {f"{comparison.name}.md": made.markdown(), **plots})
        tracker.finish(parent, "FAILED" if failed else "FINISHED")
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


def _raise(failed: Mapping[Cell, Exception]) -> None:
    """Tell of the cells that failed; a defect of ours keeps its trace.

    Raises:
        SaptError: all failures are the user's to mend.
        Exception: the first that is not.
    """
    lines = [f"{cell.place.name}: {error}" for cell, error in failed.items()]
    told = FaultsError(f"{len(failed)} cells failed; the others have their records:", lines)
    defects = [error for error in failed.values() if not isinstance(error, SaptError)]
    if defects:
        raise defects[0] from told
    told.exit_code = max(error.exit_code for error in failed.values() if isinstance(error, SaptError))
    raise told


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        __doc__ or "", "python pipelines/compare.py --config pipelines/configs/compare_superni_mini.yaml --seeds 0,1"
    )
    parser.add_argument("--list-methods", action=_ListMethods, nargs=0, help="print a method a line and end")
    parser.add_argument("--rows", type=_names, metavar="A,B", help="only these rows")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="these seeds for every row")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    cli.add_inline(parser)
    parser.add_argument("--table-only", action="store_true", help="run nothing, show what the records say")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between its markers in FILE")
    return cli.parse(parser)


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError("give one or more names, with commas between them")
    return names


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in _names(text)]
    if min(seeds) < 0:
        raise argparse.ArgumentTypeError("give one or more whole numbers from 0 on, as in 0,1,2")
    return seeds


if __name__ == "__main__":
    cli.run(main)
