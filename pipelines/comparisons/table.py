"""The table of a comparison, made of its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.table import Table

from pipelines.comparisons.cells import Comparison
from pipelines.comparisons.records import Record
from pipelines.console.machine import Machine
from pipelines.console.tables import markdown_table, text_table
from pipelines.running.monitor import short_name


@dataclass(frozen=True)
class Results:
    """The table of a comparison: what all its records say.

    Attributes:
        title: of the table.
        header: names of the columns; the first and the last hold text, the others figures.
        rows: one a row of the comparison, as text.
        remarks: lines below the table.
        attention: header and rows of the attention's table, if it is to be shown and there is any.
        progress: for every row with cells, AP over the tasks so far after each task, mean over the cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]
    attention: tuple[tuple[str, ...], ...]
    progress: tuple[tuple[str, tuple[float, ...]], ...]

    def plot(self) -> bytes | None:
        """AP after each task as a PNG; None where nothing is learnt yet."""
        from sapt_core.judging.plots import average_performance  # noqa: PLC0415  matplotlib, only where something is drawn

        return average_performance(self.progress) if self.progress else None

    def tables(self) -> list[Table]:
        """For a terminal."""
        made = [text_table(self.title, self.header, self.rows)]
        if self.attention:
            made.append(text_table("Mean attention, after each version", self.attention[0], self.attention[1:]))
        return made

    def markdown(self) -> str:
        """For a file."""
        parts = [markdown_table(self.header, self.rows), *self.remarks]
        if self.attention:
            parts.append("Mean attention on each task's test rows, after each version:")
            parts.append(markdown_table(self.attention[0], self.attention[1:]))
        return "\n\n".join(parts) + "\n"


def results(comparison: Comparison, records: Sequence[Record]) -> Results:
    """The table of all records of a comparison, also of those that other runs have left.

    A row's figures are those of the cells with the settings of its newest record; cells of other settings are
    named below the table, and so are cells that have no record yet.
    """
    groups = {
        row.name: [record for record in records if record.row == row.name and record.settings == newest]
        for row in comparison.config.rows
        for newest in [_newest_settings(records, row.name)]
    }
    used = [record for group in groups.values() for record in group]
    transfer = any(record.unseen for record in used)
    others = list(dict.fromkeys(name for record in used for name in record.other_scores))
    header = ["row", "cells", "AP", *(f"AP {name}" for name in others)]
    header += ["alone", "F.Ra", "FWT", "BWT", *(["unseen"] if transfer else [])]
    header += ["trained", "stored", "forward", "train s", "source s", "kept", "note"]
    rows = []
    for row in comparison.config.rows:
        group = groups[row.name]
        figures: list[list[float | None]] = [
            [record.figures.ap for record in group],
            *([_other(record, name) for record in group] for name in others),
            [fmean(record.single) if record.single else None for record in group],
            [record.figures.f_ra for record in group],
            [record.figures.fwt for record in group],
            [record.figures.bwt for record in group],
        ]
        if transfer:
            figures.append([_transfer(record) for record in group])
        expected = len({*comparison.places([row.name]), *(record.place for record in group)})
        rows.append(
            (
                row.name,
                str(len(group)) if len(group) == expected else f"{len(group)} of {expected}",
                *map(_spread, figures),
                _mean([n / 1000 for record in group if (n := record.trained_parameters) is not None], "{:.0f} k"),
                _mean([size / 1024 for record in group if (size := record.stored_bytes) is not None], "{:.0f} KiB"),
                _mean([cost for record in group if (cost := record.forward_cost) is not None], "× {:.2f}"),
                _mean([record.seconds.get("train", 0.0) for record in group], "{:.0f}"),
                _mean([record.source_seconds for record in group], "{:.0f}"),
                _mean([kept / 1024 for record in group if (kept := record.source_bytes) is not None], "{:.1f} KiB"),
                row.note,
            )
        )
    chosen = comparison.config.columns
    shown = [
        index
        for index, name in enumerate(header)
        if chosen is None
        or name in chosen
        or name in {"row", "cells", "note"}
        or (name.startswith("AP ") and "AP" in chosen)
    ]
    header, rows = [header[i] for i in shown], [tuple(row[i] for i in shown) for row in rows]
    attention = _attention(used) if comparison.config.attention else ()
    remarks = _remarks(comparison, records, used)
    progress = tuple((name, _progress(group)) for name, group in groups.items() if group)
    return Results(f"Comparison {comparison.name}", tuple(header), tuple(rows), remarks, attention, progress)


def _newest_settings(records: Sequence[Record], row: str) -> str:
    written = [(record.written_at, record.settings) for record in records if record.row == row]
    return max(written)[1] if written else ""


def _remarks(comparison: Comparison, records: Sequence[Record], used: Sequence[Record]) -> tuple[str, ...]:
    rows = {row.name for row in comparison.config.rows}
    there = {record.place for record in used}
    begun = {place.row for place in there}  # of the others the table says it all
    missing = [place.name for place in comparison.places() if place not in there and place.row in begun]
    others = [record.place.name for record in records if record not in used and record.row in rows]
    unknown = sorted({record.row for record in records} - rows)
    remarks = []
    if used:
        days = sorted({str(record.written_at.date()) for record in used})
        when = " to ".join(dict.fromkeys([days[0], days[-1]]))
        commits = ", ".join(sorted({_shown(record.commit) for record in used}))
        machines = "; ".join(sorted({_described(record.machine) for record in used}))
        remarks.append(
            f"Mean ± standard deviation over a row's cells (orders and seeds). {when}, code at {commits}. {machines}."
        )
    if missing:
        remarks.append(f"No record yet: {', '.join(missing)}.")
    if others:
        remarks.append(f"Left out, of other settings than the newest of its row: {', '.join(others)}.")
    if unknown:
        remarks.append(f"Records of rows that the comparison no longer has: {', '.join(unknown)}.")
    return tuple(remarks)


def _attention(records: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    """Mean over a row's cells; those of one order, as another order has other blocks."""
    groups: dict[tuple[str, int | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record.row, record.order), []).append(record)
    blocks = max((len(record.tasks) for record in records), default=0)
    rows = []
    for (name, order), group in groups.items():
        label = name if order is None else f"{name} order {order}"
        for version, row in enumerate(group[0].attention):
            for task in range(len(row)):
                of_all = zip(*(record.attention[version][task] for record in group), strict=True)
                cells = [f"{fmean(weights):.2f}" for weights in of_all]
                cells += [""] * (blocks - len(cells))
                rows.append((label, str(version + 1), *cells, short_name(group[0].tasks[task])))
    header = ("row", "version", *(f"block {block + 1}" for block in range(blocks)), "on task")
    return (header, *rows) if rows else ()


def _progress(records: Sequence[Record]) -> tuple[float, ...]:
    """Mean over records of AP over the tasks so far, after each task that all of them have learnt."""
    rows = zip(*(record.scores for record in records), strict=False)
    return tuple(fmean(fmean(scores) for scores in of_all) for of_all in rows)


def _transfer(record: Record) -> float | None:
    return fmean(scores[-1] for scores in record.unseen.values()) if record.unseen else None


def _other(record: Record, name: str) -> float | None:
    """Mean over the tasks that have a metric beside their leading one."""
    scores = record.other_scores.get(name)
    return fmean(score for score, _, _ in scores.values()) if scores else None


def _spread(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return "–"
    return f"{fmean(there):.2f}" + (f" ± {stdev(there):.2f}" if len(there) > 1 else "")


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(fmean(values)) if values else "–"


def _shown(commit: str) -> str:
    return commit[:7] + "-dirty" * commit.endswith("-dirty")


def _described(machine: Machine) -> str:
    return f"{machine.gpu or machine.cpu}, {machine.cores} cores, {machine.dtype}"
