"""What the record of an evaluation says of a version's scores on one task."""

from __future__ import annotations

from typing import Any, NamedTuple

from cluster.stages import StageRecord
from sapt_core.judging.scoring.intervals import Estimate


class Scored(NamedTuple):
    """Scores, 0 to 100.

    Attributes:
        score: of the leading metric.
        interval: the ends of its confidence interval; None where an earlier release scored.
        others: by name the metrics beside it.
    """

    score: float
    interval: tuple[float, float] | None
    others: dict[str, Estimate]

    def figures(self, word: str, task: str, others: str = "") -> dict[str, float]:
        """The figures by name, as they are told of in MLflow.

        Args:
            word: for the leading metric.
            task: it was scored on.
            others: put before the names of the other metrics.
        """
        found = {f"{word}/{task}": self.score}
        if self.interval is not None:
            found |= {f"{word}_low/{task}": self.interval[0], f"{word}_high/{task}": self.interval[1]}
        for name, each in self.others.items():
            ends = {"": each.score, "_low": each.low, "_high": each.high}
            found |= {f"{others}{name}{end}/{task}": figure for end, figure in ends.items()}
        return found


def read_scored(record: StageRecord) -> Scored:
    """The scores that a stage of kind ``evaluate`` or ``zero_shot`` gave."""
    metrics: dict[str, Any] = record.metrics
    interval = metrics.get("interval")
    others = {name: Estimate(*each) for name, each in metrics.get("others", {}).items()}
    return Scored(metrics["score"], None if interval is None else (interval[0], interval[1]), others)
