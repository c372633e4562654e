"""Single tasks that come to a pool one by one: a file or a folder each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sapt_core.data.cl_benchmark import read_task
from sapt_core.data.task import LearntTask, Task
from sapt_core.errors import DataError
from sapt_core.settings import BenchmarkConfig


@dataclass(frozen=True)
class Addition:
    """A task that is to be learnt.

    Attributes:
        name: what the pool calls it.
        path: a folder of the CL_Benchmark layout, or one file of rows, of which test rows are split off.
        definition: the instruction; default: what the rows or the folder say.
        template, metric: default: those of the benchmark section.
    """

    name: str
    path: Path
    definition: str | None = None
    template: str | None = None
    metric: str | None = None

    def like(self, known: LearntTask) -> Addition:
        """The same rows, of a task that is known."""
        return replace(self, definition=known.definition, template=known.template, metric=known.metric)


def load_additions(
    additions: Sequence[Addition], config: BenchmarkConfig, sealed: Collection[str] | None = None
) -> tuple[Task, ...]:
    """The tasks, in their order; ``sealed`` is as ``read_task`` takes it.

    Raises:
        DataError: with every fault of every task's files.
    """
    faults: list[str] = []
    tasks = [
        read_task(
            addition.path,
            config,
            addition.template or config.template or "none",
            addition.metric or config.metric or "rouge_l",
            faults,
            name=addition.name,
            definition=addition.definition,
            sealed=sealed,
        )
        for addition in additions
    ]
    found = tuple(task for task in tasks if task is not None)
    if faults:
        raise DataError("The tasks cannot be learnt:", faults)
    return found
