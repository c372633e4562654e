"""What a version costs, by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load as load_tensors

from sapt_core.data.collate import Collator
from sapt_core.pool.cost import bare_model, forward_cost
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import FullConfig, PromptConfig
from sapt_core.versions.size import stored_bytes, trained_parameters
from tests.core.lessons import sequence
from tests.core.tiny import PAD, T5_NAMES, WIDTH, DictStore, fill, lora, random_rows, tiny_backbone


def test_parameters_of_the_newest_task_alone() -> None:
    store = DictStore()
    # 6 attentions (2 layers: self in the encoder, self and cross in the decoder) with q and v, 16 to 16, rank 2.
    block = 6 * 2 * (2 * 16 + 16 * 2)
    router = 2 * 5 * WIDTH + 2 * WIDTH + WIDTH  # down and up, the norm's scale and shift, one key
    for method, expected in (("sapt", block + router), ("o_lora", block), ("sequential", block), ("per_task", block)):
        assert [trained_parameters(each, store) for each in sequence(store, method=method)] == [expected] * 3
    full = sequence(store, method="sequential", pet=FullConfig())[-1]
    assert trained_parameters(full, store) == sum(value.numel() for value in tiny_backbone("t5").parameters())
    am_lora = sequence(store, method="am_lora")[-1]
    assert trained_parameters(am_lora, store) == block + 12 * (16 + 1)
    prompt = sequence(store, method="sequential", pet=PromptConfig(length=3))[-1]
    assert trained_parameters(prompt, store) == 3 * WIDTH


def test_bytes_of_all_that_a_version_needs() -> None:
    store = DictStore()
    versions = sequence(store, method={"name": "replay", "share": 0.3})
    last = versions[-1]
    blobs = [last.blocks[0], *(last.state[f"memory 0{index}"] for index in range(3))]
    assert stored_bytes(last, store) == len(last.to_bytes()) + sum(len(store.get(digest)) for digest in blobs)
    sizes = [stored_bytes(version, store) for version in sequence(store, method="sapt")]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_forwards_operations_are_those_of_its_matrices(name: str) -> None:
    """Every block adds two products a linear; a whole model none."""
    backbone = tiny_backbone(name)
    batch = Collator(PAD, name in T5_NAMES)(random_rows(4))
    costs = []
    for blocks in (1, 3):
        pool = fill(new_pool(backbone, lora(name), None), blocks)
        costs.append(forward_cost(SaptModel(backbone, pool), batch) - 1)
    assert costs[0] > 0
    assert costs[1] == pytest.approx(3 * costs[0], rel=1e-6)
    whole = new_pool(backbone, FullConfig(), None)
    whole.add()
    assert forward_cost(SaptModel(backbone, whole), batch) == 1
    with torch.no_grad():
        logits = bare_model(backbone).eval()(batch)
        assert torch.isfinite(logits).all()


def test_an_added_lora_costs_what_its_shapes_say() -> None:
    backbone = tiny_backbone("llama")
    rows = random_rows(1)
    batch = Collator(PAD, is_encoder_decoder=False)(rows)
    store = DictStore()
    manifest = sequence(store, method="sequential", name="llama")[0]
    shapes = {name: value.shape for name, value in load_tensors(store.get(manifest.blocks[0])).items()}
    positions = batch.input_ids.shape[1]
    added = sum(2 * positions * shape[0] * shape[1] for shape in shapes.values())
    pool = fill(new_pool(backbone, lora("llama"), None), 1)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare_model(backbone).eval()(batch)
    assert forward_cost(SaptModel(backbone, pool), batch) - 1 == pytest.approx(added / counter.get_total_flops())
