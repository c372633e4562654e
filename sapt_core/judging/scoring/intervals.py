"""How far a score may be from what other rows of the same kind would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sapt_core.judging.scoring.base import Figures, Metric, Row

RESAMPLES = 1000
LEVEL = 95  # per cent
_SEED = 0
_MOST_COUNTS = 4_000_000  # counts that are held at once


class Estimate(NamedTuple):
    """A score with the ends of its confidence interval (``LEVEL`` per cent)."""

    score: float
    low: float
    high: float


def estimate(metric: Metric, rows: Sequence[Row]) -> Estimate:
    """Score of rows, and the interval that a bootstrap over them gives (Efron's percentiles).

    The same rows in any order give the same figures.
    """
    figures = metric.figures(rows)
    return Estimate(metric.total(figures), *_interval(metric, figures))


def _interval(metric: Metric, figures: Figures) -> tuple[float, float]:
    # Rows of equal figures are drawn as one that counts as often: few figures differ, and a sorted order is anybody's.
    distinct, counts = np.unique(figures, axis=0, return_counts=True)
    rows, random = len(figures), np.random.default_rng(_SEED)
    at_once = max(1, _MOST_COUNTS // len(distinct))
    scores = []
    for start in range(0, RESAMPLES, at_once):
        drawn = random.multinomial(rows, counts / rows, size=min(at_once, RESAMPLES - start))
        scores.append(metric.scores(drawn @ distinct, rows))
    outside = (100 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(scores), [outside, 100 - outside])
    return float(low), float(high)
