"""Tiny random models of classes that have other habits than T5's, Llama's and Qwen2's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sapt_core.backbones.reference import model_class
from tests.core.tiny import BOS, EOS, PAD, VOCABULARY

_WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_DECODER = {"is_decoder": True, "is_encoder_decoder": False}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,  # transformers' cache of a decoder alone has so many layers
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}

_FIELDS: dict[str, dict[str, Any]] = {
    "bart": {**_BART, **_DECODER},
    "bert": {**_WIDTHS, **_DECODER},
    "ctrl": {**_GPT, "dff": 24},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "jamba": {
        **_WIDTHS,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
        "use_mamba_kernels": False,
    },
    "led": {
        **_BART,
        "attention_window": 4,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "llama": _WIDTHS,
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": {**_WIDTHS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_WIDTHS, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "phimoe": {**_WIDTHS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_WIDTHS, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "roberta": {**_WIDTHS, **_DECODER, "max_position_embeddings": 66},
    "t5": {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2, "decoder_start_token_id": PAD},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 64},
}


def tiny_config(kind: str) -> PretrainedConfig:
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    return AutoConfig.for_model(kind, **ids, **_FIELDS[kind])


def tiny_model(kind: str) -> PreTrainedModel:
    """In float32, in eval mode; weights wide enough that places and neighbours matter."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    model: PreTrainedModel = model_class(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = None  # no answer ends early
    return model.eval()
