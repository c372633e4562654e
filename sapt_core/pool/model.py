"""A PET pool on a frozen Hugging Face backbone, encoder-decoder or decoder-only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sapt_core.backbones.tokens import decoder_inputs
from sapt_core.backbones.traits import first_position, keeps_last_logits, takes_positions
from sapt_core.data.collate import ALL_SHARE, Batch, Collator, Sharing
from sapt_core.pool.attention import max_pool
from sapt_core.pool.calls import Call, During, recomputed
from sapt_core.pool.pool import PETPool


class SaptModel(nn.Module):
    """Backbone and pool. The backbone's code is untouched: LoRA blocks hook into its linears, prompts go in front.

    Weights are computed once an input from the frozen embeddings of the tokens the query may see,
    before the first layer, and reused in every layer and every decoding step.

    The backbone is bare but while it runs: models that share it and threads that share a model take turns.

    Attributes:
        pads: whether there may be padding in front of a text. A decoder-only class that is told no positions counts it
            as a part of the text.
        sharing: which rows may share a forward.
    """

    def __init__(self, backbone: PreTrainedModel, pool: PETPool, sharing: Sharing = ALL_SHARE) -> None:
        """
        Args:
            backbone: frozen from here on.
            pool: goes on it.
            sharing: what a probe found, beyond what the class says of itself.
        """
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.pool = pool
        self.is_encoder_decoder = bool(backbone.config.is_encoder_decoder)
        self.pads = self.is_encoder_decoder or takes_positions(backbone)
        self.sharing = sharing.joined(Sharing(answering="any" if self.pads else "alike"))
        self._keeps_last_logits = keeps_last_logits(backbone)
        self._first_position = first_position(backbone)

    @contextmanager
    def mode(self, *, training: bool) -> Iterator[None]:
        """Dropout on or off for a while; then again as the backbone, which others share, had it."""
        before = self.backbone.training
        self.train(training)
        try:
            yield
        finally:
            self.train(before)

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Keep no layer's activations: backward, which must lie within, runs it again. The pool stays on for it."""
        with self.pool.blocks.on(self.backbone):
            self.backbone.activation_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
            try:
                # Needed by re-entrant checkpointing alone; left on the embeddings it would cost every later task.
                self.backbone.disable_input_require_grads()  # type: ignore[no-untyped-call]
                yield
            finally:
                self.backbone.activation_checkpointing_disable()  # type: ignore[no-untyped-call]

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
        with torch.no_grad(), self.pool.blocks.on(self.backbone):
            return max_pool(self._embed(batch.input_ids), mask)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, L, V) of a training batch, one a label (of a decoder-only model each predicts the next label)."""
        return self.run(batch)[0]

    def run(self, batch: Batch) -> tuple[Tensor, Call]:
        """Logits as of ``forward``, and the call they were made in."""
        _, logits, call = self._run(batch)
        return logits, call

    def _run(self, batch: Batch, **options: Any) -> tuple[Any, Tensor, Call]:
        """All that the backbone gives, and of it the logits one a label, with the call."""
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        labels = batch.labels.shape[1]
        if self.is_encoder_decoder:
            options["decoder_input_ids"] = decoder_inputs(self.backbone, batch.labels)
        elif self._keeps_last_logits:
            options["logits_to_keep"] = labels
        with self.pool.blocks.on(self.backbone):
            pooled = self.pooled(batch)
            call = self._call(self.pool.mixture(pooled))
            inputs = self._inputs(batch, call, pooled)
            with During(call):
                outputs = self.backbone(**inputs, use_cache=False, **options)
        return outputs, outputs.logits[:, -labels:], call

    def attend(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Logits as of ``forward``, and the attention maps (B, H, Q, K) of every layer.

        An encoder-decoder has the encoder's layers first, then the decoder's self-attention, then its
        cross-attention. The backbone must be in ``eager`` attention, the only one that keeps its maps.
        """
        outputs, logits, _ = self._run(batch, output_attentions=True)
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
    def generate(
        self, batch: Batch, *, allowed: Callable[[int, list[int]], list[int]] | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Answers by ``transformers``' generate; k beams share their input's weights.

        Args:
            batch: prompts, left-padded for a decoder-only model.
            allowed: of a row of the batch and its new tokens so far, those that may come next, at least one; default:
                any.
            options: generation settings, such as ``max_new_tokens``, ``num_beams``, ``do_sample``.

        Returns:
            New tokens (B·k, L) and the mixture (B, T) they were made with.
        """
        with self.pool.blocks.on(self.backbone):
            pooled = self.pooled(batch)
            call = self._call(self.pool.select(pooled))
            inputs = self._inputs(batch, call, pooled)
            if self.pads and not self.is_encoder_decoder:
                # As training counts them: generate() itself counts from 0, whatever the class.
                inputs["position_ids"] = self._positions(inputs["attention_mask"])
            # Before the new ones stands the decoder's start, or a decoder-only model's prompt unless it is embeddings.
            before = 1 if self.is_encoder_decoder else batch.input_ids.shape[1] if "input_ids" in inputs else 0
            if allowed is not None:
                options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row, ids[before:].tolist())
            with During(call):
                sequences: Tensor = self.backbone.generate(**inputs, **options)  # type: ignore[operator]
        return sequences[:, before:], self.pool.blocks.mixed(call)

    def _call(self, weights: Tensor) -> Call:
        return self.pool.blocks.new_call(weights, self.pool.in_use(weights))

    def _inputs(self, batch: Batch, call: Call, pooled: Tensor) -> dict[str, Tensor]:
        """What the backbone reads, soft tokens in front of each text.

        Raises:
            ValueError: there is padding in front of a text, and the class cannot be told so.
        """
        mask = batch.attention_mask
        padded = batch.left_padded and not self.is_encoder_decoder
        if padded and not self.pads:
            raise ValueError(
                f"{type(self.backbone).__name__} reads texts of one length in a batch: it takes no positions"
            )
        prompts = self.pool.blocks.prompts(call, pooled)
        if prompts is None:
            inputs = {"input_ids": batch.input_ids, "attention_mask": mask}
        else:
            embedded = self._embed(batch.input_ids)
            embedded = torch.cat([prompts.to(embedded.dtype), embedded], dim=1)
            mask = torch.cat([mask.new_ones(prompts.shape[:2]), mask], dim=1)
            if padded:
                # To the very front: between prompt and text, recurrent layers and distances would count it.
                order = mask.argsort(dim=1, stable=True)
                embedded = embedded.gather(1, order.unsqueeze(-1).expand_as(embedded))
                mask = mask.gather(1, order)
            inputs = {"inputs_embeds": embedded, "attention_mask": mask}
        if padded:
            inputs["position_ids"] = self._positions(mask)
        return inputs

    def _positions(self, mask: Tensor) -> Tensor:
        """Where each token stands (B, S), counted without the padding before it."""
        return (mask.cumsum(dim=1) - 1).clamp(min=0) + self._first_position

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.backbone.get_input_embeddings()(input_ids)
        return embedded
