"""The workers of one training: what one of them makes, all of them know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gathered(mine: T) -> list[T]:
    """What every worker gives, by rank. All workers meet here."""
    _, world = place()
    if world == 1:
        return [mine]
    found: list[T] = [mine] * world
    dist.all_gather_object(found, mine)
    return found


def shared(count: int, make: Callable[[int], T]) -> list[T]:
    """``make(0)`` to ``make(count - 1)``, each made by one worker and told to all. All workers meet here.

    For what must be the same everywhere and does not depend on the arguments alone: sooner or later two devices that
    sample differ in a token, and then in their number of steps.
    """
    rank, world = place()
    found: dict[int, T] = {}
    for made in gathered({index: make(index) for index in range(rank, count, world)}):
        found |= made
    return [found[index] for index in range(count)]
