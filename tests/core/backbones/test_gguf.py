"""A GGUF file as a backbone: named by its own digest, dense on purpose, and refused where it would be another model."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, get_tensor_name_map, quantize
from numpy import arange, float32, ones
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones import dense, loading
from sapt_core.backbones.dense import dense_folder, dense_place
from sapt_core.backbones.files import file_digest
from sapt_core.backbones.loading import load_backbone, load_embeddings, load_encoding, store_backbone
from sapt_core.backbones.reference import BackboneRef, identify, location, stored_model_config, weight_bytes
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.config.preflight import check_backbone, settle_precision
from sapt_core.errors import BackboneError, ServiceError
from sapt_core.settings import BackboneConfig
from tests.core.backbones.folders import LFS_POINTER, saved
from tests.core.backbones.ggufs import MERGES, TOKENS, TURN_END, llama, write_gguf
from tests.core.tiny import DictStore

KINDS = GGMLQuantizationType
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def given(folder: Path, **changes: Any) -> BackboneConfig:
    return BackboneConfig(**{"path": str(folder), "gguf_file": "model.gguf", **changes})


def experiment(folder: Path, **changes: Any) -> ExperimentConfig:
    pet = {"target_modules": ["q_proj", "v_proj"]}
    return ExperimentConfig(
        backbone=given(folder, **changes),
        benchmark={"suite": "synthetic", "max_source_tokens": 32, "max_target_tokens": 10},
        pet=pet,
        reflection={"source": "none"},
    )


def loaded(config: BackboneConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    store, ref = DictStore(), identify(config)
    store_backbone(config, ref, store)
    return load_backbone(ref, store)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (8, 1)])
def test_it_is_the_model_that_was_written(tied: bool, heads: int, groups: int, tmp_path: Path) -> None:
    wanted = llama(tied=tied, heads=heads, groups=groups)
    write_gguf(tmp_path / "model.gguf", wanted)
    model, _ = loaded(given(tmp_path))
    assert set(model.state_dict()) == set(wanted.state_dict())
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.F16])
def test_blocks_become_the_numbers_they_stand_for(kind: KINDS, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama(), kind)
    model, _ = loaded(given(tmp_path))
    (found,) = (each for each in GGUFReader(tmp_path / "model.gguf").tensors if each.name == "blk.1.ffn_down.weight")
    assert found.tensor_type == kind
    assert model.dtype == torch.float32
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.weight, torch.tensor(dequantize(found.data, found.tensor_type))
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "wanted"),
    [
        (KINDS.BF16, "auto", torch.bfloat16),
        (KINDS.BF16, "float32", torch.float32),
        (KINDS.Q8_0, "bfloat16", torch.bfloat16),
        (KINDS.F32, "auto", torch.float32),
    ],
)
def test_number_formats(kind: KINDS, dtype: str, wanted: torch.dtype, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama(), kind)
    assert loaded(given(tmp_path, dtype=dtype))[0].dtype == wanted
    settled = settle_precision(experiment(tmp_path, dtype=dtype), identify(given(tmp_path, dtype=dtype)))
    assert (settled.train.precision == "bfloat16") or wanted == torch.float32


@pytest.mark.parametrize(
    ("pre", "pieces"), [("smollm", ["Ġa", "ĠĠ", "1", "2"]), ("gpt-2", ["Ġa", "Ġ", "Ġ1", "2"]), ("mine", None)]
)
def test_texts_are_cut_as_the_model_was_taught(
    pre: str, pieces: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "model.gguf", llama(), pre=pre)
    _, tokenizer = loaded(given(tmp_path))
    if pieces is not None:
        assert tokenizer.tokenize(" a  12") == pieces
    assert ("tokenizer.ggml.pre=mine" in caplog.text) == (pre == "mine")
    assert len(tokenizer) == len(TOKENS) > len(MERGES)
    assert tokenizer.decode(tokenizer("a 12")["input_ids"]) == "a 12"
    assert tokenizer.chat_template
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"  # noqa: S105 - a token


def test_answers_end_with_a_turn_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama(), more=lambda writer: writer.add_eot_token_id(TURN_END))
    assert loaded(given(tmp_path))[0].generation_config.eos_token_id == [0, TURN_END]


def test_the_file_alone_names_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a" / "model.gguf", llama())
    ref = identify(given(tmp_path / "a"))
    digest = file_digest(tmp_path / "a" / "model.gguf")
    assert ref.model_dump() == {
        "path": "a",
        "revision": None,
        "files": {"model.gguf": digest},
        "dtype": "auto",
        "gguf_file": "model.gguf",
        "joined": True,
    }
    # What else lies there is not read, and counts for nothing.
    (tmp_path / "a" / "tokenizer_config.json").write_text("{")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    saved(tmp_path / "a", tokenizer=False)
    shutil.rmtree(dense_place(digest, "auto"))
    assert identify(given(tmp_path / "a")) == ref
    assert identify(given(tmp_path / "a", dtype="bfloat16")).digest != ref.digest
    check_backbone(experiment(tmp_path / "a"), [])
    # A folder's name is as it was.
    assert "gguf_file" not in identify(BackboneConfig(path=str(saved(tmp_path / "t5")))).model_dump()


def test_it_reaches_another_node_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, store = llama(), DictStore()
    folder = write_gguf(tmp_path / "model.gguf", wanted).parent
    ref = identify(given(folder))
    store_backbone(given(folder), ref, store)
    (folder / "model.gguf").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # the other node has the store alone
    loading._load_cached.cache_clear()
    again = BackboneRef.model_validate_json(ref.model_dump_json())
    assert stored_model_config(again, store).num_hidden_layers == 2
    config, _ = load_encoding(again, store)
    assert config.hidden_size == 32
    embeddings, _ = load_embeddings(again, store)
    assert torch.equal(embeddings.get_input_embeddings().weight, wanted.model.embed_tokens.weight)
    assert embeddings.lm_head.weight.is_meta or embeddings.config.tie_word_embeddings
    model, _ = load_backbone(again, store)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_it_is_made_dense_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = write_gguf(tmp_path / "model.gguf", llama(), KINDS.Q8_0).parent, []
    plain = dense.write_dense
    monkeypatch.setattr(dense, "write_dense", lambda *args: calls.append(args) or plain(*args))
    assert weight_bytes(given(folder)) == 0  # not known yet
    loaded(given(folder))
    check_backbone(experiment(folder), [])
    assert len(calls) == 1
    made = location(given(folder))
    assert weight_bytes(given(folder)) == (made / "model.safetensors").stat().st_size
    assert not list(made.parent.glob(".partial-*"))
    # Damaged since: made anew.
    data = bytearray((made / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (made / "model.safetensors").write_bytes(data)
    location(given(folder))
    assert len(calls) == 2


def test_a_cache_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ServiceError, match="set XDG_CACHE_HOME to a folder with free space"):
        dense_folder(file, "0" * 64, "auto", "mine")


def lfm2(path: Path) -> Path:
    """A class whose blocks transformers would keep packed."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    model, writer = Lfm2ForCausalLM(config), GGUFWriter(path, "lfm2")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2])
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    names = get_tensor_name_map(MODEL_ARCH.LFM2, 2)
    for key, value in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if key == "lm_head.weight" or name is None:
            assert key == "lm_head.weight"
            continue
        packed = value.ndim == 2
        tensor = value.squeeze(1) if value.ndim == 3 else value
        kind = KINDS.Q8_0 if packed else KINDS.F32
        writer.add_tensor(name, quantize(tensor.numpy().astype(float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_no_weight_stays_packed_where_there_are_kernels_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def supports(self, _: int) -> bool:
            return True

    # As on a machine that has them.
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", Kernel)
    lfm2(tmp_path / "model.gguf")
    model, _ = loaded(given(tmp_path))
    linears = [module for name, module in model.named_modules() if name.endswith(("_proj", ".w1", ".w2", ".w3"))]
    assert len(linears) == 12
    assert {type(module) for module in linears} == {nn.Linear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_positions_of_llama_3_are_scaled_as_they_were(factor: float, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain, wanted = llama(heads=1, groups=1), llama(heads=1, groups=1, rope=scaling)
    bare = llama(heads=1, groups=1, rope={"rope_type": "default", "rope_theta": 5e5})
    # The table as who converts the model makes it: what it divides the plain frequencies by.
    table = (bare.model.rotary_emb.inv_freq / wanted.model.rotary_emb.inv_freq).numpy()
    assert table.min() == 1
    assert table.max() == pytest.approx(factor)
    assert len(set(table.tolist())) > 2
    write_gguf(tmp_path / "model.gguf", wanted, more=lambda w: appended(w, "rope_freqs.weight", table))
    model, _ = loaded(given(tmp_path))
    far = torch.arange(100_000, 100_006)[None]
    torch.testing.assert_close(model(IDS, position_ids=far).logits, wanted(IDS, position_ids=far).logits)
    assert (plain(IDS, position_ids=far).logits - wanted(IDS, position_ids=far).logits).abs().max() > 0.1


def appended(writer: GGUFWriter, name: str, data: Any) -> None:
    writer.add_tensor(name, data)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_uint16("split.count", 3), r"is one of 3 parts: join them"),
        (
            lambda w: w.add_rope_scaling_type(_Named("yarn")),
            r"scaled by rope.scaling.type yarn, which transformers leaves",
        ),
        (
            lambda w: appended(w, "rope_freqs.weight", arange(1, 5, dtype=float32)),
            r"scaled by a table \(rope_freqs.weight\)",
        ),
        (
            lambda w: appended(w, "blk.0.attn_q.bias", ones(32, float32)),
            r"LlamaForCausalLM, as .* has no place for 1 of its 21 tensors \(blk.0.attn_q.bias\)",
        ),
        (
            lambda w: appended(w, "spare.weight", ones(4).astype("int32")),
            r"kind I32 cannot be read; these can: BF16, F16",
        ),
    ],
)
def test_what_would_be_another_model_is_refused(
    more: Callable[[GGUFWriter], Any], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", llama(), more=more)
    with pytest.raises(BackboneError, match=message) as error:
        identify(given(tmp_path))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "sapt" / "dense").glob("*"))


class _Named:
    def __init__(self, value: str) -> None:
        self.value = value


def renamed(data: bytes) -> bytes:
    """An architecture of the same length that nobody knows."""
    return data.replace(b"llama", b"lluma")


def unknown_kind(data: bytes) -> bytes:
    """The first tensor's kind, F32, as a number that stands for nothing yet."""
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    return data[:at] + (99).to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed, r"architecture lluma cannot be read; these can: bloom, .*llama, .*qwen35"),
        (unknown_kind, r"weights of kind 99 cannot be read; these can: .*Q4_K"),
        (lambda data: data.replace(b"1 2", b"1 \x01"), r"model.gguf cannot be read: .* out of vocabulary"),
        (lambda data: data[: len(data) // 2], r"model.gguf is damaged or cut short \(.*\); fetch it again"),
        (lambda data: data[:300], r"model.gguf is damaged or cut short"),
        (lambda data: b"PK" + data, r"model.gguf is no GGUF file"),
        (lambda _: b"", r"model.gguf is no GGUF file"),
        (lambda _: LFS_POINTER.encode(), r"Git LFS pointers stand in the place of model.gguf"),
    ],
)
def test_what_cannot_be_read_is_refused(spoil: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama())
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BackboneError, match=message) as error:
        identify(given(tmp_path))
    assert "\n" not in str(error.value)


def test_all_that_is_against_a_file_is_told_at_once(tmp_path: Path) -> None:
    def more(writer: GGUFWriter) -> None:
        writer.add_uint16("split.count", 2)
        appended(writer, "rope_freqs.weight", ones(4, float32))

    file = write_gguf(tmp_path / "model.gguf", llama(), more=more)
    file.write_bytes(renamed(file.read_bytes()))
    with pytest.raises(BackboneError, match=r"2 parts.*; architecture lluma.*; its rotary positions"):
        identify(given(tmp_path))


def test_a_file_that_is_not_named_rightly(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama())
    with pytest.raises(BackboneError, match=r"no file other\.gguf there; GGUF files there: model\.gguf"):
        identify(given(tmp_path, gguf_file="other.gguf"))
    with pytest.raises(BackboneError, match=r"name one as backbone\.gguf_file \(model\.gguf\)"):
        identify(BackboneConfig(path=str(tmp_path)))
    with pytest.raises(BackboneError, match=rf"backbone\.path={tmp_path} backbone\.gguf_file=model\.gguf"):
        identify(BackboneConfig(path=str(tmp_path / "model.gguf")))
    for name in ("../model.gguf", "model.bin", ".gguf/x", ""):
        with pytest.raises(ValueError, match="gguf_file"):
            given(tmp_path, gguf_file=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"gguf_file": "other.gguf"},
        {"gguf_file": None},
        {"files": {"model.gguf": "0" * 64, "config.json": "0" * 64}},
        {"files": None},
        {"files": {"../model.gguf": "0" * 64}, "gguf_file": "../model.gguf"},
    ],
)
def test_a_version_that_names_its_file_wrongly_is_refused(changes: dict[str, Any]) -> None:
    values = {"path": "owner/mine", "files": {"model.gguf": "0" * 64}, "gguf_file": "model.gguf"}
    BackboneRef(**values)
    with pytest.raises(ValueError, match="gguf"):
        BackboneRef(**{**values, **changes})


def test_where_it_lies_is_no_part_of_an_experiment(tmp_path: Path) -> None:
    plain = experiment(tmp_path, gguf_file=None)
    assert experiment(tmp_path).digest() == plain.digest()
    assert "gguf_file" not in json.dumps(plain.hashed({}))
    assert experiment(tmp_path).hashed({})["backbone"]["gguf_file"] == "model.gguf"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
