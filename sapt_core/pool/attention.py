"""Shared attention: one query an input, one key a block, one set of weights for learning and selection.

Source: SAPT (arXiv 2401.08295), section 3.2. The weights are computed once an input, from the frozen
token embeddings, before the first layer, and are used in every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapt_core.settings import AttentionConfig


def max_pool(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Largest value of every embedding dimension over the positions that ``mask`` admits.

    Args:
        embeddings: frozen token embeddings (B, S, D).
        mask: (B, S), true or nonzero where a token belongs to the query, at least once in a row (the collator sees to
            that). Padding never takes part, so the weights of an input do not depend on the batch it is in.

    Returns:
        Pooled embeddings (B, D) in float32.
    """
    # The maximum is the same before the cast and after it, and before it there are S times as many to cast.
    return embeddings.masked_fill(~mask.bool().unsqueeze(-1), -math.inf).amax(dim=1).float()


def vocabulary_moments(embedding: Tensor, *, draws: int = 2048, length: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D) of the pooled embeddings of ``draws`` inputs of ``length`` random tokens.

    The maximum over many tokens lies far from the origin in the same direction for all inputs, so
    queries made of it nearly coincide. Taking this part off needs the embedding matrix (V, D) alone,
    no task's data, and is the same for every task.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(embedding), (draws, length), generator=generator).to(embedding.device)
    # In parts: the embeddings of all draws at once are gigabytes.
    pooled = torch.cat([embedding[part].amax(dim=1) for part in torch.split(tokens, 64)]).float().cpu()
    return pooled.mean(dim=0), pooled.std(dim=0, correction=0)


class SharedAttention(nn.Module):
    """Query projection and attention over the keys of a pool.

    ``q = LN(W_up SiLU(W_down e))`` and ``a = softmax(K q / (τ √D))``; with ``silu="after"``
    ``q = LN(SiLU(W_up W_down e))``, as the published code has it. No biases but LayerNorm's.
    With ``residual``, ``q = LN(e + W_up SiLU(W_down e))`` and W_up starts at zero; the pooled
    embedding tells tasks apart better than a random projection of it does.
    Always computed in float32: the weights steer every layer, and the projection is tiny.

    Attributes:
        config: its settings.
        centre: taken off every pooled embedding (D); zero unless set.
        spread: what is left is divided by it (D); there with ``scale`` vocabulary only, one until set.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int, config: AttentionConfig) -> None:
        """
        Args:
            width: D, the width of the token embeddings.
            config: bottleneck, temperature, residual, scale and the place of the SiLU.
        """
        super().__init__()
        self.config = config
        self.divisor = config.temperature * math.sqrt(width)
        self.down = nn.Linear(width, config.bottleneck, bias=False)
        self.up = nn.Linear(config.bottleneck, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("centre", torch.zeros(width))
        if config.scale != "none":
            self.register_buffer("spread", torch.ones(width))
        if config.residual:
            nn.init.zeros_(self.up.weight)

    def query(self, pooled: Tensor) -> Tensor:
        """Queries (B, D) of pooled embeddings (B, D)."""
        with torch.autocast(pooled.device.type, enabled=False):
            centred = pooled.float() - self.centre
            if self.config.scale != "none":
                centred = centred / self.spread
            hidden = self.down(centred)
            hidden = self.up(F.silu(hidden)) if self.config.silu == "between" else F.silu(self.up(hidden))
            query: Tensor = self.norm(centred + hidden if self.config.residual else hidden)
            return query

    def task_key(self, pooled: Tensor) -> Tensor:
        """A key (D) of length √D in the direction of the mean query of a task's pooled embeddings (N, D).

        Keys of one length: a task of varied inputs, whose mean is short, would lose to one of similar inputs.
        """
        mean = self.query(pooled).mean(dim=0)
        return F.normalize(mean, dim=0) * math.sqrt(len(mean))

    def start(self, embedding: Tensor) -> None:
        """Set centre and spread, as configured, from the token embeddings (V, D) alone."""
        if self.config.centre == "none" and self.config.scale == "none":
            return
        mean, deviation = vocabulary_moments(embedding)
        if self.config.centre == "vocabulary":
            self.centre.copy_(mean)
        if self.config.scale == "vocabulary":
            # A dimension that all tokens share carries nothing to scale.
            self.spread.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, pooled: Tensor, keys: Tensor) -> Tensor:
        """Attention logits (B, T) of pooled embeddings (B, D) over keys (T, D), oldest block first."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.query(pooled) @ keys.float().T / self.divisor
