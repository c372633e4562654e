#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0 and torch 2.13.0: the rotary table of a GGUF file is passed over without a word.
#
# llama.cpp writes the scaled rotary positions of Llama 3.1 to 3.3 as a tensor, rope_freqs.weight, and not as metadata.
# from_pretrained(gguf_file=) has no name for it and skips it: the model comes up with plain positions, and the loading report
# has no missing, unexpected or mismatched key. Short texts hardly differ, long ones are another model's.
#
# Seen: "rope_type: default", "keys told of: 0" and "with the table and without: equal weights".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cat > run.py <<'PY'
import numpy as np
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

WIDTH, HEADS, INNER, TOKENS = 32, 4, 64, ["<s>", "</s>", *"abcdefgh"]
SHAPES = {
    "token_embd": (len(TOKENS), WIDTH),
    "output_norm": (WIDTH,),
    **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
    **{f"blk.0.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")},
    "blk.0.ffn_down": (WIDTH, INNER),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_norm": (WIDTH,),
}


def write(path, table):
    writer, draw = GGUFWriter(path, "llama"), np.random.default_rng(0)
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 131072),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, INNER),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 500000.0),
        (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, TOKENS),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(value)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    if table is not None:
        writer.add_tensor("rope_freqs.weight", table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


models = {}
for name, table in (("plain", None), ("scaled", np.array([1, 2, 8, 8], dtype=np.float32))):
    write(f"{name}.gguf", table)
    models[name], told = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf", output_loading_info=True)
print("rope_type:", models["scaled"].config.rope_parameters["rope_type"])
print("keys told of:", sum(map(len, told.values())))
same = all(torch.equal(one, other) for one, other in zip(models["plain"].parameters(), models["scaled"].parameters()))
same &= torch.equal(*(model.model.rotary_emb.inv_freq for model in models.values()))
print("with the table and without:", "equal weights" if same else "others")
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "rope_type: default" seen
grep -qx "keys told of: 0" seen
grep -qx "with the table and without: equal weights" seen
