"""What a class of models asks of whoever runs it, read from its code, whatever its size."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether it can be told where each token stands.

    A decoder-only model that cannot counts, in most classes, padding in front of a text as a part of it.
    """
    return "position_ids" in signature(model.forward).parameters


def keeps_last_logits(model: PreTrainedModel) -> bool:
    """Whether it can be asked for the logits of the last positions alone; others make those of all positions."""
    return "logits_to_keep" in signature(model.forward).parameters


def takes_embeddings(model: PreTrainedModel) -> bool:
    """Whether it trains on and generates from embeddings in the place of token ids, as soft prompts need."""
    reads: Any = model.get_encoder().forward if model.config.is_encoder_decoder else model.prepare_inputs_for_generation
    return all("inputs_embeds" in signature(function).parameters for function in (model.forward, reads))


def first_position(model: PreTrainedModel) -> int:
    """Where a text's first token stands: at 0, or behind the row of the padding, where RoBERTa and its kin have one."""
    rows = [
        module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings"
    ]
    return max((row + 1 for row in rows if row is not None), default=0)
