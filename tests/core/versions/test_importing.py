"""Adapters that PEFT made, as blocks: they compute what PEFT does, or are refused with all that is against them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapt_core.errors import FaultsError
from sapt_core.methods.base import find_method
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, LoRAConfig, PromptConfig
from sapt_core.training.reflection import GaussianQueries
from sapt_core.versions.importing import PoolKind, import_adapter
from sapt_core.versions.loading import load_blob, load_pool, load_router
from sapt_core.versions.manifest import Manifest
from sapt_core.versions.predictor import Predictor
from tests.core.lessons import learn
from tests.core.tiny import PAD, DictStore, labels_of_every_position, lora, random_rows, targets, tiny_backbone
from tests.core.versions.made import learnt, version

ROWS = ["w1 w2 w3", "w2 w4", "w5 w1 w2"]
NEW = learnt("colour", definition="w9")
OF = {"t5": "DenseReluDense.wo", "llama": "mlp.down_proj"}


def adapter(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A folder that PEFT wrote, of an adapter with random weights."""
    options = {"r": 2, "lora_alpha": 6, "target_modules": list(targets(name)), **changes}
    made = get_peft_model(tiny_backbone(name), LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, value in made.named_parameters():
            if "lora_" in parameter_name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
    made.to(dtype).save_pretrained(str(folder))
    return folder


def of_peft(folder: Path, name: str) -> Tensor:
    peft = PeftModel.from_pretrained(tiny_backbone(name), str(folder)).eval()
    model = SaptModel(tiny_backbone(name), new_pool(tiny_backbone(name), lora(name), None))
    batch = model.collator(PAD)(random_rows(4))
    assert batch.labels is not None
    with torch.no_grad():
        labels = labels_of_every_position(batch, model)
        logits: Tensor = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).logits
    return logits[:, -batch.labels.shape[1] :]


def newest_alone(manifest: Manifest, store: DictStore, name: str) -> Tensor:
    """Logits of the newest block with weight 1."""
    backbone = tiny_backbone(name)
    pool = new_pool(backbone, manifest.pet, None)
    pool.blocks.append_frozen(load_blob(manifest.blocks[-1], store))
    model = SaptModel(backbone, pool).eval()
    with torch.no_grad():
        logits: Tensor = model(model.collator(PAD)(random_rows(4)))
    return logits


KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "alike": lambda name: {},
    "another alpha": lambda name: {"lora_alpha": 5},
    "a smaller rank": lambda name: {"r": 1},
    "rslora": lambda name: {"use_rslora": True, "lora_alpha": 3},
    "rank_pattern": lambda name: {"rank_pattern": {targets(name)[1]: 1}},
    "alpha_pattern": lambda name: {"alpha_pattern": {rf".*\.{targets(name)[0]}": 1.5}, "use_rslora": True},
    "one module": lambda name: {"target_modules": [targets(name)[0]]},
    "a pattern": lambda name: {"target_modules": rf".*\.{targets(name)[1]}"},
    "excluded": lambda name: {"exclude_modules": rf".*\.1\..*\.{targets(name)[0]}"},
    "bfloat16": lambda name: {"dtype": torch.bfloat16},
    "eva": lambda name: {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_weight_one_computes_what_peft_does(name: str, kind: str, tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone", name)
    folder = adapter(tmp_path / "adapter", name, **KINDS[kind](name))
    after = import_adapter(folder, NEW, ROWS, store, onto=before)
    wanted = of_peft(folder, name)
    torch.testing.assert_close(newest_alone(after, store, name), wanted, rtol=1e-4, atol=1e-5)
    bare = tiny_backbone(name)
    assert not torch.allclose(wanted, newest_alone(before, store, name), atol=1e-2)
    assert dict(after.model_dump(), tasks=0, blocks=0, router=0, targets=0, parent=0) == dict(
        before.model_dump(), tasks=0, blocks=0, router=0, targets=0, parent=0
    )
    assert (after.parent, after.blocks[:3], after.tasks) == (before.digest, before.blocks, (*before.tasks, NEW))
    load_pool(after, store, bare)


def test_a_subset_of_layers(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone", "llama")
    folder = adapter(tmp_path / "adapter", "llama", layers_to_transform=[1])
    after = import_adapter(folder, NEW, ROWS, store, onto=before)
    torch.testing.assert_close(newest_alone(after, store, "llama"), of_peft(folder, "llama"), rtol=1e-4, atol=1e-5)
    block = load_blob(after.blocks[-1], store)
    assert all(bool(value.any()) == (".layers.1." in tensor) for tensor, value in block.items())


def test_an_adapter_of_the_pools_own_kind_keeps_its_numbers(tmp_path: Path) -> None:
    store = DictStore()
    folder = adapter(tmp_path / "adapter", "t5")
    after = import_adapter(folder, NEW, ROWS, store, onto=version(store, tmp_path / "backbone"))
    given, block = load_file(folder / "adapter_model.safetensors"), load_blob(after.blocks[-1], store)
    assert given.keys() == block.keys()
    assert all(torch.equal(value, block[name]) for name, value in given.items())


# Key and targets


def test_the_key_points_to_the_mean_query_and_the_others_stay(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    after = import_adapter(adapter(tmp_path / "adapter", "t5"), NEW, ROWS, store, onto=before)
    attention, keys = load_router(after, store)
    old, old_keys = load_router(before, store)
    assert torch.equal(keys[:3], old_keys)
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in attention.state_dict().items())
    assert float(keys[3].norm()) == pytest.approx(4.0, rel=1e-5)  # √16
    answers = Predictor.load(after.to_bytes(), store).predict(ROWS, ["colour"] * 3)
    means = [sum(answer.weights[name] for answer in answers) / 3 for name in after.block_names]
    assert list(after.targets[-1]) == pytest.approx(means, abs=1e-5)
    assert after.targets[:3] == before.targets
    assert after.targets[-1][3] == max(after.targets[-1])
    assert import_adapter(tmp_path / "adapter", NEW, ROWS, store, onto=before) == after


def test_statistics_stand_for_rows(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    folder = adapter(tmp_path / "adapter", "t5")
    known = GaussianQueries(torch.linspace(-1, 1, 16), torch.zeros(0, 16), torch.full((16,), 1e-4))
    after = import_adapter(folder, NEW, known, store, onto=before)
    attention, keys = load_router(after, store)
    with torch.no_grad():
        wanted = attention.task_key(known.mean.unsqueeze(0))
    torch.testing.assert_close(keys[3], wanted, rtol=1e-2, atol=1e-2)
    assert sum(after.targets[-1]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_first_block_begins_a_pool_that_learns_on(name: str, tmp_path: Path) -> None:
    store = DictStore()
    ref = version(store, tmp_path / "backbone", name).backbone
    attention = AttentionConfig(bottleneck=5, temperature=0.2, centre="vocabulary", key_init="task_mean")
    kind = PoolKind(find_method("sapt").model_validate({}), ref, lora(name), attention)
    folder = adapter(tmp_path / "adapter", name, lora_alpha=3)
    first = import_adapter(folder, NEW, ROWS, store, onto=kind)
    assert (first.parent, first.targets, first.block_names) == (None, ((1.0,),), ("colour",))
    assert load_router(first, store)[0].centre.any()
    assert import_adapter(folder, NEW, ROWS, store, onto=kind) == first
    torch.testing.assert_close(newest_alone(first, store, name), of_peft(folder, name), rtol=1e-4, atol=1e-5)
    second, _ = learn(store, 1, first, name=name, ref=ref, attention=attention, kept=[ROWS])
    assert second.block_names == ("colour", "task1")
    assert second.blocks[0] == first.blocks[0]


@pytest.mark.parametrize("method", ["o_lora", "per_task"])
def test_methods_without_attention_take_a_block_too(method: str, tmp_path: Path) -> None:
    store = DictStore()
    ref = version(store, tmp_path / "backbone").backbone
    kind = PoolKind(find_method(method).model_validate({}), ref, lora("t5"), None)
    first = import_adapter(adapter(tmp_path / "adapter", "t5"), NEW, (), store, onto=kind)
    second = import_adapter(tmp_path / "adapter", learnt("other"), (), store, onto=first)
    assert (second.targets, second.router) == (((1.0,), (1.0, 1.0)), None)


# What is refused


def refused(folder: Path, store: DictStore, onto: Manifest | PoolKind, *parts: str, **changes: Any) -> None:
    there = dict(store.blobs)
    with pytest.raises(FaultsError) as told:
        import_adapter(folder, **{"task": NEW, "known": ROWS, **changes}, store=store, onto=onto)
    assert str(told.value).startswith("The adapter cannot become a block:")
    for part in parts:
        assert part in str(told.value)
    assert store.blobs == there


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"r": 3}, ["its rank is 3", "the pool's blocks have 2"]),
        ({"rank_pattern": {"v": 4}}, ["its rank is 4"]),
        ({"target_modules": ["q", "wo"]}, ["it adapts wo, and the pool's blocks q, v alone"]),
        ({"target_modules": "all-linear"}, ["it adapts k, o, wi and 1 more"]),
        ({"target_modules": ["q", "shared"]}, ["it adapts shared"]),
        ({"use_dora": True}, ["use_dora true: DoRA scales the whole weight", "lora_magnitude_vector"]),
        ({"bias": "lora_only"}, ['bias "lora_only"']),
        ({"lora_bias": True}, ["lora_bias true"]),
        ({"modules_to_save": ["lm_head"]}, ['modules_to_save ["lm_head"]']),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights pissa", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights olora"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_kind_that_no_block_is_of(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    refused(adapter(tmp_path / "adapter", "t5", **changes), store, before, *parts)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_are_no_lora(config: Any, tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    backbone = tiny_backbone("t5")
    get_peft_model(backbone, config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", store, before, "the pool's blocks are LoRA; give an adapter of peft_type LORA")


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    folder = adapter(tmp_path / "adapter", "t5")
    edited(folder, target_parameters=["experts"], some_new_thing={"a": 1}, peft_version="99.0")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:, :1].contiguous()
    tensors[names[2]][0, 0] = math.nan
    tensors[names[3]] = tensors[names[3]].to(torch.int8)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2)
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(
        folder,
        store,
        before,
        "target_parameters",
        'some_new_thing {"a": 1}',
        f"1 of {len(names)} tensors are missing: {names[0]}",
        "1 tensors are none that its settings name on this backbone: base_model.model.lm_head.weight",
        f"{names[1]} is 16x1 and on this backbone, in this rank, it would be 16x2",
        f"{names[2]} holds numbers that are not finite",
        f"{names[3]} holds int8",
        "--task QA: the version has learnt qa, which differs in case alone",
        "there is no metric 'meteor'",
        "row 1 is blank",
        task=learnt("QA", metric="meteor"),
        known=["w1", " "],
    )


def test_an_adapter_of_another_backbone(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    refused(adapter(tmp_path / "llama", "llama"), store, before, "does not go with T5", "not found in the base model")
    # Of the same names and another width.
    refused(adapter(tmp_path / "wide", "t5_narrow"), store, before, "is 12x2 and on this backbone", "16x2")


def test_only_safetensors_is_read(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone")
    folder = adapter(tmp_path / "adapter", "t5")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, store, before, "adapter_model.bin is pickled and is not read")
    (folder / "adapter_model.safetensors").write_bytes(b"PK")
    refused(folder, store, before, "is no safetensors file")
    refused(tmp_path / "nosuch", store, before, "adapter_config.json: no such file", "adapter_model.safetensors: no")
    (folder / "adapter_config.json").write_text("{")
    refused(folder, store, before, "adapter_config.json cannot be read")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "8", "lora_alpha": NaN}')
    refused(folder, store, before, "adapter_config.json: r: ", "adapter_config.json: lora_alpha: ")
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, store, before, "adapter_config.json: ")


def test_a_pool_that_takes_no_lora_block(tmp_path: Path) -> None:
    store = DictStore()
    folder = adapter(tmp_path / "adapter", "t5")
    before = version(store, tmp_path / "backbone", attention=None)
    refused(folder, store, before, "method sequential has one block for all tasks")
    refused(folder, store, version(store, tmp_path / "backbone", pet=PromptConfig(length=3)), "pet.type prompt")
    kind = PoolKind(find_method("am_lora").model_validate({}), before.backbone, lora("t5"), None)
    refused(folder, store, kind, "the blocks of method am_lora are of its own kind")
    refused(folder, store, version(store, tmp_path / "backbone"), "there are no rows", known=())


def test_scaling_that_leaves_float32_is_refused(tmp_path: Path) -> None:
    store = DictStore()
    before = version(store, tmp_path / "backbone", pet=LoRAConfig(r=2, lora_alpha=1e-30, target_modules=("q", "v")))
    folder = adapter(tmp_path / "adapter", "t5", lora_alpha=1e30)
    refused(folder, store, before, "too large for float32")
