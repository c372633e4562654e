"""Keeping the one large thing that was loaded last."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, Generic, ParamSpec, TypeVar

Given = ParamSpec("Given")
Loaded = TypeVar("Loaded")


class Last(Generic[Given, Loaded]):
    """A function that keeps its last result, and lets go of it before it makes another.

    ``functools.lru_cache`` holds the old one until the new one is there, so that both must fit into memory. Threads
    take turns: of one result at a time there are not two either.

    Args:
        load: makes the result; its arguments must be hashable.
        on: what the result stands on and holds. It is let go of whenever that is asked for: by what loads another,
            or needs the room beside it.
    """

    def __init__(self, load: Callable[Given, Loaded], *, on: Last[..., Any] | None = None) -> None:
        self._load = load
        # One lock for both: each lets the other wait.
        self._lock: RLock = RLock() if on is None else on._lock
        self._kept: dict[tuple[Hashable, ...], Loaded] = {}
        self._standing: list[Last[..., Any]] = []
        if on is not None:
            on._standing.append(self)

    def __call__(self, *given: Given.args, **named: Given.kwargs) -> Loaded:
        key = (given, tuple(sorted(named.items())))
        with self._lock:
            self._clear_standing()
            if key not in self._kept:
                self.cache_clear()
                self._kept[key] = self._load(*given, **named)
            return self._kept[key]

    def cache_clear(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._clear_standing()
            if self._kept:
                self._kept.clear()
                gc.collect()  # a model's modules and hooks name each other

    def _clear_standing(self) -> None:
        for each in self._standing:
            each.cache_clear()
