"""One frozen ``ExperimentConfig``, read from YAML, changed by dotted ``key=value`` overrides.

Unknown keys, wrong types and impossible values are refused together, each with its dotted path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator

from sapt_core.config.fields import sections_of
from sapt_core.config.overrides import parsed
from sapt_core.errors import ConfigError
from sapt_core.io.addresses import redacted
from sapt_core.io.hashing import canonical_hash
from sapt_core.io.shipped import config_file, shipped_configs
from sapt_core.methods.base import DEFAULT, AnyMethod, Method, default_method, find_method
from sapt_core.settings import (
    PET_TYPES,
    AttentionConfig,
    BackboneConfig,
    BenchmarkConfig,
    ClusterConfig,
    DiagnosticsConfig,
    EvaluationConfig,
    GeneratorConfig,
    LoRAConfig,
    PETConfig,
    PlacesConfig,
    ReflectionConfig,
    RetentionConfig,
    TrainConfig,
)

# What may stay of train rows, from least to most, and what each source of reflection keeps of them.
_MOST = ("statistics", "samples", "share", "all")
_KEPT_BY = {"statistics": "statistics", "generated": "samples", "given": "samples", "memory": "share"}
_WHAT = {"samples": "pseudo-samples", "share": "real rows"}


class ExperimentConfig(PlacesConfig):
    """A whole experiment. Relative paths count from the working folder, see ``sapt_core.io.shipped``."""

    seed: int = Field(0, ge=0, description="Of all that is random, but for the dev split.")
    benchmark: BenchmarkConfig = Field(description="The tasks.")
    backbone: BackboneConfig = Field(description="The frozen model.")
    pet: PETConfig = Field(LoRAConfig(), description="The block that a task trains.")
    attention: AttentionConfig = Field(AttentionConfig(), description="How the blocks are mixed.")
    reflection: ReflectionConfig = Field(ReflectionConfig(), description="What keeps earlier attention in place.")
    generator: GeneratorConfig = Field(GeneratorConfig(), description="What pseudo-samples are made with.")
    method: AnyMethod = Field(default_factory=default_method, description="What learns the sequence.")
    train: TrainConfig = Field(TrainConfig(), description="How a task is trained.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="What is scored, and how.")
    diagnostics: DiagnosticsConfig = Field(DiagnosticsConfig(), description="What the end warns of.")
    retention: RetentionConfig = Field(RetentionConfig(), description="What may stay of the data.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="What a stage gets.")

    @model_validator(mode="before")
    @classmethod
    def _routing_of_the_method(cls, values: Any) -> Any:
        """Fill what the config leaves open of ``attention`` with the method's own."""
        if not isinstance(values, dict):
            return values
        method, attention = _method_named(values), values.get("attention") or {}
        if method is None or not isinstance(attention, dict):
            return values
        return {**values, "attention": {**method.attention_defaults, **attention}}

    @model_validator(mode="after")
    def _the_method_can(self) -> ExperimentConfig:
        method = self.method
        if self.pet.type not in method.pet_types:
            raise ValueError(
                f"method {method.name} works with pet.type {' or '.join(method.pet_types)}, not {self.pet.type}"
            )
        if method.needs_task and self.benchmark.unseen:
            raise ValueError(
                f"method {method.name} answers only for tasks that it has learnt: leave benchmark.unseen out"
            )
        return self

    @model_validator(mode="after")
    def _targets_of_the_generator(self) -> ExperimentConfig:
        """Its LoRA adapts what the block does, unless the config says otherwise."""
        pet, generator = self.pet, self.generator
        if isinstance(pet, LoRAConfig) and "target_modules" not in generator.pet.model_fields_set:
            own = generator.pet.model_copy(update={"target_modules": pet.target_modules})
            # Not among the fields that were set: ``sapt_core.config.unused`` tells of those.
            self.__dict__["generator"] = GeneratorConfig.model_construct(
                generator.model_fields_set, **{**dict(generator), "pet": own}
            )
        return self

    @model_validator(mode="after")
    def _keeps_no_more_than_may_stay(self) -> ExperimentConfig:
        if faults := [*self._reflected_on_beyond_retention(), *self._rehearsed_beyond_retention()]:
            raise ValueError("; ".join(faults))
        return self

    def _reflected_on_beyond_retention(self) -> Iterator[str]:
        reflection, retention = self.reflection, self.retention
        if not self.reflects:
            return
        kept, allowed = _KEPT_BY[reflection.source], retention.train_rows
        if _MOST.index(kept) > _MOST.index(allowed):
            fitting = [name for name, level in _KEPT_BY.items() if _MOST.index(level) <= _MOST.index(allowed)]
            yield (
                f"reflection.source={reflection.source} keeps {_WHAT[kept]} of every task, and retention.train_rows="
                f"{allowed} forbids that: give reflection.source {', '.join(fitting)} or none, or retention.train_rows="
                f"{kept}"
            )
        elif reflection.source == "memory" and allowed == "share" and reflection.share > retention.share:
            yield (
                f"reflection.share={reflection.share:g} is above retention.share={retention.share:g}: lower the one or "
                "raise the other"
            )

    def _rehearsed_beyond_retention(self) -> Iterator[str]:
        share, retention, name = self.method.kept_share, self.retention, self.method.name
        if share and retention.train_rows in {"samples", "statistics"}:
            yield (
                f"method.name={name} keeps rows of every task, and retention.train_rows={retention.train_rows} forbids "
                "that: give another method, or retention.train_rows=share"
            )
        elif retention.train_rows == "share" and share > retention.share:
            yield (
                f"method.name={name} keeps a share of {share:g} of the rows, which is above retention.share="
                f"{retention.share:g}: lower method.share, raise retention.share, or give another method"
            )

    @property
    def reflects(self) -> bool:
        """Whether something is kept of a task for later ones to reflect on."""
        reflection = self.reflection
        return self.method.shared_attention and reflection.source != "none" and reflection.weight > 0

    @property
    def generates(self) -> bool:
        """Whether pseudo-samples are made, so that ``generator`` counts."""
        return self.reflects and self.reflection.source == "generated"

    def digest(self) -> str:
        """sha256 of what decides the science, whatever it runs on and wherever it lies.

        Paths are left out, and of tasks all but their names: data and backbone count by their content, which this does
        not see. So are unseen tasks, which decide nothing of what is learnt.
        """
        unread: Any = {
            "diagnostics": True,
            "retention": True,
            "cluster": True,
            "store": True,
            "tracking": True,
            "registry": True,
            "benchmark": {"data_dir", "unseen"},
            "backbone": {"path", "revision", "gguf_file"},
            "train": {"checkpoint_every_steps"},
            "reflection": {"data_dir"},
        }
        fields = self.hashed(unread)
        if self.benchmark.tasks is not None:
            fields["benchmark"]["tasks"] = [task.name for task in self.benchmark.tasks]
        return canonical_hash(fields)

    def hashed(self, unread: Any) -> dict[str, Any]:
        """The fields that a hash is taken of.

        Args:
            unread: those that are left out, as pydantic has it; so are those that say nothing where they stand at their
                default, which earlier releases lack.
        """
        fields = self.model_dump(mode="json", exclude=unread)
        if self.benchmark.answers == "free":
            del fields["benchmark"]["answers"]
        if self.backbone.gguf_file is None:
            fields["backbone"].pop("gguf_file", None)
        return fields


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file, apply dotted ``key=value`` overrides and validate.

    Args:
        path: of the file, or the name of one that ships, such as quickstart.
        overrides: the later over the earlier, all over the file.

    Raises:
        ConfigError: with every fault and its dotted path.
    """
    changes = parsed(overrides, ExperimentConfig)
    return validated(ExperimentConfig, [read_mapping(path), *changes], f"{path} with its overrides")


def written(config: BaseModel) -> str:
    """A config with all its fields as YAML, which reads as the same config."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def load_places(overrides: Sequence[str]) -> PlacesConfig:
    """Store and tracking from their defaults and dotted ``key=value`` overrides alone.

    Raises:
        ConfigError: with every fault and its dotted path.
    """
    return validated(PlacesConfig, parsed(overrides, PlacesConfig), "What the command line gives")


def read_mapping(path: Path | str, named_in: Path | None = None) -> DictConfig:
    """The YAML mapping that a file, or the one that ships under a name, holds; not validated.

    Args:
        path: counts from the working folder, or is the name of a config that ships.
        named_in: the file that says so, for the message.

    Raises:
        ConfigError: it cannot be read or holds something else.
    """
    path = config_file(path)
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        names = shipped_configs()
        close = get_close_matches(str(path).removesuffix(".yaml"), names, n=1)
        there = f"did you mean {close[0]}?" if close else f"these ship: {', '.join(names)}"
        if named_in is not None and (beside := named_in.parent / path).is_file():
            there = f"relative paths count from the working folder, also those in {named_in}: give {beside}"
        raise ConfigError("The config cannot be read:", [f"{path}: no such file; {there}"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The config cannot be read:", [f"{path}: {error}"]) from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not valid YAML:", [redacted(str(error))]) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} is not a config:", ["the file must hold a YAML mapping"])
    return loaded


def _method_named(values: Mapping[str, Any]) -> type[Method] | None:
    """The method that raw values name; None if there is no such one, which validation tells."""
    method = values.get("method")
    if isinstance(method, Method):
        return type(method)
    name = DEFAULT if not method else method.get("name", DEFAULT) if isinstance(method, Mapping) else None
    try:
        return find_method(name) if isinstance(name, str) else None
    except ValueError:
        return None


Values = TypeVar("Values", bound=BaseModel)


def validated(model: type[Values], layers: Sequence[DictConfig], what: str) -> Values:
    """The layers merged, the later over the earlier, as a ``model``.

    Raises:
        ConfigError: with every fault and its dotted path.
    """
    try:
        values = OmegaConf.to_container(merged(layers), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what} cannot be read:", [redacted(str(error))]) from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{what} is not valid:", _faults(error, model, values)) from error


def merged(layers: Sequence[DictConfig]) -> DictConfig:
    """The later layer over the earlier; another kind of PET block or method starts its section anew.

    Their fields differ.
    """
    merged = OmegaConf.create({})
    for layer in layers:
        for section, key, default in (("pet", "type", "lora"), ("method", "name", DEFAULT)):
            kind = OmegaConf.select(layer, f"{section}.{key}")
            if kind is not None and kind != OmegaConf.select(merged, f"{section}.{key}", default=default):
                merged.pop(section, None)
        merged = DictConfig(OmegaConf.merge(merged, layer))
    return merged


def _faults(error: ValidationError, root: type[BaseModel], values: Any) -> list[str]:
    faults = []
    method = _method_named(values) if isinstance(values, Mapping) else None
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        # The tag that chose the kind of PET block is no key of the file.
        location = tuple(
            part for i, part in enumerate(parts) if not (i and parts[i - 1] == "pet" and part in PET_TYPES)
        )
        kind = next((part for part in parts if part in PET_TYPES), "lora")
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "no such field" + _nearest(location, root, kind, method)
        elif item["type"] == "model_type":
            message = f"is a section; give its fields, for example in YAML or as {'.'.join(location)}.NAME=VALUE"
        elif item["type"] not in {"missing", "value_error", "pet_type"}:
            message += redacted(f" (given: {item['input']!r})")
        if item["type"] == "string_type" and isinstance(item["input"], bool | int | float | date):
            message += ": put it in quotes, for YAML reads it as no text"
        faults.append(f"{'.'.join(location) or 'config'}: {message}")
    return faults


def _nearest(location: tuple[str, ...], section: type[BaseModel], pet: str, method: type[Method] | None) -> str:
    """The known names beside an unknown one, nearest first."""
    for part in location[:-1]:
        if part.isdigit():  # a place in a list of sections
            continue
        inner = sections_of(section.model_fields[part])
        if section is ExperimentConfig and part == "pet":
            inner = [kind for kind in inner if kind is PET_TYPES[pet]]
        if section is ExperimentConfig and part == "method":
            inner = [] if method is None else [method]
        if len(inner) != 1:
            return ""
        section = inner[0]
    names = list(section.model_fields)
    close = get_close_matches(location[-1], names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(names)}"
