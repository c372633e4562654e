"""A whole set of weights in the place of the backbone's own: all of them, for a while, and one block at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.data.collate import Collator
from sapt_core.pool.blocks.full import FullBlocks
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool, new_pool
from sapt_core.settings import FullConfig
from tests.core.tiny import PAD, T5_NAMES, fill, random_rows, tiny_backbone


def pool_of(backbone: PreTrainedModel, seed: int) -> PETPool:
    pool = fill(new_pool(backbone, FullConfig(), None), 1, seed=seed)
    pool.freeze()
    return pool


def logits(backbone: PreTrainedModel, pool: PETPool) -> Tensor:
    decodes = bool(backbone.config.is_encoder_decoder)
    with torch.no_grad():
        found: Tensor = SaptModel(backbone, pool).eval()(Collator(PAD, decodes)(random_rows(3)))
    return found


@pytest.mark.parametrize("name", ["t5", "t5_gated", "llama"])
def test_every_weight_is_replaced_wherever_it_is_used(name: str) -> None:
    """Tied ones too; the model with the block on it is one that has these weights."""
    backbone = tiny_backbone(name)
    pool = pool_of(backbone, 1)
    loaded = copy.deepcopy(backbone)
    loaded.load_state_dict(dict(zip(pool.blocks.shapes, pool.blocks.frozen, strict=True)), strict=False)
    own = {id(value) for value in backbone.parameters()}
    with pool.blocks.on(backbone):
        assert not own & {id(value) for value in backbone.parameters()}
        for (place, given), wanted in zip(backbone.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(given, wanted), place
        if name in T5_NAMES - {"t5_gated"}:
            assert backbone.lm_head.weight is backbone.get_input_embeddings().weight
    assert own == {id(value) for value in backbone.parameters()}
    torch.testing.assert_close(logits(backbone, pool), logits(loaded, pool_of_own(loaded)), rtol=0, atol=0)


def pool_of_own(backbone: PreTrainedModel) -> PETPool:
    """One block of the backbone's own weights."""
    pool = new_pool(backbone, FullConfig(), None)
    pool.add()
    return pool


def test_a_second_pool_is_made_of_the_backbones_own_weights() -> None:
    backbone = tiny_backbone("t5")
    names = dict(backbone.named_parameters())
    pools = [pool_of(backbone, seed) for seed in (1, 2)]
    for pool in pools:
        assert isinstance(pool.blocks, FullBlocks)
        assert all(own is names[name] for name, own in pool.blocks._own.items())


def test_where_another_pool_is_on_none_is_made_and_none_is_put() -> None:
    backbone = tiny_backbone("t5")
    first, second = (pool_of(backbone, seed) for seed in (1, 2))
    with first.blocks.on(backbone):
        with pytest.raises(RuntimeError, match="another pool is on this backbone"):
            FullBlocks(backbone)
        with pytest.raises(RuntimeError, match="another pool is on this backbone"), second.blocks.on(backbone):
            pass
    assert not torch.equal(logits(backbone, first), logits(backbone, second))


def test_weights_that_find_no_place_are_refused_and_none_is_left_replaced() -> None:
    backbone, other = tiny_backbone("t5"), tiny_backbone("t5")
    pool = pool_of(backbone, 1)
    with pytest.raises(RuntimeError, match="parameters are not those that the block was made for"):
        logits(other, pool)
    backbone.lm_head = torch.nn.Linear(16, 3)  # changed behind the block's back
    backbone.shared = torch.nn.Embedding(3, 16)
    backbone.encoder.embed_tokens = backbone.decoder.embed_tokens = backbone.shared
    own = {id(value) for value in backbone.parameters()}
    with pytest.raises(RuntimeError, match="parameters are not those"), pool.blocks.on(backbone):
        pass
    assert own == {id(value) for value in backbone.parameters()}
