"""Reads tasks: their splits, each up to the rows that are wanted, and cuts off train what they lack.

``dev.json`` of a folder is not read: in the published data it repeats ``test.json``, so choosing weights on it would be
choosing on the test rows. Dev rows are cut off train, unless ``splits.dev`` names a split. Folders with a train and a
test file are cut by seed alone, as the published protocols do; what else there is, by answers where those are labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from sapt_core.data.cl_benchmark import METRICS, named_tasks
from sapt_core.data.reading import SplitRows, read_split
from sapt_core.data.sources import open_folder, open_source
from sapt_core.data.task import CutOff, Example, LearntTask, Task, are_labels, dev_rows, stratified_rows
from sapt_core.errors import DataError
from sapt_core.metric_settings import metric_names
from sapt_core.settings import BenchmarkConfig
from sapt_core.task_settings import TaskConfig

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2  # of train, where there is no test split
LABELS_SHOWN = 10


def load_tasks(config: BenchmarkConfig) -> tuple[Task, ...]:
    """Read the tasks of ``config``, in order, and behind them the unseen ones.

    ``train_rows`` and ``test_rows`` take the first usable rows of a split, before dev rows are cut off. What is cut off
    depends on ``split_seed``, the number of rows and, where they are labels, the answers.

    Raises:
        ConfigError: the suite has no such order.
        DataError: with every fault of every task.
    """
    faults: list[str] = []
    where = "The task data" if config.data_dir is None else f"The task data in {config.data_dir}"
    tasks = read_tasks(named_tasks(config, faults), config, faults)
    if faults:
        raise DataError(f"{where} cannot be used:", faults)
    return tasks


def read_tasks(
    entries: Sequence[TaskConfig],
    config: BenchmarkConfig,
    faults: list[str],
    sealed: Collection[str] | None = None,
) -> tuple[Task, ...]:
    """The tasks in their order, less those with faults, which are added to ``faults``.

    Args:
        entries: each with its path.
        config: limits of rows, what is cut off, and what tasks have that do not say otherwise.
        faults: gets what is wrong.
        sealed: of a task that is known, inputs of the rows that it is scored on: it gets no other test rows, and none
            of these is learnt from.
    """
    template, metric = config.template or config.suite, config.metrics or METRICS.get(config.suite)
    tasks = []
    for entry in entries:
        told = {"template": entry.template or template, "metric": entry.metric or metric}
        tasks.append(_read_task(entry.model_copy(update=told), config, faults, sealed))
    return tuple(task for task in tasks if task is not None)


def load_additions(
    entries: Sequence[TaskConfig],
    config: BenchmarkConfig,
    sealed: Collection[str] | None = None,
    known: Sequence[LearntTask] = (),
) -> tuple[Task, ...]:
    """Tasks that come to a pool one by one, in their order.

    Args:
        entries: each with its path.
        config: as of ``read_tasks``.
        sealed: as of ``read_tasks``.
        known: those of the tasks that the pool has learnt, whose definition, template, metric and labels stay.

    Raises:
        DataError: with every fault of every task.
    """
    faults: list[str] = []
    learnt = {task.name: task for task in known}
    told = {name: task.model_dump(include={"definition", "template", "metric"}) for name, task in learnt.items()}
    entries = [entry.model_copy(update=told.get(entry.name, {})) for entry in entries]
    tasks = read_tasks(entries, config, faults, sealed)
    tasks = tuple(_labelled(task, learnt[task.name], faults) if task.name in learnt else task for task in tasks)
    if faults:
        raise DataError("The tasks cannot be learnt:", faults)
    check_parted(tasks)
    return tasks


def check_parted(tasks: Sequence[Task]) -> None:
    """Refuse definitions that would run into their inputs.

    Raises:
        DataError: naming the tasks.
    """
    torn = [task.name for task in tasks if task.template == "none" and task.definition]
    if torn:
        fault = f"{', '.join(torn)}: nothing would part definition and input; give another template"
        raise DataError("benchmark.template=none is for inputs that are whole prompts:", [fault])


def load_inputs(data_dir: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The inputs in the train split of ``<data_dir>/<name>`` of every name, whatever their outputs hold.

    Raises:
        DataError: with every fault of every file.
    """
    faults: list[str] = []
    found = {}
    for name in names:
        entry = TaskConfig(name=name)
        try:
            source = open_folder(data_dir / name, entry)
            found[name] = tuple(read_split(source, "train", entry, None, faults, inputs_alone=True).inputs)
        except DataError as error:
            faults.extend(error.faults)
    if faults:
        raise DataError(f"The samples in {data_dir} cannot be used:", faults)
    return found


def _labelled(task: Task, known: LearntTask, faults: list[str]) -> Task:
    """A task that is known, with the labels that it has; train rows of other answers are added to ``faults``."""
    answers = sorted({reference.strip() for row in task.train for reference in row.references} - {*known.labels})
    if known.labels and answers:
        faults.append(
            f"{task.name}: its train rows answer {', '.join(map(repr, answers[:LABELS_SHOWN]))}, and may be answered "
            f"{', '.join(map(repr, known.labels[:LABELS_SHOWN]))} alone, which it was learnt with: leave them out, or "
            "give them a task name of their own"
        )
    return replace(task, answers="labels" if known.labels else "free", label_names=known.labels)


def _read_task(
    entry: TaskConfig, config: BenchmarkConfig, faults: list[str], sealed: Collection[str] | None
) -> Task | None:
    """One task, or None with its faults added to ``faults``."""
    if entry.path is None or entry.template is None or entry.metric is None:
        raise ValueError(f"task {entry.name} was validated without path, template or metric")
    before = len(faults)
    try:
        source = open_source(entry, entry.path, whole=config.train_rows is None)
    except DataError as error:
        faults.extend(error.faults)
        return None
    names, seed = entry.splits, config.split_seed

    def read(split: str, limit: int | None) -> SplitRows:
        return read_split(source, split, entry, limit, faults)

    # The published suites are scored on their own test rows or not at all.
    own_test = names.test is not None or "test" in source.splits or config.suite != "folder"
    cut_test = sealed is None and not own_test
    # No further than it takes for as many rows to be left; of a smaller split that is all of it.
    wanted = None if config.train_rows is None else math.ceil(config.train_rows / (1 - TEST_SHARE if cut_test else 1))
    learnt = read(names.train, None if wanted is None else wanted + len(sealed or ()))
    train = _unsealed(learnt.usable, sealed or (), entry.name)
    test = read(names.test or "test", config.test_rows).usable if own_test and sealed is None else []
    few = None if config.train_rows is None else max(1, round(config.train_rows * config.dev_fraction))
    dev = [] if names.dev is None else read(names.dev, few).usable
    if len(faults) > before:
        return None
    by_answer = not (source.by_seed and own_test)
    if cut_test and len(train) > 2:
        train, test = _parted(train, TEST_SHARE, seed, by_answer=by_answer)
    train, test = train[: config.train_rows], test[: config.test_rows]
    if not test and sealed is None:
        faults.append(f"{source.name}: {len(train)} usable rows; dev and test rows are split off, so give at least 3")
    elif names.dev is None and len(train) < 2:
        faults.append(f"{source.name}, train: one usable row; a dev row is split off, so give at least 2")
    if len(faults) > before:
        return None
    inputs = [row.input for row in train]
    if names.dev is None:
        train, dev = _parted(train, config.dev_fraction, seed, by_answer=by_answer)
    leading, *others = metric_names(entry.metric)
    task = Task(
        name=entry.name,
        definition=learnt.definition,
        template=entry.template,
        metric=leading,
        other_metrics=tuple(others),
        answers=config.answers,
        label_names=tuple((entry.label_names or {}).values()) if config.answers == "labels" else (),
        train=tuple(train),
        dev=tuple(dev),
        test=tuple(test),
    )
    cut = tuple(split for split, is_cut in (("test", cut_test), ("dev", names.dev is None)) if is_cut)
    if cut:
        every = [row.references[0] for row in (*task.train, *task.dev, *task.test)]
        task = replace(task, cut=CutOff(cut, seed, by_answer and are_labels(every)))
    if by_answer and task.cut is not None:
        _tell_of_cut(task, task.cut)
    _warn_of_rows(task, inputs)
    answers = {row.references for row in (*task.train, *task.dev)}
    if config.train_rows is not None and len(answers) == 1:
        logger.warning("%s: all of its first %d rows have the same answer; is it sorted?", task.name, len(inputs))
    return task


def _unsealed(rows: Sequence[Example], sealed: Collection[str], name: str) -> list[Example]:
    """The rows but those that the task is scored on."""
    left = [row for row in rows if row.input not in sealed]
    if len(left) < len(rows):
        logger.warning(
            "%s: %d of its %d rows are test or dev rows that the version is scored on, and are not learnt from",
            name,
            len(rows) - len(left),
            len(rows),
        )
    return left


def _parted(
    rows: Sequence[Example], share: float, seed: int, *, by_answer: bool
) -> tuple[list[Example], list[Example]]:
    """Rows less a share of them, and that share."""
    labels = [row.references[0] for row in rows]
    cut = stratified_rows(labels, share, seed) if by_answer else dev_rows(len(rows), share, seed)
    return [row for place, row in enumerate(rows) if place not in cut], [rows[place] for place in sorted(cut)]


def _tell_of_cut(task: Task, cut: CutOff) -> None:
    told = " and ".join(f"{task.rows[split]} {split} rows" for split in cut.splits)
    how = ", of every answer alike" if cut.by_answer else ""
    logger.warning("%s: %s were split off train, by benchmark.split_seed=%d%s", task.name, told, cut.seed, how)


def _warn_of_rows(task: Task, learnt: Sequence[str]) -> None:
    shared = len({*learnt} & {row.input for row in task.test})
    if shared:
        logger.warning(
            "%s: %d inputs of test (%d rows) are also in train (%d rows): its score is too high",
            task.name,
            shared,
            len(task.test),
            len(learnt),
        )
