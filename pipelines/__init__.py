"""SAPT on Ray: what people type, and the ways from code to stores and MLflow.

``load`` and ``open_store`` are for users; they are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.api import load, open_store

__all__ = ["load", "open_store"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pipelines.api"), name)
