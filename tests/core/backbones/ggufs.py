"""GGUF files as llama.cpp's converter writes them, of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from numpy import float32
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# Every byte-level letter, two merges and the marks of chats.
LETTERS = [chr(number) for number in range(33, 127)] + ["Ġ", "Ċ"]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ a", "Ġ 1", "1 2", "Ġ Ġ"]
TOKENS = [*MARKS, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
TURN_END = TOKENS.index("<|im_end|>")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def llama(
    *, tied: bool = True, heads: int = 4, groups: int = 2, positions: int = 128, rope: dict[str, Any] | None = None
) -> LlamaForCausalLM:
    """Rows of 32, the least that blocks of weights are made of."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=positions,
            rope_parameters=rope,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.3)
    return model.eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    pre: str = "smollm",
    more: Callable[[GGUFWriter], Any] = lambda _: None,
) -> Path:
    """The file of a Llama: query and key rows interleaved, as llama.cpp's rotary positions want them.

    Args:
        path: of the file.
        model: of any size.
        kind: of all matrices; vectors stay float32.
        pre: how the tokenizer cuts texts in front of the merges.
        more: writes what else the file is to hold.
    """
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(MARKS) + [1] * (len(TOKENS) - len(MARKS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    more(writer)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        tensor = value if heads is None else interleaved(value, heads)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None
        given = GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        data = quantize(tensor.numpy().astype(float32), given)
        writer.add_tensor(name, data, raw_dtype=given)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The two halves of every head's rows, in turns."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
