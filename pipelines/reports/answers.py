"""Rows that were scored, with what was answered: the only text of rows that leaves the store.

What shows rows, the page and MLflow's table, shows those that ``drawn`` gives and reads none itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.stages import StageRecord
from cluster.store import ArtifactStore
from sapt_core.judging.analysis import draw
from sapt_core.judging.scoring.base import Row
from sapt_core.judging.scoring.named import find_metric

SHOWN_ROWS = 3  # of a task, on the page
TABLE_ROWS = 50  # of a task, in MLflow's table
LONGEST = 1000  # characters of a text in that table
COLUMNS = ("task", "input", "reference", "answer", "score", "weights")

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A scored row and what was answered.

    Attributes:
        prompt: the row's input.
        right: every answer that counts as right.
        learnt: what the version answered that had just learnt the task.
        now: what the newest version answers.
        score: of that, 0 to 100.
        weights: of the blocks that answered, by the task that made each; empty where an earlier release scored.
    """

    prompt: str
    right: tuple[str, ...]
    learnt: str
    now: str
    score: float
    weights: dict[str, float]


def read_predictions(record: StageRecord, store: ArtifactStore) -> list[Prediction]:
    """All rows that a version was scored on; none where these were erased."""
    if "predictions" in record.erased:
        return []
    return [json.loads(line) for line in store.get(record.outputs["predictions"]).splitlines()]


def drawn(
    before: Sequence[Prediction], after: Sequence[Prediction], metric: str, blocks: Sequence[str]
) -> tuple[Answer, ...]:
    """Some of the rows that two versions were scored on, drawn whatever was answered.

    Args:
        before: of the version that had just learnt the task.
        after: the same rows, of the newest version.
        metric: its name.
        blocks: those that answer the task, by the task that made each.
    """
    found = find_metric(metric)
    return tuple(
        Answer(
            prompt=row["input"],
            right=tuple(row["references"]),
            learnt=before[index]["prediction"],
            now=row["prediction"],
            score=found.of_row(Row(row["prediction"], row["references"], row["input"])),
            weights=dict(zip(blocks, row["weights"], strict=True)) if "weights" in row else {},
        )
        for index in draw(len(after), TABLE_ROWS)
        for row in (after[index],)
    )


def table(tasks: Sequence[str], answers: Sequence[Sequence[Answer]]) -> list[tuple[str | float, ...]]:
    """The rows under ``COLUMNS``; several right answers and the weights are JSON, as a served version writes them."""
    return [
        (
            name,
            cut(each.prompt, LONGEST),
            cut(each.right[0] if len(each.right) == 1 else json.dumps(each.right, ensure_ascii=False), LONGEST),
            cut(each.now, LONGEST),
            each.score,
            json.dumps(each.weights) if each.weights else "",  # no null: MLflow reads one as the text "None"
        )
        for name, found in zip(tasks, answers, strict=True)
        for each in found
    ]


def cut(text: str, longest: int) -> str:
    """A text in bounds."""
    return text if len(text) <= longest else f"{text[:longest]}…"
