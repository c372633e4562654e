"""Results of a comparison: one committed JSON record a cell, and the table that is made of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from pipelines import cli
from pipelines.comparison import Cell, Comparison, Place
from pipelines.reporter import Reporter, git_commit, short_name
from sapt_core.cost import stored_bytes
from sapt_core.device import computes_bfloat16, default_device
from sapt_core.errors import DataError, SaptError
from sapt_core.settings import TrainConfig

# Stages that make what reflection keeps of earlier tasks.
SOURCE_KINDS = frozenset({"pseudo_samples", "memory", "statistics", "given"})
DIGITS = 4


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figures(_Frozen):
    """Summaries of the score matrix, as ``sapt_core.metrics`` defines them."""

    ap: float
    f_ra: float
    fwt: float | None
    bwt: float
    bwt_over_t: float


class Machine(_Frozen):
    """What the comparison was run from: of a cluster, the driver's node."""

    cpu: str
    cores: int
    gpu: str | None
    dtype: str


class Record(_Frozen):
    """One finished cell.

    Attributes:
        key: of the experiment, data and backbone included.
        settings: what the cells of a row have in common; cells of other settings are no part of its mean.
        commit: of the code that wrote the record.
        written_at: when the record was.
        scores: row i holds the scores after task i on tasks 0 to i.
        single: scores of every task learnt alone, if they are; AP is held against their mean.
        unseen: scores on tasks that are never learnt, after every version.
        zero_shot: scores of the bare backbone on them.
        attention: row i holds for tasks 0 to i the mean weights over the blocks of version i.
        seconds: of every kind of stage, as the stages' records state them, whichever run did the work.
        source_bytes: what reflection keeps of earlier tasks, where its stages say.
        trained_parameters: for the last task; None in records of earlier releases, as the two below.
        stored_bytes: of the last version and its method's state, without the backbone and what reflection keeps.
        forward_cost: operations of a forward of the last version, as a multiple of the backbone's.
    """

    schema_version: Literal[1] = 1
    row: str
    order: int | None
    seed: int
    overrides: tuple[str, ...]
    method: str
    key: str
    settings: str
    snapshot: str
    commit: str
    written_at: datetime
    machine: Machine
    sizes: dict[str, int]
    figures: Figures
    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    single: tuple[float, ...] | None
    unseen: dict[str, tuple[float, ...]]
    zero_shot: dict[str, float]
    attention: tuple[tuple[tuple[float, ...], ...], ...]
    seconds: dict[str, float]
    source_bytes: int | None
    trained_parameters: int | None = None
    stored_bytes: int | None = None
    forward_cost: float | None = None

    @property
    def place(self) -> Place:
        """Where it belongs in the table."""
        return Place(self.row, self.order, self.seed)

    @property
    def source_seconds(self) -> float:
        """Seconds that making what reflection keeps took."""
        return sum(seconds for kind, seconds in self.seconds.items() if kind in SOURCE_KINDS)

    def to_text(self) -> str:
        """JSON, one field a line: what changed shows line by line."""
        fields = self.model_dump(mode="json")
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return "\n".join(["{", ",\n".join(lines), "}", ""])


def record_of(cell: Cell, reporter: Reporter) -> Record:
    """The record of a cell whose stages are all done."""
    experiment, summary = cell.experiment, reporter.summary()
    rows = {
        f"{split}_rows": sum(len(getattr(task, split)) for task in experiment.tasks)
        for split in ("train", "dev", "test")
    }
    stages = reporter.records.values()
    last = reporter.records[experiment.graph.train[-1]].metrics
    kept = [stage.metrics["bytes"] for stage in stages if stage.kind in SOURCE_KINDS and "bytes" in stage.metrics]
    return Record(
        **vars(cell.place),
        overrides=cell.overrides,
        method=summary["method"],
        key=summary["key"],
        settings=cell.settings,
        snapshot=summary["snapshot"],
        commit=git_commit(),
        written_at=datetime.now(UTC).replace(microsecond=0),
        machine=machine_of(experiment.config.train),
        sizes={"tasks": len(experiment.tasks), **rows},
        figures=Figures(**_rounded({name: summary[name] for name in Figures.model_fields})),
        tasks=summary["tasks"],
        scores=_rounded(summary["scores"]),
        single=_rounded(summary["single"]),
        unseen=_rounded(summary.get("unseen", {})),
        zero_shot=_rounded(summary.get("zero_shot", {})),
        attention=_rounded(
            [[reporter.records[stage].metrics["weights"] for stage in row] for row in experiment.graph.evaluate]
        ),
        seconds=summary["seconds"],
        source_bytes=sum(kept) if kept else None,
        trained_parameters=last.get("trained_parameters"),
        stored_bytes=stored_bytes(reporter.manifest(len(experiment.tasks) - 1), reporter.store),
        forward_cost=_rounded(last["forward_cost"]) if "forward_cost" in last else None,
    )


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, none if it is not there yet.

    Raises:
        DataError: with every file that is no record.
    """
    return read_folder(folder, "*.json", Record)


def recorded_elsewhere(cells: Sequence[Cell], folder: Path) -> dict[Cell, Record]:
    """Records, as of these cells, of their experiments that other comparisons keep in folders beside this one."""
    found = {}
    for path in sorted(folder.absolute().parent.glob("*/*_seed*.json")):
        with suppress(OSError, ValidationError):
            record = Record.model_validate_json(path.read_bytes())
            found[record.key] = record
    return {
        cell: found[cell.experiment.key].model_copy(
            update={**vars(cell.place), "overrides": cell.overrides, "settings": cell.settings}
        )
        for cell in cells
        if cell.experiment.key in found
    }


Kept = TypeVar("Kept", bound=BaseModel)


def read_folder(folder: Path, pattern: str, kind: type[Kept]) -> list[Kept]:
    """All files of a pattern as records of a kind, by name; none if there is no such folder yet.

    Raises:
        DataError: with every file that is no such record.
    """
    found, faults = [], []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(kind.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            faults.append(f"{path.name}: {said}; delete it, and it is put together again from its stages")
    if faults:
        raise DataError(f"{folder} holds files that are no records:", faults)
    return found


def write_record(record: Record, folder: Path) -> None:
    """Put a record into the folder, whole or not at all."""
    cli.write_output(folder / record.place.file, record.to_text())


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
        from sapt_core.plots import average_performance  # noqa: PLC0415  matplotlib, only where something is drawn

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
    header = ["row", "cells", "AP", "alone", "F.Ra", "FWT", "BWT", *(["unseen"] if transfer else [])]
    header += ["trained", "stored", "forward", "train s", "source s", "kept", "note"]
    rows = []
    for row in comparison.config.rows:
        group = groups[row.name]
        figures: list[list[float | None]] = [
            [record.figures.ap for record in group],
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
    attention = _attention(used) if comparison.config.attention else ()
    remarks = _remarks(comparison, records, used)
    progress = tuple((name, _progress(group)) for name, group in groups.items() if group)
    return Results(f"Comparison {comparison.name}", tuple(header), tuple(rows), remarks, attention, progress)


def check_markers(path: Path, name: str) -> None:
    """Refuse a Markdown file that has no place for a table, between comments of its ``name`` with begin and end.

    Raises:
        SaptError: with what to paste.
    """
    _around_markers(path, name)


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Put a table between its markers.

    Raises:
        SaptError: they are not there.
    """
    before, after = _around_markers(path, name)
    cli.write_output(path, f"{before}\n{text}{after}")


def _around_markers(path: Path, name: str) -> tuple[str, str]:
    """The file up to the first marker and from the second on."""
    begin, end = (f"<!-- {name} {place} -->" for place in ("begin", "end"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SaptError(f"--markdown {path} cannot be read: {error}") from error
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SaptError(
            f"--markdown {path} has no place for the table of {name}. Paste these two lines where it belongs:\n"
            f"{begin}\n{end}"
        )
    return before + begin, end + after


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
        commits = ", ".join(sorted({record.commit[:7] for record in used}))
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


def _spread(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return "–"
    return f"{fmean(there):.2f}" + (f" ± {stdev(there):.2f}" if len(there) > 1 else "")


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(fmean(values)) if values else "–"


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal; the first and the last column hold text, the others figures."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in {0, len(header) - 1} else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a file."""
    rule = ["---", *["--:"] * (len(header) - 2), "---"]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine_of(config: TrainConfig) -> Machine:
    """The machine that this process runs on, and the numbers it trains in."""
    auto = "bfloat16" if computes_bfloat16(default_device()) else "float32"
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        dtype=auto if config.precision == "auto" else config.precision,
    )


def _cpu() -> str:
    """The processor's model; the standard library knows its architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _described(machine: Machine) -> str:
    return f"{machine.gpu or machine.cpu}, {machine.cores} cores, {machine.dtype}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
