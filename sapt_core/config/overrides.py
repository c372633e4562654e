"""Dotted ``key=value`` overrides of a config, as a command line or a comparison's rows have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel
from yaml import YAMLError

from sapt_core.config import fields
from sapt_core.errors import ConfigError
from sapt_core.io.addresses import redacted


def parsed(overrides: Sequence[str], model: type[BaseModel]) -> list[DictConfig]:
    """Overrides of a ``model``, each a layer.

    A field that holds text takes its text as it is, with blanks and "#", "2026" and "on"; null empties one that may be
    empty. All other values are read as YAML.

    Raises:
        ConfigError: with every one that has not this form.
    """
    layers, faults = [], []
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            faults.append(f"{redacted(repr(item))}: give a dotted key, '=' and a value")
            continue
        if value == "???":
            faults.append(f"{key}: ??? stands for a value that is missing: give one")
            continue
        meant = fields.find(model, key)
        if meant and all(map(fields.is_text, meant)):
            empty = value == "null" and any(map(fields.may_be_none, meant))
            layers.append(_layer(key, None if empty else _literal(value)))
            continue
        try:
            layers.append(OmegaConf.from_dotlist([item]))
        except (YAMLError, OmegaConfBaseException) as error:
            faults.append(f"{key}: the value is not valid YAML: {redacted(' '.join(str(error).split()))}")
    if faults:
        raise ConfigError("Overrides have the form key=value, for example train.epochs=3:", faults)
    return layers


def _layer(key: str, value: Any) -> DictConfig:
    for part in reversed(key.split(".")):
        value = {part: value}
    layer: DictConfig = OmegaConf.create(value)
    return layer


def _literal(text: str) -> str:
    """Text that OmegaConf, which reads "${" as a reference, resolves to ``text``."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
