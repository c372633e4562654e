"""The registry that a command line names."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.tracking.registry import PoolRegistry
    from sapt_core.settings import PlacesConfig


def places_of(arguments: Namespace) -> PlacesConfig:
    """Store, tracking and registry, from the config, if one is given, and the command line.

    Raises:
        ConfigError: with every fault and its dotted path.
    """
    from sapt_core.config.experiment import load_config, load_places

    config, overrides = arguments.config, arguments.overrides
    return load_places(overrides) if config is None else load_config(config, overrides)


def registry_of(places: PlacesConfig, model: str | None = None) -> PoolRegistry:
    """The registry, once it is known that it can be read.

    Args:
        places: where it is.
        model: the registered model; None is ``tracking.model``.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    from cluster.tracking.registry import PoolRegistry
    from cluster.tracking.service import check_readable

    named = {} if model is None else {"model": model}
    return PoolRegistry(check_readable(places.tracking.model_copy(update=named)))
