"""The PET pool: blocks, their keys and the shared attention that mixes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_core.pool.attention import SharedAttention
from sapt_core.pool.blocks.base import PETBlocks, embedding_matrix
from sapt_core.pool.blocks.full import FullBlocks
from sapt_core.pool.blocks.lora import LoRABlocks
from sapt_core.pool.blocks.prompt import PromptBlocks
from sapt_core.settings import AttentionConfig, LoRAConfig, PETConfig, PromptConfig


def new_blocks(backbone: PreTrainedModel, pet: PETConfig) -> PETBlocks:
    """No blocks yet, for ``backbone``."""
    if isinstance(pet, LoRAConfig):
        return LoRABlocks.for_backbone(backbone, pet)
    if isinstance(pet, PromptConfig):
        return PromptBlocks(lambda: embedding_matrix(backbone), pet)
    return FullBlocks(backbone)


def new_pool(backbone: PreTrainedModel, pet: PETConfig, attention: AttentionConfig | None) -> PETPool:
    """An empty pool for ``backbone``."""
    return PETPool(new_blocks(backbone, pet), embedding_matrix(backbone).shape[1], attention)


class PETPool(nn.Module):
    """T blocks, oldest first, of which at most the last is being learnt.

    Without an attention config every block has weight 1: one is plain LoRA, several add up.

    Attributes:
        blocks: the PET blocks.
        attention: query projection, or None.
        frozen_keys: keys of the frozen blocks (T-1 or T, D).
        key: key of the block being learnt (D), or None.
        hold: share of the mixture that goes to the last block whatever the attention says, in
            [0, 1]. While a new block is still zero the old ones lower the loss faster, and an
            attention that follows the loss runs away from it: while the block is held, no gradient
            passes through the mixture to the attention.
    """

    frozen_keys: Tensor
    key: nn.Parameter | None

    def __init__(self, blocks: PETBlocks, width: int, attention: AttentionConfig | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.attention = None if attention is None else SharedAttention(width, attention)
        self.register_buffer("frozen_keys", torch.empty(0, width))
        self.register_parameter("key", None)
        self.hold = 0.0

    def add(self) -> None:
        """Start a new block with a key drawn from U(-1, 1), as the paper does."""
        self.blocks.add()
        if self.attention is not None:
            self.key = nn.Parameter(torch.rand_like(self.attention.centre) * 2 - 1)

    def freeze(self) -> None:
        """Make the block being learnt, and its key, frozen ones."""
        self.blocks.freeze()
        self.frozen_keys = self.keys.detach()
        self.key = None

    @property
    def keys(self) -> Tensor:
        """All keys (T, D), oldest first; gradient reaches the last one only."""
        return self.frozen_keys if self.key is None else torch.cat([self.frozen_keys, self.key.unsqueeze(0)])

    def logits(self, pooled: Tensor) -> Tensor:
        """Attention logits (B, T) of pooled embeddings (B, D)."""
        assert self.attention is not None  # noqa: S101 - only reflection and attend ask
        logits: Tensor = self.attention(pooled, self.keys)
        return logits

    def attend(self, pooled: Tensor) -> Tensor:
        """Attention weights (B, T) of pooled embeddings (B, D): what reflection keeps in place."""
        if self.attention is None:
            return torch.ones(pooled.shape[0], self.blocks.count, device=pooled.device)
        return torch.softmax(self.logits(pooled), dim=-1)

    def select(self, pooled: Tensor) -> Tensor:
        """Weights (B, T) that answers are made with: the attention, unless its config asks for uniform ones."""
        weights = self.attend(pooled)
        if self.attention is not None and self.attention.config.selection == "uniform":
            return torch.full_like(weights, 1 / weights.shape[1])
        return weights

    def mixture(self, pooled: Tensor) -> Tensor:
        """Weights (B, T) that the blocks learn with: the attention, but for the share held for the new block."""
        weights = self.attend(pooled)
        if self.hold:
            newest = torch.zeros_like(weights)
            newest[:, -1] = self.hold
            # Times zero and not cut off: DistributedDataParallel waits for a gradient of every parameter.
            settled = weights.detach() + 0 * weights
            weights = (1 - self.hold) * settled + newest
        return weights

    def in_use(self, weights: Tensor) -> Tensor:
        """Blocks (U,), ascending, that some input of weights (B, T) gives more than rounding error.

        The others are not computed. The block that is being learnt is always in use.
        """
        if self.attention is None:  # all of them: nothing to wait for the device for
            return torch.arange(weights.shape[1], device=weights.device)
        used = weights.detach().amax(dim=0) > torch.finfo(weights.dtype).eps
        used[-1:] |= self.key is not None
        return used.nonzero().flatten()
