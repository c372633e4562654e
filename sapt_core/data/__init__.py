"""Task sequences of every suite, as text."""

from __future__ import annotations

from dataclasses import replace

from sapt_core.data.cl_benchmark import load_folders, load_inputs
from sapt_core.data.task import Task
from sapt_core.errors import DataError
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
        tasks = load_folders(config)
    torn = [task.name for task in tasks if task.template == "none" and task.definition]
    if torn:
        fault = f"{', '.join(torn)}: nothing would part definition and input; give superni or long_sequence"
        raise DataError("benchmark.template=none is for inputs that are whole prompts:", [fault])
    return tuple(replace(task, other_metrics=config.metrics[1:], answers=config.answers) for task in tasks)
