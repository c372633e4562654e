"""A PET pool on a frozen Hugging Face backbone, encoder-decoder or decoder-only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sapt_core.attention import max_pool
from sapt_core.pool import PETPool

_HANDLES = "_pet_pool_handles"


class SaptModel(nn.Module):
    """Backbone and pool. The backbone's code is untouched: the pool hooks into its linears.

    Weights are computed once an input from the frozen embeddings of the tokens the query may see,
    before the first layer, and reused in every layer and every decoding step.
    """

    def __init__(self, backbone: PreTrainedModel, pool: PETPool) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.pool = pool
        self.is_encoder_decoder = bool(backbone.config.is_encoder_decoder)
        # Not cleared after a forward: activation checkpointing asks for it again during backward.
        self._weights: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def detach(self) -> PreTrainedModel:
        """Take the pool off and give the bare backbone back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.backbone

    def _attach(self) -> None:
        """Put the pool on the backbone, in place of another model's that shares it.

        A loaded backbone serves several models in turn, such as two versions that are compared, or the
        next stage after one that failed with its pool still on.
        """
        attached: list[RemovableHandle] = getattr(self.backbone, _HANDLES, [])
        if self._handles and attached is self._handles:
            return
        for handle in attached:
            handle.remove()
        self._handles = self.pool.blocks.attach(self.backbone, self._current_weights)
        setattr(self.backbone, _HANDLES, self._handles)

    def pooled(self, input_ids: Tensor, query_mask: Tensor) -> Tensor:
        """Max-pooled frozen embeddings (B, D) of the tokens (B, S) that ``query_mask`` (B, S) admits."""
        with torch.no_grad():
            return max_pool(self.backbone.get_input_embeddings()(input_ids), query_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, query_mask: Tensor, labels: Tensor) -> Tensor:
        """Logits of a training batch.

        Args:
            input_ids: (B, S); a decoder-only model's holds prompt and answer.
            attention_mask: (B, S), 0 on padding.
            query_mask: (B, S), true on the prompt's tokens, never on the answer's.
            labels: (B, L) for an encoder-decoder, (B, S) else; -100 where there is no loss.

        Returns:
            Logits (B, L, V), aligned with ``labels`` shifted by one for a decoder-only model.
        """
        self._attach()
        self._weights = self.pool.mixture(self.pooled(input_ids, query_mask))
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.backbone.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        logits: Tensor = self.backbone(**inputs).logits
        return logits

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy summed over the label tokens (a scalar, in nats, float32)."""
        if not self.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, query_mask: Tensor, **options: Any) -> Tensor:
        """New tokens (B·k, L) by ``transformers``' generate; k beams share their input's weights.

        Args:
            input_ids: prompts (B, S), left-padded for a decoder-only model.
            attention_mask: (B, S), 0 on padding.
            query_mask: (B, S), tokens that the attention query may see.
            options: generation settings, such as ``max_new_tokens``, ``num_beams``, ``do_sample``.
        """
        self._attach()
        self._weights = self.pool.mixture(self.pooled(input_ids, query_mask))
        sequences: Tensor = self.backbone.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, **options
        )
        return sequences[:, 1:] if self.is_encoder_decoder else sequences[:, input_ids.shape[1] :]

    @property
    def weights(self) -> Tensor | None:
        """Mixture (B, T) of the last forward or generate."""
        return self._weights

    def _current_weights(self) -> Tensor:
        if self._weights is None:
            raise RuntimeError("the backbone of a SaptModel runs through SaptModel.forward or generate only")
        return self._weights
