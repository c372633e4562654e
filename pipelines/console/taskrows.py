"""What is told of the rows of a task, in a terminal and on a report's page alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sapt_core.data.facts import TaskFacts
    from sapt_core.data.task import CutOff

LABELS_SHOWN = 20
HEAD = ("task", "rows", "prompt", "cut", "answer", "cut", "unknown", "repeated", "split")


def cells(name: str, facts: TaskFacts) -> Iterator[tuple[str, ...]]:
    """Cells under ``HEAD``, a line a split."""
    for split, of in facts.splits.items():
        yield (
            name,
            str(of.rows),
            f"{of.prompt_tokens[0]} / {of.prompt_tokens[1]}",
            str(of.prompts_cut),
            f"{of.answer_tokens[0]} / {of.answer_tokens[1]}",
            str(of.answers_cut),
            f"{of.unknown} of {of.written}",
            str(of.repeated),
            split,
        )


def lines(facts: TaskFacts, cut: CutOff | None) -> Iterator[str]:
    """What a table has no place for."""
    if cut is not None:
        how = ", of every answer alike" if cut.by_answer else ""
        yield f"{' and '.join(cut.splits)} rows were split off train, by benchmark.split_seed={cut.seed}{how}"
    if facts.labels:
        shown = [f"{label!r} {'/'.join(map(str, counts))}" for label, counts in facts.labels.items()]
        more = [f"and {len(shown) - LABELS_SHOWN} more"] if len(shown) > LABELS_SHOWN else []
        yield f"answers (train/dev/test): {', '.join([*shown[:LABELS_SHOWN], *more])}"
    if facts.shared:
        yield f"{facts.shared} inputs of test are in train or dev as well: scores are too high"
