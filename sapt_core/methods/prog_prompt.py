"""ProgPrompt (arXiv 2301.12314): every task's prompt is put in front of those before it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.methods.base import Method
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.pool.blocks.prompt import PromptBlocks
from sapt_core.pool.calls import Call
from sapt_core.settings import PETConfig, PromptConfig


class ProgPrompt(Method):
    """``[P_t; …; P_1; x]``, of which P_t is learnt and the others are frozen."""

    name: Literal["prog_prompt"] = "prog_prompt"

    summary: ClassVar[str] = "every task's prompt in front of the earlier ones (ProgPrompt, arXiv 2301.12314)"
    pool: ClassVar[Literal["block per task"]] = "block per task"
    pet_types: ClassVar[tuple[str, ...]] = ("prompt",)

    told: bool = Field(
        True,
        description="As in its paper, answer only where the task is told, with the prompts up to that task's; "
        "false: always with all prompts, as methods without task names must.",
    )

    @property
    def needs_task(self) -> bool:
        return self.told

    def soft_tokens(self, length: int, tasks: int) -> int:
        return length * tasks

    def blocks(self, backbone: PreTrainedModel, pet: PETConfig) -> PromptBlocks:
        assert isinstance(pet, PromptConfig)  # noqa: S101 - pet_types
        return ProgressiveBlocks(lambda: embedding_matrix(backbone), pet)


class ProgressiveBlocks(PromptBlocks):
    """Prompts in a row, the newest first."""

    def prompts(self, call: Call, pooled: Tensor) -> Tensor:
        """All prompts (B, T·l, D) in float32; weights and inputs play no part."""
        return self.stacked.flip(0).flatten(0, 1).expand(len(pooled), -1, -1)
