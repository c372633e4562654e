"""What a metric is: figures a row that add up, and the score that their sums make."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]


class Row(NamedTuple):
    """An answer that is scored.

    Attributes:
        prediction: the answer.
        references: every answer that counts as right, at least one.
        source: the row's input.
    """

    prediction: str
    references: Sequence[str]
    source: str = ""


class Metric(ABC):
    """A score of many rows, 0 to 100, as a function of figures that are summed over them.

    A mean over rows has one figure a row. Scores of a whole corpus have several, such as how many n-grams there are and
    how many of them are right. So any selection of rows is scored by adding up, never by reading texts again.
    """

    @abstractmethod
    def figures(self, rows: Sequence[Row]) -> Figures:
        """Of every row what is summed (N, K); what a column means may depend on all rows."""

    @abstractmethod
    def scores(self, sums: Figures, rows: int) -> Figures:
        """Scores (R) of R sums (R, K) over as many rows each."""

    @abstractmethod
    def sees(self, text: str) -> bool:
        """Whether there is anything in a text that it compares."""

    def total(self, figures: Figures) -> float:
        """Score of all rows."""
        return float(self.scores(figures.sum(axis=0, keepdims=True), len(figures))[0])

    def score(self, rows: Sequence[Row]) -> float:
        """Score of rows, at least one."""
        return self.total(self.figures(rows))

    def of_row(self, row: Row) -> float:
        """What one row says of itself."""
        return self.score([row])


@dataclass(frozen=True)
class RowMean(Metric):
    """The mean over rows of what each scores.

    Attributes:
        each: score of a row.
        seen: as ``sees``.
    """

    each: Callable[[Row], float]
    seen: Callable[[str], bool]

    def figures(self, rows: Sequence[Row]) -> Figures:
        return np.array([[self.each(row)] for row in rows], dtype=np.float64).reshape(len(rows), 1)

    def scores(self, sums: Figures, rows: int) -> Figures:
        return sums[:, 0] / rows

    def sees(self, text: str) -> bool:
        return self.seen(text)

    def total(self, figures: Figures) -> float:
        # The exact sum, rounded once: the order of rows is no matter.
        return math.fsum(figures[:, 0]) / len(figures)
