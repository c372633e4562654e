#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: BartForCausalLM with more decoder than encoder layers fails with a cache.
#
# BartConfig's num_hidden_layers is encoder_layers. The decoder alone makes its cache by that name, so that one with more
# layers than the encoder, which it has not, runs past the cache's end: in a plain forward, whose default is to use a
# cache, and in generate. Without a cache, or with as many layers in both, it works.
#
# Seen: "2 decoder, 1 encoder layers: IndexError, without a cache (1, 3, 64)" and "2 and 2: (1, 3, 64)".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > run.py <<'PY'
import torch
from transformers import BartConfig, BartForCausalLM

tokens = torch.tensor([[5, 6, 7]])


def decoder(encoder_layers):
    sizes = {"d_model": 16, "decoder_ffn_dim": 32, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    config = BartConfig(vocab_size=64, decoder_layers=2, encoder_layers=encoder_layers, **sizes)
    return BartForCausalLM(config).eval()


shorter = decoder(1)
try:
    seen = tuple(shorter(tokens).logits.shape)
except IndexError as error:
    seen = type(error).__name__
print(f"2 decoder, 1 encoder layers: {seen}, without a cache {tuple(shorter(tokens, use_cache=False).logits.shape)}")
print("2 and 2:", tuple(decoder(2)(tokens).logits.shape))
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "2 decoder, 1 encoder layers: IndexError, without a cache (1, 3, 64)" seen
grep -qx "2 and 2: (1, 3, 64)" seen
