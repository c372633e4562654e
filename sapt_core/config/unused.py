"""Fields that were set and change nothing, because of what another field says."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from sapt_core.config.experiment import ExperimentConfig


class Unused(NamedTuple):
    """A field without effect, by its dotted name; the field that makes it so, and how."""

    field: str
    because_of: str
    why: str


def unused(config: ExperimentConfig) -> list[Unused]:
    """The fields that a file or an override set in vain."""
    found: list[Unused] = []

    def in_vain(section: str, fields: Iterable[str], because_of: str, why: str) -> None:
        given = getattr(config, section).model_fields_set
        found.extend(Unused(f"{section}.{name}", because_of, why) for name in fields if name in given)

    method, reflection = config.method, config.reflection
    if not method.shared_attention:
        why = f"method {method.name} has no shared attention"
        for section in ("attention", "reflection", "generator"):
            in_vain(section, type(getattr(config, section)).model_fields, "method.name", why)
    else:
        source = f"reflection.source is {reflection.source}"
        in_vain("reflection", _unread_with(reflection.source), "reflection.source", source)
        if reflection.source != "generated":
            in_vain("generator", type(config.generator).model_fields, "reflection.source", source)
        elif reflection.weight == 0:
            in_vain("generator", type(config.generator).model_fields, "reflection.weight", "reflection.weight is 0")
    if method.pool != "block per task":
        in_vain("pet", ["detach_frozen"], "method.name", f"method {method.name} has no finished blocks beside the new")
    if config.retention.train_rows != "share":
        train_rows = config.retention.train_rows
        in_vain("retention", ["share"], "retention.train_rows", f"retention.train_rows is {train_rows}")
    if config.benchmark.tasks is not None:
        in_vain("benchmark", ["order"], "benchmark.tasks", "benchmark.tasks says the order")
    if not config.store.uri.startswith("s3://"):
        in_vain("store", ["endpoint_url"], "store.uri", "store.uri is a folder")
    return found


def _unread_with(source: str) -> Iterator[str]:
    """The fields of ``reflection`` that a source has no use for."""
    if source != "memory":
        yield "share"
    if source != "statistics":
        yield "rank"
    if source == "none":
        yield from ("weight", "batch_size", "target", "per_micro_batch")


def warn_of_unused(found: Iterable[Unused], given: Collection[str], where: str = "") -> None:
    """Log a line a reason.

    Args:
        found: as ``unused`` says.
        given: keys of overrides. What a file says for its own method is not reproached where an override
            chooses another.
        where: put before each line.
    """
    told = defaultdict[str, list[str]](list)
    for each in found:
        if named(given, each.field) or not named(given, each.because_of):
            told[each.why].append(each.field)
    for why, fields in told.items():
        has = "has" if len(fields) == 1 else "have"
        logging.getLogger(__name__).warning("%s%s %s no effect: %s", where, ", ".join(fields), has, why)


def keys_of(overrides: Iterable[str]) -> set[str]:
    """The dotted keys of overrides."""
    return {item.partition("=")[0] for item in overrides}


def named(keys: Collection[str], field: str) -> bool:
    """Whether one of the keys sets the field, a part of it, or the section it is in."""
    return any(f"{field}.".startswith(f"{key}.") or key.startswith(f"{field}.") for key in keys)
