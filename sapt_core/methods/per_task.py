"""The oracle: a block a task, and the task's name is told with every input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from sapt_core.methods.base import Method


class PerTask(Method):
    """Nothing is shared, so nothing is forgotten or transferred; useless where inputs come without a name."""

    name: Literal["per_task"] = "per_task"

    summary: ClassVar[str] = "a block a task, chosen by the task's name: an oracle, no selection is learnt"
    pool: ClassVar[Literal["block per task"]] = "block per task"
    again: ClassVar[bool] = True
    pet_types: ClassVar[tuple[str, ...]] = ("lora", "prompt", "full")

    @property
    def needs_task(self) -> bool:
        return True

    def active(self, task: int) -> Sequence[int]:
        return (task,)
