"""Single tasks that come to a pool one by one: a file or a folder each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sapt_core.data.cl_benchmark import read_task
from sapt_core.data.task import Task
from sapt_core.errors import DataError
from sapt_core.settings import BenchmarkConfig


@dataclass(frozen=True)
class Addition:
    """A task that is to be learnt.

    Attributes:
        name: what the pool calls it.
        path: a folder of the CL_Benchmark layout, or one file of rows, of which test rows are split off.
        definition: the instruction; default: what the rows or the folder say.
        template, metric: default: those of the benchmark section. Of several metrics, with commas between them, the
            first leads.
    """

    name: str
    path: Path
    definition: str | None = None
    template: str | None = None
    metric: str | None = None


def load_additions(additions: Sequence[Addition], config: BenchmarkConfig) -> tuple[Task, ...]:
    """The tasks, in their order.

    Raises:
        DataError: with every fault of every task's files.
    """
    faults: list[str] = []
    found: list[Task] = []
    for addition in additions:
        given = [part.strip() for part in (addition.metric or "").split(",") if part.strip()]
        leading, *others = given or config.metrics or ("rouge_l",)
        task = read_task(
            addition.path,
            config,
            addition.template or config.template or "none",
            leading,
            faults,
            name=addition.name,
            definition=addition.definition,
        )
        if task is not None:
            found.append(replace(task, other_metrics=tuple(others), answers=config.answers))
    if faults:
        raise DataError("The tasks cannot be learnt:", faults)
    return tuple(found)
