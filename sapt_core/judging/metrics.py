"""Scores of predictions, and what a continual-learning sequence's score matrix says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapt_core.judging.scoring.base import Row
from sapt_core.judging.scoring.intervals import Estimate, estimate
from sapt_core.judging.scoring.named import find_metric


def score(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> float:
    """Score of predictions, 0 to 100.

    Args:
        metric: its name, or ``package.module:function``.
        predictions: one a row.
        references: for each row every answer that counts as right, at least one.
        sources: the rows' inputs, for metrics that read them.

    Raises:
        ConfigError: there is no such metric.
    """
    return find_metric(metric).score(_rows(predictions, references, sources))


def estimates(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
) -> dict[str, Estimate]:
    """Scores by metric as ``score`` gives them, each with its confidence interval."""
    rows = _rows(predictions, references, sources)
    return {name: estimate(find_metric(name), rows) for name in metrics}


def _rows(predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None) -> list[Row]:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} rows: need one each, at least one")
    return list(map(Row, predictions, references, [""] * len(predictions) if sources is None else sources))


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores a[i][j] on task j after lesson i (SAPT section 4.1), oldest first, complete or so far.

    Lesson i learns task i, unless a task was learnt again: then ``lessons`` says which task each learnt.

    Every summary takes a stage i, the last one by default, and sees only the tasks learnt until then; below,
    T = i + 1.

    Attributes:
        tasks: names of the whole sequence.
        rows: row i holds the scores of the tasks known by then, a lower triangle where no task was learnt again. Fewer
            rows than lessons while it runs.
        single: for each task the score of the same PET trained on that task alone, needed by FWT.
        lessons: for each lesson the place of its task; None: each learnt the next one.
    """

    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    single: tuple[float, ...] | None = None
    lessons: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "rows", tuple(tuple(map(float, row)) for row in self.rows))
        if self.lessons is not None and [*self.lessons] == [*range(len(self.tasks))]:
            object.__setattr__(self, "lessons", None)
        if self.single is not None:
            object.__setattr__(self, "single", tuple(map(float, self.single)))
            if len(self.single) != len(self.tasks):
                raise ValueError(f"{len(self.single)} single-task scores for {len(self.tasks)} tasks")
        if len(self.rows) > len(self._lessons):
            raise ValueError(f"{len(self.rows)} rows of scores for {len(self._lessons)} tasks")
        known = 0
        for i, (row, task) in enumerate(zip(self.rows, self._lessons, strict=False)):
            if task > known or task >= len(self.tasks):
                raise ValueError(f"lesson {i} learns task {task}, and {known} are known before it")
            known = max(known, task + 1)
            if len(row) != known:
                raise ValueError(f"row {i} holds {len(row)} scores, not those of tasks 0 to {known - 1}")
        if not all(math.isfinite(value) for row in (*self.rows, self.single or ()) for value in row):
            raise ValueError("scores must be finite numbers")

    @property
    def _lessons(self) -> Sequence[int]:
        return range(len(self.tasks)) if self.lessons is None else self.lessons

    @property
    def labels(self) -> tuple[str, ...]:
        """What each row comes after: a task's name, and that it was learnt again."""
        lessons = self._lessons[: len(self.rows)]
        return tuple(
            f"{self.tasks[task]} again" if task in lessons[:place] else self.tasks[task]
            for place, task in enumerate(lessons)
        )

    def learnt(self, task: int, i: int | None = None) -> int:
        """The row after which a task was just learnt, the last time until stage i."""
        last = self._stage(i)
        return max(row for row, each in enumerate(self._lessons[: last + 1]) if each == task)

    def taught(self, i: int | None = None) -> int:
        """The task that was learnt last."""
        return self._lessons[self._stage(i)]

    def ap(self, i: int | None = None) -> float:
        """Average performance: the mean of a[T-1][j] over the tasks learnt."""
        return _mean(self.rows[self._stage(i)])

    def f_ra(self, i: int | None = None) -> float:
        """Forgetting rate: mean over j < T-1 of (max of a[s][j] over s in j..T-2) - a[T-1][j]; 0 if T = 1.

        A task that is learnt again counts as the others do: it was known before.
        """
        return _mean(self.forgotten(i))

    def forgotten(self, i: int | None = None) -> tuple[float, ...]:
        """What ``f_ra`` is the mean of: for each earlier task its best earlier score minus the one at stage i."""
        last = self._stage(i)
        return tuple(
            max(row[j] for row in self.rows[:last] if j < len(row)) - self.rows[last][j]
            for j in range(self._before(last))
        )

    def fwt(self, i: int | None = None) -> float | None:
        """Forward transfer: mean over j of a[j][j] - single[j]; None without single-task scores.

        This is SAPT's measure, not that of Lopez-Paz and Ranzato, which scores tasks not learnt yet.
        """
        gained = self.transferred(i)
        return None if gained is None else _mean(gained)

    def transferred(self, i: int | None = None) -> tuple[float, ...] | None:
        """What ``fwt`` is the mean of: for each task its score when it was learnt minus the one alone."""
        last = self._stage(i)
        if self.single is None:
            return None
        return tuple(self.rows[self.learnt(j, last)][j] - self.single[j] for j in range(len(self.rows[last])))

    def bwt(self, i: int | None = None) -> float:
        """Backward transfer: 1/(T-1) times the sum over j < T-1 of a[T-1][j] - a[j][j]; 0 if T = 1.

        Of a task that was learnt again it is from the first time on.
        """
        last = self._stage(i)
        first = [next(row[j] for row in self.rows if j < len(row)) for j in range(self._before(last))]
        return _mean([self.rows[last][j] - score for j, score in enumerate(first)])

    def bwt_over_t(self, i: int | None = None) -> float:
        """The sum of ``bwt`` divided by T, as SAPT's published scoring does; for comparison with its tables."""
        last = self._stage(i)
        return self.bwt(last) * self._before(last) / len(self.rows[last])

    def _before(self, row: int) -> int:
        """How many tasks were known before a row's lesson."""
        return len(self.rows[row - 1]) if row else 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return {
            "tasks": list(self.tasks),
            "rows": [list(row) for row in self.rows],
            "single": None if self.single is None else list(self.single),
            **({} if self.lessons is None else {"lessons": list(self.lessons)}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ScoreMatrix:
        """Read what ``to_json`` gave."""
        lessons = value.get("lessons")
        return cls(value["tasks"], value["rows"], value["single"], None if lessons is None else tuple(lessons))

    def _stage(self, i: int | None) -> int:
        last = len(self.rows) - 1 if i is None else i
        if not 0 <= last < len(self.rows):
            raise ValueError(f"stage {i}: scores are there for {len(self.rows)} stages")
        return last


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
