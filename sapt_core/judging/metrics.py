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
    """Scores a[i][j] on task j after learning task i (SAPT section 4.1), oldest first, complete or so far.

    Every summary takes a stage i, the last one by default, and sees only the tasks learnt until then; below,
    T = i + 1.

    Attributes:
        tasks: names of the whole sequence.
        rows: lower triangle; row i holds the scores of tasks 0 to i. Fewer rows than tasks while it runs.
        single: for each task the score of the same PET trained on that task alone, needed by FWT.
    """

    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    single: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "rows", tuple(tuple(map(float, row)) for row in self.rows))
        if self.single is not None:
            object.__setattr__(self, "single", tuple(map(float, self.single)))
            if len(self.single) != len(self.tasks):
                raise ValueError(f"{len(self.single)} single-task scores for {len(self.tasks)} tasks")
        if len(self.rows) > len(self.tasks):
            raise ValueError(f"{len(self.rows)} rows of scores for {len(self.tasks)} tasks")
        for i, row in enumerate(self.rows):
            if len(row) != i + 1:
                raise ValueError(f"row {i} holds {len(row)} scores, not those of tasks 0 to {i}")
        if not all(math.isfinite(value) for row in (*self.rows, self.single or ()) for value in row):
            raise ValueError("scores must be finite numbers")

    def ap(self, i: int | None = None) -> float:
        """Average performance: the mean of a[T-1][j] over the tasks learnt."""
        return _mean(self.rows[self._stage(i)])

    def f_ra(self, i: int | None = None) -> float:
        """Forgetting rate: mean over j < T-1 of (max of a[s][j] over s in j..T-2) - a[T-1][j]; 0 if T = 1."""
        return _mean(self.forgotten(i))

    def forgotten(self, i: int | None = None) -> tuple[float, ...]:
        """What ``f_ra`` is the mean of: for each earlier task its best earlier score minus the one at stage i."""
        last = self._stage(i)
        return tuple(max(self.rows[s][j] for s in range(j, last)) - self.rows[last][j] for j in range(last))

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
        return tuple(self.rows[j][j] - self.single[j] for j in range(last + 1))

    def bwt(self, i: int | None = None) -> float:
        """Backward transfer: 1/(T-1) times the sum over j < T-1 of a[T-1][j] - a[j][j]; 0 if T = 1."""
        last = self._stage(i)
        return _mean([self.rows[last][j] - self.rows[j][j] for j in range(last)])

    def bwt_over_t(self, i: int | None = None) -> float:
        """The sum of ``bwt`` divided by T, as SAPT's published scoring does; for comparison with its tables."""
        last = self._stage(i)
        return self.bwt(last) * last / (last + 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return {
            "tasks": list(self.tasks),
            "rows": [list(row) for row in self.rows],
            "single": None if self.single is None else list(self.single),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ScoreMatrix:
        """Read what ``to_json`` gave."""
        return cls(value["tasks"], value["rows"], value["single"])

    def _stage(self, i: int | None) -> int:
        last = len(self.rows) - 1 if i is None else i
        if not 0 <= last < len(self.rows):
            raise ValueError(f"stage {i}: scores are there for {len(self.rows)} stages")
        return last


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
