"""Attentive reflection (ARM): hold the attention of earlier tasks where it was when they were learnt.

Source: SAPT section 3.3. For every earlier task i, KL(ā_i ‖ a(x̂)) on inputs x̂ of the task, where
ā_i is the mean attention stored after task i (or x̂'s own attention then), with zeros for the blocks
that came later. Only pooled embeddings are needed; they never change, so the term costs one pass of
the query projection a step and never one of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sapt_core.pool.attention import SharedAttention
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool


class Queries(Protocol):
    """Inputs of an earlier task, as far as the attention sees them."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """At most ``count`` pooled embeddings (n, D), n at least 1, decided by ``generator`` (CPU) alone."""
        ...

    def to(self, device: torch.device) -> Queries:
        """The same inputs on ``device``."""
        ...


@dataclass(frozen=True)
class StoredQueries:
    """Pooled embeddings (N, D) of kept inputs, real or generated; N at least 1."""

    pooled: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows without repetition."""
        return self.pooled[self.places(count, generator)]

    def places(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (n) of the rows of a draw, on the CPU."""
        return torch.randperm(len(self.pooled), generator=generator)[:count]

    def to(self, device: torch.device) -> StoredQueries:
        return StoredQueries(self.pooled.to(device))


@dataclass(frozen=True)
class GaussianQueries:
    """A task's pooled embeddings as mean and low-rank covariance: no text and no row of it is kept.

    Attributes:
        mean: (D).
        directions: (K, D), the covariance's leading directions times their standard deviation.
        rest: (D), standard deviation of each dimension that the directions leave.
    """

    mean: Tensor
    directions: Tensor
    rest: Tensor

    @classmethod
    def of(cls, pooled: Tensor, rank: int) -> GaussianQueries:
        """Moments of pooled embeddings (N, D), N at least 1, with at most ``rank`` directions."""
        mean = pooled.mean(dim=0)
        centred = pooled - mean
        freedom = max(1, len(pooled) - 1)
        # (N, D) = U S Vᵀ: the covariance is V S² Vᵀ / (N - 1).
        _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
        kept = min(rank, len(pooled) - 1, pooled.shape[1])
        directions = singular[:kept, None] * rows[:kept] / freedom**0.5
        left = centred.square().sum(dim=0) / freedom - directions.square().sum(dim=0)
        return cls(mean, directions, left.clamp_min(0).sqrt())

    @classmethod
    def joined(cls, parts: Sequence[tuple[GaussianQueries, int]], rank: int) -> GaussianQueries:
        """Moments of all rows that several were made of, as far as these tell, with at most ``rank`` directions.

        Args:
            parts: each with the number of its rows.
            rank: of the result.
        """
        total = sum(rows for _, rows in parts)
        shares = [(part, rows / total) for part, rows in parts]
        mean = torch.stack([share * part.mean for part, share in shares]).sum(dim=0)
        # Σ w (C + (m - m̄)(m - m̄)ᵀ), of which the parts' own directions and the distances of their means are rows.
        spread = torch.cat(
            [share**0.5 * torch.cat([part.directions, (part.mean - mean).unsqueeze(0)]) for part, share in shares]
        )
        beside = torch.stack([share * part.rest.square() for part, share in shares]).sum(dim=0)
        _, singular, rows = torch.linalg.svd(spread, full_matrices=False)
        directions = singular[:rank, None] * rows[:rank]
        left = spread.square().sum(dim=0) - directions.square().sum(dim=0) + beside
        return cls(mean, directions, left.clamp_min(0).sqrt())

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from the normal distribution of these moments."""
        along, beside = (
            torch.randn(count, size, generator=generator).to(self.mean)
            for size in (len(self.directions), len(self.mean))
        )
        return self.mean + along @ self.directions + beside * self.rest

    def to(self, device: torch.device) -> GaussianQueries:
        return GaussianQueries(self.mean.to(device), self.directions.to(device), self.rest.to(device))


@dataclass(frozen=True)
class RecordedAttention:
    """The shared attention as it was right after a task: query projection and keys (T_i, D)."""

    attention: SharedAttention
    keys: Tensor

    def to(self, device: torch.device) -> RecordedAttention:
        """The same attention on ``device``."""
        return RecordedAttention(self.attention.to(device), self.keys.to(device))


class StackedQueries:
    """Stored inputs of all earlier tasks, drawn in one go: task by task a GPU is sent as many lists of places."""

    def __init__(self, queries: Sequence[StoredQueries]) -> None:
        self._pooled = torch.cat([each.pooled for each in queries])
        sizes = [len(each.pooled) for each in queries]
        self.queries = [StoredQueries(part) for part in torch.split(self._pooled, sizes)]
        self._starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]

    def draw(self, count: int, generator: torch.Generator) -> Sequence[Tensor]:
        """What each would draw (n, D), one after the other, from the same numbers."""
        places = [each.places(count, generator) for each in self.queries]
        rows = torch.cat([each + start for each, start in zip(places, self._starts, strict=True)])
        return torch.split(self._pooled[rows], [len(each) for each in places])


class RecordedAttentions:
    """Of several times, each asked of inputs of its own, all at once: one by one they cost a step more than itself."""

    def __init__(self, recorded: Sequence[RecordedAttention]) -> None:
        self._attention = recorded[0].attention  # of one sequence all have the same settings
        self._state = stack_module_state([each.attention for each in recorded])
        self._counts = [len(each.keys) for each in recorded]
        self._keys = pad_sequence([each.keys for each in recorded], batch_first=True)
        there = torch.arange(max(self._counts)) < torch.tensor(self._counts).unsqueeze(1)
        self._absent = ~there.unsqueeze(1).to(self._keys.device)

    @torch.no_grad()
    def __call__(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Weights (B_i, T_i) of each one's pooled embeddings (B_i, D)."""

        def logits(parameters: dict[str, Tensor], buffers: dict[str, Tensor], pooled: Tensor, keys: Tensor) -> Tensor:
            found: Tensor = functional_call(self._attention, (parameters, buffers), (pooled, keys))
            return found

        stacked = vmap(logits)(*self._state, pad_sequence(list(pooled), batch_first=True), self._keys)
        weights = stacked.masked_fill(self._absent, -math.inf).softmax(dim=-1)
        return [each[: len(own), :count] for each, own, count in zip(weights, pooled, self._counts, strict=True)]


@dataclass(frozen=True)
class Memory:
    """What is known of one earlier task.

    Attributes:
        queries: inputs of it.
        target: the attention to hold: its mean (T_i,) over the blocks there were, oldest first, sum 1,
            or the attention of that time, which gives every input its own.
    """

    queries: Queries
    target: Tensor | RecordedAttention

    def to(self, device: torch.device) -> Memory:
        """The same memory on ``device``."""
        return Memory(self.queries.to(device), self.target.to(device))


class Drawn(NamedTuple):
    """Inputs of one earlier task: pooled embeddings (n, D) and the attention (n, T_i) to hold."""

    pooled: Tensor
    target: Tensor


class Reflection:
    """The KL term over all earlier tasks; a ``sapt_core.training.objective.Term``."""

    name = "kl"
    runs_rows = False

    def __init__(
        self,
        memories: Sequence[Memory],
        batch_size: int,
        weight: float,
        *,
        per_micro_batch: bool = False,
        order: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            memories: one an earlier task; at least one.
            batch_size: inputs drawn of every task for one evaluation of the term.
            weight: λ.
            per_micro_batch: whether the term is added in every micro-batch instead of once a step.
            order: for each block that targets are over its place in the pool; None where both have one order.
        """
        stored = [memory.queries for memory in memories if isinstance(memory.queries, StoredQueries)]
        self._stacked = StackedQueries(stored) if len(stored) == len(memories) else None
        if self._stacked is not None:  # the same rows, once in memory
            memories = [
                replace(memory, queries=each) for memory, each in zip(memories, self._stacked.queries, strict=True)
            ]
        self.memories = tuple(memories)
        recorded = [memory.target for memory in memories if isinstance(memory.target, RecordedAttention)]
        self._recorded = RecordedAttentions(recorded) if recorded else None
        self.batch_size = batch_size
        self.weight = weight
        self.per_micro_batch = per_micro_batch
        self.order = None if order is None else list(order)

    def draw(self, generator: torch.Generator) -> list[Drawn]:
        """At most ``batch_size`` inputs of every earlier task."""
        pooled = (
            [memory.queries.draw(self.batch_size, generator) for memory in self.memories]
            if self._stacked is None
            else self._stacked.draw(self.batch_size, generator)
        )
        pairs = list(zip(pooled, self.memories, strict=True))
        asked = [each for each, memory in pairs if isinstance(memory.target, RecordedAttention)]
        own = iter(self._recorded(asked) if self._recorded is not None else ())
        return [
            Drawn(each, target.expand(len(each), -1) if isinstance(target := memory.target, Tensor) else next(own))
            for each, memory in pairs
        ]

    def value(self, model: SaptModel, drawn: Sequence[Drawn]) -> Tensor:
        return self.loss(model.pool, drawn)

    def loss(self, pool: PETPool, drawn: Sequence[Drawn]) -> Tensor:
        """Σ_i mean_b KL(ā_i ‖ a(x̂_b)), a scalar in nats, not yet times λ.

        Args:
            pool: the pool with T blocks, the newest being learnt.
            drawn: inputs of every earlier task.
        """
        log_weights = torch.log_softmax(pool.logits(torch.cat([task.pooled for task in drawn])), dim=-1)
        if self.order is not None:
            log_weights = log_weights[:, self.order]
        blocks = log_weights.shape[1]
        targets = torch.cat([F.pad(task.target, (0, blocks - task.target.shape[1])) for task in drawn])
        # Mean over the rows of a task, sum over tasks.
        sizes = torch.tensor([len(task.pooled) for task in drawn])
        share = (1 / sizes).repeat_interleave(sizes).to(targets)
        divergence = (torch.xlogy(targets, targets) - targets * log_weights).sum(dim=1)
        return (share * divergence).sum()

    def to(self, device: torch.device) -> Reflection:
        """The same term with its tensors on ``device``."""
        moved = [memory.to(device) for memory in self.memories]
        return Reflection(moved, self.batch_size, self.weight, per_micro_batch=self.per_micro_batch, order=self.order)
