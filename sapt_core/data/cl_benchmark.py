"""Reads folders of the CL_Benchmark layout: ``<data_dir>/<task>/{train,test}.json``, or other formats of ``files``.

Each file is one JSON object with ``Definition`` and ``Instances`` (rows of ``input`` and ``output``); other
keys are ignored. ``dev.json`` is not read: in the published data it repeats ``test.json``, so choosing weights
on it would be choosing on the test rows. Dev rows are split off train instead.

A definition that is null or an empty list, as published copa has it, is an empty one; of several wordings the first
is used. An answer that is a number or a truth value is taken as JSON writes it. The templates put nothing else in
the place of an empty definition.

Rows without a usable answer are left out of every split, with a warning that counts them: published data has
mnli rows labelled ``-`` (the annotators did not agree) and task511 summaries that are blank or ``**``. No metric
can score such a row, since none looks at punctuation. Anything else that is wrong is a fault.
"""

from __future__ import annotations

import json
import logging
import string
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard

from sapt_core.data.files import kind, read_file, read_split
from sapt_core.data.task import SEEN, Example, Task, dev_rows
from sapt_core.errors import ConfigError, DataError
from sapt_core.settings import BenchmarkConfig

logger = logging.getLogger(__name__)

MAX_FAULTS_PER_FILE = 5

# Task orders of SAPT (SuperNI) and of O-LoRA's Long Sequence, as numbered in the configuration.
ORDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "superni": (
        (
            "task1572_samsum_summary",
            "task363_sst2_polarity_classification",
            "task1290_xsum_summarization",
            "task181_outcome_extraction",
            "task002_quoref_answer_generation",
            "task1510_evalution_relation_extraction",
            "task639_multi_woz_user_utterance_generation",
            "task1729_personachat_generate_next",
            "task073_commonsenseqa_answer_generation",
            "task1590_diplomacy_text_generation",
            "task748_glucose_reverse_cause_event_detection",
            "task511_reddit_tifu_long_text_summarization",
            "task591_sciq_answer_generation",
            "task1687_sentiment140_classification",
            "task875_emotion_classification",
        ),
        (
            "task748_glucose_reverse_cause_event_detection",
            "task073_commonsenseqa_answer_generation",
            "task1590_diplomacy_text_generation",
            "task639_multi_woz_user_utterance_generation",
            "task1572_samsum_summary",
            "task1687_sentiment140_classification",
            "task591_sciq_answer_generation",
            "task363_sst2_polarity_classification",
            "task1510_evalution_relation_extraction",
            "task1729_personachat_generate_next",
            "task181_outcome_extraction",
            "task511_reddit_tifu_long_text_summarization",
            "task002_quoref_answer_generation",
            "task1290_xsum_summarization",
            "task875_emotion_classification",
        ),
    ),
    "long_sequence": (
        (
            "yelp",
            "amazon",
            "mnli",
            "cb",
            "copa",
            "qqp",
            "rte",
            "imdb",
            "sst2",
            "dbpedia",
            "agnews",
            "yahoo",
            "multirc",
            "boolq",
            "wic",
        ),
        (
            "mnli",
            "cb",
            "wic",
            "copa",
            "qqp",
            "boolq",
            "rte",
            "imdb",
            "yelp",
            "amazon",
            "sst2",
            "dbpedia",
            "agnews",
            "multirc",
            "yahoo",
        ),
    ),
}
TEST_SHARE = 0.2  # of the rows of a task that is one file
METRICS = {"superni": "rouge_l", "long_sequence": "exact_match"}


def load_folders(config: BenchmarkConfig) -> tuple[Task, ...]:
    """Read the tasks of ``config``, in order, and behind them the unseen ones.

    ``train_rows`` and ``test_rows`` take the first usable rows of a file, before the dev split. The split
    depends on ``split_seed`` and the number of rows alone; train rows keep their order in the file.

    Raises:
        ConfigError: the suite has no such order.
        DataError: with every fault of every task.
    """
    data_dir = config.data_dir
    if data_dir is None:
        raise ValueError(f"suite {config.suite} was validated without data_dir")
    if not data_dir.is_dir():
        raise DataError("The task data cannot be read:", [f"benchmark.data_dir: {data_dir} is not a folder"])
    faults: list[str] = []
    folders = _folders(config, data_dir, faults)
    template, metric = config.template or config.suite, next(iter(config.metrics), METRICS.get(config.suite))
    if metric is None:
        raise ValueError("suite folder was validated without a metric")
    tasks = [task for name in folders if (task := read_task(data_dir / name, config, template, metric, faults))]
    if faults:
        raise DataError(f"The task data in {data_dir} cannot be used:", faults)
    return tuple(tasks)


def _folders(config: BenchmarkConfig, data_dir: Path, faults: list[str]) -> list[str]:
    """Folder names of the sequence and of the unseen tasks; those that cannot be found are added to ``faults``."""
    if config.tasks is not None:
        wanted: Sequence[str] = config.tasks
    else:
        orders, number = ORDERS[config.suite], config.order or 1
        if number > len(orders):
            allowed = ", ".join(str(index + 1) for index in range(len(orders)))
            fault = f"benchmark.order: {number}; suite {config.suite} has the orders {allowed}, or name benchmark.tasks"
            raise ConfigError("There is no such task order:", [fault])
        wanted = orders[number - 1]
    present = sorted(entry.name for entry in data_dir.iterdir() if entry.is_dir())
    found: list[str] = []
    missing = 0
    for place, name in enumerate((*wanted, *config.unseen)):
        # A task number is enough: task748 for task748_glucose_reverse_cause_event_detection.
        matches = [name] if name in present else [folder for folder in present if folder.startswith(f"{name}_")]
        if not matches:
            missing += 1
            faults.append(f"{name}: no such folder{_hint(name, data_dir, present)}")
        elif len(matches) > 1:
            faults.append(f"{name}: fits several folders, give one in full: {', '.join(matches)}")
        elif matches[0] in found and place < len(wanted):
            faults.append(f"{name}: names {matches[0]}, which the sequence already has")
        elif matches[0] in found:
            faults.append(f"benchmark.unseen: {name} names {matches[0]}, {SEEN}")
        else:
            found.append(matches[0])
    if missing and found and config.tasks is None and not config.unseen:
        faults.append(f"to learn only the folders that are there, give benchmark.tasks={','.join(found)}")
    return found


def _hint(name: str, data_dir: Path, present: Sequence[str]) -> str:
    inside = [folder for folder in present if (data_dir / folder / name).is_dir()]
    if inside:
        return f"; data_dir is one level too high, give {data_dir / inside[0]}"
    # Both spellings that are accepted: the whole name and what comes before its first underscore.
    spellings = {folder.split("_")[0]: folder for folder in present} | {folder: folder for folder in present}
    close = dict.fromkeys(spellings[near] for near in get_close_matches(name, spellings, n=3))
    return f"; nearest: {', '.join(close)}" if close else ""


def read_task(
    path: Path,
    config: BenchmarkConfig,
    template: str,
    metric: str,
    faults: list[str],
    *,
    name: str | None = None,
    definition: str | None = None,
) -> Task | None:
    """One task, or None with its faults added to ``faults``.

    Args:
        path: the task's folder, or one file of rows, of which ``TEST_SHARE`` become test rows by ``split_seed``.
        config: limits of rows, and the dev split.
        template, metric: the task's.
        faults: gets what is wrong.
        name: of the task; default: the folder's.
        definition: its instruction; default: what its rows or its train split say.
    """
    before = len(faults)
    if path.is_file():
        said, rows = _read_rows(path, "train", faults, definition)
        held = dev_rows(len(rows), TEST_SHARE, config.split_seed) if len(rows) > 2 else set()
        train = [row for index, row in enumerate(rows) if index not in held]
        test = [row for index, row in enumerate(rows) if index in held]
        if len(faults) == before and not test:
            faults.append(f"{path.name}: {len(rows)} usable rows; dev and test rows are split off, so give at least 3")
    else:
        said, train = _read_rows(path, "train", faults, definition)
        _, test = _read_rows(path, "test", faults, definition)
    train, test = train[: config.train_rows], test[: config.test_rows]
    if len(faults) == before and len(train) < 2:
        faults.append(f"{path.name}, train: one usable row; a dev row is split off, so give at least 2")
    if len(faults) > before:
        return None
    shared = len({row.input for row in train} & {row.input for row in test})
    if shared:
        logger.warning(
            "%s: %d inputs of test (%d rows) are also in train (%d rows): its score is too high",
            name or path.name,
            shared,
            len(test),
            len(train),
        )
    dev = dev_rows(len(train), config.dev_fraction, config.split_seed)
    return Task(
        name=name or path.name,
        definition=said,
        train=tuple(row for index, row in enumerate(train) if index not in dev),
        dev=tuple(row for index, row in enumerate(train) if index in dev),
        test=tuple(test),
        template=template,
        metric=metric,
    )


def _read_rows(path: Path, split: str, faults: list[str], given: str | None = None) -> tuple[str, list[Example]]:
    """Definition and usable rows of one split; what is wrong with it is added to ``faults``."""
    name, content = read_file(path, faults) if path.is_file() else read_split(path, split, faults)
    if content is None:
        return "", []

    definition = _definition(content, name, faults) if given is None else given
    instances = _instances(content, name, faults)
    rows: list[Example] = []
    row_faults: list[str] = []
    unanswered: list[int] = []
    for index, instance in enumerate(instances):
        row = _row(instance)
        if isinstance(row, str):
            row_faults.append(f"{name}: row {index}: {row}")
        elif not row.references:
            unanswered.append(index)
        else:
            rows.append(row)
    _add_row_faults(row_faults, name, faults)
    if unanswered and not rows and not row_faults:
        faults.append(f"{name}: no row is usable: no output holds more than punctuation")
    elif unanswered:
        logger.warning(
            "%s: %d of %d rows left out: their output holds no more than punctuation (first: row %d, %r)",
            name,
            len(unanswered),
            len(instances),
            unanswered[0],
            instances[unanswered[0]].get("output"),
        )
    return definition, rows


def load_inputs(data_dir: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The inputs in the train split of ``<data_dir>/<name>`` of every name, whatever their outputs hold.

    Raises:
        DataError: with every fault of every file.
    """
    faults: list[str] = []
    found = {}
    for folder in names:
        name, content = read_split(data_dir / folder, "train", faults)
        rows = [] if content is None else [_row(instance) for instance in _instances(content, name, faults)]
        _add_row_faults([f"{name}: row {i}: {row}" for i, row in enumerate(rows) if isinstance(row, str)], name, faults)
        found[folder] = tuple(row.input for row in rows if not isinstance(row, str))
    if faults:
        raise DataError(f"The samples in {data_dir} cannot be used:", faults)
    return found


def _instances(content: dict[str, Any], name: str, faults: list[str]) -> list[Any]:
    instances = content.get("Instances")
    if not isinstance(instances, list) or not instances:
        state = "is missing" if "Instances" not in content else "is empty" if instances == [] else "is not a list"
        faults.append(f"{name}: Instances {state}; give a list of objects with input and output")
        return []
    return instances


def _add_row_faults(row_faults: Sequence[str], name: str, faults: list[str]) -> None:
    faults.extend(row_faults[:MAX_FAULTS_PER_FILE])
    if len(row_faults) > MAX_FAULTS_PER_FILE:
        faults.append(f"{name}: {len(row_faults) - MAX_FAULTS_PER_FILE} more faulty rows")


def _definition(content: dict[str, Any], name: str, faults: list[str]) -> str:
    given = content.get("Definition")
    wordings = [given] if isinstance(given, str) else [] if given is None else given
    if "Definition" not in content or not isinstance(wordings, list) or not all(map(_is_text, wordings)):
        state = "is not text or a list of texts" if "Definition" in content else "is missing"
        faults.append(f"{name}: Definition {state}; give the instruction, or an empty text for none")
        return ""
    if len(wordings) > 1:
        logger.warning("%s: Definition has %d wordings; the first is used", name, len(wordings))
    return str(wordings[0]) if wordings else ""


def _row(instance: Any) -> Example | str:
    """The row with its scorable references (maybe none), or what is wrong with it."""
    if not isinstance(instance, dict):
        return f"is {kind(instance)}, not an object with input and output"
    text, output = instance.get("input"), instance.get("output")
    given = output if isinstance(output, list) else [] if output is None else [output]
    references = [json.dumps(answer) if isinstance(answer, int | float) else answer for answer in given]
    problems = []
    if isinstance(text, str) and not _is_text(text):
        problems.append("input holds a lone surrogate, which is no character")
    elif not _is_text(text):
        problems.append(f"input is {kind(text)}, not text" if "input" in instance else "input is missing")
    elif not text.strip():
        problems.append("input is blank")
    if "output" not in instance:
        problems.append("output is missing")
    elif not all(map(_is_text, references)):
        problems.append("output is neither text, a number nor a list of them")
    if problems:
        return "; ".join(problems)
    return Example(instance["input"], tuple(answer for answer in references if any(map(_says_something, answer))))


def _says_something(character: str) -> bool:
    """A letter, digit or symbol of any script; the ASCII symbols, such as ``*``, are punctuation to the metrics."""
    return unicodedata.category(character)[0] in "LNS" and character not in string.punctuation


def _is_text(value: Any) -> TypeGuard[str]:
    """A string that can be encoded; JSON allows lone surrogates, which no tokenizer or file takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
