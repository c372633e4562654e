"""What is compared: rows of settings, each learnt in every order and with every seed, read from one YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator

from pipelines.sequence.experiment import Experiment, assemble
from sapt_core.backbones.reference import identify
from sapt_core.config.experiment import ExperimentConfig, load_config, read_mapping, validated
from sapt_core.config.overrides import parsed
from sapt_core.config.unused import keys_of, named, unused, warn_of_unused
from sapt_core.data import load_sequence
from sapt_core.errors import ConfigError, FaultsError, SaptError
from sapt_core.io.hashing import canonical_hash
from sapt_core.task_settings import Section

Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Orders = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]

Column = Literal[
    "AP", "alone", "F.Ra", "FWT", "BWT", "unseen", "trained", "stored", "forward", "train s", "source s", "kept"
]


class Row(Section):
    """One line of the table: what it changes of the base."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]*$", description="Unique, whatever the case.")
    overrides: tuple[str, ...] = Field((), description="Dotted key=value over the base.")
    orders: Orders | None = Field(None, description="Default: those of the comparison.")
    seeds: Seeds | None = Field(None, description="Default: those of the comparison.")
    note: str = Field("", description="One line for the table: why the row is there.")


class ComparisonConfig(Section):
    """A comparison as its YAML file gives it."""

    base: Path = Field(description="Experiment config: path or name of one that ships.")
    overrides: tuple[str, ...] = Field((), description="Dotted key=value over the base, for all rows.")
    orders: Orders | None = Field(None, description="Numbered task orders; default: the base's.")
    seeds: Seeds = Field((0,), description="Seeds of a row that names none.")
    rows: tuple[Row, ...] = Field(min_length=1, description="Lines of the table.")
    results: Path = Field(description="Folder of the records, one JSON file a cell.")
    columns: Annotated[tuple[Column, ...], Field(min_length=1)] | None = Field(
        None, description="Figures in the table; default: all."
    )
    attention: bool = Field(False, description="Show each version's mean attention on every task it has learnt.")

    @model_validator(mode="after")
    def _rows_are_told_apart(self) -> ComparisonConfig:
        places = [slug(row.name) for row in self.rows]
        twice = [row.name for row, place in zip(self.rows, places, strict=True) if places.count(place) > 1]
        if twice:
            raise ValueError(f"rows of one name: {', '.join(twice)}")
        return self


@dataclass(frozen=True, order=True)
class Place:
    """Where a result belongs in the table: row, order (None is the base's) and seed."""

    row: str
    order: int | None
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        order = "" if self.order is None else f" order {self.order}"
        return f"{self.row}{order} seed {self.seed}"

    @property
    def file(self) -> str:
        """Name of its record."""
        order = "" if self.order is None else f"_order{self.order}"
        return f"{slug(self.row)}{order}_seed{self.seed}.json"


@dataclass(frozen=True, eq=False)
class Cell:
    """One sequence of a comparison, checked and ready to run."""

    place: Place
    overrides: tuple[str, ...]
    experiment: Experiment

    @property
    def settings(self) -> str:
        """sha256 of what all cells of a row have in common: settings, tasks as a set, backbone."""
        config = self.experiment.config
        # The number format is the machine's, which the record names.
        train = config.train.model_copy(update={"precision": "auto"})
        benchmark = config.benchmark.model_copy(update={"order": None})
        settings = config.model_copy(update={"seed": 0, "benchmark": benchmark, "train": train}).digest()
        tasks = sorted(task.digest for task in self.experiment.tasks)
        return canonical_hash([settings, tasks, self.experiment.backbone.digest])


@dataclass(frozen=True)
class Comparison:
    """A comparison whose settings are known to be valid.

    Attributes:
        name: of its table and its MLflow run.
        path: of its YAML file.
        config: what the file says.
        overrides: of the command line, over every row.
    """

    name: str
    path: Path
    config: ComparisonConfig
    overrides: tuple[str, ...]

    def places(self, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Place]:
        """The cells of some rows, all by default, with the file's seeds or others; each once."""
        wanted = [
            Place(row.name, order, seed)
            for row in self.config.rows
            if rows is None or row.name in rows
            for order in row.orders or self.config.orders or (None,)
            for seed in seeds or row.seeds or self.config.seeds
        ]
        return list(dict.fromkeys(wanted))

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            SaptError: there is none.
        """
        known = {row.name: row for row in self.config.rows}
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known)}"
            raise SaptError(f"--rows: {self.path} has no row {name!r}; {hint}")
        return known[name]

    def experiment(self, place: Place) -> ExperimentConfig:
        """The settings of a cell.

        Raises:
            ConfigError: with every fault.
        """
        overrides = (*self.config.overrides, *self.row(place.row).overrides, *self.overrides)
        return load_config(self.config.base, [*overrides, *_own(place)])

    def cells(self, places: Sequence[Place]) -> list[Cell]:
        """Check data and backbone of these cells; nothing is started or written.

        Raises:
            SaptError: with all faults of all cells, each told once.
        """
        load, identified = cache(load_sequence), cache(identify)
        found: list[Cell] = []
        faults: dict[str, list[str]] = {}
        for place in places:
            try:
                experiment = assemble(self.experiment(place), "The experiment", load=load, identified=identified)
                found.append(Cell(place, self.row(place.row).overrides, experiment))
            except SaptError as error:
                faults.setdefault(str(error).replace("\n", "\n  "), []).append(place.name)
        if faults:
            shared = [len(names) == len(places) for names in faults.values()]
            lines = [
                message if everywhere else f"{', '.join(names)}: {message}"
                for everywhere, (message, names) in zip(shared, faults.items(), strict=True)
            ]
            raise FaultsError(f"{self.path} cannot be run:", lines)
        return found


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison and validate the settings of every cell.

    Args:
        path: of the YAML file.
        overrides: dotted key=value of the command line, over every row.

    Raises:
        ConfigError: with all faults of the file, of its base and of every row.
    """
    given = OmegaConf.to_container(read_mapping(path))
    assert isinstance(given, dict)  # noqa: S101 - narrows what a mapping is read as
    faults: list[str] = []
    try:
        config = validated(ComparisonConfig, [OmegaConf.create(given)], str(path))
    except ConfigError as error:
        faults += error.faults
    # What a faulty file says right is looked at all the same, so that all faults are told at once.
    rows = list(_valid_rows(given.get("rows")))
    shared = given.get("overrides", [])
    shared = [item for item in shared if isinstance(item, str)] if isinstance(shared, list) else []
    faults += _misplaced("overrides", shared, ("seed", "benchmark.order"))
    faults += _misplaced("command line", overrides, ("seed", "benchmark.order"))
    for row in rows:
        forbidden = ("seed", "benchmark.order", "store", "tracking", "cluster")
        faults += _misplaced(f"rows.{row.name}", row.overrides, forbidden)
    base = given["base"] if isinstance(given.get("base"), str) else None
    plain = _faults(path, base, [*shared, *overrides])
    faults += plain
    for row in rows:
        found = _faults(path, base, [*shared, *row.overrides, *overrides])
        faults += [f"rows.{row.name}: {fault}" for fault in found if fault not in plain]
    if not faults:
        comparison = Comparison(path.stem.removeprefix("compare_"), path, config, tuple(overrides))
        ordered = [place for place in comparison.places() if place.order is not None]
        clashes = [place.row for place in ordered if comparison.experiment(place).benchmark.tasks is not None]
        faults += [
            f"orders: row {name} names benchmark.tasks, which win over any order: leave one of both out"
            for name in dict.fromkeys(clashes)
        ]
    if faults:
        raise ConfigError(f"{path} is not a valid comparison:", faults)
    for row in config.rows:  # what all rows share suits some of them and need not suit others
        in_vain = unused(comparison.experiment(comparison.places([row.name])[0]))
        own = keys_of(row.overrides)
        warn_of_unused([each for each in in_vain if named(own, each.field)], own, f"rows.{row.name}: ")
    return comparison


def slug(name: str) -> str:
    """A row's name as part of a file's."""
    return re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")


def _own(place: Place) -> list[str]:
    order = [] if place.order is None else [f"benchmark.order={place.order}"]
    return [f"seed={place.seed}", *order]


def _valid_rows(given: Any) -> Iterable[Row]:
    for values in given if isinstance(given, list) else ():
        try:
            yield Row.model_validate(values)
        except ValidationError:
            continue  # told of with the file


def _misplaced(where: str, overrides: Sequence[str], forbidden: Sequence[str]) -> list[str]:
    """Faults of overrides of what is not theirs to set."""
    reasons = {
        "seed": "give seeds",
        "benchmark.order": "give orders",
        "store": "all cells share one: set it in the base or on the command line",
        "tracking": "all cells share one: set it in the base or on the command line",
        "cluster": "all cells share one: set it in the base or on the command line",
    }
    keys = [item.partition("=")[0] for item in overrides]
    return [
        f"{where}: {key}: {reasons[name]}"
        for key in keys
        for name in forbidden
        if key == name or key.startswith(f"{name}.")
    ]


def _faults(path: Path, base: str | None, overrides: Sequence[str]) -> list[str]:
    """Faults of the base with overrides; of the overrides alone if the base cannot be read."""
    faults: list[str] = []
    try:
        layers = parsed(overrides, ExperimentConfig)
    except ConfigError as error:
        faults, layers = list(error.faults), []
    try:
        mapping = None if base is None else read_mapping(base, named_in=path)
    except ConfigError as error:
        faults += [f"base: {fault}" for fault in error.faults]
        mapping = None
    try:
        validated(ExperimentConfig, layers if mapping is None else [mapping, *layers], "")
    except ConfigError as error:
        keys = [item.partition("=")[0] for item in overrides]
        faults += [fault for fault in error.faults if mapping is not None or fault.partition(":")[0] in keys]
    return faults
