"""Metrics over classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapt_core.judging.scoring.base import Figures, Metric, Row


class MacroF1(Metric):
    """100 times the mean of the F1 of every class that a row is of.

    A row is of the class of the reference that was answered, or of its first one. An answer that is no class of any row
    is a miss and no class: it costs recall of the right one and precision of none.
    """

    def figures(self, rows: Sequence[Row]) -> Figures:
        """Of every class three columns: right, and how often it is answered and right to answer."""
        pairs = [_classes(row) for row in rows]
        place = {label: index for index, label in enumerate(sorted({right for _, right in pairs}))}
        figures = np.zeros((len(rows), len(place), 3))
        for counts, (given, right) in zip(figures, pairs, strict=True):
            counts[place[right]] += [given == right, 0, 1]
            if given in place:
                counts[place[given], 1] += 1
        return figures.reshape(len(rows), -1)

    def scores(self, sums: Figures, rows: int) -> Figures:
        """The mean is over the classes that the summed rows are of: others have no F1."""
        right, given, there = np.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
        f1 = 2 * right / np.maximum(given + there, 1)
        return np.asarray(100 * f1.sum(axis=1, where=there > 0) / (there > 0).sum(axis=1))

    def sees(self, text: str) -> bool:
        return bool(text.strip())


def _classes(row: Row) -> tuple[str, str]:
    given, right = row.prediction.strip(), [reference.strip() for reference in row.references]
    return given, given if given in right else right[0]
