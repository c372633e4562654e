"""Valid configurations of a few thousand weights, for every text class of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

# Layers enough for the patterns of hybrid classes, heads that share keys, experts of which some are left out.
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "d_ff": 48,
    "dff": 48,
    "d_inner": 48,
    "dim_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "feed_forward_size": 48,
    "shared_intermediate_size": 24,
    "moe_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "model_max_length": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
}

# What a class needs beside that, or otherwise; None leaves a field as the class has it.
OTHERWISE: Mapping[str, Mapping[str, Any]] = {}

_NO_TEXT = (
    "vision_config",
    "audio_config",
    "audio_encoder_config",
    "audio_encoder",
    "encoder_config.audio",
    "vq_config",
)

PAD, END = 0, 1  # of the tokenizer


def classes() -> dict[str, str]:
    """Class by ``causal/TYPE`` or ``encoder-decoder/TYPE``, of all that transformers maps so."""
    kinds = {
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "encoder-decoder": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    return {f"{kind}/{name}": found for kind, names in kinds.items() for name, found in sorted(names.items())}


def tiny_config(key: str, vocabulary: int) -> PretrainedConfig:
    """The configuration of a class of ``classes`` with some thousand weights."""
    kind, _, name = key.partition("/")
    config = CONFIG_MAPPING[name]
    fields = inspect.signature(config.__init__).parameters
    given = {field: value for field, value in SIZES.items() if field in fields}
    given |= {"vocab_size": vocabulary, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
    if kind == "encoder-decoder":
        given |= {"decoder_start_token_id": PAD}
    elif "is_decoder" in fields:
        given |= {"is_decoder": True, "is_encoder_decoder": False}
    for field, value in {**OTHERWISE.get(name, {}), **OTHERWISE.get(key, {})}.items():
        given[field] = value
        if value is None:
            del given[field]
    return config(**given)


def reads_more_than_text(name: str) -> bool:
    """Whether a type of models is for pictures or sound."""
    parts = getattr(CONFIG_MAPPING[name], "sub_configs", None) or {}
    return any(part in _NO_TEXT for part in parts) or name in {"whisper", "trocr"}
