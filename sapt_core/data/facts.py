"""What can be said of a task before it is learnt: as what tokens it is read, and what of it is lost or repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sapt_core.data.prepare import EncodedRow, PromptEncoder
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
    """Figures of a task.

    Attributes:
        splits: by name.
        labels: how often each answer is given in train, dev and test, the commonest first; empty where answers are no
            labels.
        shared: inputs of test that are in train or dev.
    """

    splits: dict[str, SplitFacts]
    labels: dict[str, tuple[int, int, int]]
    shared: int


def facts_of(task: Task, encoder: PromptEncoder, max_target_tokens: int) -> TaskFacts:
    """Count.

    Raises:
        DataError: the words of the template alone leave no room for an input.
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
        {split: _facts(task, rows, encoder, max_target_tokens) for split, rows in splits.items()},
        labels,
        len(learnt & {row.input for row in task.test}),
    )


def encoded(task: Task, rows: Sequence[Example], encoder: PromptEncoder, max_target_tokens: int) -> list[EncodedRow]:
    """Rows as the model reads and learns them: the first right answer of each.

    Raises:
        DataError: the words of the template alone leave no room for an input.
    """
    pairs = [(row.input, row.references[0]) for row in rows]
    return encoder.rows(task.template, task.definition, pairs, max_target_tokens)


def _facts(task: Task, rows: Sequence[Example], encoder: PromptEncoder, max_target_tokens: int) -> SplitFacts:
    learnt = encoded(task, rows, encoder, max_target_tokens)
    whole = encoder.uncut()
    full = encoded(task, rows, whole, whole.max_source_tokens)
    written = _bare(encoder.tokenizer, rows)
    unknown = encoder.tokenizer.unk_token_id
    return SplitFacts(
        rows=len(rows),
        prompt_tokens=_typical([len(row.prompt.prompt_ids) for row in full]),
        answer_tokens=_typical([len(row.answer_ids) for row in full]),
        prompts_cut=sum(row.prompt.truncated for row in learnt),
        answers_cut=sum(row.answer_cut for row in learnt),
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
    return int(np.median(lengths)), max(lengths)
