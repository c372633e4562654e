"""The published suites: their task orders and metrics, and which folders of ``data_dir`` a config names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from sapt_core.data.task import SEEN
from sapt_core.errors import ConfigError, DataError
from sapt_core.settings import BenchmarkConfig
from sapt_core.task_settings import TaskConfig

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
METRICS = {"superni": "rouge_l", "long_sequence": "exact_match"}


def named_tasks(config: BenchmarkConfig, faults: list[str]) -> list[TaskConfig]:
    """The tasks of the sequence and the unseen ones, each with its path; what cannot be found is added to ``faults``.

    Raises:
        ConfigError: the suite has no such order.
        DataError: the folder that tasks should be in is none.
    """
    if config.tasks is not None:
        wanted: Sequence[TaskConfig] = config.tasks
    else:
        orders, number = ORDERS[config.suite], config.order or 1
        if number > len(orders):
            allowed = ", ".join(str(index + 1) for index in range(len(orders)))
            fault = f"benchmark.order: {number}; suite {config.suite} has the orders {allowed}, or name benchmark.tasks"
            raise ConfigError("There is no such task order:", [fault])
        wanted = [TaskConfig(name=name) for name in orders[number - 1]]
    # Of no account where every task has a path of its own.
    data_dir = config.data_dir if any(task.path is None for task in (*wanted, *config.unseen)) else None
    if data_dir is not None and not data_dir.is_dir():
        raise DataError("The task data cannot be read:", [f"benchmark.data_dir: {data_dir} is not a folder"])
    present = [] if data_dir is None else sorted(entry.name for entry in data_dir.iterdir() if entry.is_dir())
    found: list[TaskConfig] = []
    missing = 0
    for place, task in enumerate((*wanted, *config.unseen)):
        name, names = task.name, [each.name for each in found]
        # A task number is enough: task748 for task748_glucose_reverse_cause_event_detection.
        begun = [folder for folder in present if folder.startswith(f"{name}_")]
        matches = [name] if task.path is not None or name in present else begun
        if not matches:
            missing += 1
            faults.append(f"{name}: no such folder{'' if data_dir is None else _hint(name, data_dir, present)}")
        elif len(matches) > 1:
            faults.append(f"{name}: fits several folders, give one in full: {', '.join(matches)}")
        elif matches[0] in names and place < len(wanted):
            faults.append(f"{name}: names {matches[0]}, which the sequence already has")
        elif matches[0] in names:
            faults.append(f"benchmark.unseen: {name} names {matches[0]}, {SEEN}")
        else:
            path = task.path if data_dir is None or task.path is not None else str(data_dir / matches[0])
            found.append(task.model_copy(update={"name": matches[0], "path": path}))
    if missing and found and config.tasks is None and not config.unseen:
        names = [each.name for each in found]
        faults.append(f"to learn only the folders that are there, give benchmark.tasks={','.join(names)}")
    return found


def _hint(name: str, data_dir: Path, present: Sequence[str]) -> str:
    inside = [folder for folder in present if (data_dir / folder / name).is_dir()]
    if inside:
        return f"; data_dir is one level too high, give {data_dir / inside[0]}"
    # Both spellings that are accepted: the whole name and what comes before its first underscore.
    spellings = {folder.split("_")[0]: folder for folder in present} | {folder: folder for folder in present}
    close = dict.fromkeys(spellings[near] for near in get_close_matches(name, spellings, n=3))
    return f"; nearest: {', '.join(close)}" if close else ""
