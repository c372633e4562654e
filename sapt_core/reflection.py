"""Attentive reflection (ARM): hold the attention of earlier tasks where it was when they were learnt.

Source: SAPT section 3.3. For every earlier task i, KL(ā_i ‖ a(x̂)) on pseudo-samples x̂ of the task,
where ā_i is the mean attention stored after task i, with zeros for the blocks that came later.
Only pooled embeddings are needed; they never change, so the term costs one pass of the query
projection a step and never one of the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sapt_core.pool import PETPool


@dataclass(frozen=True)
class Memory:
    """What is kept of one earlier task.

    Attributes:
        pooled: pooled embeddings of its pseudo-samples (N, D), N at least 1.
        target: its mean attention (T_i,) over the blocks there were, oldest first, sum 1.
    """

    pooled: Tensor
    target: Tensor


class Reflection:
    """The KL term over all earlier tasks."""

    def __init__(self, memories: Sequence[Memory], batch_size: int, weight: float) -> None:
        """
        Args:
            memories: one an earlier task; at least one.
            batch_size: pseudo-samples drawn of every task for one evaluation of the term.
            weight: λ.
        """
        self.memories = tuple(memories)
        self.batch_size = batch_size
        self.weight = weight

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """Row numbers (min(batch_size, N_i),) of every memory, without repetition."""
        return [torch.randperm(len(memory.pooled), generator=generator)[: self.batch_size] for memory in self.memories]

    def loss(self, pool: PETPool, rows: Sequence[Tensor]) -> Tensor:
        """Σ_i mean_b KL(ā_i ‖ a(x̂_b)), a scalar in nats, not yet times λ.

        Args:
            pool: the pool with T blocks, the newest being learnt.
            rows: drawn row numbers of every memory.
        """
        pooled = torch.cat([memory.pooled[row] for memory, row in zip(self.memories, rows, strict=True)])
        log_weights = torch.log_softmax(pool.logits(pooled), dim=-1)
        blocks = log_weights.shape[1]
        targets = torch.cat(
            [
                F.pad(memory.target, (0, blocks - len(memory.target))).expand(len(row), blocks)
                for memory, row in zip(self.memories, rows, strict=True)
            ]
        )
        # Mean over the rows of a task, sum over tasks.
        share = torch.cat([torch.full((len(row),), 1 / len(row)) for row in rows]).to(pooled.device)
        divergence = (torch.xlogy(targets, targets) - targets * log_weights).sum(dim=1)
        return (share * divergence).sum()

    def to(self, device: torch.device) -> Reflection:
        """The same term with its tensors on ``device``."""
        moved = [Memory(memory.pooled.to(device), memory.target.to(device)) for memory in self.memories]
        return Reflection(moved, self.batch_size, self.weight)
