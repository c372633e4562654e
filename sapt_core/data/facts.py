"""What can be said of a task before it is learnt: as what tokens it is read, and what of it is lost or repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sapt_core.data.encoding import EncodedRow, PromptEncoder
from sapt_core.data.task import Example, Task, are_labels


class SplitFacts(NamedTuple):
    """Figures of one split.

    Attributes:
        rows: how many there are.
        prompt_tokens, answer_tokens: median and largest number of tokens, before anything is cut.
        prompts_cut, answers_cut: rows that lose tokens of the one or the other.
        unknown: tokens of answers that the tokenizer does not know, of ``written``.
        written: tokens of answers, without their ends.
        repeated: rows whose input an earlier row of the split has.
    """

    rows: int
    prompt_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    prompts_cut: int
    answers_cut: int
    unknown: int
    written: int
    repeated: int


class TaskFacts(NamedTuple):
    """Figures of a task; the names of labels are all that it has of its text.

    Attributes:
        splits: by name.
        labels: how often each answer is given in train, dev and test, the commonest first; empty where answers are no
            labels.
        shared: inputs of test that are in train or dev.
    """

    splits: dict[str, SplitFacts]
    labels: dict[str, tuple[int, int, int]]
    shared: int

    def parted(self) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """What is figures alone, and the labels, both as JSON has them."""
        splits = {name: each._asdict() for name, each in self.splits.items()}
        return {"splits": splits, "shared": self.shared}, {name: list(counts) for name, counts in self.labels.items()}

    @classmethod
    def joined(cls, figures: Mapping[str, Any], labels: Mapping[str, Sequence[int]]) -> TaskFacts:
        """What ``parted`` took apart."""
        lengths = ("prompt_tokens", "answer_tokens")
        splits = {
            name: SplitFacts(**{**each, **{field: tuple(each[field]) for field in lengths}})
            for name, each in figures["splits"].items()
        }
        counts = {name: (train, dev, test) for name, (train, dev, test) in labels.items()}
        return cls(splits, counts, figures["shared"])


def facts_of(task: Task, made: Mapping[str, Sequence[EncodedRow]], tokenizer: PreTrainedTokenizerBase) -> TaskFacts:
    """Count.

    Args:
        task: as text.
        made: of each split its rows, encoded.
        tokenizer: that did it.
    """
    splits = {"train": task.train, "dev": task.dev, "test": task.test}
    learnt = {row.input for row in (*task.train, *task.dev)}
    answers = {split: Counter(row.references[0] for row in rows) for split, rows in splits.items()}
    every = sum(answers.values(), Counter[str]())
    labels = {}
    if are_labels([*every.elements()]):
        labels = {
            answer: (answers["train"][answer], answers["dev"][answer], answers["test"][answer])
            for answer, _ in every.most_common()
        }
    return TaskFacts(
        {split: _facts(rows, made[split], tokenizer) for split, rows in splits.items()},
        labels,
        len(learnt & {row.input for row in task.test}),
    )


def encoded(task: Task, rows: Sequence[Example], encoder: PromptEncoder, max_target_tokens: int) -> list[EncodedRow]:
    """Rows as the model reads and learns them: the first right answer of each.

    Raises:
        BackboneError, DataError: as ``PromptEncoder.rows``.
    """
    pairs = [(row.input, row.references[0]) for row in rows]
    return encoder.rows(task.template, task.definition, pairs, max_target_tokens)


def _facts(rows: Sequence[Example], made: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerBase) -> SplitFacts:
    written, unknown = _bare(tokenizer, rows), tokenizer.unk_token_id
    return SplitFacts(
        rows=len(rows),
        prompt_tokens=_typical([row.prompt.tokens for row in made]),
        answer_tokens=_typical([row.tokens for row in made]),
        prompts_cut=sum(row.prompt.truncated for row in made),
        answers_cut=sum(row.answer_cut for row in made),
        unknown=0 if unknown is None else sum(ids.count(unknown) for ids in written),
        written=sum(map(len, written)),
        repeated=len(rows) - len({row.input for row in rows}),
    )


def _bare(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[list[int]]:
    """Ids of the answers that are learnt, by themselves."""
    if not rows:
        return []
    batch = tokenizer([row.references[0] for row in rows], add_special_tokens=False, verbose=False)
    return [list(ids) for ids in batch["input_ids"]]


def _typical(lengths: Sequence[int]) -> tuple[int, int]:
    return (int(np.median(lengths)), max(lengths)) if lengths else (0, 0)
