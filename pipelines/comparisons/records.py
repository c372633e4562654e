"""Records of a comparison: one committed JSON file a cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.comparisons.cells import Cell, Place
from pipelines.console import cli
from pipelines.console.machine import Machine, machine_of
from pipelines.console.records import read_folder
from pipelines.running.monitor import Monitor
from sapt_core.versions.size import stored_bytes

# Stages that make what reflection keeps of earlier tasks.
SOURCE_KINDS = frozenset({"pseudo_samples", "memory", "statistics", "given"})
DIGITS = 4


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figures(_Frozen):
    """Summaries of the score matrix, as ``sapt_core.judging.metrics`` defines them."""

    ap: float
    f_ra: float
    fwt: float | None
    bwt: float
    bwt_over_t: float


class Record(_Frozen):
    """One finished cell.

    Attributes:
        key: of the experiment, data and backbone included.
        settings: what the cells of a row have in common, data and backbone included; cells of other settings are
            no part of its mean.
        overrides: the row's own; all that was set is in ``config``.
        config: all settings, but for where things lie and run; None in records of earlier releases.
        commit: of the code that put the record together, as its run began.
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
        intervals: row i holds the ends of the confidence intervals of row i of ``scores``, None where an earlier
            release scored.
        other_scores: by metric beside the leading one, and by task, what the last version scores, with the ends of the
            confidence interval.
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
    config: dict[str, Any] | None = None
    intervals: tuple[tuple[tuple[float, float] | None, ...], ...] = ()
    other_scores: dict[str, dict[str, tuple[float, float, float]]] = {}

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
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
        return "\n".join(["{", ",\n".join(lines), "}", ""])


def record_of(cell: Cell, monitor: Monitor) -> Record:
    """The record of a cell whose stages are all done."""
    experiment, summary = cell.experiment, monitor.summary()
    rows = {
        f"{split}_rows": sum(len(getattr(task, split)) for task in experiment.tasks)
        for split in ("train", "dev", "test")
    }
    stages = monitor.records.values()
    cost = monitor.records[experiment.graph.cost].metrics
    kept = [stage.metrics["bytes"] for stage in stages if stage.kind in SOURCE_KINDS and "bytes" in stage.metrics]
    return Record(
        **vars(cell.place),
        overrides=cell.overrides,
        method=summary["method"],
        key=summary["key"],
        settings=cell.settings,
        snapshot=summary["snapshot"],
        commit=experiment.commit,
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
            [[monitor.records[stage].metrics["weights"] for stage in row] for row in experiment.graph.evaluate]
        ),
        seconds=summary["seconds"],
        source_bytes=sum(kept) if kept else None,
        trained_parameters=cost["trained_parameters"],
        stored_bytes=stored_bytes(monitor.manifest(len(experiment.tasks) - 1), monitor.store),
        forward_cost=_rounded(cost["forward_cost"]),
        config=_config(cell),
        intervals=_rounded(summary["intervals"]),
        other_scores=_rounded(summary["other_scores"]),
    )


def as_of(record: Record, cell: Cell) -> Record:
    """The record of the cell's experiment as this cell's own: its place, and settings as they are told now."""
    told = {"overrides": cell.overrides, "settings": cell.settings, "config": _config(cell)}
    return record.model_copy(update={**vars(cell.place), **told})


def _config(cell: Cell) -> dict[str, Any]:
    """All that was set, less where things lie on the machine that it was set on."""
    unsaid: Any = dict.fromkeys(("store", "tracking", "registry", "cluster", "diagnostics", "retention"), True)
    unsaid |= {"benchmark": {"data_dir"}, "reflection": {"data_dir"}}
    config = cell.experiment.config.model_dump(mode="json", exclude=unsaid)
    config["backbone"]["path"] = cell.experiment.backbone.path
    for task in (*(config["benchmark"]["tasks"] or ()), *config["benchmark"]["unseen"]):
        if isinstance(task, dict):
            task.pop("path", None)
    return config


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
    return {cell: as_of(found[cell.experiment.key], cell) for cell in cells if cell.experiment.key in found}


def write_record(record: Record, folder: Path) -> None:
    """Put a record into the folder, whole or not at all."""
    cli.write_output(folder / record.place.file, record.to_text())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
