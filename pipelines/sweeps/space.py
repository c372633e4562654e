"""What a sweep varies and how, read from one YAML file and checked before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import optuna
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, model_validator

from sapt_core.config.experiment import ExperimentConfig, load_config, merged, read_mapping, validated
from sapt_core.config.overrides import parsed
from sapt_core.config.unused import keys_of, unused, warn_of_unused
from sapt_core.errors import ConfigError
from sapt_core.task_settings import Section

Scalar: TypeAlias = bool | int | float | str
Point: TypeAlias = dict[str, Scalar]
"""A value for every swept field, by its dotted name."""

# What a trial may not change: they say what is learnt, where and from which data, not how.
FIXED = (
    "seed",
    "benchmark",
    "backbone",
    "store",
    "tracking",
    "registry",
    "cluster",
    "evaluation.split",
    "diagnostics",
    "retention",
)
MOST_POINTS = 256
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {"ap": "maximize", "f_ra": "minimize"}


class Dimension(Section):
    """The values of one field: a range of numbers, or a list."""

    low: float | None = Field(None, description="Lower end of a range.")
    high: float | None = Field(None, description="Upper end of a range.")
    log: bool = Field(False, description="Draw the logarithm evenly; of a range only.")
    values: tuple[Scalar, ...] | None = Field(None, min_length=2, description="The list, instead of a range.")

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        ranged = self.low is not None or self.high is not None
        if ranged == (self.values is not None):
            raise ValueError("give either low and high, or values")
        if not ranged:
            if self.log:
                raise ValueError("log is for a range, not for values")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give both low and high")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range cannot start at {self.low:g}: give a low above 0")
        return self

    def distribution(self, field: type) -> BaseDistribution:
        """The dimension as Optuna draws from it; a ``field`` of whole numbers has steps of 1."""
        if self.values is not None:
            return CategoricalDistribution(self.values)
        low, high = self.ends()
        if field is int:
            return IntDistribution(math.ceil(low), math.floor(high), log=self.log)
        return FloatDistribution(low, high, log=self.log)

    def holds(self, value: Scalar) -> bool:
        """Whether ``value`` is one of these."""
        if self.values is not None:
            return value in self.values
        low, high = self.ends()
        return not isinstance(value, str) and low <= value <= high

    def ends(self) -> tuple[float, float]:
        """Of a range."""
        assert self.low is not None and self.high is not None  # noqa: S101, PT018 - validated
        return self.low, self.high


Names = Annotated[tuple[Literal["ap", "f_ra"], ...], Field(min_length=1, max_length=2)]


class SweepConfig(Section):
    """A sweep as its YAML file gives it."""

    base: Path = Field(description="Experiment config: path or name of one that ships.")
    overrides: tuple[str, ...] = Field((), description="Dotted key=value over the base, for all trials.")
    space: dict[str, Dimension] = Field(min_length=1, description="Dotted fields and their values.")
    search: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="Optuna's TPE, points drawn beforehand, or every combination of values."
    )
    trials: int | None = Field(None, ge=1, description="How many; of a grid all combinations.")
    objectives: Names = Field(("ap",), description="What is looked for; two give a Pareto front.")
    stop: Literal["none", "asha", "median"] = Field(
        "none", description="End bad trials early, by AP over the tasks so far: successive halving or the median rule."
    )
    grace: int = Field(2, ge=1, description="Tasks that no trial is stopped before.")
    concurrent: int = Field(1, ge=1, description="Trials at once.")
    seed: int = Field(0, ge=0, description="Of the search; the trials' own is the base's.")
    champion: bool = Field(False, description="Register the best trial's versions and give the last the alias.")
    results: Path = Field(description="Folder of the trials' records, one JSON file each.")

    @model_validator(mode="after")
    def _belongs_together(self) -> SweepConfig:
        if self.search == "grid":
            open_ended = [name for name, dimension in self.space.items() if dimension.values is None]
            if open_ended:
                raise ValueError(f"a grid needs values, not ranges: {', '.join(open_ended)}")
            if self.trials is not None:
                raise ValueError("a grid has as many trials as combinations: leave trials out")
        elif self.trials is None:
            raise ValueError(f"search {self.search} needs trials, how many points are tried")
        if self.stop != "none" and len(self.objectives) > 1:
            raise ValueError("stopping early ranks by AP alone: with two objectives set stop: none")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep whose settings are known to be valid.

    Attributes:
        name: of its tables and its MLflow run.
        path: of its YAML file.
        config: what the file says.
        base: the experiment's mapping before a point is laid over it; a trial on another node has no files.
        kinds: the type of every swept field.
    """

    name: str
    path: Path
    config: SweepConfig
    base: Mapping[str, Any]
    kinds: Mapping[str, type]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of every field, for Optuna."""
        return {name: each.distribution(self.kinds[name]) for name, each in self.config.space.items()}

    def experiment(self, point: Mapping[str, Scalar]) -> ExperimentConfig:
        """The settings of a trial; of no point those of the base.

        Raises:
            ConfigError: with every fault.
        """
        changes = parsed([f"{name}={_written(value)}" for name, value in point.items()], ExperimentConfig)
        return validated(ExperimentConfig, [OmegaConf.create(dict(self.base)), *changes], f"A trial of {self.path}")

    def holds(self, point: Mapping[str, Scalar]) -> bool:
        """Whether a trial of a sweep over the same fields lies in this space."""
        return all(self.config.space[name].holds(value) for name, value in point.items())

    def lattice(self) -> list[Point]:
        """Points with every listed value and both ends of every range: what two of them share, trials may share."""
        values = {name: dimension.values or dimension.ends() for name, dimension in self.config.space.items()}
        every = itertools.islice(itertools.product(*values.values()), MOST_POINTS)
        return [dict(zip(values, point, strict=True)) for point in every]

    @property
    def size(self) -> int | None:
        """How many points there are; None where some field has a value between any two."""
        counts = [_count(distribution) for distribution in self.distributions.values()]
        return None if None in counts else math.prod(count for count in counts if count is not None)

    def planned(self) -> list[Point] | None:
        """The points of a search that does not look at results, in their order; None for one that does."""
        space = self.config.space
        if self.config.search == "grid":
            every = itertools.product(*(dimension.values or () for dimension in space.values()))
            return [dict(zip(space, values, strict=True)) for values in every]
        if self.config.search == "random":
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.config.seed))
            drawn = [study.ask(self.distributions).params for _ in range(self.config.trials or 0)]
            return list({describe(point): point for point in drawn}.values())
        return None


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and validate its space and the settings at its ends.

    Args:
        path: of the YAML file.
        overrides: dotted key=value of the command line, over every trial.

    Raises:
        ConfigError: with all faults.
    """
    config = validated(SweepConfig, [read_mapping(path)], str(path))
    shared = [*config.overrides, *overrides, "evaluation.split=dev"]
    mapping = read_mapping(config.base, named_in=path)
    base = load_config(config.base, shared)
    faults: list[str] = []
    kinds: dict[str, type] = {}
    for name in config.space:
        if any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED):
            faults.append(f"space.{name}: is the same for all trials of a sweep; set it in the base or in overrides")
            continue
        try:
            kinds[name] = _kind(base, name)
        except ValueError as error:
            faults.append(f"space.{name}: {error}")
    given = keys_of((*config.overrides, *overrides))
    clashes = given & set(config.space)
    faults += [f"overrides: {name} is swept: leave it out" for name in sorted(clashes)]
    laid = merged([mapping, *parsed(shared, ExperimentConfig)])
    raw: Any = OmegaConf.to_container(laid, resolve=True)
    sweep = Sweep(path.stem.removeprefix("sweep_"), path, config, raw, kinds)
    if not faults:
        for point in sweep.lattice():
            try:
                sweep.experiment(point)
            except ConfigError as error:
                faults += [f"at {_named(point, fault)}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(f"{path} is not a valid sweep:", list(dict.fromkeys(faults)))
    # In vain is what no point has a use for: a swept field may decide about others.
    everywhere = [{each.field: each for each in unused(sweep.experiment(point))} for point in sweep.lattice()]
    in_vain = [each for name, each in everywhere[0].items() if all(name in found for found in everywhere)]
    warn_of_unused(in_vain, given | set(config.space))
    return sweep


def _count(distribution: BaseDistribution) -> int | None:
    if isinstance(distribution, CategoricalDistribution):
        return len(set(distribution.choices))
    if isinstance(distribution, IntDistribution):
        return distribution.high - distribution.low + 1
    return None


def describe(point: Mapping[str, Scalar]) -> str:
    """A point for people."""
    return ", ".join(f"{name}={shown(value)}" for name, value in point.items())


def shown(value: Scalar) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _named(point: Mapping[str, Scalar], fault: str) -> str:
    """Of a point what a fault is about, where it says so, so that it is told once and not for every point."""
    about = {name: value for name, value in point.items() if fault.startswith(f"{name}:")}
    return describe(about or point)


def _kind(base: ExperimentConfig, name: str) -> type:
    """The type of a swept field's value in the base.

    Raises:
        ValueError: there is no such field, or it is a section or a list.
    """
    value: Any = base.model_dump()
    parts = name.split(".")
    for place, part in enumerate(parts):
        if not isinstance(value, Mapping) or part not in value:
            known = _leaves(base.model_dump())
            close = get_close_matches(name, known, n=1, cutoff=0.4)
            there = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"there is no {'.'.join(parts[: place + 1])}{there}")
        value = value[part]
    if isinstance(value, Mapping | list | tuple):
        raise ValueError(f"is a {'section' if isinstance(value, Mapping) else 'list'}, not one value")
    return type(value)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return found


def _written(value: Scalar) -> str:
    """A value as an override has it: all digits, so that a trial is the same wherever it is read."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)
