"""Versions of a pool: what is written can be read back, by us and by PEFT, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sapt_core.data.collate import Collator
from sapt_core.errors import SnapshotError, StoreError
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig
from sapt_core.versions.export import export_block
from sapt_core.versions.loading import load_pool, store_block, store_router
from sapt_core.versions.manifest import SCHEMA_VERSION, CarriedTask, Manifest, require_backbone
from tests.core.tiny import (
    BACKBONES,
    PAD,
    DictStore,
    fill,
    labels_of_every_position,
    learnt_task,
    lora,
    random_rows,
    tiny_backbone,
    tiny_ref,
    tiny_task,
)
from tests.core.versions.made import RECIPE

ATTENTION = AttentionConfig(bottleneck=5, temperature=0.2)


def stored(name: str, store: DictStore, *, blocks: int = 3) -> tuple[Manifest, torch.Tensor]:
    """A version in the store and the logits that its pool gave before."""
    backbone = tiny_backbone(name)
    pool = fill(new_pool(backbone, lora(name), ATTENTION), 1)
    digests = [store_block(pool, store)]
    while len(digests) < blocks:
        pool.freeze()
        fill(pool, 1, seed=len(digests) + 1)
        digests.append(store_block(pool, store))
    pool.freeze()
    manifest = Manifest(
        method={"name": "sapt"},
        backbone=tiny_ref(),
        pet=lora(name),
        attention=ATTENTION,
        tasks=tuple(learnt_task(tiny_task(number)) for number in range(blocks)),
        blocks=tuple(digests),
        router=store_router(pool, store),
        targets=tuple((1 / (n + 1),) * (n + 1) for n in range(blocks)),
        parent=None,
    )
    return manifest, logits(SaptModel(backbone, pool).eval())


def logits(model: SaptModel) -> torch.Tensor:
    batch = Collator(PAD, model.is_encoder_decoder)(random_rows(4))
    assert batch.labels is not None
    with torch.no_grad():
        return model(batch)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_loaded_pool_gives_identical_logits(name: str) -> None:
    store = DictStore()
    manifest, before = stored(name, store)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    torch.manual_seed(99)
    backbone = tiny_backbone(name)
    pool = load_pool(manifest, store, backbone)
    assert not [parameter for name, parameter in pool.named_parameters() if not name.startswith("attention.")]
    assert torch.equal(logits(SaptModel(backbone, pool).eval()), before)
    assert len(store.blobs) == 4  # one a block, one for the router


def test_the_digest_is_that_of_the_canonical_manifest() -> None:
    manifest, _ = stored("t5", DictStore(), blocks=1)
    value = json.loads(manifest.to_bytes())
    shuffled = json.dumps(dict(reversed(value.items()))).encode()
    assert Manifest.from_bytes(shuffled).digest == manifest.digest
    assert manifest.model_copy(update={"parent": "0" * 64}).digest != manifest.digest


@pytest.mark.parametrize("schema", [1, 2])
def test_a_manifest_of_an_earlier_schema_is_read_and_keeps_its_name(schema: int) -> None:
    manifest, _ = stored("t5", DictStore())
    value = json.loads(manifest.to_bytes())
    value["schema_version"] = schema
    value["method"] = "sapt"
    del value["state"]
    if schema == 1:
        for name in ("query", "pool_padding", "scale", "selection", "learning_rate_ratio"):
            del value["attention"][name]
        value["attention"]["learning_rate"] = 0.01
        del value["pet"]["detach_frozen"]
    written = json.dumps(value, sort_keys=True, indent=1).encode()
    read = Manifest.from_bytes(written)
    assert (read.attention, read.pet, read.blocks) == (manifest.attention, manifest.pet, manifest.blocks)
    assert read.to_bytes() == written
    assert read.digest == hashlib.sha256(written).hexdigest()
    assert read.model_copy(update={"parent": "0" * 64}).parent == "0" * 64
    assert json.loads(read.model_copy(update={"parent": "0" * 64}).to_bytes())["parent"] == "0" * 64


def test_a_damaged_or_missing_blob_is_refused() -> None:
    for index in (0, 2, None):
        store = DictStore()
        manifest, _ = stored("t5", store)
        digest = manifest.router if index is None else manifest.blocks[index]
        assert digest is not None
        store.blobs[digest] = store.blobs[digest][:-1] + b"\x01"
        with pytest.raises(StoreError, match=digest):
            load_pool(manifest, store, tiny_backbone("t5"))
        del store.blobs[digest]
        with pytest.raises(StoreError, match=digest):
            load_pool(manifest, store, tiny_backbone("t5"))


def test_a_blob_that_is_no_safetensors_file_is_refused_unread() -> None:
    store = DictStore()
    manifest, _ = stored("t5", store)
    pickled = store.put(b"\x80\x04K\x01.")
    for changes in ({"blocks": (pickled, *manifest.blocks[1:])}, {"router": pickled}):
        with pytest.raises(SnapshotError, match=f"{pickled}.*no safetensors"):
            load_pool(manifest.model_copy(update=changes), store, tiny_backbone("t5"))


def test_another_backbone_is_refused() -> None:
    store = DictStore()
    manifest, _ = stored("t5", store)
    require_backbone(manifest, tiny_ref(path="moved elsewhere"))
    for other in (tiny_ref(files={"model.safetensors": "1" * 64}), tiny_ref(dtype="bfloat16")):
        with pytest.raises(SnapshotError, match=r"learnt on backbone tiny .* give the backbone it was learnt on"):
            require_backbone(manifest, other)
    with pytest.raises(SnapshotError, match="does not fit"):
        load_pool(manifest, store, tiny_backbone("t5_narrow"))


def test_a_router_of_other_width_or_number_of_keys_is_refused() -> None:
    store = DictStore()
    manifest, _ = stored("t5", store)
    assert manifest.router is not None
    tensors = load_tensors(store.get(manifest.router))
    for changes in (
        {"keys": tensors["keys"][:2]},
        {"keys": tensors["keys"][:, :8].contiguous()},
        {"up.weight": tensors["up.weight"][:, :4].contiguous()},
        {"extra": torch.zeros(1)},
    ):
        router = store.put(save_tensors(tensors | changes))
        with pytest.raises(SnapshotError, match=f"router does not fit.*{next(iter(changes))}"):
            load_pool(manifest.model_copy(update={"router": router}), store, tiny_backbone("t5"))
    del tensors["keys"]
    with pytest.raises(SnapshotError, match="keys"):
        load_pool(manifest.model_copy(update={"router": store.put(save_tensors(tensors))}), store, tiny_backbone("t5"))


def edited(**changes: Any) -> bytes:
    manifest, _ = stored("t5", DictStore())
    return json.dumps(json.loads(manifest.to_bytes()) | changes).encode()


def test_no_manifest_holds_a_weight_that_is_no_number() -> None:
    manifest, _ = stored("t5", DictStore())
    with pytest.raises(ValueError, match="finite number"):
        Manifest(**{**dict(manifest), "targets": ((1.0,), (0.5, math.inf), (0.2, 0.3, 0.5))})


def test_a_manifest_that_cannot_be_understood_is_refused() -> None:
    for data, message in (
        (b"\xff\xfe", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not valid"),
        (edited(schema_version=SCHEMA_VERSION + 1), f"schema version {SCHEMA_VERSION + 1}.*Update"),
        (edited(method=3), "method"),
        (edited(colour="x"), "colour"),
        (edited(router=None), "attention and router"),
        (edited(attention=None), "attention and router"),
        (edited(attention=None, router=None), "method sapt does not go with a version that has no attention"),
        (edited(blocks=["0" * 64]), "3 tasks, 1 blocks"),
        (edited(targets=[[1.0]]), "do not belong together"),
        (edited(tasks=[]), "do not belong together"),
        (edited(targets=[[1.0], [0.5, math.nan], [0.2, 0.3, 0.5]]), "it holds NaN, so its training diverged; learn it"),
    ):
        with pytest.raises(SnapshotError, match=message):
            Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["../out.json", "/etc/out.json", "folder/config.json", "a\\b.json", "a\0.json", "..", "", "model.bin", "run.py"],
)
def test_names_in_somebody_elses_manifest_stay_in_their_folder(name: str) -> None:
    files = {"config.json": "0" * 64, name: "1" * 64}
    with pytest.raises(SnapshotError, match=r"backbone\.files: .* is no plain name"):
        Manifest.from_bytes(edited(backbone={"path": "model", "files": files}))


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {"path": "model", "files": {"config.json": "../" * 22}}},
        {"backbone": {"path": "/etc"}},
        {"backbone": {"path": "../model"}},
        {"backbone": {"path": "owner/model", "revision": "../../refs"}},
        {"backbone": {"path": "owner/model", "dtype": "load"}},
        {"blocks": ["0" * 64, "0" * 64, "../../secret"]},
        {"router": "0" * 63},
        {"state": {"memory": "/etc/x"}},
        {"parent": "x"},
    ],
)
def test_addresses_in_somebody_elses_manifest_are_digests_and_hub_ids(changes: dict[str, Any]) -> None:
    with pytest.raises(SnapshotError, match=f"not valid: {next(iter(changes))}"):
        Manifest.from_bytes(edited(**changes))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("index", [0, 2])
def test_peft_loads_an_exported_block_and_computes_the_same(name: str, index: int, tmp_path: Path) -> None:
    store = DictStore()
    manifest, mixed = stored(name, store)
    export_block(manifest, index, store, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    backbone = tiny_backbone(name)
    single = new_pool(backbone, lora(name), None)
    single.blocks.append_frozen(load_tensors(store.get(manifest.blocks[index])))
    model = SaptModel(backbone, single).eval()
    ours = logits(model)

    adapted = PeftModel.from_pretrained(backbone, str(tmp_path / "adapter")).eval()
    batch = Collator(PAD, model.is_encoder_decoder)(random_rows(4))
    with torch.no_grad():
        labels = labels_of_every_position(batch, model)
        theirs = adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).logits
    torch.testing.assert_close(ours, theirs[:, -ours.shape[1] :], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, mixed, atol=1e-3)


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    store = DictStore()
    manifest, _ = stored("t5", store)
    for index in (-1, 3):
        with pytest.raises(SnapshotError, match=f"no block {index}; the version has blocks 0 to 2"):
            export_block(manifest, index, store, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    (tmp_path / "note.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(SnapshotError, match="not an empty folder"):
            export_block(manifest, 0, store, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_export_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = DictStore()
    manifest, _ = stored("t5", store)
    (tmp_path / "adapter").mkdir()
    del store.blobs[manifest.blocks[1]]
    with pytest.raises(StoreError):
        export_block(manifest, 1, store, tmp_path / "adapter")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter"]
    export_block(manifest, 0, store, tmp_path / "adapter")
    assert len(list((tmp_path / "adapter").iterdir())) == 2


def test_a_completed_version_is_the_parent_that_it_was_trained_as() -> None:
    manifest, _ = stored("t5", DictStore(), blocks=1)
    assert manifest.as_parent == manifest.digest
    some = "0" * 64
    carried = CarriedTask(data=some, rows={}, tokens={}, reflection={}, origin=some, curve=some)
    complete = manifest.complete(lineage=some, recipe=RECIPE, carried=[carried])
    assert complete.digest != manifest.digest
    assert complete.as_parent == manifest.digest
