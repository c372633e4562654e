"""Numbers are computed in the format that the record says, on every node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sapt_core.backbones import device
from sapt_core.backbones.device import autocast, resolved_precision
from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import BackboneRef, identify
from sapt_core.config.preflight import settle_precision
from sapt_core.errors import BackboneError
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from tests.core.backbones.folders import config, experiment, saved
from tests.core.tiny import DictStore, fill, lora, random_rows, tiny_backbone, tiny_tokenizer

CPU = torch.device("cpu")


def in_half(folder: Path, dtype: torch.dtype, name: str = "llama") -> Path:
    tiny_backbone(name).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def formats(folder: Path, dtype: str, name: str, **train: Any) -> set[torch.dtype]:
    """Of what the linears give in a training forward."""
    store, given = DictStore(), config(folder, dtype=dtype)
    ref = identify(given)
    store_backbone(given, ref, store)
    asked = experiment(folder, name, **train)
    settled = settle_precision(asked.model_copy(update={"backbone": given}), ref)
    backbone, tokenizer = load_backbone(ref, store)
    found: set[torch.dtype] = set()
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *call: found.add(call[2].dtype))
    model = SaptModel(backbone, fill(new_pool(backbone, lora(name), None), 1))
    with autocast(CPU, settled.train.precision):
        logits = model(model.collator(tokenizer.pad_token_id)(random_rows(3)))
    assert torch.isfinite(logits).all()
    return found


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        (torch.float16, "auto", "float32", torch.float32),
        (torch.float16, "auto", "bfloat16", torch.bfloat16),
        (torch.float16, "bfloat16", "auto", torch.bfloat16),
        (torch.bfloat16, "auto", "auto", torch.bfloat16),
        (torch.bfloat16, "float32", "float32", torch.float32),
        (torch.float32, "auto", "float32", torch.float32),
    ],
)
def test_linears_compute_in_the_format_that_is_asked_for(
    name: str, native: bool, case: tuple[Any, str, str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, dtype, precision, wanted = case
    monkeypatch.setattr(device, "computes_bfloat16", lambda _: native)
    found = formats(in_half(tmp_path / "model", stored, name), dtype, name, precision=precision)
    # T5 keeps one linear in float32 by itself, as it overflows in float16.
    assert found - ({torch.float32} if name == "t5" else set()) <= {wanted}
    assert wanted in found


def test_nothing_is_loaded_in_float16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = identify(config(in_half(tmp_path / "half", torch.float16)))
    assert half.dtype == "float32"
    assert "stored in float16" in caplog.text
    # What other checkpoints are named is what earlier releases named them.
    assert identify(config(in_half(tmp_path / "brain", torch.bfloat16))).dtype == "auto"
    assert identify(config(saved(tmp_path / "single"))).dtype == "auto"


def test_float32_of_half_weights_is_refused(tmp_path: Path) -> None:
    folder = in_half(tmp_path / "model", torch.bfloat16)
    asked = experiment(folder, "llama", precision="float32")
    with pytest.raises(BackboneError, match=r"weights are bfloat16: set backbone\.dtype=float32 too"):
        settle_precision(asked, identify(config(folder)))


@pytest.mark.parametrize(
    ("native", "gpus", "wanted"), [(True, 0, "bfloat16"), (False, 0, "float32"), (False, 1, "bfloat16")]
)
def test_auto_is_settled_before_the_run(
    native: bool, gpus: float, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "computes_bfloat16", lambda _: native)
    monkeypatch.setattr(device, "default_device", lambda: CPU)
    assert resolved_precision("auto", torch.float32, gpus) == wanted
    assert resolved_precision("float32", torch.float32, gpus) == "float32"
    assert resolved_precision("bfloat16", torch.float32, gpus) == "bfloat16"


def test_a_version_learnt_in_float16_still_loads_as_it_was(tmp_path: Path) -> None:
    folder, store = in_half(tmp_path / "model", torch.float16), DictStore()
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    earlier = BackboneRef(path=ref.path, files=ref.files)
    assert load_backbone(earlier, store)[0].dtype == torch.float16
