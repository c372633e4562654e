"""Learn the same tasks with several settings, orders and seeds, and put the results side by side.

    python pipelines/compare.py --config pipelines/configs/comparisons/superni_mini.yaml [key=value ...]

All cells (row, order, seed) are one wide graph of stages: what two of them share runs once. Each complete cell
leaves a JSON record in the results folder, and table and figure are made of all records there. Submitted again
after any interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.console import cli, places
from pipelines.console.commands import pasted
from sapt_core.errors import FaultsError, SaptError

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.comparisons.cells import Cell, Comparison


class _ListMethods(argparse.Action):
    """Print a method a line and end, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from sapt_core.methods.base import known_methods

        methods = known_methods()
        width = max(map(len, methods))
        for name, found in methods.items():
            print(f"{name:{width}}  {found.summary}")
        parser.exit()


def main() -> None:
    """Parse the command line, run what has no record yet and show the table."""
    arguments = _arguments()

    from pipelines.comparisons.cells import load_comparison
    from pipelines.comparisons.records import read_records
    from pipelines.comparisons.run import PLOT
    from pipelines.comparisons.table import results
    from pipelines.console.tables import check_markers, wide_console, write_between_markers

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
        console.print(remark)
    plot = made.plot()
    if plot is not None:
        cli.write_output(folder / PLOT, plot)
    if arguments.markdown is not None:
        write_between_markers(arguments.markdown, f"compare:{comparison.name}", made.markdown())
    if failed:
        _raise(failed)


def _learn(comparison: Comparison, arguments: argparse.Namespace, console: Console) -> Mapping[Cell, Exception]:
    """Give the chosen cells their records; those that failed, each with its error."""
    from cluster.store import open_store
    from pipelines.comparisons.records import as_of, read_records, recorded_elsewhere, write_record
    from pipelines.comparisons.run import ComparisonRun, run_cells

    folder = comparison.config.results
    there = {record.place: record for record in read_records(folder)}
    keys = {place: record.key for place, record in there.items()}
    cells = comparison.cells(comparison.places(arguments.rows, arguments.seeds))
    written = {"results": folder, "--markdown": arguments.markdown}
    places.check_lasting(written, cells[0].experiment.config, inline=arguments.inline)
    cli.check_output(folder / cells[0].place.file)
    unrecorded = [cell for cell in cells if keys.get(cell.place) != cell.experiment.key]
    elsewhere = recorded_elsewhere(unrecorded, folder)
    to_run = [cell for cell in unrecorded if cell not in elsewhere]
    store = open_store(cells[0].experiment.config.store)
    if not arguments.dry_run:
        store.check()
    running = ComparisonRun(comparison, to_run, store, console)
    running.show_plan(recorded=len(cells) - len(to_run))
    for cell in unrecorded:
        if cell.place in keys:
            console.print(f"{cell.place.name}: its record is of other settings, data or backbone; it is replaced")
        if cell in elsewhere:
            console.print(f"{cell.place.name}: its record is taken over from another comparison")
    if arguments.dry_run:
        return {}
    # Records of an earlier release told the settings of a row otherwise.
    retold = [as_of(there[cell.place], cell) for cell in cells if cell not in unrecorded]
    for record in (*elsewhere.values(), *(each for each in retold if each != there[each.place])):
        write_record(record, folder)
    return run_cells(running, arguments) if to_run else {}


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
        __doc__ or "", pasted("compare", "--config", "quickstart", "--seeds", "0,1"), kind="comparisons"
    )
    parser.add_argument("--list-methods", action=_ListMethods, nargs=0, help="print a method a line and end")
    parser.add_argument("--rows", type=_names, metavar="A,B", help="only these rows")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="these seeds for every row")
    cli.add_print_config(parser, "the config of each row's first cell,")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    cli.add_inline(parser)
    parser.add_argument("--table-only", action="store_true", help="run nothing, show what the records say")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between its markers in FILE")
    return cli.parse(parser, _configs)


def _configs(arguments: argparse.Namespace) -> str:
    """A YAML document a row, each a config that `sapt learn` takes."""
    from pipelines.comparisons.cells import load_comparison
    from sapt_core.config.experiment import written

    comparison = load_comparison(arguments.config, arguments.overrides)
    rows = arguments.rows or [row.name for row in comparison.config.rows]
    first = [comparison.places([comparison.row(name).name], arguments.seeds)[0] for name in rows]
    return "---\n".join(f"# {place.name}\n{written(comparison.experiment(place))}" for place in first)


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
