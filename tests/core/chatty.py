# ruff: noqa: S106 - tokens of a tokenizer
"""Small real tokenizers that have a chat template: bytes, and tokens of their own for turns."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2's: a blank before the answer and before its end, and a chat of the system's and the user's turns by turns.
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# A model that thinks: what it is asked with ends in the beginning of its turn, and a turn has an empty thought.
THINKING = CHATML.replace(
    "message['role'] + '\n' + message['content']",
    "message['role'] + '\n' + ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '')"
    " + message['content']",
)
TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXTS = ["user assistant system Name the colour. the sky is blue", "[INST] alpha beta gamma [/INST] positive negative"]


def chat_tokenizer(template: str | None = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with ``bos`` <s> stands in front of a text and </s> ends it, else <|endoftext|> does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=TURNS, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>" if bos else "<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    made.chat_template = template
    return made
