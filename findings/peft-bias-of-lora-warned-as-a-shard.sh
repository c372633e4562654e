#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 and transformers 5.23.0: saving an adapter with lora_bias=True warns of sharded tensors.
#
# Whatever has lora_B in its name and one dimension is taken for a tensor that ZeRO-3 or FSDP did not gather. The bias that
# lora_bias=True adds has one dimension by nature, so every such adapter is said to be incomplete, and is whole.
#
# Seen: "warned: True" and "bias of the saved adapter: equal".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > run.py <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_bias=True, **sizes))
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
bias = adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].bias
torch.nn.init.normal_(bias)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    adapted.save_pretrained("adapter")
print("warned:", any("ZeRO-3 / FSDP shards were not gathered" in str(each.message) for each in said))
(saved,) = [value for name, value in load_file("adapter/adapter_model.safetensors").items() if name.endswith("bias")]
print("bias of the saved adapter:", "equal" if torch.equal(saved, bias) else "another")
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "warned: True" seen
grep -qx "bias of the saved adapter: equal" seen
