"""AM-LoRA: gates and penalty against naive formulas, and what a new LoRA starts as."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from sapt_core.data.collate import Collator
from sapt_core.methods import am_lora
from sapt_core.methods.am_lora import GatedBlocks
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import LoRAConfig
from sapt_core.versions.loading import load_pool
from tests.core.lessons import learn
from tests.core.tiny import (
    PAD,
    DictStore,
    lora,
    random_rows,
    tiny_backbone,
)


@pytest.mark.parametrize("gates", ["softmax", "sigmoid"])
@pytest.mark.parametrize("learning", [False, True])
def test_am_lora_mixes_by_the_features_of_its_loras(gates: Literal["softmax", "sigmoid"], learning: bool) -> None:
    """Token by token and block by block, from the formula; the zero LoRA takes its share of the softmax."""
    torch.manual_seed(3)
    blocks = GatedBlocks({"a": (6, 5)}, LoRAConfig(r=2, lora_alpha=6))
    blocks.choose(gates)
    ((_, site),) = blocks.named_sites()
    parts = [{name: torch.randn(shape) for name, shape in site.shapes.items()} for _ in range(3)]
    states = [{f"base_model.model.a.{name}": value for name, value in block.items()} for block in parts]
    blocks.append_frozen(*states[:2])
    if learning:
        blocks.add()
        blocks.load_current(states[2])
    else:
        blocks.append_frozen(states[2])
    x = torch.randn(2, 4, 6)
    expected, opened = torch.zeros(2, 4, 5), torch.zeros(2, 3)
    for row in range(2):
        for place in range(4):
            updates = [3.0 * b["lora_B.weight"] @ b["lora_A.weight"] @ x[row, place] for b in parts]
            scores = []
            for block, update in zip(parts, updates, strict=True):
                score = float(block["selector.weight"] @ update + block["selector.bias"])
                scores.append(score if score > 0 else 0.2 * score)
            if gates == "softmax":
                total = 1 + sum(math.exp(score) for score in scores)
                shares = [math.exp(score) / total for score in scores]
            else:
                shares = [1 / (1 + math.exp(-score)) for score in scores]
            opened[row] += torch.tensor(shares) / 4
            for share, update in zip(shares, updates, strict=True):
                expected[row, place] += share * update
    call = blocks.new_call(torch.ones(2, 3), torch.arange(3))
    assert torch.allclose(site(x, call), expected, atol=1e-5)
    site(x[:, :1], call)  # a token that is written later
    assert torch.allclose(call.noted[site], opened, atol=1e-5)


def test_readers_of_finished_loras_are_made_when_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass makes that of the LoRA being learnt alone, and looks at no B of a finished one but to write with it."""
    asked: list[torch.Tensor] = []
    reader = am_lora._reader

    def counting(B: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # noqa: N803
        asked.append(B)
        return reader(B, weight)

    monkeypatch.setattr(am_lora, "_reader", counting)
    made = GatedBlocks({"a": (8, 64)}, LoRAConfig(r=2))
    shapes = made.shapes
    made.append_frozen(*({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(40)))
    assert len(asked) == 40
    x, (site,) = torch.randn(1, 1, 8), made.sites
    site(x, made.new_call(torch.ones(1, 40), torch.arange(40)))
    assert len(asked) == 40
    made.add()
    site(x, made.new_call(torch.ones(1, 41), torch.arange(41)))
    assert [each.shape for each in asked[40:]] == [(64, 2)]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_answers_tell_the_gates_they_were_made_with(kind: str) -> None:
    """The mean over sites of what each saw of the prompt, for each row, however many beams there are."""
    store = DictStore()
    version, _ = learn(store, 0, None, name=kind, method="am_lora")
    version, _ = learn(store, 1, version, name=kind, method="am_lora")
    backbone = tiny_backbone(kind)
    model = SaptModel(backbone, load_pool(version, store, backbone)).eval()
    batch = Collator(PAD, is_encoder_decoder=kind == "t5").prompts(random_rows(3))
    _, one = model.generate(batch, max_new_tokens=4, num_beams=1)
    _, two = model.generate(batch, max_new_tokens=1, num_beams=2)
    assert one.shape == (3, 2)
    assert ((one > 0) & (one < 1)).all()
    assert (one.sum(dim=1) < 1).all()  # the zero LoRA has the rest
    assert torch.allclose(one, two, atol=1e-5)
    _, call = model.run(Collator(PAD, is_encoder_decoder=kind == "t5")(random_rows(3)))
    opened = [call.noted[site] for _, site in model.pool.blocks.named_sites()]
    assert torch.allclose(model.pool.blocks.mixed(call), sum(opened) / len(opened))


def test_am_loras_penalty_does_not_depend_on_micro_batches() -> None:
    curves = []
    for size in (None, 1):
        store = DictStore()
        first, _ = learn(store, 0, None, method={"name": "am_lora", "sparsity": 0.5})
        train = {"micro_batch_size": size}
        # Nearly: padding, which a batch decides, takes part in the mean over positions.
        curves.append(learn(store, 1, first, method={"name": "am_lora", "sparsity": 0.5}, train=train)[1])
    whole, pieces = curves
    assert all(entry["sparsity"] > 0.3 for entry in whole)
    assert [entry["sparsity"] for entry in whole] == pytest.approx([entry["sparsity"] for entry in pieces], rel=0.1)
    assert [entry["loss"] for entry in whole] == pytest.approx([entry["loss"] for entry in pieces], rel=1e-2)


def test_sparsity_closes_gates() -> None:
    def opened(weight: float) -> float:
        method = {"name": "am_lora", "sparsity": weight}
        curve = learn(DictStore(), 0, None, method=method, train={"epochs": 8})[1]
        return curve[-1]["sparsity"]

    assert opened(30.0) < opened(1e-6) - 0.05


def test_a_new_lora_starts_without_changing_anything() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, method="am_lora")
    backbone = tiny_backbone("t5")
    pool = load_pool(first, store, backbone)
    pool.add()
    batch = Collator(PAD, is_encoder_decoder=True)(random_rows(4))
    assert isinstance(pool.blocks, GatedBlocks)
    for _, site in pool.blocks.named_sites():
        site.frozen_B.zero_()
    with torch.no_grad():
        model = SaptModel(backbone, pool).eval()
        found = model(batch)
        bare = SaptModel(backbone, new_pool(backbone, lora("t5"), None)).eval()
        bare.pool.add()
        assert torch.allclose(found, bare(batch), atol=1e-6)
