"""Task sequences of every suite, as text."""

from __future__ import annotations

from sapt_core.data.task import Task
from sapt_core.data.tasks import check_parted, load_inputs, load_tasks
from sapt_core.settings import BenchmarkConfig

__all__ = ["load_inputs", "load_sequence"]


def load_sequence(config: BenchmarkConfig) -> tuple[Task, ...]:
    """The tasks of ``config`` in the order they are learnt, oldest first, and behind them the unseen ones.

    Raises:
        ConfigError: the suite has no such order.
        DataError: with every fault of every task's files.
    """
    if config.suite == "synthetic":
        from sapt_core.data.synthetic import synthetic_sequence  # noqa: PLC0415  only its users pay for it

        tasks = synthetic_sequence(config)
    else:
        tasks = load_tasks(config)
    check_parted(tasks)
    return tasks
