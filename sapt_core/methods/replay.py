"""Experience replay: rows of earlier tasks are kept and learnt again beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.training.objective import Row
from sapt_core.training.rehearsal import choose, pack, unpack
from sapt_core.training.trainer import step_seed


class Rehearsal(Method):
    """What methods share that keep a share of every task's rows and mix them into each later task's."""

    pet_types: ClassVar[tuple[str, ...]] = ("lora", "prompt", "full")

    share: float = Field(0.02, gt=0, le=1, description="Kept share of a task's train rows, at least one.")

    @property
    def kept_share(self) -> float:
        """The memory's."""
        return self.share

    def begin(self, lesson: Lesson) -> Plan:
        """Train on the task's rows and all kept ones; an epoch passes over each once."""
        return Plan([*lesson.rows, *(row for rows in remembered(lesson) for row in rows)])

    def end(self, lesson: Lesson) -> Mapping[str, bytes]:
        """Keep a random share of the rows."""
        chosen = choose(lesson.rows, self.share, step_seed(lesson.seed, "memory"))
        return {memory_name(lesson.index): pack(chosen)}


class Replay(Rehearsal):
    """One block trained on from task to task, over new rows and a memory of old ones."""

    name: Literal["replay"] = "replay"

    summary: ClassVar[str] = "one block trained on, with a share of every earlier task's rows mixed in"


class MultiTask(Rehearsal):
    """The ceiling of sequences: at every task a new block learns all tasks so far, all rows at once."""

    name: Literal["multi_task"] = "multi_task"
    share: Literal[1] = Field(1, description="Of the rows of earlier tasks: all.")

    summary: ClassVar[str] = "a new block for all rows of all tasks so far: a ceiling, not a continual learner"
    pool: ClassVar[Literal["fresh block"]] = "fresh block"


def memory_name(task: int) -> str:
    """Under which name the rows of the ``task``-th task are saved."""
    return f"memory {task:02d}"


def remembered(lesson: Lesson) -> list[list[Row]]:
    """Kept rows of every earlier task, oldest first."""
    saved = [lesson.state(memory_name(task)) for task in range(lesson.index)]
    return [[] if data is None else unpack(data) for data in saved]
