#!/usr/bin/env bash
# transformers 5.23.0: an index of shards without "metadata" stops from_pretrained with KeyError: 'metadata'.
#
# Nothing that is loaded is in that entry (save_pretrained writes sizes into it), and the reader of single shards needs
# "weight_map" alone. Tools that write their own index leave it out.
#
# Seen: "with metadata: True" (several shards, loaded), "without: KeyError 'metadata'".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > run.py <<'PY'
import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
).save_pretrained("model", max_shard_size="6KB")
index = Path("model/model.safetensors.index.json")
print("with metadata:", len(set(json.loads(index.read_text())["weight_map"].values())) > 1)
LlamaForCausalLM.from_pretrained("model")
index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
try:
    LlamaForCausalLM.from_pretrained("model")
    print("without: loaded")
except KeyError as error:
    print("without: KeyError", error)
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'SEEN'
with metadata: True
without: KeyError 'metadata'
SEEN
