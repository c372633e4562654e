"""O-LoRA (arXiv 2310.14152): blocks add up, and each new one learns in a subspace orthogonal to the old."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.pool.blocks.lora import LoRABlocks
from sapt_core.pool.model import SaptModel
from sapt_core.training.objective import Objective


class OLoRA(Method):
    """Sum of all blocks, without a choice among them at inference."""

    name: Literal["o_lora"] = "o_lora"

    summary: ClassVar[str] = "blocks that add up, orthogonal to each other (O-LoRA, arXiv 2310.14152)"
    pool: ClassVar[Literal["block per task"]] = "block per task"
    pet_types: ClassVar[tuple[str, ...]] = ("lora",)

    orthogonality: float = Field(0.5, ge=0, description="Weight of the orthogonality term; 0 adds plain blocks up.")

    def begin(self, lesson: Lesson) -> Plan:
        """Train the new block under the orthogonality term."""
        if not lesson.earlier or not self.orthogonality:
            return Plan(lesson.rows)
        return Plan(lesson.rows, Objective((Orthogonality(self.orthogonality),)))


@dataclass(frozen=True)
class Orthogonality:
    """``Σ_sites Σ_{i<t} Σ_{jk} |A_i A_tᵀ|_{jk}``, as published: absolute values, a sum over all sites."""

    weight: float
    name = "orthogonality"
    per_micro_batch = False
    runs_rows = False

    def draw(self, generator: torch.Generator) -> None:
        return None

    def value(self, model: SaptModel, drawn: None) -> Tensor:
        blocks = model.pool.blocks
        assert isinstance(blocks, LoRABlocks)  # noqa: S101 - the method takes no other kind
        sites = [site for _, site in blocks.named_sites()]
        parts = [(site.frozen_A @ site.lora_A.T).abs().sum() for site in sites if site.lora_A is not None]
        return torch.stack(parts).sum()

    def to(self, device: torch.device) -> Orthogonality:
        return self
