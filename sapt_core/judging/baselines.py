"""What a task scores without its input being read: always the one answer that most of its rows have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from sapt_core.judging.scoring.base import Row
from sapt_core.judging.scoring.named import find_metric


def commonest_answer(rows: Iterable[Sequence[str]]) -> str | None:
    """The answer that is right for the most rows; of several the one that comes first, None of no rows.

    Args:
        rows: for each row every answer that counts as right.
    """
    counted = Counter(answer for answers in rows for answer in dict.fromkeys(answers))
    return max(counted, key=counted.__getitem__, default=None)


def constant_score(
    metric: str, answer: str, references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> float:
    """Score, 0 to 100, of giving one answer to every row.

    Args:
        metric: its name.
        answer: given to all rows.
        references: for each row every answer that counts as right, at least one.
        sources: the rows' inputs, for metrics that read them.
    """
    # Rows of few different answers are the rule, and a score takes a thousand times as long as a look.
    inputs = [""] * len(references) if sources is None else sources
    counted = Counter(Row(answer, tuple(right), source) for right, source in zip(references, inputs, strict=True))
    found = find_metric(metric)
    sums = np.array([*counted.values()], dtype=np.float64) @ found.figures([*counted])
    return float(found.scores(sums[np.newaxis], counted.total())[0])
