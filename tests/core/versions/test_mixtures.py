"""A mixture of blocks as one PEFT adapter, against the pool with those weights and against a plain sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from sapt_core.errors import SnapshotError, StoreError
from sapt_core.pool.model import SaptModel
from sapt_core.settings import PromptConfig
from sapt_core.versions.export import export_mixture, mixture_of
from sapt_core.versions.loading import load_blob, load_pool
from sapt_core.versions.manifest import Manifest
from sapt_core.versions.predictor import Predictor
from tests.core.tiny import PAD, DictStore, labels_of_every_position, random_rows, sapt_model, tiny_backbone
from tests.core.versions.made import version

WEIGHTS = {"qa_hard": 0.7, "task7_sum": 0.35}


def with_weights(manifest: Manifest, store: DictStore, name: str, *weights: float) -> Tensor:
    """Logits of the pool with fixed weights."""
    backbone = tiny_backbone(name)
    pool = load_pool(manifest, store, backbone)
    model = SaptModel(backbone, pool).eval()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "attend", lambda pooled: torch.tensor(weights).expand(len(pooled), -1))
        logits: Tensor = model(model.collator(PAD)(random_rows(4)))
    return logits


def of_peft(folder: Path, name: str, like: Tensor) -> Tensor:
    """Logits of PEFT with the adapter, of the positions that the pool gives."""
    peft = PeftModel.from_pretrained(tiny_backbone(name), str(folder)).eval()
    model = sapt_model(name, 1)
    batch = model.collator(PAD)(random_rows(4))
    with torch.no_grad():
        labels = labels_of_every_position(batch, model)
        given = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).logits
    return given[:, -like.shape[1] :]


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("pet", [None, PromptConfig(length=3)], ids=["lora", "prompt"])
def test_peft_computes_what_the_pool_does_with_the_weights(name: str, pet: PromptConfig | None, tmp_path: Path) -> None:
    store = DictStore()
    manifest = version(store, tmp_path / "backbone", name, pet=pet)
    export_mixture(manifest, WEIGHTS, store, tmp_path / "adapter")
    wanted = with_weights(manifest, store, name, 0.7, 0.0, 0.35)
    torch.testing.assert_close(of_peft(tmp_path / "adapter", name, wanted), wanted, rtol=1e-4, atol=1e-5)
    alone = with_weights(manifest, store, name, 1.0, 0.0, 0.0)
    assert not torch.allclose(wanted, alone, atol=1e-2)


def test_the_weights_of_the_backbone_change_by_the_plain_sum(tmp_path: Path) -> None:
    store = DictStore()
    manifest = version(store, tmp_path / "backbone")
    export_mixture(manifest, WEIGHTS, store, tmp_path / "adapter")
    merged = PeftModel.from_pretrained(tiny_backbone("t5"), str(tmp_path / "adapter")).merge_and_unload()
    blocks = {task.name: load_blob(digest, store) for task, digest in zip(manifest.tasks, manifest.blocks, strict=True)}
    bare = dict(tiny_backbone("t5").named_parameters())
    for name, weight in merged.named_parameters():
        update = torch.zeros_like(weight)
        for task, share in WEIGHTS.items():
            parts = [
                blocks[task].get(f"base_model.model.{name[: -len('weight')]}lora_{which}.weight") for which in "BA"
            ]
            if parts[0] is not None and parts[1] is not None:
                update += share * 3 * parts[0] @ parts[1]  # lora_alpha 6 / r 2
        torch.testing.assert_close(weight, bare[name] + update, rtol=1e-5, atol=1e-6)


def test_one_block_with_weight_one_is_that_block(tmp_path: Path) -> None:
    store = DictStore()
    manifest = version(store, tmp_path / "backbone")
    export_mixture(manifest, {"qa": 1.0, "qa_hard": 0.0}, store, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    block = load_blob(manifest.blocks[1], store)
    assert written.keys() == block.keys()
    assert all(value.shape == block[name].shape for name, value in written.items())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_mixture_of_a_prompt_is_what_answers_it(name: str, tmp_path: Path) -> None:
    store = DictStore()
    manifest = version(store, tmp_path / "backbone", name)
    found = mixture_of(manifest, "w1 w2 w30", store)
    (answered,) = Predictor.load(manifest.to_bytes(), store).predict(["w1 w2 w30"])
    assert found == pytest.approx(answered.weights, abs=1e-6)
    assert min(found.values()) > 0
    plain = version(store, tmp_path / "backbone", name, attention=None)
    with pytest.raises(SnapshotError, match="sequential has no attention that chooses weights"):
        mixture_of(plain, "w1", store)


def test_what_is_no_mixture_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = DictStore()
    manifest = version(store, tmp_path / "backbone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    with pytest.raises(SnapshotError) as told:
        export_mixture(manifest, {"nosuch": 1.0, "qa": float("nan")}, store, tmp_path / "full")
    for part in ("is not an empty folder", "no block nosuch; there are: qa_hard, qa, task7_sum", "weight of qa is no"):
        assert part in str(told.value)
    with pytest.raises(SnapshotError, match="the bare backbone"):
        export_mixture(manifest, {"qa": 0.0}, store, tmp_path / "adapter")
    del store.blobs[manifest.blocks[2]]
    with pytest.raises(StoreError):
        export_mixture(manifest, WEIGHTS, store, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "full"]
