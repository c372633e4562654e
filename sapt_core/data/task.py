"""A task as text, before any tokenizer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field

# Why a task cannot be named in ``benchmark.unseen``, in every suite.
SEEN = "which is learnt in the sequence or named in unseen already; give tasks that are never learnt, each once"

MAX_LABELS = 100  # kinds of answers that are still labels


@dataclass(frozen=True)
class Example:
    """One row: an input and every answer that counts as right."""

    input: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class CutOff:
    """Splits that were cut off train.

    Attributes:
        splits: which.
        seed: that chose their rows.
        by_answer: whether as many rows of every answer were taken as is its share.
    """

    splits: tuple[str, ...]
    seed: int
    by_answer: bool


@dataclass(frozen=True)
class Task:
    """A named task: its instruction and its rows.

    Attributes:
        name: folder name, unique in a sequence.
        definition: the instruction put before every input; may be empty.
        train, dev, test: rows; dev is split off train, never read from the folder's dev.json,
            which in the published data repeats the test rows.
        template: of its prompts, see ``sapt_core.template_settings``.
        metric: name of the score that leads, see ``sapt_core.judging.scoring``.
        other_metrics: scores that stand beside it.
        answers: ``free``, or ``labels`` where nothing but a label may be answered.
        label_names: the labels; none where they are the answers of the train rows.
        cut: what was cut off train, if anything; known where the data was read, and no part of the task.
    """

    name: str
    definition: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    template: str
    metric: str
    other_metrics: tuple[str, ...] = ()
    answers: str = "free"
    label_names: tuple[str, ...] = ()
    cut: CutOff | None = field(default=None, compare=False)

    def to_json(self) -> bytes:
        """The whole task, canonically: equal tasks give equal bytes."""
        values = asdict(self)
        del values["cut"]
        # Left out where they say nothing, as tasks of earlier releases lack them.
        for name in ("other_metrics", "answers", "label_names"):
            if values[name] == type(self).__dataclass_fields__[name].default:
                del values[name]
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Task:
        """Read what ``to_json`` wrote."""
        values = json.loads(data)
        for split in ("train", "dev", "test"):
            values[split] = tuple(Example(row["input"], tuple(row["references"])) for row in values[split])
        for name in ("other_metrics", "label_names"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, the leading one first."""
        return (self.metric, *self.other_metrics)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The only answers that may be given, sorted; none where anything may be."""
        if self.answers != "labels":
            return ()
        named = self.label_names or (reference for row in self.train for reference in row.references)
        return tuple(sorted({label.strip() for label in named}))

    @property
    def rows(self) -> dict[str, int]:
        """How many rows each split has."""
        return {"train": len(self.train), "dev": len(self.dev), "test": len(self.test)}

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole task; made once, since every stage key and every experiment's asks for it."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @cached_property
    def learnt_digest(self) -> str:
        """sha256 of what is learnt of it: the whole task but for test rows and metrics beside the leading one."""
        return replace(self, test=(), other_metrics=()).digest


@dataclass(frozen=True)
class KnownTask:
    """A task that was learnt before, of which the rows need not be there any more: what a ``Task`` says of itself."""

    name: str
    definition: str
    template: str
    metric: str
    digest: str
    rows: Mapping[str, int]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The leading metric, which is all that a version says of them."""
        return (self.metric,)


def name_faults(name: str, known: Iterable[str]) -> list[str]:
    """What is against a new task's name beside the names that are known."""
    folded = {each.casefold(): each for each in known}
    there = folded.get(name.casefold())
    if not name.strip():
        return ["the task's name is blank"]
    if there is None:
        return []
    what = (
        "the version has learnt it" if there == name else f"the version has learnt {there}, which differs in case alone"
    )
    return [f"{what}: give the new task a name of its own"]


def dev_rows(rows: int, fraction: float, seed: int) -> set[int]:
    """Which train rows become dev: at least one, and at least one stays."""
    draw = random.Random(seed)
    # Sorting random() keys, not shuffle(): only random() is promised to repeat over Python versions.
    keys = [draw.random() for _ in range(rows)]
    count = min(max(1, round(rows * fraction)), rows - 1)
    return set(sorted(range(rows), key=keys.__getitem__)[:count])


def are_labels(answers: Sequence[str]) -> bool:
    """Whether answers are of few kinds, each given several times."""
    kinds = len({*answers})
    return 1 < kinds <= min(MAX_LABELS, len(answers) // 2)


def stratified_rows(answers: Sequence[str], fraction: float, seed: int) -> set[int]:
    """Which rows go, as ``dev_rows`` has them: as many of every answer as is its share, where answers are labels."""
    if not are_labels(answers):
        return dev_rows(len(answers), fraction, seed)
    draw = random.Random(seed)
    keys = [draw.random() for _ in answers]
    of_answer: dict[str, list[int]] = {}
    for row in sorted(range(len(answers)), key=keys.__getitem__):
        of_answer.setdefault(answers[row], []).append(row)
    # A row's place among those of its answer, from 0 to 1: the first rows by place are of all answers alike.
    places = {row: (place + 0.5) / len(rows) for rows in of_answer.values() for place, row in enumerate(rows)}
    count = min(max(1, round(len(answers) * fraction)), len(answers) - 1)
    return set(sorted(places, key=lambda row: (places[row], keys[row]))[:count])


def _is_empty(value: Sequence[object]) -> bool:
    return not value


class LearntTask(BaseModel):
    """What inference and later reports need to know of a task.

    Attributes:
        template: of its prompts, see ``sapt_core.template_settings``; a newer release's may be another.
        labels: the only answers that may be given; none where anything may be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    definition: str
    template: str
    metric: str
    max_source_tokens: int
    max_target_tokens: int
    labels: tuple[str, ...] = Field((), exclude_if=_is_empty)
