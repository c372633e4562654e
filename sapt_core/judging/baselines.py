"""What a task scores without its input being read: always the one answer that most of its rows have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sapt_core.judging import metrics


def commonest_answer(rows: Iterable[Sequence[str]]) -> str | None:
    """The answer that is right for the most rows; of several the one that comes first, None of no rows.

    Args:
        rows: for each row every answer that counts as right.
    """
    counted = Counter(answer for answers in rows for answer in dict.fromkeys(answers))
    return max(counted, key=counted.__getitem__, default=None)


def constant_score(metric: str, answer: str, references: Sequence[Sequence[str]]) -> float:
    """Mean score, 0 to 100, of giving one answer to every row.

    Args:
        metric: of ``METRICS``.
        answer: given to all rows.
        references: for each row every answer that counts as right, at least one.
    """
    # Rows of few different answers are the rule, and a score takes a thousand times as long as a look.
    counted = Counter(map(tuple, references))
    total = sum(metrics.METRICS[metric].score(answer, right) * rows for right, rows in counted.items())
    return total / counted.total()
