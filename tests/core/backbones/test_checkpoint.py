"""Weight files that are no model, or another one than their configuration says, are refused before the run."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sapt_core.backbones.checkpoint import check_weights, read_headers
from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import identify, load_model_config, skeleton
from sapt_core.config.preflight import check_backbone
from sapt_core.errors import BackboneError
from tests.core.backbones.folders import LFS_POINTER, config, experiment, rewritten, saved
from tests.core.tiny import DictStore

DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_ff": 24, "num_layers": 2, "d_kv": 4, "num_heads": 4}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)

CLASSES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5 untied": lambda: T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, **HEADS, **SIZES)),
}


def check(folder: Path) -> None:
    settings = load_model_config(folder, "mine")
    check_weights(skeleton(settings), read_headers(folder, settings, "mine"), "mine")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_what_save_pretrained_wrote_fits(
    name: str, size: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CLASSES[name]().save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (size == "1GB")
    check(tmp_path)
    assert "not used" not in caplog.text


def test_a_model_without_its_head_fits_where_the_head_is_tied(tmp_path: Path) -> None:
    CLASSES["gpt2"]().save_pretrained(tmp_path)
    shutil.copy(tmp_path / "config.json", tmp_path.parent / "kept.json")
    GPT2Model(GPT2).save_pretrained(tmp_path)  # names without the prefix of the base model
    shutil.copy(tmp_path.parent / "kept.json", tmp_path / "config.json")
    check(tmp_path)


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in tensors.items()}


def short(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:-1].contiguous() if "embed_tokens" in name else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            wrapped,
            r"21 tensors .* missing \(lm_head.weight, .*, …\); 21 there belong to nothing \(module.lm_head",
        ),
        ("t5", wrapped, r"50 tensors .* missing .*; 47 there belong to nothing"),
        ("llama", without(".layers.1."), r"9 tensors of the model are missing \(model.layers.1."),
        ("mixtral", without(".layers.1."), r"9 tensors of the model are missing"),
        ("mixtral", without("layers.1.block_sparse_moe.experts.2."), r"2 have another shape .*experts"),
        ("llama", short, r"1 have another shape \(model.embed_tokens.weight \(63, 16\), not \(64, 16\)\)"),
    ],
)
def test_weights_of_another_model_are_refused(
    name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    CLASSES[name]().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=message):
        check(rewritten(tmp_path, change))


@pytest.mark.parametrize("change", [wrapped, without(".block.1."), short])
def test_no_stage_computes_with_random_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, store = rewritten(saved(tmp_path / "model", "t5_gated"), change), DictStore()
    if change is short:
        rewritten(folder, lambda tensors: {**tensors, "shared.weight": tensors["shared.weight"][:-1].contiguous()})
    with pytest.raises(BackboneError, match="weights would be random"):
        check_backbone(experiment(folder), [])
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    with pytest.raises(BackboneError, match="weights would be random"):
        load_backbone(ref, store)


def test_tensors_that_nothing_uses_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CLASSES["llama"]().save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: {**tensors, "value_head.weight": torch.zeros(3)})
    with caplog.at_level(logging.WARNING, "sapt_core"):
        check(tmp_path)
    assert "1 of 22 tensors in its weight files are not used (value_head.weight)" in caplog.text


def cut(data: bytes) -> bytes:
    return data[:-10]


def head_only(data: bytes) -> bytes:
    return data[:100]


@pytest.mark.parametrize("spoil", [cut, head_only, lambda _: b"", lambda data: b"PK\x03\x04" + data])
def test_a_weight_file_that_is_cut_short_is_named(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    with pytest.raises(BackboneError, match=re.escape(f"{folder}: model.safetensors is damaged or cut short")) as error:
        identify(config(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_as_one(file: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / file).write_text(LFS_POINTER)
    with pytest.raises(BackboneError, match=f"Git LFS pointers stand in the place of {file}; run git lfs pull"):
        identify(config(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is damaged"),
        ("[]", "index.json is damaged"),
        ("{}", "index.json is damaged"),
        (
            '{"metadata": {}, "weight_map": {"a": "../model.safetensors"}}',
            r"names '../model.safetensors', which is no file",
        ),
        ('{"weight_map": {"a": "model-1.safetensors"}}', 'has no metadata, .* add "metadata": {}'),
        (
            '{"metadata": {}, "weight_map": {"a": "model-2.safetensors"}}',
            "model-2.safetensors, which .* names, is missing",
        ),
    ],
)
def test_an_index_of_shards_that_is_damaged(index: str, message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BackboneError, match=message):
        identify(config(folder))


def test_weights_under_a_name_that_nothing_reads(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(BackboneError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json there"):
        identify(config(folder))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="an adapter lies there"):
        identify(config(folder))


def examine(folder: Path) -> None:
    identify(config(folder))
    check_backbone(experiment(folder), [])


@pytest.mark.parametrize(
    "changes", [{"d_model": "wide"}, {"d_model": None}, {"d_model": -1}, {"dtype": "float17"}, {"num_layers": "two"}]
)
def test_a_configuration_that_makes_no_model(changes: dict[str, object], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(BackboneError) as error:
        examine(folder)
    assert "\n" not in str(error.value)
