"""SAPT on Ray: what is computed. The names below are for users; all else may change with any release.

They are imported when they are asked for: ``import sapt_core`` takes no time, ``sapt_core.Pool`` the seconds of torch
and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapt_core.api import Pool, learn_first, load, make_task
    from sapt_core.config.experiment import ExperimentConfig, load_config
    from sapt_core.data import load_sequence
    from sapt_core.data.task import Example, Task
    from sapt_core.errors import SaptError
    from sapt_core.versions.predictor import Prediction

__version__ = "0.1.0"

_HOMES = {
    "Example": "sapt_core.data.task",
    "ExperimentConfig": "sapt_core.config.experiment",
    "Pool": "sapt_core.api",
    "Prediction": "sapt_core.versions.predictor",
    "SaptError": "sapt_core.errors",
    "Task": "sapt_core.data.task",
    "learn_first": "sapt_core.api",
    "load": "sapt_core.api",
    "load_config": "sapt_core.config.experiment",
    "load_sequence": "sapt_core.data",
    "make_task": "sapt_core.api",
}

__all__ = [
    "Example",
    "ExperimentConfig",
    "Pool",
    "Prediction",
    "SaptError",
    "Task",
    "__version__",
    "learn_first",
    "load",
    "load_config",
    "load_sequence",
    "make_task",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
