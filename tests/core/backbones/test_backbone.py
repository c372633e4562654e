"""Which backbone exactly, what is refused, and how it reaches another node."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    T5Config,
)

from sapt_core.backbones import loading
from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import BackboneRef, identify, model_class, skeleton
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.config.preflight import check_backbone
from sapt_core.data.task import Task
from sapt_core.errors import BackboneError, DataError, StoreError
from tests.core.backbones.folders import config, saved
from tests.core.tiny import BACKBONES, DictStore, tiny_backbone, tiny_tokenizer


@pytest.mark.parametrize("name", BACKBONES)
def test_only_a_decoder_only_backbone_says_how_prompts_are_tokenised(name: str, tmp_path: Path) -> None:
    ref = identify(config(saved(tmp_path / "model", name)))
    said = {"joined": True} if name in {"llama", "qwen2"} else {}
    assert ref.model_dump() == {"path": "model", "revision": None, "files": ref.files, "dtype": "auto", **said}
    assert ref.digest == BackboneRef(path="model", files=ref.files).digest  # the weights are the same


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folder_reaches_another_node_whole(name: str, tmp_path: Path) -> None:
    folder, store = saved(tmp_path / "model", name), DictStore()
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    shutil.rmtree(folder)  # the other node has the store alone
    model, tokenizer = load_backbone(BackboneRef.model_validate_json(ref.model_dump_json()), store)
    wanted = tiny_backbone(name).state_dict()
    assert set(model.state_dict()) == set(wanted)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    if name != "qwen2":  # transformers puts Qwen2's own splitting of words on any vocabulary
        assert tokenizer("w3 w4")["input_ids"] == tiny_tokenizer()("w3 w4")["input_ids"]
    assert not model.training
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "t5":  # tied weights are one tensor again
        assert model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
    assert load_backbone(ref, DictStore())[0] is model  # stays loaded, and its files on this machine


def test_the_cache_is_open_to_whom_the_umask_lets_in(tmp_path: Path) -> None:
    folder, store = saved(tmp_path / "model"), DictStore()
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    umask = os.umask(0o027)
    try:
        load_backbone(ref, store)
    finally:
        os.umask(umask)
    (cached,) = (tmp_path / "cache" / "sapt" / "backbones").iterdir()
    assert cached.stat().st_mode & 0o777 == 0o750


def test_content_names_it_not_the_place(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a" / "model"), tmp_path / "b" / "model"
    shutil.copytree(first, second)
    assert identify(config(first)) == identify(config(second))
    digest = identify(config(first)).digest
    renamed = second.rename(tmp_path / "b" / "other")
    assert identify(config(renamed)).digest == digest
    assert identify(config(first, dtype="bfloat16")).digest != digest
    weights = renamed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identify(config(renamed)).digest != digest
    (first / "notes.md").write_text("not read by transformers")
    assert identify(config(first)).digest == digest
    (first / "tokenizer.json").write_text((first / "tokenizer.json").read_text() + "\n")
    assert identify(config(first)).digest != digest


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "model")
    assert identify(config("~/model")) == identify(config(tmp_path / "model"))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    broken = saved(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    bare = saved(tmp_path / "bare")
    (bare / "config.json").unlink()
    unknown = saved(tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    for path, message in (
        (tmp_path / "empty", "no .*safetensors there"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "missing", "not a folder"),
        ("missing", "give a folder with config.json, or a hub id"),
        ("owner/missing", "give a folder with config.json, or a hub id"),
        (broken, "not a model"),
        (bare, "not a model"),
        (unknown, "not a model"),
    ):
        with pytest.raises(BackboneError, match=message) as error:
            identify(config(path))
        assert f"backbone.path {path}" in str(error.value)
        assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_backbone("t5").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="pickled weights are not loaded"):
        identify(config(folder))


def test_pickled_weights_beside_the_others_do_not_travel(tmp_path: Path) -> None:
    folder, store = saved(tmp_path / "model"), DictStore()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling_mine.py").write_text("raise SystemExit")
    ref = identify(config(folder))
    assert ref.files is not None
    assert {Path(name).suffix for name in ref.files} <= {".json", ".safetensors", ".jinja"}
    store_backbone(config(folder), ref, store)
    load_backbone(ref, store)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "configuration_mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BackboneError, match="not a model that can be loaded"):
        identify(config(folder))


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=20, **small)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(BackboneError, match="'bert' is neither an encoder-decoder nor a causal"):
        identify(config(tmp_path / "bert"))


def test_a_damaged_store_leaves_nothing_half_written(tmp_path: Path) -> None:
    folder, store = saved(tmp_path / "model"), DictStore()
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    assert ref.files is not None
    digest = ref.files["model.safetensors"]
    whole = store.blobs[digest]
    store.blobs[digest] = whole[:-1]
    with pytest.raises(StoreError):
        load_backbone(ref, store)
    assert list((tmp_path / "cache" / "sapt" / "backbones").iterdir()) == []
    store.blobs[digest] = whole
    load_backbone(ref, store)
    assert [path.name for path in (tmp_path / "cache" / "sapt" / "backbones").iterdir()] == [ref.digest]


def test_a_file_that_changed_on_this_machine_is_fetched_again(tmp_path: Path) -> None:
    store = DictStore()
    given = config(saved(tmp_path / "model"))
    ref = identify(given)
    store_backbone(given, ref, store)
    load_backbone(ref, store)
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + b"x")
    loading._load_cached.cache_clear()  # as in another process
    load_backbone(ref, store)
    assert weights.read_bytes() == intact


def test_a_checkpoints_own_decoding_settings_do_not_leak_into_answers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 9.0, "top_p": 0.1}))
    store = DictStore()
    given = config(folder)
    store_backbone(given, identify(given), store)
    model, _ = load_backbone(identify(given), store)
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.top_p in (None, 1.0)
    assert model.generation_config.decoder_start_token_id == settings["decoder_start_token_id"]
    assert model.generation_config.eos_token_id == settings["eos_token_id"]


def test_tokenizers_without_padding_pad_with_the_end_and_without_both_are_refused(tmp_path: Path) -> None:
    for changes, pad in (({"pad_token": None}, 1), ({"pad_token": None, "eos_token": None}, None)):
        folder, store = saved(tmp_path / str(pad), tokenizer=False), DictStore()
        tokenizer = tiny_tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        ref = identify(config(folder))
        store_backbone(config(folder), ref, store)
        if pad is not None:
            assert load_backbone(ref, store)[1].pad_token_id == pad
            continue
        with pytest.raises(BackboneError, match="neither a padding nor an end-of-text token"):
            load_backbone(ref, store)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    # transformers would make up an empty one, to which every word is unknown.
    with pytest.raises(BackboneError, match="no tokenizer there"):
        identify(config(saved(tmp_path / "model", tokenizer=False)))


def test_the_number_format_is_the_one_asked_for(tmp_path: Path) -> None:
    folder, store = saved(tmp_path / "model"), DictStore()
    for dtype, wanted in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        ref = identify(config(folder, dtype=dtype))
        store_backbone(config(folder), ref, store)
        assert load_backbone(ref, store)[0].dtype == wanted


def test_a_skeleton_has_modules_and_no_weights(tmp_path: Path) -> None:
    model = skeleton(AutoConfig.from_pretrained(saved(tmp_path / "model")))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model_class(T5Config()) is AutoModelForSeq2SeqLM
    assert model_class(LlamaConfig()) is AutoModelForCausalLM
    assert model_class(BertConfig(is_decoder=True)) is AutoModelForCausalLM


def experiment(folder: Path, **changes: dict[str, Any]) -> ExperimentConfig:
    pet = {"target_modules": ["q_proj", "v_proj"]}
    sections: dict[str, dict[str, Any]] = {
        "backbone": {"path": str(folder)},
        "benchmark": {"suite": "synthetic", "max_source_tokens": 64, "max_target_tokens": 10},
        "pet": pet,
        "generator": {"pet": pet, "max_tokens": 80},
    }
    return ExperimentConfig(
        **{name: {**sections.get(name, {}), **changes.get(name, {})} for name in sections | changes}
    )


def test_a_generator_is_checked_only_where_one_is_used(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    unfit: dict[str, Any] = {"generator": {"pet": {"target_modules": ["query"]}, "max_tokens": 300}}
    with pytest.raises(BackboneError, match=r"^generator\.pet\.target_modules: query match no linear"):
        check_backbone(experiment(folder, **unfit), [])
    for unused in (
        {"method": {"name": "o_lora"}},
        {"reflection": {"source": "statistics"}},
        {"reflection": {"weight": 0}},
    ):
        check_backbone(experiment(folder, **unfit, **unused), [])


def test_a_backbone_is_checked_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model", "llama")
    task = Task("task", "w1 " * 20, (), (), (), "superni", "exact_match")
    check_backbone(experiment(folder), [task])
    monkeypatch.setenv("HOME", str(tmp_path))
    check_backbone(experiment(Path("~/model")), [task])
    for changes, message in (
        ({"pet": {"target_modules": ["q"]}}, "pet.target_modules: q match no linear of LlamaForCausalLM"),
        ({"generator": {"pet": {"target_modules": ["query"]}}}, "query match no linear"),
        ({"benchmark": {"max_source_tokens": 250}}, "256 positions.*max_target_tokens ask for 260"),
        ({"generator": {"max_tokens": 300}}, "256 positions.*generator.max_tokens ask for 300"),
    ):
        with pytest.raises(BackboneError, match=message):
            check_backbone(experiment(folder, **changes), [task])
    with pytest.raises(DataError, match="task: "):
        check_backbone(experiment(folder, benchmark={"max_source_tokens": 8}), [task])
