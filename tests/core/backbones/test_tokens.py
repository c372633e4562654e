"""Ids that a tokenizer and a model must share, and where answers start and end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    GenerationConfig,
    MBartConfig,
    MBartForConditionalGeneration,
)

from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import identify
from sapt_core.backbones.tokens import answer_settings, check_tokens, decoder_inputs, decoder_start, load_tokenizer
from sapt_core.config.preflight import check_backbone
from sapt_core.errors import BackboneError
from sapt_core.judging.decoding import answer
from sapt_core.pool.cost import bare_model
from sapt_core.settings import EvaluationConfig
from tests.core.backbones.folders import LFS_POINTER, config, experiment, saved
from tests.core.tiny import EOS, VOCABULARY, DictStore, tiny_backbone, tiny_tokenizer


def edit(path: Path, **changes: Any) -> None:
    """Change the fields of a JSON file; None takes one out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def loaded(folder: Path) -> tuple[Any, Any]:
    store, given = DictStore(), config(folder)
    ref = identify(given)
    store_backbone(given, ref, store)
    return load_backbone(ref, store)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_padding_id_behind_the_embeddings_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    message = rf"1 tokens .* behind the model's {VOCABULARY} embeddings: '\[PAD\]' \(padding\) has {VOCABULARY}; call"
    with pytest.raises(BackboneError, match=message):
        check_backbone(experiment(folder, name), [])


def test_words_that_a_prompt_may_hold_and_the_model_has_no_row_for_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("new"), AddedToken("newer")])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BackboneError, match=rf"2 tokens .*'new' has {VOCABULARY}, 'newer' has {VOCABULARY + 1}"):
        check_backbone(experiment(folder), [])


@pytest.mark.parametrize("field", ["decoder_start_token_id", "pad_token_id"])
def test_a_decoder_that_cannot_start_is_refused_by_the_missing_field(field: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit(folder / "config.json", **{field: None})
    edit(folder / "generation_config.json", **{field: None})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, field: None}))
    with pytest.raises(BackboneError, match=f"config.json lacks {field}: set it"):
        check_backbone(experiment(folder), [])


def test_a_decoder_that_starts_behind_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit(folder / "config.json", decoder_start_token_id=VOCABULARY)
    with pytest.raises(BackboneError, match=f"decoder_start_token_id in config.json is {VOCABULARY}"):
        check_backbone(experiment(folder), [])


def test_a_class_that_does_not_say_so_reads_labels_as_its_own_loss_does() -> None:
    small = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = BlenderbotConfig(**small, **heads, pad_token_id=0, eos_token_id=EOS, decoder_start_token_id=3)
    assert not hasattr(BlenderbotForConditionalGeneration, "prepare_decoder_input_ids_from_labels")
    torch.manual_seed(0)
    model = BlenderbotForConditionalGeneration(config).eval()
    check_tokens(model, tiny_tokenizer(), "mine")
    ids, labels = torch.tensor([[8, 9, 10]] * 2), torch.tensor([[7, 8, EOS], [9, EOS, -100]])
    assert decoder_inputs(model, labels).tolist() == [[3, 7, 8], [3, 9, EOS]]
    own = model(input_ids=ids, labels=labels).logits
    assert torch.equal(model(input_ids=ids, decoder_input_ids=decoder_inputs(model, labels)).logits, own)
    model.config.pad_token_id = None
    with pytest.raises(BackboneError, match=r"config\.json lacks pad_token_id: set it"):
        check_tokens(model, tiny_tokenizer(), "mine")


@pytest.mark.parametrize("name", ["t5", "t5_gated", "llama", "qwen2"])
def test_whole_backbones_pass(name: str) -> None:
    check_tokens(tiny_backbone(name), tiny_tokenizer(), "mine")


@pytest.mark.parametrize(("own", "wanted"), [(7, [7, EOS]), ([7, 8], [7, 8, EOS]), (EOS, EOS), (None, EOS)])
def test_answers_stop_at_the_end_they_are_taught_and_at_the_models(own: Any, wanted: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    edit(folder / "generation_config.json", eos_token_id=own)
    if own is None:
        edit(folder / "config.json", eos_token_id=None)
    assert loaded(folder)[0].generation_config.eos_token_id == wanted


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_nothing_is_written_behind_the_taught_end(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, name)
    edit(folder / "generation_config.json", eos_token_id=7)
    model, tokenizer = loaded(folder)
    taught = torch.nn.Parameter(torch.zeros_like(model.get_output_embeddings().weight))
    model.get_output_embeddings().weight = taught  # of equal logits the first is taken: the padding
    bias = torch.zeros(VOCABULARY)
    bias[EOS] = 1
    model.get_output_embeddings().register_forward_hook(lambda *call: call[2] + bias)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    bare = bare_model(model)
    rows = [{"prompt_ids": [8, 9]}]
    texts, _ = answer(bare, tokenizer, rows, EvaluationConfig(), max_new_tokens=9, precision="float32")
    assert texts == [""]
    assert len(calls) == 1
    # Where a chat's turn ends is told with its rows.
    bias[EOS], bias[9] = 0, 1
    for ends, count in (((), 9), ((9,), 1)):
        calls.clear()
        answer(bare, tokenizer, rows, EvaluationConfig(), max_new_tokens=9, precision="float32", ends=ends)
        assert len(calls) == count


def test_the_decoder_starts_in_answers_as_it_did_in_training(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit(folder / "generation_config.json", decoder_start_token_id=5)
    model, _ = loaded(folder)
    assert model.generation_config.decoder_start_token_id == model.config.decoder_start_token_id
    # Of classes that take the last label to the front: what training reads, not a language of the checkpoint's.
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    settings = MBartConfig(vocab_size=VOCABULARY, d_model=16, pad_token_id=0, eos_token_id=EOS, **heads, **layers)
    mbart = MBartForConditionalGeneration(settings)
    mbart.generation_config = GenerationConfig(decoder_start_token_id=9, pad_token_id=0)
    check_tokens(mbart, tiny_tokenizer(), "mine")
    assert decoder_start(mbart, EOS) == EOS
    assert answer_settings(mbart, tiny_tokenizer()).decoder_start_token_id == EOS


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.model"])
def test_a_sentencepiece_file_alone_asks_for_sentencepiece(file: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, tokenizer=False)
    (folder / file).write_bytes(b"\x0a\x0e")
    with pytest.raises(BackboneError, match=rf"SentencePiece file alone \({file}\): install sentencepiece"):
        load_tokenizer(folder, "mine")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", LFS_POINTER),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "WordLevel"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(file: str, text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(BackboneError, match="the tokenizer of mine cannot be loaded") as error:
        load_tokenizer(folder, "mine")
    assert "\n" not in str(error.value)
