"""The only answers that may be given, as paths of tokens: what else the model would like to say is never looked at."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from sapt_core.data.encoding import PromptEncoder
from sapt_core.data.prepare import PreparedTask
from sapt_core.pool.model import SaptModel


@dataclass(frozen=True)
class Choices:
    """Labels and the tokens that say them.

    Attributes:
        labels: the answers, no two of one token path (see ``faults``).
        ids: of each its tokens, the end token last.
        cut: those that were too long, so that their last words are not among their tokens.
    """

    labels: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    cut: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest label."""
        return max(map(len, self.ids))

    @cached_property
    def _next(self) -> dict[tuple[int, ...], list[int]]:
        """After every beginning of a path the tokens that go on with one."""
        found: dict[tuple[int, ...], dict[int, None]] = {}
        for path in self.ids:
            for length, token in enumerate(path):
                found.setdefault(path[:length], {})[token] = None
        return {beginning: list(tokens) for beginning, tokens in found.items()}

    @cached_property
    def _said(self) -> dict[tuple[int, ...], str]:
        return dict(zip(self.ids, self.labels, strict=True))

    def after(self, beginning: Sequence[int]) -> list[int]:
        """Tokens that may follow those generated so far; none where a label has ended, or none begins so."""
        return self._next.get(tuple(beginning), [])

    def read(self, tokens: Sequence[int]) -> str | None:
        """The label that generated tokens begin with; None if they are none's."""
        for length in range(1, len(tokens) + 1):
            label = self._said.get(tuple(tokens[:length]))
            if label is not None:
                return label
        return None

    def faults(self, max_target_tokens: int) -> list[str]:
        """Why no answer could tell these labels apart.

        Args:
            max_target_tokens: longest answer, which they were encoded for.
        """
        if not self.labels:
            return ["there is none: of train rows without answers no label can be made"]
        if len(self.labels) == 1:
            return [f"all train rows answer {self.labels[0]!r}: there is nothing to choose from"]
        faults = []
        if self.cut:
            faults.append(
                f"{_listed(self.cut)}: longer, with their end, than benchmark.max_target_tokens={max_target_tokens}: "
                "raise it"
            )
        alike: dict[tuple[int, ...], list[str]] = {}
        for label, path in zip(self.labels, self.ids, strict=True):
            if label not in self.cut:
                alike.setdefault(path, []).append(label)
        for labels in alike.values():
            if len(labels) > 1:
                faults.append(
                    f"{_listed(labels)} are the same to the tokenizer: name them otherwise, or choose a backbone whose "
                    "tokenizer tells them apart"
                )
        return faults


class Labelled(Protocol):
    """A task as far as its labels' tokens depend on it."""

    @property
    def template(self) -> str: ...
    @property
    def definition(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


def choices_of(encoder: PromptEncoder, task: Labelled, inputs: Sequence[str], max_target_tokens: int) -> list[Choices]:
    """The choices of every input of a task, encoded as its answers are in training.

    Args:
        encoder: of the backbone, as the rows were encoded, see ``label_encoder``.
        task: with labels.
        inputs: of rows.
        max_target_tokens: longest answer.
    """
    template, definition, labels = task.template, task.definition, task.labels
    known: dict[str, Choices] = {}
    found = []
    for text, end in zip(inputs, encoder.ends(template, definition, inputs), strict=True):
        if end not in known:
            rows = encoder.rows(template, definition, [(text, label) for label in labels], max_target_tokens)
            known[end] = Choices(
                labels,
                tuple(tuple(row.answer_ids) for row in rows),
                tuple(label for label, row in zip(labels, rows, strict=True) if row.answer_cut),
            )
        found.append(known[end])
    return found


def label_encoder(
    tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool, joined: bool | None
) -> PromptEncoder:
    """An encoder to encode labels with: of any prompt, since the prompt itself is not read."""
    return PromptEncoder(tokenizer, max_source_tokens=sys.maxsize, is_encoder_decoder=is_encoder_decoder, joined=joined)


def task_choices(
    task: PreparedTask,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    model: SaptModel,
    *,
    joined: bool | None,
    max_target_tokens: int,
) -> list[Choices]:
    """The choices of rows of a prepared task; none where anything may be answered."""
    if not task.labels:
        return []
    encoder = label_encoder(tokenizer, is_encoder_decoder=model.is_encoder_decoder, joined=joined)
    inputs = [row["input"] for row in rows]
    return choices_of(encoder, task, inputs, max_target_tokens)


def _listed(labels: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, labels[:most]))
    return shown if len(labels) <= most else f"{shown} and {len(labels) - most} more"
