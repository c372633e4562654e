"""The floor: one block that goes on training from task to task, with nothing against forgetting."""

from __future__ import annotations

from typing import ClassVar, Literal

from sapt_core.methods.base import Method


class Sequential(Method):
    """Plain fine-tuning on one task after another; with one task, that task learnt alone."""

    name: Literal["sequential"] = "sequential"

    pet_types: ClassVar[tuple[str, ...]] = ("lora", "prompt", "full")
    summary: ClassVar[str] = "one block trained on from task to task: what forgetting costs"
    again: ClassVar[bool] = True
