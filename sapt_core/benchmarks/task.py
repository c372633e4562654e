"""A task as text, before any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One row: an input and every answer that counts as right."""

    input: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A named task: its instruction and its rows.

    Attributes:
        name: folder name, unique in a sequence.
        definition: the instruction put before every input; may be empty.
        train, dev, test: rows; dev is split off train, never read from the folder's dev.json,
            which in the published data repeats the test rows.
        template: prompt template name, see ``sapt_core.benchmarks.templates``.
        metric: ``rouge_l`` or ``exact_match``.
    """

    name: str
    definition: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    template: str
    metric: str
