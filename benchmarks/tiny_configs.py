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

PAD, END = 0, 1  # of the tokenizer

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

_GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "vocab_size": "vocab_size",
}
_BERT = {
    "model_type": "bert",
    "vocab_size": "vocab_size",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_BLT = {
    "hidden_size_global": 32,
    "vocab_size": "vocab_size",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What a class needs beside that, or otherwise.
OTHERWISE: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "patcher_config": _BLT,
        "encoder_config": _BLT,
        "decoder_config": _BLT,
        "global_config": _BLT,
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2},
    "dots3_note_text": {
        "head_dim": 16,
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "encoder-decoder": {
        "encoder": _BERT,
        "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "fsmt": {"src_vocab_size": "vocab_size", "tgt_vocab_size": "vocab_size"},
    "gemma3n_text": {
        "layer_types": _SLIDING,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": "vocab_size",
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": "vocab_size",
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "layer_types": _SLIDING,
    },
    "gemma4_unified_text": {"global_head_dim": 8, "layer_types": _SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "rel_extent": 64,
        "unpadded_vocab_size": "vocab_size",
    },
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "rel_extent": 64,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "led": {"max_encoder_position_embeddings": 256, "max_decoder_position_embeddings": 256, "attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "m2m_100": {"decoder_start_token_id": END},  # padding in front of an answer has no place
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "nllb-moe": {"decoder_start_token_id": END},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (8, 24),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": "vocab_size",
        "shape_embed_dim": 8,
        "shape_vocab_size": "vocab_size",
    },
    "seamless_m4t": {"decoder_start_token_id": END},
    "seamless_m4t_v2": {"decoder_start_token_id": END},
    "t5gemma": {"encoder": _GEMMA, "decoder": _GEMMA},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},  # widths are rounded up to 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

# Types that read pictures or sound, and heads that are no models by themselves.
_NO_TEXT = {"vision_config", "audio_config", "audio_encoder_config", "audio_encoder", "vq_config"}
_OF_OTHERS = {
    "fuyu",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "granite_speech",
    "granite_speech_plus",
    "t5gemma2",
    "trocr",
    "vibevoice_asr",
    "whisper",
}


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
    if "kv_lora_rank" in fields:  # attention whose heads share what their keys are made of, and no keys
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= OTHERWISE.get(name, {})
    return config(**_filled(given, vocabulary))


def _filled(given: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Fields with the vocabulary's size where it is named."""
    sizes = {field: vocabulary if value == "vocab_size" else value for field, value in given.items()}
    return {field: _filled(value, vocabulary) if isinstance(value, dict) else value for field, value in sizes.items()}


def reads_more_than_text(name: str) -> bool:
    """Whether a type of models is for pictures or sound, or a part of another model."""
    return name in _OF_OTHERS or not _NO_TEXT.isdisjoint(getattr(CONFIG_MAPPING[name], "sub_configs", None) or ())
