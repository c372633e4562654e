"""A PET pool on a frozen Hugging Face backbone, encoder-decoder or decoder-only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sapt_core.data.collate import Batch, Collator
from sapt_core.pool.attention import max_pool
from sapt_core.pool.blocks.base import Handle
from sapt_core.pool.pool import PETPool

_HANDLES = "_pet_pool_handles"


class SaptModel(nn.Module):
    """Backbone and pool. The backbone's code is untouched: LoRA blocks hook into its linears, prompts go in front.

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
        self._used: Tensor | None = None
        self._handles: Sequence[Handle] = ()

    def detach(self) -> PreTrainedModel:
        """Take the pool off and give the bare backbone back."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        return self.backbone

    def _attach(self) -> None:
        """Put the pool on the backbone, in place of another model's that shares it.

        A loaded backbone serves several models in turn, such as two versions that are compared, or the
        next stage after one that failed with its pool still on.
        """
        attached: Sequence[Handle] = getattr(self.backbone, _HANDLES, ())
        if self._handles and attached is self._handles:
            return
        for handle in attached:
            handle.remove()
        self._handles = self.pool.blocks.attach(self.backbone, self._mixture)
        setattr(self.backbone, _HANDLES, self._handles)

    def collator(self, pad_token_id: int) -> Collator:
        """Makes batches for this model, with the tokens its query may see."""
        attention = self.pool.attention
        whole = attention is None or attention.config.query == "prompt"
        return Collator(pad_token_id, self.is_encoder_decoder, definition_in_query=whole)

    def pooled(self, batch: Batch) -> Tensor:
        """Max-pooled frozen embeddings (B, D) of the tokens that the batch's query mask admits."""
        mask = batch.query_mask
        if self.pool.attention is not None and self.pool.attention.config.pool_padding:
            mask = mask | (batch.attention_mask == 0)
        with torch.no_grad():
            return max_pool(self._embed(batch.input_ids), mask)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, L, V) of a training batch, one a label (of a decoder-only model each predicts the next label)."""
        return self._run(batch)[0]

    def _run(self, batch: Batch, **options: Any) -> tuple[Tensor, Any]:
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        self._attach()
        pooled = self.pooled(batch)
        inputs = self._inputs(batch, self.pool.mixture(pooled), pooled)
        if self.is_encoder_decoder:
            options["decoder_input_ids"] = self.backbone.prepare_decoder_input_ids_from_labels(batch.labels)  # type: ignore[operator]
        else:
            options["logits_to_keep"] = batch.labels.shape[1]
        outputs = self.backbone(**inputs, use_cache=False, **options)
        return outputs.logits, outputs

    def attend(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Logits as of ``forward``, and the attention maps (B, H, Q, K) of every layer.

        An encoder-decoder has the encoder's layers first, then the decoder's self-attention, then its
        cross-attention. The backbone must be in ``eager`` attention, the only one that keeps its maps.
        """
        logits, outputs = self._run(batch, output_attentions=True)
        if self.is_encoder_decoder:
            return logits, [*outputs.encoder_attentions, *outputs.decoder_attentions, *outputs.cross_attentions]
        return logits, list(outputs.attentions)

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy summed over the label tokens (a scalar, in nats, float32)."""
        if not self.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    def answer_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of one row's logits (P, V) and labels, those that predict its answer's tokens (L, V), in float32."""
        if not self.is_encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        return logits[labels >= 0].float()

    @torch.no_grad()
    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """New tokens (B·k, L) by ``transformers``' generate; k beams share their input's weights.

        Args:
            batch: prompts, left-padded for a decoder-only model.
            options: generation settings, such as ``max_new_tokens``, ``num_beams``, ``do_sample``.
        """
        self._attach()
        pooled = self.pooled(batch)
        inputs = self._inputs(batch, self.pool.select(pooled), pooled)
        sequences: Tensor = self.backbone.generate(**inputs, **options)  # type: ignore[operator]
        if self.is_encoder_decoder:
            return sequences[:, 1:]
        # Of a decoder-only model's prompt ids come back in front of the new ones, embeddings do not.
        return sequences[:, batch.input_ids.shape[1] :] if "input_ids" in inputs else sequences

    def _inputs(self, batch: Batch, weights: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """What the backbone reads, soft tokens in front.

        In front of left padding too: attention skips the padding, and positions are counted without it.
        """
        self._weights, self._used = weights, self.pool.in_use(weights)
        prompts = self.pool.blocks.prompts(weights, pooled)
        if prompts is None:
            return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        embedded = self._embed(batch.input_ids)
        mask = batch.attention_mask.new_ones(prompts.shape[:2])
        return {
            "inputs_embeds": torch.cat([prompts.to(embedded.dtype), embedded], dim=1),
            "attention_mask": torch.cat([mask, batch.attention_mask], dim=1),
        }

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.backbone.get_input_embeddings()(input_ids)
        return embedded

    @property
    def weights(self) -> Tensor | None:
        """Mixture (B, T) of the last forward or generate."""
        return None if self._weights is None else self.pool.blocks.mixed(self._weights)

    def _mixture(self) -> tuple[Tensor, Tensor]:
        if self._weights is None or self._used is None:
            raise RuntimeError("the backbone of a SaptModel runs through SaptModel.forward or generate only")
        return self._weights, self._used
