"""Rows to padded batches, for both kinds of backbone, and the seeded order of an epoch's batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100
"""Label of a position that has no loss (PyTorch's cross-entropy default)."""

MEGA_BATCHES = 50
"""Most batches among which rows of like length are brought together."""

Together: TypeAlias = Literal["any", "alike", "alone"]
"""Which rows may share a batch: any, with padding, those of one length, or no two."""


def stricter(*given: Together) -> Together:
    """What holds where all of them do."""
    return max(given, key=get_args(Together).index)


@dataclass(frozen=True)
class Sharing:
    """Which rows may share a forward in training, and which prompts where answers are generated."""

    training: Together = "any"
    answering: Together = "any"

    def joined(self, other: Sharing) -> Sharing:
        """What holds where both do."""
        return Sharing(stricter(self.training, other.training), stricter(self.answering, other.answering))


ALL_SHARE = Sharing()


def parted(rows: Sequence[Mapping[str, Any]], size: int, together: Together) -> list[list[Mapping[str, Any]]]:
    """Rows in parts of at most ``size`` that may share a forward, each part in their order."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for place, row in enumerate(rows):
        lengths = len(row["prompt_ids"]), len(row["answer_ids"])
        group = {"any": None, "alike": lengths, "alone": place}[together]
        groups.setdefault(group, []).append(row)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


@dataclass(frozen=True)
class Batch:
    """Padded rows. A decoder-only training row is the prompt followed by its answer.

    Attributes:
        input_ids: (B, S) int64.
        attention_mask: (B, S) int64, 1 on tokens and 0 on padding.
        query_mask: (B, S) bool, the tokens that shared attention may look at: those of the prompt, never of an
            answer, which is not known yet when a prediction is made.
        labels: (B, L) int64 with ``IGNORED_LABEL`` where there is no loss. For a decoder-only backbone they are those
            of the last L of the S positions, from the one that predicts the batch's first answer token on, so that
            no logits of what lies before are made. None in a batch of prompts.
        left_padded: whether there is padding in front of a row. Known where the batch is made: of a mask on a GPU it
            could only be asked by waiting for it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    query_mask: Tensor
    labels: Tensor | None
    left_padded: bool

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.query_mask.to(device),
            None if self.labels is None else self.labels.to(device),
            self.left_padded,
        )


@dataclass(frozen=True)
class Collator:
    """Pads rows with ``prompt_ids`` and, for training, ``answer_ids``.

    Without ``definition_in_query`` the query sees a prompt from the row's ``query_start`` on.

    Raises:
        ValueError: the query sees no token of a row, so there is nothing to choose blocks by.
    """

    pad_token_id: int
    is_encoder_decoder: bool
    definition_in_query: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A training batch of at least one row, padded on the right."""
        prompts = [list(row["prompt_ids"]) for row in rows]
        answers = [list(row["answer_ids"]) for row in rows]
        if self.is_encoder_decoder:
            inputs, labels = prompts, answers
        else:
            inputs = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            first = min(map(len, prompts)) - 1
            ignored = [[IGNORED_LABEL] * (len(prompt) - first) for prompt in prompts]
            labels = [before + answer for before, answer in zip(ignored, answers, strict=True)]
        query = [seen + [0] * (len(ids) - len(seen)) for seen, ids in zip(map(self._seen, rows), inputs, strict=True)]
        return Batch(
            _pad(inputs, self.pad_token_id),
            _pad([[1] * len(ids) for ids in inputs], 0),
            _pad(query, 0).bool(),
            _pad(labels, IGNORED_LABEL),
            left_padded=False,
        )

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch to generate from; a decoder-only backbone goes on at the right edge, so its padding is left."""
        prompts = [list(row["prompt_ids"]) for row in rows]
        left = not self.is_encoder_decoder
        mask = _pad([[1] * len(ids) for ids in prompts], 0, left=left)
        query = _pad([self._seen(row) for row in rows], 0, left=left)
        unlike = len(set(map(len, prompts))) > 1
        return Batch(_pad(prompts, self.pad_token_id, left=left), mask, query.bool(), None, left_padded=left and unlike)

    def _seen(self, row: Mapping[str, Any]) -> list[int]:
        """1 for each token of a prompt that the query may see."""
        hidden = 0 if self.definition_in_query else row["query_start"]
        if hidden >= len(row["prompt_ids"]):
            raise ValueError("every row needs at least one token that the query may see")
        return [0] * hidden + [1] * (len(row["prompt_ids"]) - hidden)


def _pad(rows: Iterable[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left" if left else "right")


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of one epoch's batches: shuffled, with rows of like length together to save padding.

    A pure function of its arguments, so a resumed run finds the rest of its epoch. Rows are shuffled, sorted
    by length within mega-batches of up to ``MEGA_BATCHES`` batches (at least four of these, so that an epoch
    of few rows stays random too), cut into batches, and the batches are shuffled.

    Args:
        lengths: length of each row.
        batch_size: rows in a batch.
        seed, epoch: decide the order.

    Returns:
        Batches that hold every index once. All are full but perhaps the last.
    """
    draw = random.Random(f"{seed}:{epoch}")
    order = _shuffled(range(len(lengths)), draw)
    mega = batch_size * max(1, min(len(lengths) // (batch_size * 4), MEGA_BATCHES))
    batches: list[list[int]] = []
    for start in range(0, len(order), mega):
        alike = sorted(order[start : start + mega], key=lengths.__getitem__, reverse=True)
        batches.extend(alike[i : i + batch_size] for i in range(0, len(alike), batch_size))
    short = batches.pop() if batches and len(batches[-1]) < batch_size else []
    shuffled = [batches[i] for i in _shuffled(range(len(batches)), draw)]
    return [*shuffled, short] if short else shuffled


def _shuffled(indices: range, draw: random.Random) -> list[int]:
    # Sorting random() keys, not shuffle(): only random() is promised to repeat over Python versions.
    keys = [draw.random() for _ in indices]
    return sorted(indices, key=keys.__getitem__)
