#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0 and tokenizers as it brings it: numbers of a GGUF file are cut as GPT-2 cuts them.
#
# A GGUF file says in tokenizer.ggml.pre how texts are cut before merges; of "smollm" that is digit by digit, as in the
# tokenizer.json that the file was made of. The GGUF reader knows some of these names and takes GPT-2's way for all others, so
# digits merge and blanks go to them: other ids than the model was trained on, no warning.
#
# Seen: "smollm: ['12']" and "tokenizer.json of the same tokens, digits apart: ['1', '2']".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cat > run.py <<'PY'
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

TOKENS, MERGES = ["<|endoftext|>", *"0123456789ab", "12"], ["1 2"]
writer = GGUFWriter("model.gguf", "llama")
for add, value in (
    (writer.add_block_count, 1),
    (writer.add_context_length, 64),
    (writer.add_embedding_length, 32),
    (writer.add_feed_forward_length, 64),
    (writer.add_head_count, 4),
    (writer.add_tokenizer_model, "gpt2"),
    (writer.add_tokenizer_pre, "smollm"),
    (writer.add_token_list, TOKENS),
    (writer.add_token_merges, MERGES),
    (writer.add_bos_token_id, 0),
    (writer.add_eos_token_id, 0),
):
    add(value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
print("smollm:", AutoTokenizer.from_pretrained(".", gguf_file="model.gguf").tokenize("12"))
apart = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, [tuple(MERGES[0].split())]))
apart.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
print("tokenizer.json of the same tokens, digits apart:", apart.encode("12").tokens)
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "smollm: \['12'\]" seen
grep -qx "tokenizer.json of the same tokens, digits apart: \['1', '2'\]" seen
