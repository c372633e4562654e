"""A pool of soft prompts: ``P = Σ_i a_i P_i`` in front of the input's embeddings (SAPT-Prompt, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_core.pool.blocks.base import PETBlocks
from sapt_core.pool.calls import Call
from sapt_core.settings import PromptConfig

NAME = "prompt_embeddings"


class PromptBlocks(PETBlocks):
    """Prompts of l soft tokens each, at the input of the encoder or of a decoder-only model.

    Attributes:
        frozen: the finished prompts (T-1 or T, l, D).
        prompt: the one that is being learnt (l, D), or None.
    """

    frozen: Tensor
    prompt: nn.Parameter | None

    def __init__(self, vocabulary: Callable[[], Tensor], config: PromptConfig) -> None:
        """
        Args:
            vocabulary: the frozen token embeddings (V, D), asked for when a prompt is started.
            config: length of a prompt.
        """
        super().__init__()
        self.length = config.length
        self._vocabulary = vocabulary
        self.register_buffer("frozen", torch.empty(0, config.length, vocabulary().shape[1]))
        self.register_parameter("prompt", None)

    @property
    def learning(self) -> bool:
        return self.prompt is not None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {NAME: tuple(self.frozen.shape[1:])}

    def _on(self, backbone: PreTrainedModel) -> AbstractContextManager[None]:
        return nullcontext()

    def prompts(self, call: Call, pooled: Tensor) -> Tensor:
        """Mixed prompts (B, l, D) in float32."""
        with torch.autocast(call.weights.device.type, enabled=False):
            return torch.einsum("bt,tld->bld", call.weights.float(), self.stacked)

    @property
    def stacked(self) -> Tensor:
        """All prompts (T, l, D), oldest first."""
        return self.frozen if self.prompt is None else torch.cat([self.frozen, self.prompt.unsqueeze(0)])

    def add(self) -> None:
        """Start a prompt at random rows of the vocabulary, as the published code does."""
        vocabulary = self._vocabulary()
        rows = torch.randint(len(vocabulary), (self.length,)).to(vocabulary.device)
        self.prompt = nn.Parameter(vocabulary[rows].detach().float().to(self.frozen.device))

    def current_state(self) -> dict[str, Tensor]:
        if self.prompt is None:
            raise ValueError("no block is being learnt")
        return {NAME: self.prompt.detach().clone()}

    def _load_current(self, state: Mapping[str, Tensor]) -> None:
        if self.prompt is None:
            raise ValueError("no block is being learnt")
        with torch.no_grad():
            self.prompt.copy_(state[NAME])

    def _append_frozen(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        self.frozen = torch.cat([self.frozen, *(state[NAME].to(self.frozen).unsqueeze(0) for state in states)])

    def _drop_current(self) -> None:
        self.prompt = None
